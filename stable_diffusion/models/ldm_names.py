"""The tensors of a Stable Diffusion checkpoint in one file: their names there, in diffusers' folders, and their shapes.

The names are those of CompVis' latent-diffusion (openaimodel.py, model.py), OpenAI's CLIP as transformers saves it, OpenCLIP, and
Stability's generative-models. All follows from diffusers' configuration of a component. Knows no files and imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
# Of a text encoder, by component: in transformers' names or in OpenCLIP's.
CLIP_PREFIXES = {
    "text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
    "text_encoder_2": (),
}
OPEN_CLIP_PREFIXES = {"text_encoder": ("cond_stage_model.model.",), "text_encoder_2": ("conditioner.embedders.1.model.",)}

# How the file holds a tensor: as it is; as the first, second or third part of one that is three times as high; transposed; as a
# convolution of 1x1.
Form = Literal["same", "first third", "second third", "last third", "transposed", "convolution"]
_THIRDS: tuple[Form, ...] = ("first third", "second third", "last third")
Named = Iterator[tuple[str, str, tuple[int, ...]]]  # the name in the file, the name in the folder, the shape


@dataclass(frozen=True)
class Tensor:
    """One tensor of a component. `name` and `shape` are diffusers', `source` is its name in the file."""

    name: str
    source: str
    shape: tuple[int, ...]
    form: Form = "same"

    @property
    def file_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that `source` may have in the file."""
        if self.form in _THIRDS:
            return ((3 * self.shape[0], *self.shape[1:]),)
        if self.form == "transposed":
            return (self.shape[::-1],)
        if self.form == "convolution":
            return ((*self.shape, 1, 1), self.shape)
        return (self.shape,)


def tensors_of(component: str, config: Mapping[str, Any], names: Collection[str]) -> list[Tensor]:
    """The tensors of "unet", "vae", "text_encoder" or "text_encoder_2" with this configuration.

    `names`: those in the file, which show how the text encoder's are written. Raises LookupError for an incomplete configuration.
    """
    if component == "unet":
        return [Tensor(name, UNET_PREFIX + source, shape) for source, name, shape in _unet(config)]
    if component == "vae":
        return [Tensor(name, VAE_PREFIX + source, shape, _form_in_vae(name, shape)) for source, name, shape in _vae(config)]
    for prefix in OPEN_CLIP_PREFIXES[component]:
        if f"{prefix}token_embedding.weight" in names or not CLIP_PREFIXES[component]:
            return list(_open_clip(prefix, config, with_projection=component == "text_encoder_2"))
    known = CLIP_PREFIXES[component]
    prefix = next((prefix for prefix in known if any(name.startswith(prefix) for name in names)), known[0])
    start = prefix + ("" if f"{prefix}{_WITHOUT_TEXT_MODEL}" in names else "text_model.")
    return [Tensor(name, start + name, shape) for name, shape in _clip(config)]


_WITHOUT_TEXT_MODEL = "embeddings.token_embedding.weight"  # as some trainers of 2022 wrote CLIP's names


def has_clip_without_text_model(names: Collection[str]) -> bool:
    """Whether a file's text encoder has names that diffusers' loader does not know."""
    return any(f"{prefix}{_WITHOUT_TEXT_MODEL}" in names for prefix in CLIP_PREFIXES["text_encoder"])


def tensors_of_vae(config: Mapping[str, Any], names: Collection[str]) -> list[Tensor]:
    """The tensors of an autoencoder alone, in latent-diffusion's names, with or without their prefix, or in diffusers' old or new ones."""
    parts = list(_vae(config))
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in names):
        is_old = any(name.endswith(".attentions.0.query.weight") for name in names)
        return [Tensor(name, _old_name(name) if is_old else name, shape, _form_in_vae(name, shape)) for _, name, shape in parts]
    prefix = VAE_PREFIX if any(name.startswith(VAE_PREFIX) for name in names) else ""
    return [Tensor(name, prefix + source, shape, _form_in_vae(name, shape)) for source, name, shape in parts]


def _old_name(name: str) -> str:
    """As diffusers named an autoencoder's attention before version 0.17."""
    for now, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f".attentions.0.{now}.", f".attentions.0.{before}.")
    return name


def _pair(source: str, name: str, weight: tuple[int, ...]) -> Named:
    """A weight and its bias."""
    yield f"{source}.weight", f"{name}.weight", weight
    yield f"{source}.bias", f"{name}.bias", weight[:1]


