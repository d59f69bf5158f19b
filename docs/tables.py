"""Writes the tables in the pages from the code: `make docs`. With --check it only says which pages are stale.

A table stands in a page between the comments `<!-- table: NAME -->` and `<!-- end of table -->`. This module knows the code that names
fields, errors, variables and metrics, and nothing of the prose around the tables.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from prometheus_client import REGISTRY
from pydantic import BaseModel

from stable_diffusion.api.a1111.parameters import ImageToImageBody, TextToImageBody
from stable_diffusion.api.openai.parameters import ALIASES, OpenaiParameters, generation_fields
from stable_diffusion.core import errors, settings
from stable_diffusion.core.requests import ImageToImageRequest
from stable_diffusion.core.safety import SafetyPolicy
from stable_diffusion.core.schedulers import SCHEDULERS
from stable_diffusion.state import metrics

FOLDER = Path(__file__).parent
_TABLE = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace('<', '&lt;') for cell in cells)} |".replace("|  |", "| |")


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    return "\n".join([_row(*head), _row(*["---"] * len(head)), *(_row(*row) for row in rows)]) + "\n"


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _range(schema: dict[str, Any]) -> str:
    """A number's limits, from JSON Schema's names for them."""
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    most, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if below is not None:
        most = below - 1  # only whole numbers have one
    if least is not None and most is not None:
        text = f"{_number(least)} to {_number(most)}"
    elif above is not None and most is not None:
        text = f"above {_number(above)}, up to {_number(most)}"
    else:
        text = "whole number" if schema["type"] == "integer" else "number"
    return f"{text}, multiples of {schema['multipleOf']}" if "multipleOf" in schema else text


def _allowed(schema: dict[str, Any], is_required: bool) -> str:
    """The allowed values of a field; of a field that may be null, those of its value."""
    kinds = [kind for kind in schema.get("anyOf", []) if kind.get("type") != "null"]
    value: dict[str, Any] = {**kinds[0], **schema} if kinds else schema
    values = value.get("enum") or ([value["const"]] if "const" in value else [])
    match value.get("type"):
        case _ if values:
            return ", ".join(f"`{one}`" for one in values)
        case "boolean":
            return "`true`, `false`"
        case "integer" | "number":
            return _range(value)
        case "string" if "maxLength" in value:
            return f"{'1 to' if is_required else 'up to'} {value['maxLength']} characters"
        case "string":
            return "a name" if len(schema.get("examples", [])) > 1 else "text"
        case "array":
            return f"list, up to {value['maxItems']} entries" if "maxItems" in value else "list"
        case "object":
            return "object"
        case _:
            return "object" if "$ref" in value else "anything"


def _default(schema: dict[str, Any], is_required: bool) -> str:
    if is_required:
        return "required"
    value = schema.get("default")
    match value:
        case None | [] | {}:
            return ""
        case bool():
            return f"`{str(value).lower()}`"
        case "":
            return '`""`'
        case int() | float():
            return _number(value)
        case _:
            return f"`{value}`" if isinstance(value, str) else ""


def _fields(model: type[BaseModel], names: list[str] | None = None, extra: dict[str, str] | None = None) -> Iterator[tuple[str, ...]]:
    document = model.model_json_schema()
    required = document.get("required", [])
    for name in names or model.model_fields:
        schema = document["properties"][name]
        is_required = name in required
        description = schema.get("description", "") + (f" {extra[name]}" if extra and name in extra else "")
        yield f"`{name}`", _default(schema, is_required), _allowed(schema, is_required), description


_FIELD_HEAD = ("field", "default", "allowed", "meaning")


_IN_PROMPTS = {
    "loras": '`{"name": "NAME", "weight": 0.8}` each: see [prompts.md](prompts.md#loras).',
    "prompt_syntax": "See [prompts.md](prompts.md).",
}


def native_fields() -> str:
    return _table(_FIELD_HEAD, _fields(ImageToImageRequest, extra=_IN_PROMPTS | {"strength": "Only `/img2img` and `/inpaint` have it."}))


def openai_parameters() -> str:
    return _table(("parameter", *_FIELD_HEAD[1:]), _fields(OpenaiParameters))


def openai_extensions() -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        others = {name: alias for alias, name in ALIASES.items()}
        only_edits = {"strength": "Only edits have it."}
        aliases = {name: f"Another name: `{alias}`." for name, alias in others.items()}
        yield from _fields(ImageToImageRequest, generation_fields(ImageToImageRequest), _IN_PROMPTS | only_edits | aliases)

    return _table(("parameter", *_FIELD_HEAD[1:]), rows())


def a1111_fields() -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        both = [name for name in TextToImageBody.model_fields if name in ImageToImageBody.model_fields]
        yield from _fields(TextToImageBody, both)
        for model, path in ((TextToImageBody, "txt2img"), (ImageToImageBody, "img2img")):
            for field, *rest, description in _fields(model, [name for name in model.model_fields if name not in both]):
                yield (field, *rest, f"Only `{path}`. {description}")

    return _table(_FIELD_HEAD, rows())


def schedulers() -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        for name, short_names in SCHEDULERS.items():
            yield f"`{short_names[0]}`", ", ".join(f"`{other}`" for other in short_names[1:]), f"`{name}`"

    return _table(("name", "other short names", "as responses and diffusers name it"), rows())


# The front door refuses these before a request reaches an API.
_OF_FRONT_DOOR = (
    (403, "cross_site", "a page of another site sent the request, in a browser; see below"),
    (404, "not_found", "there is no such path"),
    (405, "method_not_allowed", "the path has other methods; the header `Allow` lists them"),
)


def error_types() -> str:
    """The tree of errors; its texts are those of the module's docstring."""
    texts = dict(re.findall(r"── (\w+) +\d{3} +(.+)$", errors.__doc__ or "", re.MULTILINE))

    def found(kind: type[errors.ServiceError]) -> Iterator[tuple[int, str, str, int | None]]:
        for child in kind.__subclasses__():
            if child.__module__ != errors.__name__:
                continue  # a module's own subclass, which clients see as its parent
            yield child.status, child.type, texts[child.__name__], child.retry_after_s
            yield from found(child)

    listed = sorted([*found(errors.ServiceError), *((*one, None) for one in _OF_FRONT_DOOR)], key=lambda error: error[0])
    return _table(("status", "type", "when"), ((str(status), f"`{kind}`", text) for status, kind, text, _ in listed))


