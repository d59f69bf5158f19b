"""What whoever runs the server may set: `stable_diffusion/limits.py`."""

from __future__ import annotations

import pytest

from stable_diffusion.core.errors import SettingError
from stable_diffusion.core.settings import VARIABLES, Limits, read_limits
from tests.http.servers import ROOT


def test_what_is_not_set_has_its_default() -> None:
    assert read_limits({}) == read_limits(dict.fromkeys((name for name, _ in VARIABLES.values()), " ")) == Limits()


def test_each_variable_sets_its_limit() -> None:
    values = {name: str(number) for number, (name, _) in enumerate(VARIABLES.values(), 1)}
    assert read_limits(values) == Limits(1, 2, 3, 4)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e10", "ten", "1,5"])
@pytest.mark.parametrize("name", [name for name, _ in VARIABLES.values()])
def test_what_cannot_be_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=rf"{name} must be a number above 0, at most \d+, not "):
        read_limits({name: value})


def test_the_readme_has_each_variable_with_its_default() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for field, (name, _) in VARIABLES.items():
        assert f"| `{name}` | {getattr(Limits(), field):.0f} |" in readme
