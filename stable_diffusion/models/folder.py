"""Chooses the model to serve, a folder or one file, and checks that it is complete. Reads file names, JSON and file headers.

Imports neither torch nor diffusers, because API workers use it too. `engine/loading.py` loads the weights.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stable_diffusion.core.errors import ModelFolderError
from stable_diffusion.core.limits import MAX_PIXEL_STEPS, MAX_SIDE, USUAL_MAX_SIDE
from stable_diffusion.core.settings import MODEL_VARIABLE, read_settings
from stable_diffusion.models.defaults import FILE_NAME as DEFAULTS_FILE_NAME
from stable_diffusion.models.defaults import Defaults, DefaultsFile, defaults_of, read_defaults
from stable_diffusion.models.safetensors import check_safetensors, read_tensor_list, samples_of
from stable_diffusion.models.single_file import KINDS, Kind, read_single_file, samples_of_component, shapes_of
from stable_diffusion.models.vae_file import check_vae, samples_of_vae

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
_USUAL_PIXELS = 512 * 512  # of the native size that MAX_PIXEL_STEPS is for


@dataclass(frozen=True)
class ModelFolder:
    """A checked Stable Diffusion 1.x, 2.x or XL model, with facts from its JSON files: a folder of diffusers, or one file."""

    path: Path  # the folder; for a file that of its kind, which has configurations only
    file: Path | None  # the one that has all weights
    vae: Path | None  # the file of the autoencoder that replaces the model's
    name: str
    is_demo: bool
    is_xl: bool  # Stable Diffusion XL: two text encoders, and a UNet that is also told sizes
    native_width: int  # pixels
    native_height: int  # pixels
    scheduler: str  # the default one: a key of SCHEDULERS, or diffusers' class name
    defaults: Defaults
    scheduler_changes: tuple[tuple[str, str | bool], ...]  # what the noise scheduler's configuration has instead of that in `path`
    is_prediction_type_unknown: bool  # a file does not show it; the loaded model does
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
        return MAX_SIDE if min(self.native_width, self.native_height) >= USUAL_MAX_SIDE else USUAL_MAX_SIDE

    @property
    def max_pixel_steps(self) -> int:
        """How much work a request may ask for: pixels x steps, summed over its images. Larger native images are as many."""
        return MAX_PIXEL_STEPS * max(1, self.native_width * self.native_height // _USUAL_PIXELS)

    @functools.cached_property
    def hash(self) -> str:
        """Ten hexadecimal digits that identify everything in the model that determines images. Computed on first use.

        A SHA-256 over name, dtype, shape and the middle 4 KiB of every tensor, and over the noise scheduler's configuration. The safety
        checker is left out: it generates nothing. Training changes all values of a tensor that it trains, so a sample reveals it without
        reading gigabytes; saving the model again, in other files or shards, keeps the hash. One file is hashed as the folder that
        diffusers would make of it.
        This is not the hash that A1111 or the hub show, which covers the bytes of one file.
        """
        digest = hashlib.sha256()
        for component in ("unet", "vae", *self.text_encoders):
            for described, sample in sorted(self._samples(component)):
                digest.update(f"{component} {described}\n".encode() + sample)
        scheduler = self.scheduler_config()
        digest.update(json.dumps({name: scheduler[name] for name in scheduler if name != "_diffusers_version"}, sort_keys=True).encode())
        return digest.hexdigest()[:_HASH_DIGITS]

    def _samples(self, component: str) -> list[tuple[str, bytes]]:
        if component == "vae" and self.vae is not None:
            return list(samples_of_vae(self.vae, self.path))
        if self.file is not None:
            return list(samples_of_component(self.file, self.path, component))
        files, _ = _find_weights(self.path / component, _WEIGHT_FILES[component])
        return [sample for file in files for sample in samples_of(file)]

    def scheduler_config(self) -> dict[str, Any]:
        """The configuration of the model's noise scheduler."""
        config = _read_json(self.path / "scheduler" / "scheduler_config.json", "the noise scheduler's configuration")
        return config | dict(self.scheduler_changes)

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of a component, such as "unet"."""
        return _read_json(self.path / component / "config.json", "a component's configuration")

    def weight_shapes(self, component: str) -> dict[str, list[int]]:
        """The shapes of a component's tensors by diffusers' names, from its files' headers."""
        if self.file is not None:
            return shapes_of(self.file, self.path, component)
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
    vae = Path(settings.vae).expanduser().absolute() if settings.vae else None
    model = _chosen(settings.model, models, vae, in_bento=in_bento)
    loras, embeddings = (Path(path).expanduser() if path else None for path in (settings.loras, settings.embeddings))
    return replace(model, loras=loras or model.loras, embeddings=embeddings or model.embeddings)


