"""Encodes prompts: words to tokens in chunks, tokens to embeddings, with weights, CLIP skip and textual inversions.

A text of one unweighted chunk gives diffusers' embeddings bit for bit. Longer texts and weights follow A1111. Stable Diffusion XL has two
text encoders. `core/prompt_syntax.py` reads the grammar; this module does not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stable_diffusion.core.prompt_syntax import Emphasis
from stable_diffusion.core.requests import MAX_PROMPT_CHUNKS
from stable_diffusion.engine.adapters import AdaptedLayers, Lora, LowRank

# Embeddings of a chunk take a quarter of a megabyte in Stable Diffusion.
_KEPT_TEXTS = 64
_BACK_TO_A_COMMA = 20  # tokens: a full chunk ends after its last comma, if that comma is at most so far back


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


@dataclass
class _Chunk:
    """Up to 75 tokens with their weights."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    last_comma: int = -1

    def add(self, tokens: list[int], weight: float) -> None:
        self.tokens += tokens
        self.weights += [weight] * len(tokens)


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder with its tokenizer. Those of a model have the same vocabulary; only their padding may differ."""

    tokenizer: CLIPTokenizer
    model: CLIPTextModel | CLIPTextModelWithProjection

    @property
    def has_projection(self) -> bool:
        """Whether it also gives a summary of the text."""
        return isinstance(self.model, CLIPTextModelWithProjection)

    def padded(self, tokens: list[int]) -> list[int]:
        start, end, padding = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        return [start, *tokens, end, *[padding] * (self.tokenizer.model_max_length - 2 - len(tokens))]


class PromptEncoder:
    """The text encoders of a model. Keeps the embeddings of the most recent texts."""

    def __init__(self, encoders: Sequence[TextEncoder], dtype: torch.dtype, inversions: Mapping[str, list[int]]) -> None:
        """`inversions`: the tokens that stand for a textual inversion, by its name."""
        self._encoders = encoders
        self._tokenizer = encoders[0].tokenizer
        self._dtype = dtype
        self._adapted = [AdaptedLayers(getattr(encoder.model, "text_model", encoder.model)) for encoder in encoders]
        self.chunk_tokens = self._tokenizer.model_max_length - 2
        self._comma = self._tokenizer.get_vocab().get(",</w>")
        # A1111 compares tokens, so the case of a name does not matter. Longer names first: one may begin with another.
        found = [(self._tokens_of(name), tokens) for name, tokens in inversions.items()]
        self._inversions = sorted(found, key=lambda one: -len(one[0]))
        self._kept: OrderedDict[tuple[object, ...], Embeddings] = OrderedDict()  # the last used one at the end

    def dropped(self, text: Text) -> str:
        """The text beyond MAX_PROMPT_CHUNKS chunks; "" if there is none."""
        return " ".join(self._tokenizer.decode(chunk.tokens) for chunk in self._chunks(text)[MAX_PROMPT_CHUNKS:]).strip()

    def count_chunks(self, text: Text) -> int:
        """How many chunks the text fills, from 1 to MAX_PROMPT_CHUNKS."""
        return min(len(self._chunks(text)), MAX_PROMPT_CHUNKS)

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
        chunks = self._chunks(text)[:MAX_PROMPT_CHUNKS]
        of_encoders = [self._encode_with(index, chunks, text) for index in range(len(self._encoders))]
        tokens = torch.cat([tokens for tokens, _ in of_encoders], dim=-1)
        pooled = of_encoders[-1][1]
        if text.is_zero:
            return Embeddings(torch.zeros_like(tokens), None if pooled is None else torch.zeros_like(pooled))
        return Embeddings(tokens, pooled)

    def _encode_with(self, index: int, chunks: list[_Chunk], text: Text) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One encoder's embeddings (1, tokens, width) and, if it has a projection, its summary of the first chunk (1, width)."""
        encoder = self._encoders[index]
        device = encoder.model.device
        tokens = torch.tensor([encoder.padded(chunk.tokens) for chunk in chunks], device=device)
        mask = None
        if getattr(encoder.model.config, "use_attention_mask", False):
            lengths = [len(chunk.tokens) for chunk in chunks]
            mask = torch.tensor([[1] * (length + 2) + [0] * (self.chunk_tokens - length) for length in lengths], device=device)
        adapters = tuple((_changes(lora, index), weight) for lora, weight in text.adapters if _changes(lora, index))
        with self._adapted[index].applied([adapters] * len(chunks)):
            embeddings, pooled = self._layer_output(encoder, tokens, mask, text.clip_skip)
        if any(weight != 1 for chunk in chunks for weight in chunk.weights):
            embeddings = _weighted(embeddings, [self._padded_weights(chunk.weights) for chunk in chunks])
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

    def _chunks(self, text: Text) -> list[_Chunk]:
        """The text's tokens in chunks of 75. BREAK begins a new one."""
        return [chunk for section in text.sections for chunk in self._chunks_of_section(section)]

    def _chunks_of_section(self, section: tuple[Emphasis, ...]) -> list[_Chunk]:
        chunks = [_Chunk()]
        for run in section:
            for tokens in self._words_of(run.text):
                is_comma = tokens == [self._comma]
                if len(chunks[-1].tokens) + len(tokens) > self.chunk_tokens:
                    chunks.append(_Chunk() if is_comma or len(tokens) > 1 else self._after_comma(chunks[-1]))
                if is_comma:
                    chunks[-1].last_comma = len(chunks[-1].tokens)
                chunks[-1].add(tokens, run.weight)
        return chunks

    def _after_comma(self, full: _Chunk) -> _Chunk:
        """The next chunk after a full one. It begins with the tokens after the full one's last comma, if they are few."""
        following = _Chunk()
        if full.last_comma >= 0 and len(full.tokens) - full.last_comma <= _BACK_TO_A_COMMA:
            start = full.last_comma + 1
            following.tokens, following.weights = full.tokens[start:], full.weights[start:]
            del full.tokens[start:], full.weights[start:]
        return following

    def _words_of(self, text: str) -> list[list[int]]:
        """The tokens of a text one by one; those of a textual inversion together."""
        tokens = self._tokens_of(text)
        words: list[list[int]] = []
        position = 0
        while position < len(tokens):
            one_token = tokens[position : position + 1]
            found = (one for one in self._inversions if tokens[position : position + len(one[0])] == one[0])
            name, inversion = next(found, (one_token, one_token))
            words.append(inversion)
            position += len(name)
        return words

    def _tokens_of(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return tokens

    def _padded_weights(self, weights: list[float]) -> list[float]:
        return [1.0, *weights, *[1.0] * (self.chunk_tokens + 1 - len(weights))]


def _changes(lora: Lora, encoder: int) -> Mapping[str, LowRank]:
    return (lora.text_encoder, lora.text_encoder_2)[encoder]


def _weighted(embeddings: torch.Tensor, weights: list[list[float]]) -> torch.Tensor:
    """Multiply each token's embedding by its weight, then restore each chunk's mean, as A1111 does."""
    factors = torch.tensor(weights, dtype=embeddings.dtype, device=embeddings.device)[:, :, None]
    weighted = embeddings * factors
    return weighted * (embeddings.mean(dim=(1, 2), keepdim=True) / weighted.mean(dim=(1, 2), keepdim=True))
