"""What MODEL of `make model` means."""

from __future__ import annotations

import re

import pytest

from stable_diffusion.models.hub_model import PRESETS, HubModel, NotDownloadedError, parse_model
from tests.pages import PAGES


def test_a_short_name_is_a_repository_at_a_pinned_commit() -> None:
    assert parse_model("sdxl", "fp16") == HubModel(
        repository="stabilityai/stable-diffusion-xl-base-1.0",
        revision="462165984030d82259a11f4367a4eed129e94a7b",
        file=None,
        name="stable-diffusion-xl-base-1.0",
    )
    assert all(re.fullmatch(r"[0-9a-f]{40}", revision) for _, revision in PRESETS.values())


def test_version_1_4_keeps_its_folders_however_it_is_named() -> None:
    for text in ("v1.4", "CompVis/stable-diffusion-v1-4", "CompVis/stable-diffusion-v1-4@main"):
        assert (parse_model(text, "fp32").name, parse_model(text, "fp16").name) == ("v1_4", "v1_4_fp16")


def test_two_short_names_never_share_a_folder() -> None:
    assert len({parse_model(name, "fp32").name for name in PRESETS}) == len(PRESETS)


@pytest.mark.parametrize(
    ("text", "revision", "file", "name"),
    [
        ("Some-Body/a.model_1", None, None, "a.model_1"),
        ("Some-Body/a.model_1@v2", "v2", None, "a.model_1"),
        ("Some-Body/a.model_1@refs/pr/7", "refs/pr/7", None, "a.model_1"),
        ("Some-Body/a.model_1/x.safetensors", None, "x.safetensors", "x.safetensors"),
        ("Some-Body/a.model_1/a folder/b/x.safetensors@v2", "v2", "a folder/b/x.safetensors", "x.safetensors"),
    ],
)
def test_a_repository_a_revision_and_a_file_are_told_apart(text: str, revision: str | None, file: str | None, name: str) -> None:
    assert parse_model(text, "fp32") == HubModel("Some-Body/a.model_1", revision, file, name)


@pytest.mark.parametrize("text", ["", "v1.6", "a/b@", "a/b@x y", "https://huggingface.co/a/b", "../b", "a/b/../x.safetensors", "a//x"])
def test_other_texts_are_answered_with_what_is_allowed(text: str) -> None:
    with pytest.raises(NotDownloadedError, match=r"expected v1.4, v1.5, .* owner/name or owner/name/file.safetensors"):
        parse_model(text, "fp32")


@pytest.mark.parametrize("file", ["x.ckpt", "unet/diffusion_pytorch_model.bin"])
def test_a_file_that_is_no_safetensors_file_is_refused_by_name(file: str) -> None:
    with pytest.raises(NotDownloadedError, match=rf"{file} is not a .safetensors file"):
        parse_model(f"a/b/{file}", "fp32")


def test_the_documentation_lists_every_short_name_with_its_repository_and_commit() -> None:
    for name, (repository, revision) in PRESETS.items():
        assert f"\n| `{name}` | `{repository}` | `{revision[:12]}` |" in PAGES["docs/configuration.md"]