def _unet(config: Mapping[str, Any]) -> Named:
    channels: list[int] = config["block_out_channels"]
    layers: int = config["layers_per_block"]
    first, time, context = channels[0], 4 * channels[0], config["cross_attention_dim"]
    is_linear = bool(config.get("use_linear_projection"))
    stated = config.get("transformer_layers_per_block", 1)
    depths: list[int] = stated if isinstance(stated, list) else [stated] * len(channels)

    def attention(source: str, name: str, width: int, depth: int) -> Named:
        return _transformer(source, name, width, context, depth, is_linear)

    yield from _pair("time_embed.0", "time_embedding.linear_1", (time, first))
    yield from _pair("time_embed.2", "time_embedding.linear_2", (time, time))
    if config.get("addition_embed_type") == "text_time":
        yield from _pair("label_emb.0.0", "add_embedding.linear_1", (time, config["projection_class_embeddings_input_dim"]))
        yield from _pair("label_emb.0.2", "add_embedding.linear_2", (time, time))
    yield from _pair("input_blocks.0.0", "conv_in", (first, config["in_channels"], 3, 3))
    skipped = [first]  # the channels that the way down keeps for the way up
    place = itertools.count(1)
    width = first
    for block, (kind, out) in enumerate(zip(config["down_block_types"], channels, strict=True)):
        for layer in range(layers):
            source = f"input_blocks.{next(place)}"
            yield from _resnet(f"{source}.0", f"down_blocks.{block}.resnets.{layer}", width, out, time)
            if "CrossAttn" in kind:
                yield from attention(f"{source}.1", f"down_blocks.{block}.attentions.{layer}", out, depths[block])
            width = out
            skipped.append(out)
        if block < len(channels) - 1:
            yield from _pair(f"input_blocks.{next(place)}.0.op", f"down_blocks.{block}.downsamplers.0.conv", (out, out, 3, 3))
            skipped.append(out)
    yield from _resnet("middle_block.0", "mid_block.resnets.0", width, width, time)
    yield from attention("middle_block.1", "mid_block.attentions.0", width, depths[-1])
    yield from _resnet("middle_block.2", "mid_block.resnets.1", width, width, time)
    place = itertools.count()
    for block, (kind, out, depth) in enumerate(zip(config["up_block_types"], channels[::-1], depths[::-1], strict=True)):
        has_attention = "CrossAttn" in kind
        for layer in range(layers + 1):
            source = f"output_blocks.{next(place)}"
            yield from _resnet(f"{source}.0", f"up_blocks.{block}.resnets.{layer}", width + skipped.pop(), out, time)
            if has_attention:
                yield from attention(f"{source}.1", f"up_blocks.{block}.attentions.{layer}", out, depth)
            width = out
        if block < len(channels) - 1:
            yield from _pair(f"{source}.{2 if has_attention else 1}.conv", f"up_blocks.{block}.upsamplers.0.conv", (out, out, 3, 3))
    yield from _pair("out.0", "conv_norm_out", (first,))
    yield from _pair("out.2", "conv_out", (config["out_channels"], first, 3, 3))


def _resnet(source: str, name: str, width: int, out: int, time: int) -> Named:
    yield from _pair(f"{source}.in_layers.0", f"{name}.norm1", (width,))
    yield from _pair(f"{source}.in_layers.2", f"{name}.conv1", (out, width, 3, 3))
    yield from _pair(f"{source}.emb_layers.1", f"{name}.time_emb_proj", (out, time))
    yield from _pair(f"{source}.out_layers.0", f"{name}.norm2", (out,))
    yield from _pair(f"{source}.out_layers.3", f"{name}.conv2", (out, out, 3, 3))
    if width != out:
        yield from _pair(f"{source}.skip_connection", f"{name}.conv_shortcut", (out, width, 1, 1))


def _transformer(source: str, name: str, width: int, context: int, depth: int, is_linear: bool) -> Named:
    """Attention's names are the same in both."""
    projection = (width, width) if is_linear else (width, width, 1, 1)
    within: list[tuple[str, tuple[int, ...]]] = [("norm.weight", (width,)), ("norm.bias", (width,))]
    within += [("proj_in.weight", projection), ("proj_in.bias", (width,))]
    for index in range(depth):
        block = f"transformer_blocks.{index}"
        within += [(f"{block}.norm{number}.{part}", (width,)) for number in (1, 2, 3) for part in ("weight", "bias")]
        for attention, keys in (("attn1", width), ("attn2", context)):
            within += [(f"{block}.{attention}.to_q.weight", (width, width))]
            within += [(f"{block}.{attention}.{part}.weight", (width, keys)) for part in ("to_k", "to_v")]
            within += [(f"{block}.{attention}.to_out.0.weight", (width, width)), (f"{block}.{attention}.to_out.0.bias", (width,))]
        within += [(f"{block}.ff.net.0.proj.weight", (8 * width, width)), (f"{block}.ff.net.0.proj.bias", (8 * width,))]
        within += [(f"{block}.ff.net.2.weight", (width, 4 * width)), (f"{block}.ff.net.2.bias", (width,))]
    within += [("proj_out.weight", projection), ("proj_out.bias", (width,))]
    for part, shape in within:
        yield f"{source}.{part}", f"{name}.{part}", shape