_ON_OR_OFF = "on, off"
_MEANINGS = {
    settings.MODEL_VARIABLE: (
        "",
        "`demo`, `demo-xl`, or the path of a folder or file",
        "The model to serve. By default the one model in `models/`; without one the demo model, except in a bento, which then does not "
        "start.",
    ),
    settings.VAE_VARIABLE: (
        "",
        "the path of a file",
        "The autoencoder (VAE) to use instead of the model's: see [Another autoencoder](#another-autoencoder).",
    ),
    settings.LORAS_VARIABLE: (
        "",
        "the path of a folder",
        "The LoRAs that requests may name. By default `loras` beside the model's folder.",
    ),
    settings.EMBEDDINGS_VARIABLE: (
        "",
        "the path of a folder",
        "The textual inversions that prompts may name, read at startup. By default `embeddings` beside the model's folder.",
    ),
    settings.SAFETY_VARIABLE: (
        f"`{settings.Settings.safety}`",
        ", ".join(f"`{policy}`" for policy in get_args(SafetyPolicy)),
        "Which images the safety checker looks at: see [Safety checker](#safety-checker).",
    ),
    settings.KEYS_FILE_VARIABLE: ("", "the path of a file", "API keys, one entry per line: see [API keys](#api-keys)."),
    settings.KEYS_VARIABLE: ("", "comma-separated entries", "The same entries as in the file."),
    settings.OPEN_VARIABLE: (
        "",
        ", ".join(f"`{name}`" for name in settings.OPENABLE) + ", comma-separated",
        "The pages that need no API key: `docs` opens `/` and `/docs.json`, `metrics` opens `/metrics`.",
    ),
    settings.WITHOUT_KEYS_VARIABLE: ("off", _ON_OR_OFF, "Let a bento start without API keys at an address that others can reach."),
    settings.RATE_LIMIT_VARIABLE: (
        "",
        f"1 to {settings._MAX_REQUESTS_PER_MINUTE}",
        "Generation requests that each API key may send per minute and machine: see [Rate limit](#rate-limit). By default unlimited.",
    ),
    "SD_MAX_QUEUE_S": ("", "", "Seconds of unfinished work, estimated from measured steps, that a model process accepts."),
    "SD_MAX_QUEUE_PICTURES": ("", "", "Waiting and running images that a model process accepts."),
    "SD_STUCK_STEP_S": (
        "",
        "",
        "If a step takes longer than this and more than 20 times its expected time, the model process is ended and restarted.",
    ),
    "SD_STOP_GRACE_S": ("", "", "Seconds that a stopping server may take to finish what it has accepted."),
    settings.SHARED_STATE_VARIABLE: (
        "",
        "`rediss://:PASSWORD@HOST:PORT`; on this machine also `redis://`",
        "A Redis 7 or Valkey through which machines share jobs, limits and idempotency keys: see [fleet.md](fleet.md).",
    ),
    settings.LOG_PROMPTS_VARIABLE: ("off", _ON_OR_OFF, "Write prompts into the request log."),
    settings.EXECUTION_VARIABLE: (
        f"`{settings.Settings.execution}`",
        ", ".join(f"`{name}`" for name in (*settings.EXECUTIONS, *settings.EXECUTION_PARTS)) + ", the last three also joined by `+`",
        "How a step is computed; by default in the way that is measured as the fastest at startup: see "
        "[performance.md](performance.md#ways-of-computing).",
    ),
}


