"""Cuts prompts into chunks of 75 tokens: words to tokens, textual inversions, BREAK, ends at commas, as in A1111.

Does not know models. `prompts.py` encodes the chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import CLIPTokenizer

from stable_diffusion.core.prompt_syntax import Emphasis

_BACK_TO_A_COMMA = 20  # tokens: a full chunk ends after its last comma, if that comma is at most so far back


@dataclass
class Chunk:
    """Up to 75 tokens with their weights."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    last_comma: int = -1

    def add(self, tokens: list[int], weight: float) -> None:
        self.tokens += tokens
        self.weights += [weight] * len(tokens)


class Chunker:
    """The tokenizer of a text encoder."""

    def __init__(self, tokenizer: CLIPTokenizer, inversions: Mapping[str, list[int]]) -> None:
        """`inversions`: the tokens that stand for a textual inversion, by its name."""
        self._tokenizer = tokenizer
        self.chunk_tokens: int = tokenizer.model_max_length - 2
        self._comma = tokenizer.get_vocab().get(",</w>")
        # A1111 compares tokens, so the case of a name does not matter. Longer names first: one may begin with another.
        found = [(self._tokens_of(name), tokens) for name, tokens in inversions.items()]
        self._inversions = sorted(found, key=lambda one: -len(one[0]))

    def chunks(self, sections: Sequence[tuple[Emphasis, ...]]) -> list[Chunk]:
        """The tokens of a text. Each section begins a new chunk."""
        return [chunk for section in sections for chunk in self._chunks_of_section(section)]

    def padded_tokens(self, chunk: Chunk) -> list[int]:
        """The chunk's tokens between those of the start and the end, filled up to the length that the text encoder takes."""
        start, end, padding = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        return [start, *chunk.tokens, end, *[padding] * (self.chunk_tokens - len(chunk.tokens))]

    def padded_weights(self, chunk: Chunk) -> list[float]:
        """The weights of `padded_tokens`."""
        return [1.0, *chunk.weights, *[1.0] * (self.chunk_tokens + 1 - len(chunk.weights))]

    def text_of(self, chunks: Sequence[Chunk]) -> str:
        return " ".join(self._tokenizer.decode(chunk.tokens) for chunk in chunks).strip()

    def _chunks_of_section(self, section: tuple[Emphasis, ...]) -> list[Chunk]:
        chunks = [Chunk()]
        for run in section:
            for tokens in self._words_of(run.text):
                is_comma = tokens == [self._comma]
                if len(chunks[-1].tokens) + len(tokens) > self.chunk_tokens:
                    chunks.append(Chunk() if is_comma or len(tokens) > 1 else self._after_comma(chunks[-1]))
                if is_comma:
                    chunks[-1].last_comma = len(chunks[-1].tokens)
                chunks[-1].add(tokens, run.weight)
        return chunks

    def _after_comma(self, full: Chunk) -> Chunk:
        """The next chunk after a full one. It begins with the tokens after the full one's last comma, if they are few."""
        following = Chunk()
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
