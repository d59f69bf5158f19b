"""Builds the OpenAPI 3.1 document from the `openapi` modules of the API packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from stable_diffusion.api.a1111 import openapi as a1111
from stable_diffusion.api.jobs import openapi as jobs
from stable_diffusion.api.native import openapi as native
from stable_diffusion.api.openai import openapi as openai
from stable_diffusion.api.reproduce import openapi as reproduce
from stable_diffusion.api.status import openapi as status
from stable_diffusion.server.access import openapi as access


def document(title: str, version: str) -> dict[str, Any]:
    """All APIs as a JSON-serialisable OpenAPI 3.1 document."""
    apis = (native, reproduce, jobs, openai, a1111, status)
    paths = {path: item for api in apis for path, item in api.paths().items()}
    written = {
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": version,
            "description": "Stable Diffusion: text to image, image to image and inpainting. The response body is the image itself.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [api.TAG for api in apis],
        "paths": access.with_keys(paths),
        "security": access.SECURITY,
        "components": {"securitySchemes": access.SECURITY_SCHEMES, "schemas": openai.schemas() | a1111.schemas()},
    }
    return _with_schemas(written)


def _with_schemas(written: dict[str, Any]) -> dict[str, Any]:
    """The document with its Python types replaced by JSON Schema; models become components."""
    types: dict[Any, None] = {}
    _mapped(written, types.setdefault)
    inputs: list[tuple[Any, JsonSchemaMode, TypeAdapter[Any]]] = [(found, "validation", TypeAdapter(found)) for found in types]
    schemas, shared = TypeAdapter.json_schemas(inputs, ref_template="#/components/schemas/{model}")
    for component in shared["$defs"].values():
        if "description" in component:
            component["description"] = component["description"].splitlines()[0]
    made: dict[str, Any] = _mapped(written, lambda found: schemas[found, "validation"])
    made["components"]["schemas"] |= shared["$defs"]
    return made


def _mapped(node: Any, schema_of: Callable[[Any], Any]) -> Any:
    """A part of the document, with every type replaced by `schema_of` of it."""
    if isinstance(node, dict):
        return {name: _mapped(part, schema_of) for name, part in node.items()}
    if isinstance(node, list | tuple):
        return [_mapped(part, schema_of) for part in node]
    return node if isinstance(node, str | int | float | None) else schema_of(node)