def _vae(config: Mapping[str, Any]) -> Named:
    channels: list[int] = config["block_out_channels"]
    layers, latent, blocks = config["layers_per_block"], config["latent_channels"], len(channels)
    deepest = channels[-1]
    yield from _pair("encoder.conv_in", "encoder.conv_in", (channels[0], config["in_channels"], 3, 3))
    width = channels[0]
    for block, out in enumerate(channels):
        for layer in range(layers):
            yield from _vae_resnet(f"encoder.down.{block}.block.{layer}", f"encoder.down_blocks.{block}.resnets.{layer}", width, out)
            width = out
        if block < blocks - 1:
            source, name = f"encoder.down.{block}.downsample.conv", f"encoder.down_blocks.{block}.downsamplers.0.conv"
            yield from _pair(source, name, (out, out, 3, 3))
    yield from _vae_middle("encoder", deepest)
    yield from _pair("encoder.norm_out", "encoder.conv_norm_out", (deepest,))
    yield from _pair("encoder.conv_out", "encoder.conv_out", (2 * latent, deepest, 3, 3))
    yield from _pair("decoder.conv_in", "decoder.conv_in", (deepest, latent, 3, 3))
    yield from _vae_middle("decoder", deepest)
    width = deepest
    for block, out in enumerate(channels[::-1]):
        level = blocks - 1 - block  # latent-diffusion counts from the picture, diffusers from the latents
        for layer in range(layers + 1):
            yield from _vae_resnet(f"decoder.up.{level}.block.{layer}", f"decoder.up_blocks.{block}.resnets.{layer}", width, out)
            width = out
        if block < blocks - 1:
            yield from _pair(f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{block}.upsamplers.0.conv", (out, out, 3, 3))
    yield from _pair("decoder.norm_out", "decoder.conv_norm_out", (channels[0],))
    yield from _pair("decoder.conv_out", "decoder.conv_out", (config["out_channels"], channels[0], 3, 3))
    yield from _pair("quant_conv", "quant_conv", (2 * latent, 2 * latent, 1, 1))
    yield from _pair("post_quant_conv", "post_quant_conv", (latent, latent, 1, 1))


def _vae_middle(half: str, width: int) -> Named:
    for index in (0, 1):
        yield from _vae_resnet(f"{half}.mid.block_{index + 1}", f"{half}.mid_block.resnets.{index}", width, width)
    source, name = f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0"
    yield from _pair(f"{source}.norm", f"{name}.group_norm", (width,))
    for theirs, ours in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        yield from _pair(f"{source}.{theirs}", f"{name}.{ours}", (width, width))


def _vae_resnet(source: str, name: str, width: int, out: int) -> Named:
    yield from _pair(f"{source}.norm1", f"{name}.norm1", (width,))
    yield from _pair(f"{source}.conv1", f"{name}.conv1", (out, width, 3, 3))
    yield from _pair(f"{source}.norm2", f"{name}.norm2", (out,))
    yield from _pair(f"{source}.conv2", f"{name}.conv2", (out, out, 3, 3))
    if width != out:
        yield from _pair(f"{source}.nin_shortcut", f"{name}.conv_shortcut", (out, width, 1, 1))


def _form_in_vae(name: str, shape: tuple[int, ...]) -> Form:
    # latent-diffusion's attention in the autoencoder is made of convolutions of 1x1.
    return "convolution" if ".attentions." in name and len(shape) == 2 else "same"


def _clip(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names are those of transformers' CLIPTextModel, in the file with `text_model.` before them."""
    width, within = config["hidden_size"], config["intermediate_size"]
    yield "embeddings.token_embedding.weight", (config["vocab_size"], width)
    yield "embeddings.position_embedding.weight", (config["max_position_embeddings"], width)
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{index}"
        for part, weight in (
            ("self_attn.q_proj", (width, width)),
            ("self_attn.k_proj", (width, width)),
            ("self_attn.v_proj", (width, width)),
            ("self_attn.out_proj", (width, width)),
            ("layer_norm1", (width,)),
            ("layer_norm2", (width,)),
            ("mlp.fc1", (within, width)),
            ("mlp.fc2", (width, within)),
        ):
            yield f"{layer}.{part}.weight", weight
            yield f"{layer}.{part}.bias", weight[:1]
    yield "final_layer_norm.weight", (width,)
    yield "final_layer_norm.bias", (width,)


_IN_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_IN_OPEN_CLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_IN_PROJECTION: dict[str, Form] = {
    "self_attn.q_proj": "first third",
    "self_attn.k_proj": "second third",
    "self_attn.v_proj": "last third",
}


def _open_clip(prefix: str, config: Mapping[str, Any], *, with_projection: bool) -> Iterator[Tensor]:
    """transformers keeps a text encoder with a projection under `text_model.`, and one without at the top."""
    start = "text_model." if with_projection else ""
    for name, shape in _clip(config):
        if name in _IN_OPEN_CLIP:
            yield Tensor(start + name, prefix + _IN_OPEN_CLIP[name], shape)
            continue
        _, _, index, rest = name.split(".", 3)
        part, _, kind = rest.rpartition(".")
        block = f"{prefix}transformer.resblocks.{index}"
        if part in _IN_PROJECTION:
            yield Tensor(start + name, f"{block}.attn.in_proj_{kind}", shape, _IN_PROJECTION[part])
        else:
            yield Tensor(start + name, f"{block}.{_IN_OPEN_CLIP_LAYER[part]}.{kind}", shape)
    if with_projection:
        projection = (config["projection_dim"], config["hidden_size"])
        yield Tensor("text_projection.weight", f"{prefix}text_projection", projection, "transposed")
