"""API keys and the rate limit in the OpenAPI document: the responses that they add to every operation except the probes."""

from __future__ import annotations

from typing import Any

from stable_diffusion.api.dialect import dialect_of
from stable_diffusion.api.openapi import json_content
from stable_diffusion.api.responses import Error
from stable_diffusion.server.access.policy import LIMITED_PATHS, PROBES

SECURITY_SCHEMES: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "The key."},
    "basic": {"type": "http", "scheme": "basic", "description": "Any user name, the key as the password. Browsers prompt for it."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The key."},
}
# The empty entry stands for a server without keys.
SECURITY: list[dict[str, Any]] = [{}, *({name: []} for name in SECURITY_SCHEMES)]
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
_RATE_LIMITED = "Rate limit exceeded: this caller has sent more generation requests than the operator allows per minute (`rate_limited`)."


def with_keys(paths: dict[str, Any]) -> dict[str, Any]:
    """The same paths, with the responses 401 and 429 where they can occur."""
    return {path: {method: _with_keys(path, method, operation) for method, operation in item.items()} for path, item in paths.items()}


def _with_keys(path: str, method: str, operation: Any) -> Any:
    if method == "parameters":
        return operation
    if path in PROBES:
        return {**operation, "security": []}
    dialect = dialect_of(path)
    content = json_content(Error if dialect is None else dialect.ERROR)
    challenge = {"WWW-Authenticate": {"description": "Basic and Bearer.", "schema": {"type": "string"}}}
    added = {
        "401": {
            "description": "The server requires an API key, and the request carries no valid one.",
            "headers": challenge,
            "content": content,
        }
    }
    if method == "post" and path in LIMITED_PATHS:
        other = operation["responses"].get("429", {"description": ""})
        description = f"{other['description']} {_RATE_LIMITED}".strip()
        added["429"] = {"description": description, "headers": _RETRY_AFTER, "content": content}
    return {**operation, "responses": {**operation["responses"], **added}}
