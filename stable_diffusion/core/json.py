"""Strict and bounded parsing of JSON from clients. It does not know what a document should contain."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from stable_diffusion.core.errors import InvalidRequest

MAX_NAMES = 64  # of a JSON object; a request has about a dozen
MAX_VALUES = 2**14  # of a JSON body, at all depths: reading millions of them would hold up every other request


@dataclass(frozen=True)
class _Constant:
    """Stands for NaN or Infinity until the caller knows the field: json.loads does not say at which name it found one."""

    name: str  # NaN, Infinity or -Infinity


def parse_json(body: bytes | str, where: str, max_names: int = MAX_NAMES) -> dict[str, Any]:
    """Parse a JSON object strictly: no NaN, no Infinity, no duplicate names. `where` names the body or part in errors without a field.

    No object may have more than `max_names` names, and the document no more than MAX_VALUES values.
    """

    def checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) > max_names:
            raise InvalidRequest(f"{where}: {len(pairs)} names, at most {max_names} are allowed", field=where)
        document: dict[str, Any] = {}
        for name, value in pairs:
            if name in document:
                raise InvalidRequest(f"{name[:60]} is given more than once", field=name[:60])
            _refuse_constant(value, name[:60])
            document[name] = value
        return document

    try:
        text = body.decode("utf-8") if isinstance(body, bytes) else body
        _require_few_values(text, where)
        document = json.loads(text, parse_constant=_Constant, object_pairs_hook=checked_object)
    except UnicodeDecodeError:
        raise InvalidRequest(f"{where}: not UTF-8", field=where) from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"{where}: not valid JSON, {error.msg.lower()} at line {error.lineno} column {error.colno}", field=where
        ) from None
    except (RecursionError, ValueError):  # nested too deeply, or an integer of more digits than Python reads
        raise InvalidRequest(f"{where}: JSON is nested too deeply or has a number that is too long", field=where) from None
    _refuse_constant(document, where)
    if not isinstance(document, dict):
        raise InvalidRequest(f'{where}: must be a JSON object, such as {{"prompt": "a red circle"}}', field=where)
    return document


def _refuse_constant(value: Any, name: str) -> None:
    """Refuse constants in `value` and in nested lists. Nested objects were checked when they were parsed."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, _Constant):
            raise InvalidRequest(f"{name}: {one.name} is not a number in JSON", field=name)
        if isinstance(one, list):
            pending.extend(reversed(one))


def _require_few_values(text: str, where: str) -> None:
    """Every value but the first follows one of these characters. Those in strings count too, but base64 contains none."""
    count = sum(text.count(mark) for mark in ",[{")
    if count > MAX_VALUES:
        raise InvalidRequest(f"{where}: some {count} values, at most {MAX_VALUES} are allowed", field=where)
