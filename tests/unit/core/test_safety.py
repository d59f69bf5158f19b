"""The operator's policy says which pictures are checked; a request may only tighten it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from stable_diffusion.api.a1111.parameters import read_text_to_image
from stable_diffusion.api.openai.parameters import parse_generation
from stable_diffusion.api.tasks import text_task
from stable_diffusion.core.errors import InvalidRequest, SettingError
from stable_diffusion.core.requests import TextToImageRequest, parse_text_to_image
from stable_diffusion.core.safety import SafetyPolicy, is_checked
from stable_diffusion.core.settings import safety_policy
from stable_diffusion.models.folder import DEMO_FOLDER, check_model
from tests.tasks import served

WITHOUT_CHECKER = check_model(DEMO_FOLDER)
WITH_CHECKER = dataclasses.replace(WITHOUT_CHECKER, has_safety_checker=True)


@pytest.mark.parametrize(("said", "policy"), [(None, "default-on"), ("", "default-on"), ("default-on", "default-on"), ("off", "off")])
def test_the_environment_says_the_policy(said: str | None, policy: SafetyPolicy) -> None:
    assert safety_policy({} if said is None else {"SD_SAFETY": said}, model_name="model", has_checker=False) == policy


def test_always_needs_a_model_with_a_checker() -> None:
    assert safety_policy({"SD_SAFETY": "always"}, model_name="model", has_checker=True) == "always"
    with pytest.raises(SettingError, match="SD_SAFETY=always, but the model model has no safety checker"):
        safety_policy({"SD_SAFETY": "always"}, model_name="model", has_checker=False)


@pytest.mark.parametrize("said", ["on", "true", "Always", "default_on", "0"])
def test_an_unknown_policy_is_refused(said: str) -> None:
    with pytest.raises(SettingError, match="SD_SAFETY is .*, allowed are always, default-on, off"):
        safety_policy({"SD_SAFETY": said}, model_name="model", has_checker=True)


@pytest.mark.parametrize(
    ("policy", "asked", "checked"),
    [
        ("always", None, True),
        ("always", True, True),
        ("default-on", None, True),
        ("default-on", True, True),
        ("default-on", False, False),
        ("off", None, False),
        ("off", True, True),
        ("off", False, False),
    ],
)
def test_what_is_checked(policy: SafetyPolicy, asked: bool | None, checked: bool) -> None:
    assert is_checked(asked, policy) is checked


def of_plain(fields: dict[str, Any]) -> TextToImageRequest:
    return parse_text_to_image(fields)


def of_openai(fields: dict[str, Any]) -> TextToImageRequest:
    return parse_generation(fields)[1]


def of_a1111(fields: dict[str, Any]) -> TextToImageRequest:
    return read_text_to_image(fields).parameters


@pytest.mark.parametrize("door", [of_plain, of_openai])
def test_where_every_picture_is_checked_a_request_that_asks_not_to_be_is_refused(
    door: Callable[[dict[str, Any]], TextToImageRequest],
) -> None:
    with pytest.raises(InvalidRequest, match="safety_check: must be true or omitted") as caught:
        text_task(door({"prompt": "x", "safety_check": False}), served(WITH_CHECKER, "always"))
    assert [problem.field for problem in caught.value.problems] == ["safety_check"]


@pytest.mark.parametrize("door", [of_plain, of_openai, of_a1111])
@pytest.mark.parametrize(("policy", "checked"), [("always", True), ("default-on", True), ("off", False)])
def test_a_request_that_says_nothing_gets_what_the_policy_says(
    door: Callable[[dict[str, Any]], TextToImageRequest], policy: SafetyPolicy, checked: bool
) -> None:
    for fields in ({"prompt": "x"}, {"prompt": "x", "safety_check": None}):
        assert text_task(door(fields), served(WITH_CHECKER, policy)).safety_check is checked
