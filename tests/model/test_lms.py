"""The kept coefficients of LMS: diffusers' values, integrated once for all jobs with the same noise levels."""

from __future__ import annotations

import pytest
from diffusers import LMSDiscreteScheduler
from scipy import integrate

from stable_diffusion.engine.lms import KeptLMSDiscreteScheduler


def test_coefficients_are_those_of_diffusers_and_integrated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    KeptLMSDiscreteScheduler._coefficients.clear()
    integrations: list[float] = []

    def counting(function: object, start: float, end: float, **options: float) -> object:
        integrations.append(start)
        return quad(function, start, end, **options)

    quad = integrate.quad
    monkeypatch.setattr(integrate, "quad", counting)
    for steps in (6, 9):
        theirs, *ours = LMSDiscreteScheduler(), KeptLMSDiscreteScheduler(), KeptLMSDiscreteScheduler()
        for scheduler in (theirs, *ours):
            scheduler.set_timesteps(steps)
        asked = [(order, step, current) for step in range(steps) for order in range(1, min(step + 1, 4) + 1) for current in range(order)]
        expected = [theirs.get_lms_coefficient(*one) for one in asked]
        integrations.clear()
        for scheduler in ours:
            assert [scheduler.get_lms_coefficient(*one) for one in asked] == expected
        assert len(integrations) == len(asked), "once for both"