def _chosen(asked_for: str, models: Path, vae: Path | None, *, in_bento: bool) -> ModelFolder:
    if asked_for == DEMO_NAME:
        return _demo(vae)
    if asked_for == DEMO_XL_NAME:
        # What lies beside it is made for the demo model.
        model = check_model(DEMO_XL_FOLDER, name=DEMO_XL_NAME, is_demo=True, vae=vae)
        return replace(model, loras=DEMO_XL_FOLDER / "loras", embeddings=DEMO_XL_FOLDER / "embeddings")
    if asked_for:
        try:
            return check_model(Path(asked_for).expanduser().absolute(), vae=vae)
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
        return check_model(found[0], vae=vae)
    if in_bento:
        raise ModelFolderError(
            f"this bento holds no weights in {models.name}/: run 'make model' before 'bentoml build', set {MODEL_VARIABLE} "
            f"to a model, or set {MODEL_VARIABLE}={DEMO_NAME} to serve the demo model, which generates coloured shapes only"
        )
    return _demo(vae)


def models_in(models: Path) -> list[Path]:
    """The models that lie in the folder `models`, which need not exist, whole or broken: folders and .safetensors files, by name.

    A folder with any content counts, and a file that is half downloaded: an interrupted download must lead to an error, not silently
    to the demo model. Pickles count if there is nothing else, so that they are refused by name.
    """
    visible = sorted(path for path in models.glob("*") if not path.name.startswith("."))
    found = [path for path in visible if (_is_model_folder(path) if path.is_dir() else _is_model_file(path))]
    return found or [path for path in visible if path.suffix.lower() in _PICKLES]


def _is_model_folder(folder: Path) -> bool:
    return folder.name not in _ADAPTERS and any(folder.iterdir())


def _is_model_file(file: Path) -> bool:
    return file.name.removesuffix(_UNFINISHED).endswith(_SAFETENSORS)


def _demo(vae: Path | None) -> ModelFolder:
    return check_model(DEMO_FOLDER, name=DEMO_NAME, is_demo=True, vae=vae)


def check_model(
    path: Path, *, name: str | None = None, is_demo: bool = False, vae: Path | None = None, kinds: Sequence[Kind] = KINDS
) -> ModelFolder:
    """Check that `path` is a complete model in safetensors: a folder of diffusers, or one file of one of `kinds`.

    `vae`: the file of an autoencoder that replaces the model's; None: what the model's own defaults say. Raises ModelFolderError, which
    names the wrong file.
    """
    if path.is_dir():
        return _check_folder(path, name or path.name, is_demo, vae)
    if path.exists():
        return _check_file(path, kinds, vae)
    raise ModelFolderError(f"{path}: no such folder or file")


def _check_file(file: Path, kinds: Sequence[Kind], vae: Path | None) -> ModelFolder:
    _refuse_pickle(file)
    stated = _stated_defaults(file.with_suffix(f".{DEFAULTS_FILE_NAME}"))
    vae = vae or _stated_vae(stated, file.parent)
    checked = read_single_file(file, stated.prediction_type, kinds, needs_vae=vae is None)
    return replace(
        _facts_of(checked.kind.folder, stated, dict(checked.scheduler_changes)),
        file=file,
        vae=_checked_vae(vae, checked.kind.folder),
        name=file.stem,
        is_prediction_type_unknown=checked.is_prediction_type_unknown,
        loras=file.parent / "loras",
        embeddings=file.parent / "embeddings",
    )


