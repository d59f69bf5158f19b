"""The ways of computing a UNet call: which there are, which are worth a try on a device, how far their results may differ.

Plain data. `unet_calls.py` computes in them, `choosing.py` chooses one by measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

# The norm of the difference from eager's result, divided by the norm of eager's result, by dtype. Channels last gave 0.0013 on an H200
# in float16. In float32 a GPU's convolutions compute in TF32 by default, with 10 bits. A CPU must give the same bits.
_TOLERANCE_ON_GPU = {"torch.float16": 0.005, "torch.float32": 0.001}


@dataclass(frozen=True)
class Way:
    """A combination of what can be done to a UNet; without any of it, it is computed eagerly."""

    channels_last: bool = False  # the weights of convolutions in that memory format
    compiled: bool = False  # by torch.compile
    graphs: bool = False  # calls are recorded as CUDA graphs and replayed

    @property
    def name(self) -> str:
        parts = (("channels_last", self.channels_last), ("compile", self.compiled), ("graphs", self.graphs))
        return "+".join(name for name, is_on in parts if is_on) or "eager"

    @property
    def is_eager(self) -> bool:
        return self == EAGER


EAGER = Way()


def way_named(name: str) -> Way:
    """`name`: "eager", or parts joined by "+", as in SD_EXECUTION."""
    parts = name.split("+")
    return Way("channels_last" in parts, "compile" in parts, "graphs" in parts)


def obstacle(way: Way, device: str) -> str:
    """Why a type of device cannot compute in this way; "" if it can. `device`: "cpu" or "cuda"."""
    return "CUDA graphs need a GPU" if way.graphs and device != "cuda" else ""


def ways_to_try(device: str) -> tuple[Way, ...]:
    """The ways that may be faster than eager, cheap ones first.

    On a CPU only channels last: compiling takes minutes and changes bits.
    """
    if device != "cuda":
        return (Way(channels_last=True),)
    return (
        Way(graphs=True),
        Way(channels_last=True),
        Way(channels_last=True, graphs=True),
        Way(channels_last=True, compiled=True, graphs=True),
        Way(compiled=True, graphs=True),
    )


def tolerance(device: str, dtype: str) -> float:
    """How far a way's result may differ from eager's: see above. `dtype`: like "torch.float16"."""
    return _TOLERANCE_ON_GPU.get(dtype, 0.0) if device == "cuda" else 0.0