def environment_variables() -> str:
    names = {value for name, value in vars(settings).items() if name.endswith("_VARIABLE")}
    limits = {name: (getattr(settings.Limits(), field), most) for field, (name, most) in settings.LIMIT_VARIABLES.items()}
    missing = (names | set(limits)) - settings.SET_BY_THE_SERVER ^ set(_MEANINGS)
    if missing:
        raise SystemExit(f"docs/tables.py and core/settings.py do not name the same variables: {', '.join(sorted(missing))}")

    def rows() -> Iterator[tuple[str, ...]]:
        for name, (default, allowed, meaning) in _MEANINGS.items():
            if name in limits:
                usual, most = limits[name]
                yield f"`{name}`", f"{usual:.0f}", f"above 0, up to {most:.0f}", meaning
            else:
                yield f"`{name}`", default, allowed, meaning

    return _table(("variable", "default", "allowed", "meaning"), rows())


def metric_names() -> str:
    metrics.counting()

    def rows() -> Iterator[tuple[str, ...]]:
        counted = [family for family in REGISTRY.collect() if family.name.startswith("stable_diffusion_")]
        for family in counted:
            labels = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
            name = f"{family.name}_total" if family.type == "counter" else family.name
            yield f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation
        # These have no series before a runner has started.
        for current in (metrics._caps([]), metrics._models([]), metrics._executions([]), metrics._backlog(0), metrics._shared_state(True)):
            yield f"`{current.name}`", current.type, ", ".join(f"`{label}`" for label in current._labelnames), current.documentation

    return _table(("metric", "type", "labels", "meaning"), rows())


TABLES: dict[str, Callable[[], str]] = {
    "native-fields": native_fields,
    "schedulers": schedulers,
    "errors": error_types,
    "openai-parameters": openai_parameters,
    "openai-extensions": openai_extensions,
    "a1111-fields": a1111_fields,
    "environment": environment_variables,
    "metrics": metric_names,
}


def filled(page: str) -> str:
    """The page with all its tables as the code has them now. Raises KeyError for a table that nobody writes."""
    return _TABLE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", page)


def main() -> None:
    pages = {file: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.md"))}
    unused = set(TABLES) - {name for page in pages.values() for _, name, _ in _TABLE.findall(page)}
    stale = [file for file, page in pages.items() if filled(page) != page]
    if sys.argv[1:] == ["--check"]:
        if stale or unused:
            raise SystemExit(f"stale, run make docs: {[file.name for file in stale]}; in no page: {sorted(unused)}")
        return
    for file in stale:
        file.write_text(filled(pages[file]), encoding="utf-8")
        print(f"Written: {file.name}")


if __name__ == "__main__":
    main()