def _refuse_pickle(file: Path) -> None:
    if file.suffix.lower() in _PICKLES:
        raise ModelFolderError(f"{file}: a pickle can run code when it is loaded, only safetensors are served; get it as safetensors")


def _stated_vae(stated: DefaultsFile, folder: Path) -> Path | None:
    return None if stated.vae is None else folder / Path(stated.vae).expanduser()


def _checked_vae(vae: Path | None, folder: Path) -> Path | None:
    if vae is not None:
        _refuse_pickle(vae)
        check_vae(vae, folder)
    return vae


def _check_folder(folder: Path, name: str, is_demo: bool, vae: Path | None) -> ModelFolder:
    _refuse_pickles(folder)
    index = _read_json(folder / "model_index.json", "not a diffusers model folder")
    check_pipeline(index, folder / "model_index.json")
    is_xl = _is_xl(index)
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
    stated = _stated_defaults(folder / DEFAULTS_FILE_NAME)
    changes: dict[str, str | bool] = {} if stated.prediction_type is None else {"prediction_type": stated.prediction_type}
    return replace(
        _facts_of(folder, stated, changes),
        vae=_checked_vae(vae or _stated_vae(stated, folder), folder),
        name=name,
        is_demo=is_demo,
        has_safety_checker=has_checker,
        variant=variants.pop(),
    )


def _facts_of(folder: Path, stated: DefaultsFile, scheduler_changes: dict[str, str | bool]) -> ModelFolder:
    """What the configurations in `folder` and the operator's defaults say of a model."""
    unet = _read_json(folder / "unet" / "config.json", "the UNet's configuration")
    vae = _read_json(folder / "vae" / "config.json", "the autoencoder's configuration")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", "the noise scheduler's configuration") | scheduler_changes
    is_xl = _is_xl(_read_json(folder / "model_index.json", "not a diffusers model folder"))
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
    default_scheduler = stated.scheduler or str(scheduler.get("_class_name", "PNDMScheduler"))
    return ModelFolder(
        path=folder,
        file=None,
        vae=None,
        name=folder.name,
        is_demo=False,
        is_xl=is_xl,
        native_width=stated.width or latent_width * pixels_per_latent,
        native_height=stated.height or latent_height * pixels_per_latent,
        scheduler=default_scheduler,
        defaults=defaults_of(stated, default_scheduler, unet, scheduler),
        scheduler_changes=tuple(scheduler_changes.items()),
        is_prediction_type_unknown=False,
        only_inpaints=channels == 9,
        has_safety_checker=False,
        variant=None,
        # Stable Diffusion XL starts from the layer before the last.
        text_layers=min(_text_layers(folder, "text_encoder"), _text_layers(folder, "text_encoder_2")) - 1
        if is_xl
        else _text_layers(folder, "text_encoder"),
        loras=folder.parent / "loras",
        embeddings=folder.parent / "embeddings",
    )


def _is_xl(index: Mapping[str, Any]) -> bool:
    return index.get("_class_name") in _XL_PIPELINES


def check_pipeline(index: Mapping[str, Any], file: object) -> None:
    """Check that the model_index.json `file` with the content `index` describes a model that can be served. Raises ModelFolderError."""
    pipeline = index.get("_class_name")
    if pipeline not in _PIPELINES + _XL_PIPELINES:
        raise ModelFolderError(
            f"{file}: a {pipeline} is not a Stable Diffusion 1.x, 2.x or XL model, expected {' or '.join(_PIPELINES + _XL_PIPELINES)}"
        )
    if index.get("requires_aesthetics_score"):
        raise ModelFolderError(f"{file}: the refiner of Stable Diffusion XL cannot generate images on its own")


def _stated_defaults(file: Path) -> DefaultsFile:
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
