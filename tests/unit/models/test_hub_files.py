"""Which files of a repository are fetched, by the names that repositories of the hub have."""

from __future__ import annotations

import pytest

from stable_diffusion.models.hub_files import check_is_folder, files_of_model, license_files
from stable_diffusion.models.hub_model import NotDownloadedError

# The XL base model's, without its OpenVINO, Flax and single files, of which some stand for all.
XL_NAMES = [
    ".gitattributes",
    "01.png",
    "LICENSE.md",
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "sd_xl_base_1.0.safetensors",
    "sd_xl_offset_example-lora_1.0.safetensors",
    "text_encoder/config.json",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.onnx",
    "text_encoder/model.safetensors",
    "text_encoder/openvino_model.bin",
    "text_encoder_2/config.json",
    "text_encoder_2/model.fp16.safetensors",
    "text_encoder_2/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/merges.txt",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/tokenizer_config.json",
    "tokenizer_2/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/model.onnx",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "vae_1_0/config.json",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "vae_decoder/config.json",
    "vae_decoder/model.onnx",
    "vae_encoder/config.json",
]
XL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
INDEX = {name: XL_INDEX[name] for name in ("scheduler", "text_encoder", "tokenizer", "unet", "vae")} | {"safety_checker": [None, None]}
NAMES = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"]


def test_of_the_xl_repository_one_precision_of_five_components_is_fetched() -> None:
    names, is_half = files_of_model("a/b", XL_NAMES, XL_INDEX, "fp16")
    assert is_half
    assert [name for name in names if not name.endswith((".json", ".txt"))] == [
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert [name for name in names if name.endswith((".json", ".txt"))] == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder_2/config.json",
        *(name for name in XL_NAMES if name.startswith("tokenizer")),
        "unet/config.json",
        "vae/config.json",
    ]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("precision", "suffix"), [("fp32", ""), ("fp16", ".fp16")])
def test_weights_in_several_files_are_fetched_with_their_index(precision: str, suffix: str, before: bool) -> None:
    numbers = [f"-0000{number}-of-00002" for number in (1, 2)]
    shards = [
        f"unet/diffusion_pytorch_model{suffix}{number}.safetensors"
        if before
        else f"unet/diffusion_pytorch_model{number}{suffix}.safetensors"
        for number in numbers
    ]
    index = f"unet/diffusion_pytorch_model.safetensors.index{suffix}.json"
    rest = [f"vae/diffusion_pytorch_model{suffix}.safetensors", f"text_encoder/model{suffix}.safetensors"]
    names, is_half = files_of_model("a/b", [*NAMES, index, *shards, *rest, "unet/diffusion_pytorch_model.bin.index.json"], INDEX, precision)  # type: ignore[arg-type]
    assert names == [*NAMES, index, *shards, *rest]
    assert is_half == bool(suffix)


def test_a_safety_checker_that_the_index_does_not_name_is_left_out() -> None:
    weights = ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    more = ["safety_checker/config.json", "safety_checker/model.safetensors"]
    assert files_of_model("a/b", [*NAMES, *weights, *more], INDEX, "fp32")[0] == [*NAMES, *weights]
    checked = INDEX | {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    assert files_of_model("a/b", [*NAMES, *weights, *more], checked, "fp32")[0] == [*NAMES, *weights, *more]


def test_components_of_two_precisions_are_refused() -> None:
    weights = ["unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    with pytest.raises(NotDownloadedError, match="some components have only half-precision files"):
        files_of_model("a/b", [*NAMES, *weights], INDEX, "fp16")


def test_a_repository_of_single_files_is_no_folder() -> None:
    with pytest.raises(NotDownloadedError, match=r"MODEL=a/b/x.safetensors \(it has x.safetensors, y.safetensors\)"):
        check_is_folder("a/b", ["x.safetensors", "y.safetensors", "README.md"])
    check_is_folder("a/b", XL_NAMES)


def test_licenses_are_recognised_by_name() -> None:
    names = ["LICENSE", "LICENSE.md", "license.txt", "LICENCE-WEIGHTS", "COPYING", "README.md", "unet/LICENSE", "licensed.json"]
    assert license_files(names) == ["LICENSE", "LICENSE.md", "license.txt", "LICENCE-WEIGHTS", "COPYING"]
