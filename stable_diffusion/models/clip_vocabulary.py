"""CLIP's vocabulary, which all kinds of Stable Diffusion models share. A checkpoint in one file does not contain it.

Reads the shipped list of merges, from which everything follows. Knows no tokenizer.
"""

from __future__ import annotations

import lzma
from pathlib import Path

_MERGES_FILE = Path(__file__).parent / "kinds" / "clip_merges.txt.xz"
_END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The 49,408 tokens with their numbers, and the merges in their order.

    The tokens are the 256 bytes, the same at a word's end, what each merge makes, and two that begin and end a text.
    """
    with lzma.open(_MERGES_FILE, "rt", encoding="utf-8") as stream:
        merges = [(first, second) for first, second in (line.split() for line in stream)]
    letters = _letters_of_bytes()
    tokens = [*letters, *(letter + _END_OF_WORD for letter in letters), *(first + second for first, second in merges), START, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def _letters_of_bytes() -> list[str]:
    """A visible letter for each byte, in the vocabulary's order: visible ones stand for themselves and come first (as in GPT-2)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in visible] + [chr(256 + index) for index in range(256 - len(visible))]
