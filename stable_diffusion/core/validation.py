"""Validates a document by a pydantic model and says in words what is wrong. Knows no field of requests except `strength`.

Requests and the operator's `defaults.json` share it. A module of its own: the model process has no use for the models of requests.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from stable_diffusion.core.errors import FieldError, InvalidRequest
from stable_diffusion.core.limits import MAX_SIDE, MIN_SIDE, SIDE_MULTIPLE

BLANK_PROMPTS = "blank prompts are allowed"  # a key of the validators' context
_MAX_PROBLEMS = 20  # reported per document

Model = TypeVar("Model", bound=BaseModel)


def _whole_blocks(side: int | None) -> int | None:
    if side is not None and side % SIDE_MULTIPLE:
        raise ValueError(f"must be a multiple of {SIDE_MULTIPLE}, {side} is not")
    return side


Side = Annotated[
    int | None,
    Field(ge=MIN_SIDE, le=MAX_SIDE, json_schema_extra={"multipleOf": SIDE_MULTIPLE}),
    AfterValidator(_whole_blocks),
]


def validated(model: type[Model], document: dict[str, Any], *, blank_prompts: bool = False) -> Model:
    """Validate `document`. Raises InvalidRequest, which names each wrong field and what is allowed."""
    try:
        return model.model_validate(document, context={BLANK_PROMPTS: blank_prompts})
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)[:_MAX_PROBLEMS]
        problems = [_problem(detail, model) for detail in details]
        message = "; ".join(problem.message for problem in problems[:5])
        raise InvalidRequest(message, problems=problems) from None


def _problem(detail: Any, model: type[BaseModel]) -> FieldError:
    """Describe a pydantic error in words that name the field and the limit."""
    # Errors of whole-model validators have no location. The only such validator concerns strength.
    is_about_strength = detail["type"] == "value_error" and not detail["loc"]
    field = "strength" if is_about_strength else str(next(iter(detail["loc"]), "body"))[:60]
    context = detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            reason = "is required"
        case "extra_forbidden":
            reason = f"is not a known field, allowed are {', '.join(model.model_fields)}"
        case "value_error":
            reason = str(context["error"])
        case "literal_error":
            reason = f"must be one of {context['expected']}"
        case "string_too_long":
            reason = f"must have at most {context['max_length']} characters"
        case _:
            reason = detail["msg"][:1].lower() + detail["msg"][1:]
            reason = reason.removeprefix("input ").removeprefix("should").strip()
            reason = f"must {reason}" if not reason.startswith("must") else reason
    return FieldError(field, reason if is_about_strength else f"{field}: {reason}")
