"""Chooses the model folder to serve and checks that it is complete. Reads file names, JSON and file headers.

Imports neither torch nor diffusers, because API workers use it too. `engine/loading.py` loads the weights.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.core.requests import MAX_PIXEL_STEPS, MAX_SIDE
from stable_diffusion.core.settings import MODEL_VARIABLE, read_settings
from stable_diffusion.models.defaults import FILE_NAME as DEFAULTS_FILE_NAME
from stable_diffusion.models.defaults import Defaults, DefaultsFile, defaults_of, read_defaults
from stable_diffusion.models.safetensors import check_safetensors, read_tensor_list, samples_of

DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "model"
DEMO_NAME = "demo"
DEMO_XL_FOLDER = DEMO_FOLDER.with_name("model_xl")
DEMO_XL_NAME = "demo-xl"

_ADAPTERS = ("loras", "embeddings")  # the folders beside a model that hold no models
_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
_XL_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
_WEIGHT_FILES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "safety_checker": "model",
}
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_SAFETENSORS = ".safetensors"
_UNFINISHED = ".part"  # a file that `make model` is fetching, or was
_HALF_PRECISION = ".fp16"
_HASH_DIGITS = 10  # as A1111 shows them
_LARGE_SIDE = 1024  # pixels
_USUAL_PIXELS = 512 * 512  # of the native size that MAX_PIXEL_STEPS is for


@dataclass(frozen=True)
class ModelFolder:
    """A checked diffusers folder of a Stable Diffusion 1.x, 2.x or XL model, with facts from its JSON files."""

    path: Path
    name: str
    is_demo: bool
    is_xl: bool  # Stable Diffusion XL: two text encoders, and a UNet that is also told sizes
    native_width: int  # pixels
    native_height: int  # pixels
    scheduler: str  # the default one: a key of SCHEDULERS, or diffusers' class name
    defaults: Defaults
    only_inpaints: bool  # its UNet has 9 input channels and needs a mask
    has_safety_checker: bool
    variant: str | None  # "fp16" if the folder has only half-precision files, named as on the hub
    text_layers: int  # how many of the text encoder's layers clip_skip can choose from
    loras: Path  # the folder of LoRAs, which need not exist
    embeddings: Path  # the folder of textual inversions, which need not exist

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that encode prompts."""
        return ("text_encoder", "text_encoder_2") if self.is_xl else ("text_encoder",)

    @property
    def max_side(self) -> int:
        """The greatest width and height in pixels: twice the native size of a model for large images."""
        return MAX_SIDE if min(self.native_width, self.native_height) >= _LARGE_SIDE else _LARGE_SIDE

    @property
    def max_pixel_steps(self) -> int:
        """How much work a request may ask for: pixels x steps, summed over its images. Larger native images are as many."""
        return MAX_PIXEL_STEPS * max(1, self.native_width * self.native_height // _USUAL_PIXELS)

    @functools.cached_property
    def hash(self) -> str:
        """Ten hexadecimal digits that identify everything in the model that determines images. Computed on first use.

        A SHA-256 over name, dtype, shape and the middle 4 KiB of every tensor, and over the noise scheduler's configuration. The safety
        checker is left out: it generates nothing. Training changes all values of a tensor that it trains, so a sample reveals it without
        reading gigabytes; saving the model again, in other files or shards, keeps the hash.
        This is not the hash that A1111 or the hub show, which covers the bytes of one file.
        """
        digest = hashlib.sha256()
        for component in ("unet", "vae", *self.text_encoders):
            files, _ = _find_weights(self.path / component, _WEIGHT_FILES[component])
            for described, sample in sorted(sample for file in files for sample in samples_of(file)):
                digest.update(f"{component} {described}\n".encode() + sample)
        scheduler = _read_json(self.path / "scheduler" / "scheduler_config.json", "the noise scheduler's configuration")
        digest.update(json.dumps({name: scheduler[name] for name in scheduler if name != "_diffusers_version"}, sort_keys=True).encode())
        return digest.hexdigest()[:_HASH_DIGITS]

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of a component, such as "unet"."""
        return _read_json(self.path / component / "config.json", "a component's configuration")

    def weight_shapes(self, component: str) -> dict[str, list[int]]:
        """The shapes of a component's tensors by name, from its files' headers."""
        files, _ = _find_weights(self.path / component, _WEIGHT_FILES[component])
        return {name: tensor["shape"] for file in files for name, tensor in read_tensor_list(file)[0].items()}


def is_in_bento(service_folder: Path) -> bool:
    """Whether the service runs from a built bento, which holds the service's folder as src/ beside bento.yaml."""
    return (service_folder.parent / "bento.yaml").is_file()


def model_of_service(service_folder: Path, environment: Mapping[str, str]) -> ModelFolder:
    """The model that the service in `service_folder` serves. Raises ModelFolderError."""
    return choose_model(service_folder / "models", environment, in_bento=is_in_bento(service_folder))


def choose_model(models: Path, environment: Mapping[str, str], *, in_bento: bool) -> ModelFolder:
    """The model to serve: the one that SD_MODEL names ("demo" or a path), else the only one in the folder `models`, else the demo model.

    A built bento never falls back to the demo model. Raises ModelFolderError, and SettingError like `read_settings`.
    """
    settings = read_settings(environment)
    model = _chosen(settings.model, models, in_bento=in_bento)
    loras, embeddings = (Path(path).expanduser() if path else None for path in (settings.loras, settings.embeddings))
    return replace(model, loras=loras or model.loras, embeddings=embeddings or model.embeddings)


def _chosen(asked_for: str, models: Path, *, in_bento: bool) -> ModelFolder:
    if asked_for == DEMO_NAME:
        return _demo()
    if asked_for == DEMO_XL_NAME:
        return check_model(DEMO_XL_FOLDER, name=DEMO_XL_NAME, is_demo=True)
    if asked_for:
        try:
            return check_model(Path(asked_for).expanduser().absolute())
        except ModelFolderError as error:
            raise ModelFolderError(f"{MODEL_VARIABLE}: {error}") from None
    found = models_in(models)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ModelFolderError(
            f"{models} holds {len(found)} models ({names}): set {MODEL_VARIABLE} to the path of the one to serve, such as {found[0]}"
        )
    if found and found[0].suffix == _UNFINISHED:
        raise ModelFolderError(f"{found[0]}: half downloaded; run 'make model' again, which continues, or remove the file")
    if found:
        return check_model(found[0])
    if in_bento:
        raise ModelFolderError(
            f"this bento holds no weights in {models.name}/: run 'make model' before 'bentoml build', set {MODEL_VARIABLE} "
            f"to a model, or set {MODEL_VARIABLE}={DEMO_NAME} to serve the demo model, which generates coloured shapes only"
        )
    return _demo()


def models_in(models: Path) -> list[Path]:
    """The models that lie in the folder `models`, which need not exist, whole or broken: folders and .safetensors files, by name.

    A folder with any content counts, and a file that is half downloaded: an interrupted download must lead to an error, not silently
    to the demo model.
    """
    visible = sorted(path for path in models.glob("*") if not path.name.startswith("."))
    return [path for path in visible if (_is_model_folder(path) if path.is_dir() else _is_model_file(path))]


def _is_model_folder(folder: Path) -> bool:
    return folder.name not in _ADAPTERS and any(folder.iterdir())


def _is_model_file(file: Path) -> bool:
    return file.name.removesuffix(_UNFINISHED).endswith(_SAFETENSORS)


def _demo() -> ModelFolder:
    return check_model(DEMO_FOLDER, name=DEMO_NAME, is_demo=True)


def check_model(folder: Path, *, name: str | None = None, is_demo: bool = False) -> ModelFolder:
    """Check that `folder` is a complete SD 1.x, 2.x or XL model in safetensors. Raises ModelFolderError, which names the wrong file."""
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such folder")
    _refuse_pickles(folder)
    index = _read_json(folder / "model_index.json", "not a diffusers model folder")
    check_pipeline(index, folder / "model_index.json")
    is_xl = index["_class_name"] in _XL_PIPELINES
    has_checker = not is_xl and (index.get("safety_checker") or [None])[0] is not None
    components = ["unet", "vae", "text_encoder", *["text_encoder_2"] * is_xl, *["safety_checker"] * has_checker]
    variants = {_check_weights(folder / component, _WEIGHT_FILES[component]) for component in components}
    if len(variants) > 1:
        raise ModelFolderError(f"{folder}: some components have only half-precision files, others only full-precision ones")
    if has_checker:
        _read_json(folder / "feature_extractor" / "preprocessor_config.json", "the preprocessing for the safety checker")
    _check_tokenizer(folder / "tokenizer")
    if is_xl:
        _check_tokenizer(folder / "tokenizer_2")
    unet = _read_json(folder / "unet" / "config.json", "the UNet's configuration")
    vae = _read_json(folder / "vae" / "config.json", "the autoencoder's configuration")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", "the noise scheduler's configuration")
    channels = unet.get("in_channels")
    if channels not in (4, 9):
        raise ModelFolderError(f"{folder / 'unet' / 'config.json'}: in_channels is {channels}, expected 4, or 9 for inpainting")
    native = unet.get("sample_size")
    latent_height, latent_width = native if isinstance(native, list) and len(native) == 2 else (native, native)
    if not (isinstance(latent_height, int) and isinstance(latent_width, int)):
        raise ModelFolderError(f"{folder / 'unet' / 'config.json'}: sample_size is {native}, expected a number of latent pixels")
    if not isinstance(vae.get("block_out_channels"), list):
        raise ModelFolderError(f"{folder / 'vae' / 'config.json'}: block_out_channels is missing")
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise ModelFolderError(f"{folder / 'vae' / 'config.json'}: latents_mean and latents_std are not supported")
    pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
    stated = _stated_defaults(folder)
    default_scheduler = stated.scheduler or str(scheduler.get("_class_name", "PNDMScheduler"))
    return ModelFolder(
        path=folder,
        name=name or folder.name,
        is_demo=is_demo,
        is_xl=is_xl,
        native_width=stated.width or latent_width * pixels_per_latent,
        native_height=stated.height or latent_height * pixels_per_latent,
        scheduler=default_scheduler,
        defaults=defaults_of(stated, default_scheduler, unet, scheduler),
        only_inpaints=channels == 9,
        has_safety_checker=has_checker,
        variant=variants.pop(),
        # Stable Diffusion XL starts from the layer before the last.
        text_layers=min(_text_layers(folder, "text_encoder"), _text_layers(folder, "text_encoder_2")) - 1
        if is_xl
        else _text_layers(folder, "text_encoder"),
        loras=folder.parent / "loras",
        embeddings=folder.parent / "embeddings",
    )


def check_pipeline(index: Mapping[str, Any], file: object) -> None:
    """Check that the model_index.json `file` with the content `index` describes a model that can be served. Raises ModelFolderError."""
    pipeline = index.get("_class_name")
    if pipeline not in _PIPELINES + _XL_PIPELINES:
        raise ModelFolderError(
            f"{file}: a {pipeline} is not a Stable Diffusion 1.x, 2.x or XL model, expected {' or '.join(_PIPELINES + _XL_PIPELINES)}"
        )
    if index.get("requires_aesthetics_score"):
        raise ModelFolderError(f"{file}: the refiner of Stable Diffusion XL cannot generate images on its own")


def _stated_defaults(folder: Path) -> DefaultsFile:
    file = folder / DEFAULTS_FILE_NAME
    return read_defaults(file, _read_json(file, "the model's defaults") if file.exists() else {})


def _text_layers(folder: Path, text_encoder: str) -> int:
    file = folder / text_encoder / "config.json"
    layers = _read_json(file, "the text encoder's configuration").get("num_hidden_layers")
    if not isinstance(layers, int) or layers < 1:
        raise ModelFolderError(f"{file}: num_hidden_layers is {layers}, expected a number of layers")
    return layers


def _refuse_pickles(folder: Path) -> None:
    """Refuse pickles anywhere in the folder, so that no library can find a file that runs code."""
    for file in sorted({*folder.rglob("*"), *folder.glob("*/*")}):  # rglob does not follow a component that is a link
        if file.suffix.lower() in _PICKLES:
            raise ModelFolderError(
                f"{file}: a pickle can run code when it is loaded, only safetensors are served; move it out of the model's folder, "
                "and get the weights as safetensors if this was the only form of them"
            )


def _check_tokenizer(folder: Path) -> None:
    _read_json(folder / "tokenizer_config.json", "the tokenizer's configuration")
    for names in _TOKENIZER_FILES:
        if all((folder / name).is_file() for name in names):
            _read_json(folder / names[0], "the tokenizer's vocabulary")
            return
    raise ModelFolderError(f"{folder}: tokenizer.json, or vocab.json and merges.txt, are missing")


def _read_json(file: Path, meaning: str) -> dict[str, Any]:
    if not file.is_file():
        raise ModelFolderError(f"{file}: missing ({meaning})")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelFolderError(f"{file}: not valid JSON ({error}), perhaps half downloaded") from None
    if not isinstance(content, dict):
        raise ModelFolderError(f"{file}: not a JSON object ({meaning})")
    return content


def _check_weights(component: Path, stem: str) -> str | None:
    """Check one component's weights. Returns the variant ("fp16" or None) to request from diffusers."""
    _read_json(component / "config.json", "a component's configuration")
    files, variant = _find_weights(component, stem)
    for file in files:
        check_safetensors(file)
    return variant


def _find_weights(component: Path, stem: str) -> tuple[list[Path], str | None]:
    """The weight files of one component, and their variant."""
    for suffix in ("", _HALF_PRECISION):
        single = component / f"{stem}{suffix}.safetensors"
        index = component / f"{stem}.safetensors.index{suffix}.json"
        if index.is_file():
            shards = sorted(set(_read_json(index, "the list of weight files").get("weight_map", {}).values()))
        elif single.is_file():
            shards = [single.name]
        else:
            continue
        return [component / shard for shard in shards], suffix.removeprefix(".") or None
    raise ModelFolderError(f"{component / (stem + '.safetensors')}: missing")
