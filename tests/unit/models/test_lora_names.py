"""The names that LoRA files have for layers: held against diffusers' own conversion of CompVis' UNet, and against published files."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from stable_diffusion.models.lora_names import Layer, UNetShape, kind_of_other, layers_by_name, split

SHAPE = UNetShape(layers_per_block=2, up_blocks_with_attention=frozenset({1, 2, 3}))  # of Stable Diffusion 1.x and 2.x


@pytest.fixture(scope="module")
def unet_layers() -> list[str]:
    """Of Stable Diffusion 1.5, whose configuration is diffusers' default except for the text's width."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    return [name for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]


@pytest.fixture(scope="module")
def known(unet_layers: list[str]) -> dict[str, Layer]:
    return dict(layers_by_name({"unet": unet_layers, "text_encoder": ["encoder.layers.0.self_attn.q_proj"]}, SHAPE))


def test_every_layer_has_four_names_and_no_two_have_the_same(unet_layers: list[str], known: dict[str, Layer]) -> None:
    assert len(unet_layers) == 282, "as many as adapters.md counts"
    names_of = {layer: [name for name, found in known.items() if found == ("unet", layer)] for layer in unet_layers}
    assert {len(names) for names in names_of.values()} == {4}
    assert len(known) == 4 * 282 + 4


def test_the_names_in_compvis_unet_are_those_that_diffusers_converts(unet_layers: list[str], known: dict[str, Layer]) -> None:
    """Layer i of CompVis' UNet has the weight i; diffusers says which of its own layers then has that weight."""
    compvis = compvis_layers()
    assert len(compvis) == 282
    checkpoint = {f"model.diffusion_model.{name}.weight": torch.tensor([float(index)]) for index, name in enumerate(compvis)}
    others = [*(f"{name}.bias" for name in compvis), "out.0.weight", "out.0.bias"]
    checkpoint |= {f"model.diffusion_model.{name}": torch.tensor([-1.0]) for name in others}
    converted = convert_ldm_unet_checkpoint(checkpoint, {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None})
    theirs = {compvis[int(weight)]: name.removesuffix(".weight") for name, weight in converted.items() if weight >= 0}
    assert len(theirs) == 282
    wrong = {name: layer for name, layer in theirs.items() if known.get(f"lora_unet_{name.replace('.', '_')}") != ("unet", layer)}
    assert wrong == {}


def compvis_layers() -> list[str]:
    """The linear and convolution layers of UNetModel in openaimodel.py with v1-inference.yaml, written down from its constructor."""

    def resnet(place: str, *, changes_width: bool) -> list[str]:
        parts = ["in_layers.2", "emb_layers.1", "out_layers.3", *(["skip_connection"] if changes_width else [])]
        return [f"{place}.{part}" for part in parts]

    def transformer(place: str) -> list[str]:
        attention = [f"attn{number}.{part}" for number in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
        block = [f"transformer_blocks.0.{part}" for part in (*attention, "ff.net.0.proj", "ff.net.2")]
        return [f"{place}.{part}" for part in ("proj_in", *block, "proj_out")]

    layers = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.2"]
    for block in (1, 2, 4, 5, 7, 8, 10, 11):
        layers += resnet(f"input_blocks.{block}.0", changes_width=block in (4, 7))
        layers += transformer(f"input_blocks.{block}.1") if block < 10 else []
    layers += [f"input_blocks.{block}.0.op" for block in (3, 6, 9)]
    layers += resnet("middle_block.0", changes_width=False) + transformer("middle_block.1") + resnet("middle_block.2", changes_width=False)
    for block in range(12):
        layers += resnet(f"output_blocks.{block}.0", changes_width=True)
        layers += transformer(f"output_blocks.{block}.1") if block >= 3 else []
    return layers + ["output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv"]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        # As they stand in published files for Stable Diffusion 1.5.
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("lora_unet_mid_block_attentions_0_proj_in", "mid_block.attentions.0.proj_in"),
        ("lora_unet_up_blocks_3_resnets_2_conv_shortcut", "up_blocks.3.resnets.2.conv_shortcut"),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"),
        ("lora_unet_output_blocks_2_1_conv", "up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv"),
        ("lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_middle_block_1_proj_out", "mid_block.attentions.0.proj_out"),
        ("lora_unet_time_embed_2", "time_embedding.linear_2"),
        ("lora_unet_out_2", "conv_out"),
    ],
)
def test_published_names_are_known(known: dict[str, Layer], name: str, layer: str) -> None:
    assert known[name] == ("unet", layer)


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "text_encoder.encoder.layers.0.self_attn.q_proj",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    ],
)
def test_the_text_encoder_has_its_names(known: dict[str, Layer], name: str) -> None:
    assert known[name] == ("text_encoder", "encoder.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("tensor", "layer", "part"),
    [
        ("unet.a.to_q.lora_A.weight", "unet.a.to_q", "down"),
        ("unet.a.to_q.lora_B.weight", "unet.a.to_q", "up"),
        ("unet.a.to_q.lora.down.weight", "unet.a.to_q", "down"),
        ("base_model.model.a.to_q.lora_A.weight", "a.to_q", "down"),
        ("text_encoder.a.lora_linear_layer.up.weight", "text_encoder.a", "up"),
        ("unet.a.attn1.processor.to_q_lora.down.weight", "unet.a.attn1.to_q", "down"),
        ("a.attn1.processor.to_out_lora.up.weight", "a.attn1.to_out.0", "up"),
        ("lora_unet_a.lora_down.weight", "lora_unet_a", "down"),
        ("lora_unet_a.alpha", "lora_unet_a", "alpha"),
        ("unet.a.to_q.alpha", "unet.a.to_q", "alpha"),
    ],
)
def test_a_tensors_name_is_that_of_its_layer_and_its_part(tensor: str, layer: str, part: str) -> None:
    assert split(tensor) == (layer, part)


@pytest.mark.parametrize("tensor", ["", "alpha", "unet.a.to_q.weight", "lora_unet_a.lora_down.bias", "a.lora_A.weight.more"])
def test_other_names_are_none_of_a_lora(tensor: str) -> None:
    assert split(tensor) is None


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("lora_unet_a.hada_w1_a", "a LoHa"),
        ("lora_unet_a.lokr_w1", "a LoKr"),
        ("lora_unet_a.oft_blocks", "an OFT adapter"),
        ("lora_unet_a.dora_scale", "a DoRA"),
        ("unet.a.lora_magnitude_vector", "a DoRA"),
        ("lora_unet_a.lora_mid.weight", "a LoCon in CP decomposition"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "a LoRA for Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight", "a LoRA for a diffusion transformer"),
        ("lora_unet_joint_blocks_0_x_block_attn_proj.lora_down.weight", "a LoRA for Stable Diffusion 3"),
        ("emb_params", "a textual inversion"),
        ("model.diffusion_model.out.2.weight", "a checkpoint"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
    ],
)
def test_what_is_no_lora_that_can_be_served_is_named(tensor: str, kind: str) -> None:
    assert kind_of_other(["lora_unet_conv_in.lora_down.weight", tensor]) == kind


def test_a_lora_is_no_other_kind(unet_layers: list[str]) -> None:
    names = [f"{prefix}.{layer}.{part}" for layer in unet_layers for prefix in ("unet", "lora_unet") for part in ("lora_A.weight", "alpha")]
    assert kind_of_other(names) is None
