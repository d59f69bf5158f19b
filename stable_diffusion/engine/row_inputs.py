"""The inputs of one UNet call: tensors with one row for each prediction, and the adapters of the rows.

The only module that lists the inputs. Does not know the purpose of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from stable_diffusion.engine.adapters import RowAdapters


@dataclass(frozen=True)
class RowInputs:
    """Shapes: latents (rows, channels, height/8, width/8), timesteps (rows), embeddings (rows, tokens, width).

    `mask` (rows, tokens) is 1 for tokens that count; None where all rows have the same number of tokens. `guidance` (rows, width) is for
    models that take the guidance scale as an input; `pooled` (rows, width) and `time_ids` (rows, 6) are Stable Diffusion XL's: the summary
    of a text, and sizes and crop. `adapters` has one entry for each row, or none if no row has an adapter.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    embeddings: torch.Tensor
    mask: torch.Tensor | None = None
    guidance: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None
    adapters: tuple[RowAdapters, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.latents)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by field. Fields that are None are missing."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def first(self) -> RowInputs:
        """The first row."""
        return RowInputs(**{name: tensor[:1].contiguous() for name, tensor in self.tensors().items()}, adapters=self.adapters[:1])

    def contiguous(self) -> RowInputs:
        """The same with tensors of the usual strides."""
        return RowInputs(**{name: tensor.contiguous() for name, tensor in self.tensors().items()}, adapters=self.adapters)

    def repeated(self, rows: int) -> RowInputs:
        """The same one row `rows` times."""
        repeated = {name: tensor.repeat(rows, *[1] * (tensor.dim() - 1)) for name, tensor in self.tensors().items()}
        return RowInputs(**repeated, adapters=self.adapters * rows)


def joined(parts: Sequence[RowInputs]) -> RowInputs:
    """The rows of all `parts`, which have the same inputs except for masks and adapters."""
    if len(parts) == 1:
        return parts[0]
    embeddings, mask = stacked([part.embeddings for part in parts], [part.mask for part in parts])
    others = parts[0].tensors().keys() - {"embeddings", "mask"}
    tensors = {name: torch.cat([part.tensors()[name] for part in parts]) for name in others}
    has_adapters = any(part.adapters for part in parts)
    adapters = tuple(one for part in parts for one in part.adapters or ((),) * part.rows) if has_adapters else ()
    return RowInputs(**tensors, embeddings=embeddings, mask=mask, adapters=adapters)


def stacked(
    embeddings: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None] | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The embeddings of several texts as rows, and their mask. Shorter ones are padded with zeros, which the mask leaves out.

    There is no mask if all have the same length and none had one, so that the usual call stays diffusers' own.
    """
    masks = masks or [None] * len(embeddings)
    tokens = max(one.shape[1] for one in embeddings)
    if all(one.shape[1] == tokens for one in embeddings) and all(mask is None for mask in masks):
        return torch.cat(list(embeddings)), None
    ones = [one.new_ones(one.shape[:2]) if mask is None else mask for one, mask in zip(embeddings, masks, strict=True)]
    padded = [torch.nn.functional.pad(one, (0, 0, 0, tokens - one.shape[1])) for one in embeddings]
    return torch.cat(padded), torch.cat([torch.nn.functional.pad(mask, (0, tokens - mask.shape[1])) for mask in ones])
