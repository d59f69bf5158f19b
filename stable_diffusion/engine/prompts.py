"""Encodes prompts: chunks of tokens to embeddings, with weights and CLIP skip.

A text of one unweighted chunk gives diffusers' embeddings bit for bit. Longer texts and weights follow A1111. Stable Diffusion XL has two
text encoders. `core/prompt_syntax.py` reads the grammar and `chunks.py` cuts texts; this module does neither.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stable_diffusion.core.limits import MAX_PROMPT_CHUNKS
from stable_diffusion.core.prompt_syntax import Emphasis
from stable_diffusion.engine.adapters import AdaptedLayers, Lora, LowRank
from stable_diffusion.engine.chunks import Chunk, Chunker

# Embeddings of a chunk take a quarter of a megabyte in Stable Diffusion.
_KEPT_TEXTS = 64


@dataclass(frozen=True)
class Text:
    """What determines embeddings. `sections` are separated by BREAK. `clip_skip` 1: the layer that the model is made for."""

    sections: tuple[tuple[Emphasis, ...], ...]
    clip_skip: int = 1
    adapters: tuple[tuple[Lora, float], ...] = ()  # of the text encoders, with their weights
    is_zero: bool = False  # zeros instead of the text's embeddings, the negative prompt of models that are trained without one

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal embeddings. Holds no adapter, so that a kept embedding keeps none on the device."""
        return self.sections, self.clip_skip, self.is_zero, tuple((lora.name, lora.hash, weight) for lora, weight in self.adapters)


@dataclass(frozen=True)
class Embeddings:
    """What the UNet is told of a text: `tokens` (1, tokens, width) and, in Stable Diffusion XL, `pooled` (1, width), its summary."""

    tokens: torch.Tensor
    pooled: torch.Tensor | None = None


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder with its tokenizer. Those of a model have the same vocabulary, and may pad with different tokens."""

    tokenizer: CLIPTokenizer
    model: CLIPTextModel | CLIPTextModelWithProjection

    @property
    def has_projection(self) -> bool:
        """Whether it also gives a summary of the text."""
        return isinstance(self.model, CLIPTextModelWithProjection)


class PromptEncoder:
    """The text encoders of a model. Keeps the embeddings of the most recent texts."""

    def __init__(self, encoders: Sequence[TextEncoder], dtype: torch.dtype, inversions: Mapping[str, list[int]]) -> None:
        """`inversions`: the tokens that stand for a textual inversion, by its name."""
        self._encoders = encoders
        self._chunkers = [Chunker(encoder.tokenizer, inversions) for encoder in encoders]
        self._dtype = dtype
        self._adapted = [AdaptedLayers(getattr(encoder.model, "text_model", encoder.model)) for encoder in encoders]
        self.chunk_tokens = self._chunkers[0].chunk_tokens
        self._kept: OrderedDict[tuple[object, ...], Embeddings] = OrderedDict()  # the last used one at the end

    def dropped(self, text: Text) -> str:
        """The text beyond MAX_PROMPT_CHUNKS chunks; "" if there is none."""
        dropped = (chunker.text_of(chunker.chunks(text.sections)[MAX_PROMPT_CHUNKS:]) for chunker in self._chunkers)
        return next(filter(None, dropped), "")

    def count_chunks(self, text: Text) -> int:
        """How many chunks the text fills, from 1 to MAX_PROMPT_CHUNKS."""
        return min(max(len(chunker.chunks(text.sections)) for chunker in self._chunkers), MAX_PROMPT_CHUNKS)

    def encode(self, text: Text) -> Embeddings:
        """The text's embeddings, shared and not to be changed. There are 77 tokens for each chunk.

        They are kept, mainly for the empty negative prompt, which nearly every request has.
        """
        key = text.key
        embeddings = self._kept.get(key)
        if embeddings is None:
            embeddings = self._kept[key] = self._encode(text)
        self._kept.move_to_end(key)
        if len(self._kept) > _KEPT_TEXTS:
            self._kept.popitem(last=False)
        return embeddings

    def _encode(self, text: Text) -> Embeddings:
        chunks = [chunker.chunks(text.sections)[:MAX_PROMPT_CHUNKS] for chunker in self._chunkers]
        count = max(map(len, chunks))
        # The tokenizers of Stable Diffusion XL read "!" differently, so one encoder may have fewer chunks.
        filled = [own + [Chunk() for _ in range(count - len(own))] for own in chunks]
        of_encoders = [self._encode_with(index, own, text) for index, own in enumerate(filled)]
        tokens = torch.cat([tokens for tokens, _ in of_encoders], dim=-1)
        pooled = of_encoders[-1][1]
        if text.is_zero:
            return Embeddings(torch.zeros_like(tokens), None if pooled is None else torch.zeros_like(pooled))
        return Embeddings(tokens, pooled)

    def _encode_with(self, index: int, chunks: list[Chunk], text: Text) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One encoder's embeddings (1, tokens, width) and, if it has a projection, its summary of the first chunk (1, width)."""
        encoder, chunker = self._encoders[index], self._chunkers[index]
        device = encoder.model.device
        tokens = torch.tensor([chunker.padded_tokens(chunk) for chunk in chunks], device=device)
        mask = None
        if getattr(encoder.model.config, "use_attention_mask", False):
            lengths = [len(chunk.tokens) for chunk in chunks]
            mask = torch.tensor([[1] * (length + 2) + [0] * (self.chunk_tokens - length) for length in lengths], device=device)
        adapters = tuple((_changes(lora, index), weight) for lora, weight in text.adapters if _changes(lora, index))
        with self._adapted[index].applied([adapters] * len(chunks)):
            embeddings, pooled = self._layer_output(encoder, tokens, mask, text.clip_skip)
        if any(weight != 1 for chunk in chunks for weight in chunk.weights):
            embeddings = _weighted(embeddings, [chunker.padded_weights(chunk) for chunk in chunks])
        return embeddings.reshape(1, -1, embeddings.shape[-1]).to(self._dtype), None if pooled is None else pooled[:1].to(self._dtype)

    def _layer_output(
        self, encoder: TextEncoder, tokens: torch.Tensor, mask: torch.Tensor | None, clip_skip: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """An encoder's output for each token (chunks, 77, width) and for each chunk (chunks, width), the latter with a projection only.

        Stable Diffusion 1 and 2 use the last layer's, normalized; Stable Diffusion XL that of the layer before it, as it is (Podell et al.
        2023). `clip_skip` n: that of n - 1 layers before.
        """
        if len(self._encoders) > 1:
            output = encoder.model(tokens, attention_mask=mask, output_hidden_states=True)
            return output.hidden_states[-1 - clip_skip], output[0] if encoder.has_projection else None
        if clip_skip == 1:
            return encoder.model(tokens, attention_mask=mask)[0], None
        states = encoder.model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        return encoder.model.final_layer_norm(states[-clip_skip]), None


def _changes(lora: Lora, encoder: int) -> Mapping[str, LowRank]:
    return (lora.text_encoder, lora.text_encoder_2)[encoder]


def _weighted(embeddings: torch.Tensor, weights: list[list[float]]) -> torch.Tensor:
    """Multiply each token's embedding by its weight, then restore each chunk's mean, as A1111 does."""
    factors = torch.tensor(weights, dtype=embeddings.dtype, device=embeddings.device)[:, :, None]
    weighted = embeddings * factors
    return weighted * (embeddings.mean(dim=(1, 2), keepdim=True) / weighted.mean(dim=(1, 2), keepdim=True))
