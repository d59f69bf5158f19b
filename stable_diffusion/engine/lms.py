"""diffusers' LMS scheduler with kept coefficients. Does not know jobs."""

from __future__ import annotations

from collections import OrderedDict

from diffusers import LMSDiscreteScheduler

_KEPT = 4096  # about twenty numbers of steps; some 3 MB


class KeptLMSDiscreteScheduler(LMSDiscreteScheduler):  # type: ignore[misc]  # diffusers has no types
    """The same values. diffusers integrates the coefficients anew in each step of each image, which takes 3 ms of the processor."""

    _coefficients: OrderedDict[tuple[object, ...], float] = OrderedDict()  # shared by all jobs; the last used one at the end

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """The coefficient of one of the last `order` derivatives in step `t`."""
        kept = self._coefficients
        key = (order, t, current_order, self.sigmas[: t + 2].numpy().tobytes())
        if key not in kept:
            kept[key] = super().get_lms_coefficient(order, t, current_order)
        kept.move_to_end(key)
        if len(kept) > _KEPT:
            kept.popitem(last=False)
        return kept[key]
