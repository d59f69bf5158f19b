"""The prompt grammar of AUTOMATIC1111's web UI as plain data: weights, BREAK, AND, prompt editing, alternation, LoRA tags.

It reads text and knows no tokens, embeddings or files: callers check whether a LoRA exists and how many chunks a text fills.
Every function reads a prompt once, without recursion: its time grows with the length, whatever the brackets are.

A prompt is read in this order: `without_lora_tags`, then `composed`, then `scheduled` on each part, then `emphasized` on each text.
A negative prompt is only `scheduled` and `emphasized`: AND and LoRA tags are text there.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

LEAST_WEIGHT = -10.0
GREATEST_WEIGHT = 10.0
BRACKET_WEIGHT = 1.1  # what ( ) multiply by and [ ] divide by

Span = tuple[int, int]  # first character and the one after the last


class PromptError(ValueError):
    """An invalid prompt. The message names the character, counted from 1, and what is wrong there."""


@dataclass(frozen=True)
class Emphasis:
    """A run of text with its weight: 1.0 is neutral."""

    text: str
    weight: float


@dataclass(frozen=True)
class LoraTag:
    """`<lora:name:...>`: the weights for the two models that a LoRA may change."""

    name: str
    unet_weight: float
    text_encoder_weight: float


def emphasized(text: str) -> tuple[tuple[Emphasis, ...], ...]:
    r"""Split a text into runs of equal weight, in one tuple for each part between BREAKs.

    `(a)` multiplies the weight by 1.1, `[a]` divides it by 1.1, `(a:1.2)` multiplies it by 1.2; nested brackets multiply.
    Round and square brackets may overlap. An opening bracket without a closing one counts to the end; a closing one without
    an opening one is text. `\(`, `\)`, `\[`, `\]` and `\\` stand for the character after the backslash; any other backslash is
    removed.
    The word BREAK splits the text wherever it stands, and is removed with the white space around it. (A1111 treats a BREAK inside
    brackets as text.) A part without text is one empty run of weight 1. Weights are rounded to 12 digits.

    Raises PromptError for `(a:1.2.3)`, and for a weight, written or multiplied, that is not between -10 and 10.
    """
    return _emphasized(_Text.of(text))


def composed(prompt: str) -> tuple[tuple[str, float], ...]:
    """Split a prompt at the word AND into parts, each with its weight: `a AND b :1.2`.

    Without a weight at its end a part has 1.0; white space before the weight and at the end is not part of the text.
    A prompt without AND is one part, and may have a weight too: `16:9` at its end is a weight of 9.

    Raises PromptError for a weight that is not between -10 and 10.
    """
    return tuple((part.characters, weight) for part, weight in _composed(_Text.of(prompt)))


def scheduled(prompt: str, steps: int) -> tuple[tuple[int, str], ...]:
    """The texts that a prompt stands for in the course of `steps` (at least 1): (last step, text), in rising order.

    Steps count from 1. Step i uses the first entry with i <= last step, so the last entry's is `steps`. (A1111 compares with
    a step counted from 0, and changes one step late; this is not repeated here.) Equal neighbours are merged.

    `[a:b:when]` is a up to step `when` and b from then on; `[b:when]` and `[:b:when]` add, `[a::when]` removes.
    A number with a "." is a share of the steps, one without is a step. `[a|b]` alternates from step to step.
    They may be nested, and stand in ( ) and [ ]. Brackets that do not match are text, and so are those around them. A prompt with
    a `|` outside an alternation, or with a backslash at the end of a line, is taken literally: nothing in it changes.

    Raises PromptError for a number of steps that is not finite.
    """
    return tuple((last_step, text) for last_step, text, _ in _scheduled(_Text.of(prompt), steps))


def without_lora_tags(prompt: str) -> tuple[str, tuple[LoraTag, ...]]:
    """Remove the LoRA tags from a prompt, and nothing of the white space around them; return them in their order.

    `<lora:name>` has weight 1, `<lora:name:0.8>` 0.8 for both models, `<lora:name:0.8:0.5>` 0.8 for the text encoder and 0.5 for
    the UNet. `te=0.8` and `unet=0.5` say the same by name; `lyco` is another word for `lora`.

    Raises PromptError for other tags in this form, such as `<hypernet:name:1>`, for arguments that are not listed here, and for a
    weight that is not between -10 and 10.
    """
    text, tags = _without_lora_tags(_Text.of(prompt))
    return text.characters, tags


def check(prompt: str, steps: int) -> None:
    """Raise PromptError, with the place in `prompt`, if it cannot be read for `steps` steps."""
    text, _ = _without_lora_tags(_Text.of(prompt))
    for part, _ in _composed(text):
        _check_texts(part, steps)


def check_negative(negative_prompt: str, steps: int) -> None:
    """As `check`, for a negative prompt, in which AND and LoRA tags are text."""
    _check_texts(_Text.of(negative_prompt), steps)


@dataclass(frozen=True)
class _Text:
    """Characters, and the place of each in the prompt that they come from, for messages."""

    characters: str
    places: Sequence[int]

    @classmethod
    def of(cls, prompt: str) -> _Text:
        return cls(prompt, range(len(prompt)))

    def part(self, span: Span) -> _Text:
        start, end = span
        return _Text(self.characters[start:end], self.places[start:end])

    def joined(self, spans: Sequence[Span]) -> _Text:
        if len(spans) == 1:
            return self.part(spans[0])
        return _Text(_joined(self.characters, spans), [place for start, end in spans for place in self.places[start:end]])

    def error(self, index: int, message: str) -> PromptError:
        return PromptError(f"character {self.places[index] + 1}: {message}")

    def weight(self, span: Span) -> float:
        """The number in the span, if it is one and in range."""
        start, end = span
        written = self.characters[start:end].strip()
        if not _NUMBER.fullmatch(written):
            raise self.error(start, f"{_quoted(written)} is not a weight")
        value = float(written)
        if not LEAST_WEIGHT <= value <= GREATEST_WEIGHT:
            raise self.error(start, f"the weight {_quoted(written)} is not between {LEAST_WEIGHT:g} and {GREATEST_WEIGHT:g}")
        return value


_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def _joined(characters: str, spans: Iterable[Span]) -> str:
    return "".join([characters[start:end] for start, end in spans])


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


# Emphasis

_BREAK = re.compile(r"\bBREAK\b")
# An escaped character or a lone backslash; a bracket; a weight with the bracket that it closes.
_EMPHASIS_MARK = re.compile(r"\\[\\()\[\]]?|[(\[\])]|:\s*(?P<weight>[-+]?[.\d]+)\s*\)")


class _Brackets:
    """The brackets of one kind: each has a factor and the bracket around it, and the innermost open one is current.

    A bracket's product is known at the end, because its factor stands at its end. Number 0 is "no bracket".
    """

    def __init__(self) -> None:
        self.current = 0
        self._around = [0]
        self._factors = [1.0]

    def open(self, factor: float) -> None:
        self._around.append(self.current)
        self._factors.append(factor)
        self.current = len(self._factors) - 1

    def close(self, factor: float | None = None) -> None:
        if factor is not None:
            self._factors[self.current] = factor
        self.current = self._around[self.current]

    def products(self) -> list[float]:
        """For each bracket, its factor times those of all brackets around it."""
        products = [1.0]
        for around, factor in zip(self._around[1:], self._factors[1:], strict=True):
            products.append(products[around] * factor)
        return products


class _Run(NamedTuple):
    """A text and the brackets that it stands in; `start` is where it begins in the text."""

    text: str
    start: int
    round_bracket: int
    square_bracket: int


class _Runs:
    """The runs of a text as its brackets open and close, in one list for each part between BREAKs."""

    def __init__(self, text: _Text) -> None:
        self.round, self.square = _Brackets(), _Brackets()
        self._text = text
        self._parts: list[list[_Run]] = [[]]

    def add(self, start: int, end: int) -> None:
        if start < end:
            run = _Run(self._text.characters[start:end], start, self.round.current, self.square.current)
            self._parts[-1].append(run)

    def add_with_breaks(self, start: int, end: int) -> None:
        if start < end:
            first, *others = _between_breaks(self._text.characters, start, end)
            self.add(*first)
            for span in others:
                self._parts.append([])
                self.add(*span)

    def weighed(self) -> tuple[tuple[Emphasis, ...], ...]:
        round_products, square_products = self.round.products(), self.square.products()

        def weight(run: _Run) -> float:
            return round_products[run.round_bracket] * square_products[run.square_bracket]

        for runs in self._parts:
            for run in runs:
                if not LEAST_WEIGHT <= weight(run) <= GREATEST_WEIGHT:
                    written = f"the brackets around this multiply to a weight of {weight(run):.4g}"
                    raise self._text.error(run.start, f"{written}, which is not between {LEAST_WEIGHT:g} and {GREATEST_WEIGHT:g}")
        return tuple(_merged((run.text, weight(run)) for run in runs) for runs in self._parts)


def _emphasized(text: _Text) -> tuple[tuple[Emphasis, ...], ...]:
    runs = _Runs(text)
    end_of_mark = 0
    for mark in _EMPHASIS_MARK.finditer(text.characters):
        runs.add_with_breaks(end_of_mark, mark.start())
        end_of_mark = mark.end()
        character = text.characters[mark.start()]
        if character == "\\":
            runs.add(mark.start() + 1, mark.end())
        elif character == "(":
            runs.round.open(BRACKET_WEIGHT)
        elif character == "[":
            runs.square.open(1 / BRACKET_WEIGHT)
        elif character == ":" and runs.round.current:
            runs.round.close(text.weight(mark.span("weight")))
        elif character == ")" and runs.round.current:
            runs.round.close()
        elif character == "]" and runs.square.current:
            runs.square.close()
        else:
            runs.add(mark.start(), mark.end())
    runs.add_with_breaks(end_of_mark, len(text.characters))
    return runs.weighed()


def _between_breaks(characters: str, start: int, end: int) -> Iterator[Span]:
    """The spans between the BREAKs in a span, without the white space beside the BREAKs."""
    after_break = False
    for word in _BREAK.finditer(characters, start, end):
        first = _after_space(characters, start, word.start()) if after_break else start
        yield first, first + len(characters[first : word.start()].rstrip())
        start, after_break = word.end(), True
    yield _after_space(characters, start, end) if after_break else start, end


def _after_space(characters: str, start: int, end: int) -> int:
    return end - len(characters[start:end].lstrip())


def _merged(runs: Iterable[tuple[str, float]]) -> tuple[Emphasis, ...]:
    texts: list[list[str]] = []
    weights: list[float] = []
    exact = None
    for text, weight in runs:
        if weight != exact:
            exact = weight
            rounded = _rounded(weight)
            if not weights or weights[-1] != rounded:
                texts.append([])
                weights.append(rounded)
        texts[-1].append(text)
    merged = tuple(Emphasis("".join(pieces), weight) for pieces, weight in zip(texts, weights, strict=True))
    return merged or (Emphasis("", 1.0),)


def _rounded(weight: float) -> float:
    """Drop the last bits, so that (([a])) weighs the same as (a) in whichever order the factors are multiplied."""
    return float(f"{weight:.12g}") + 0.0  # -0.0 becomes 0.0


# Composition

_AND = re.compile(r"\bAND\b")
_PART_WEIGHT = re.compile(r"\s*[-+]?(?:\d+\.?|\d*\.\d+)\s*")


def _composed(prompt: _Text) -> list[tuple[_Text, float]]:
    ends = [(word.start(), word.end()) for word in _AND.finditer(prompt.characters)]
    starts = [0, *(end for _, end in ends)]
    stops = [*(start for start, _ in ends), len(prompt.characters)]
    return [_weighed_part(prompt.part(span)) for span in zip(starts, stops, strict=True)]


def _weighed_part(part: _Text) -> tuple[_Text, float]:
    colon = part.characters.rfind(":")
    weight = _PART_WEIGHT.fullmatch(part.characters, colon + 1) if colon >= 0 else None
    text = part.part((0, len(part.characters[: colon if weight else None].rstrip())))
    if not weight:
        return text, 1.0
    return text, part.weight((_after_space(part.characters, *weight.span()), weight.end()))


# Editing and alternation

_EDITING_MARK = re.compile(r"\\.|[()\[\]:|\\]")
_WHEN = re.compile(r"\s*(?P<number>[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*")


@dataclass(frozen=True)
class _Edit:
    """A bracket whose text depends on the step; `end` is the character after it.

    With `last_step`, the first choice holds up to that step and the second one afterwards; without, the choices alternate.
    """

    end: int
    choices: tuple[Span, ...]
    last_step: int | None = None

    def choice(self, step: int) -> Span:
        if self.last_step is None:
            return self.choices[(step - 1) % len(self.choices)]
        return self.choices[0 if step <= self.last_step else 1]


@dataclass
class _OpenBracket:
    start: int
    character: str
    marks: list[int] = field(default_factory=list)  # the places of its : or |
    alternates: bool = False  # has | among them


def _scheduled(prompt: _Text, steps: int) -> list[tuple[int, str, list[Span]]]:
    """Last step, text, and the spans of the prompt that the text is made of."""
    edits = _edits(prompt, steps)
    starts = sorted(edits)
    last_steps = {steps}
    for edit in edits.values():
        if edit.last_step is None:
            last_steps.update(range(1, steps + 1))
        elif edit.last_step >= 1:
            last_steps.add(edit.last_step)
    entries: list[tuple[int, str, list[Span]]] = []
    for step in sorted(last_steps):
        spans = _spans_at(step, edits, starts, len(prompt.characters))
        text = _joined(prompt.characters, spans)
        if entries and entries[-1][1] == text:
            entries.pop()
        entries.append((step, text, spans))
    return entries


def _spans_at(step: int, edits: dict[int, _Edit], starts: list[int], length: int) -> list[Span]:
    """The pieces of the prompt that are its text at one step. `starts`: the keys of `edits` in order."""
    spans: list[Span] = []
    pending: list[Span] = [(0, length)]
    while pending:
        start, end = pending.pop()
        following = bisect_left(starts, start)
        if following == len(starts) or starts[following] >= end:
            spans.append((start, end))
            continue
        edit = edits[starts[following]]
        spans.append((start, starts[following]))
        pending.append((edit.end, end))
        pending.append(edit.choice(step))
    return spans


def _edits(prompt: _Text, steps: int) -> dict[int, _Edit]:
    """The edits and alternations of a prompt by the place of their opening bracket; none if the prompt is taken literally.

    A bracket that does not fit the grammar is text, and so is every bracket that is still open around it; complete edits inside stay.
    A | outside an alternation makes the whole prompt literal.
    """
    complete: list[tuple[_OpenBracket, int]] = []
    open_brackets: list[_OpenBracket] = []
    for match in _EDITING_MARK.finditer(prompt.characters):
        place, mark = match.start(), match[0]
        innermost = open_brackets[-1] if open_brackets else None
        if mark == "\\":
            return {}
        if mark[0] == "\\":
            continue
        if mark in "([":
            open_brackets.append(_OpenBracket(place, mark))
        elif innermost and _accepts(innermost, mark):
            innermost.marks.append(place)
            innermost.alternates = mark == "|"
        elif innermost and _is_closed_by(innermost, mark, prompt.characters, place):
            open_brackets.pop()
            if innermost.marks and mark == "]":
                complete.append((innermost, place))
        elif mark == "|" or any(bracket.alternates for bracket in open_brackets):
            return {}
        else:
            open_brackets.clear()
    if any(bracket.alternates for bracket in open_brackets):
        return {}
    return {bracket.start: _edit(prompt, bracket, place, steps) for bracket, place in complete}


def _accepts(bracket: _OpenBracket, mark: str) -> bool:
    """Whether the mark is a : or | that the bracket may have."""
    if mark == "|":
        return bracket.character == "[" and (bracket.alternates or not bracket.marks)
    most_colons = 1 if bracket.character == "(" else 2
    return mark == ":" and not bracket.alternates and len(bracket.marks) < most_colons


def _is_closed_by(bracket: _OpenBracket, mark: str, characters: str, place: int) -> bool:
    """Whether the mark, at `place`, closes the bracket, and the bracket is one that the grammar knows."""
    if bracket.character == "(":
        return mark == ")"
    if mark != "]":
        return False
    return bracket.alternates or not bracket.marks or _WHEN.fullmatch(characters, bracket.marks[-1] + 1, place) is not None


def _edit(prompt: _Text, bracket: _OpenBracket, place: int, steps: int) -> _Edit:
    """The edit that a complete [ ] with marks in it stands for. It is closed at `place`."""
    starts = [bracket.start + 1, *(mark + 1 for mark in bracket.marks)]
    parts = tuple(zip(starts, [*bracket.marks, place], strict=True))
    if bracket.alternates:
        return _Edit(place + 1, parts)
    before = parts[0] if len(parts) == 3 else (place, place)
    return _Edit(place + 1, (before, parts[-2]), _last_step(prompt, parts[-1], steps))


def _last_step(prompt: _Text, span: Span, steps: int) -> int:
    match = _WHEN.fullmatch(prompt.characters, *span)
    assert match, "the bracket was closed with a number"
    number = match["number"]
    value = float(number) * (steps if "." in number else 1)
    if not math.isfinite(value):
        raise prompt.error(match.start("number"), f"{_quoted(number)} is not a number of steps")
    return min(steps, int(value))


def _check_texts(part: _Text, steps: int) -> None:
    seen: set[str] = set()
    for _, text, spans in _scheduled(part, steps):
        if text not in seen:
            seen.add(text)
            _emphasized(part.joined(spans))


# LoRA tags

_TAG_START = re.compile(r"<(?P<kind>\w+):")
_TAG_KINDS = ("lora", "lyco")
_NAMED_WEIGHTS = ("te", "unet")


def _without_lora_tags(prompt: _Text) -> tuple[_Text, tuple[LoraTag, ...]]:
    characters = prompt.characters
    kept: list[Span] = []
    tags: list[LoraTag] = []
    start = searched = 0
    while match := _TAG_START.search(characters, searched):
        end = characters.find(">", match.end())
        if end < 0:
            break
        searched = match.end()
        if end == match.end():  # nothing in it: text
            continue
        if match["kind"] not in _TAG_KINDS:
            tag = _quoted(characters[match.start() : end + 1])
            raise prompt.error(match.start(), f"{tag} is not supported; tags are <lora:name> and <lora:name:weight>")
        tags.append(_lora_tag(prompt, match.start(), (match.end(), end)))
        kept.append((start, match.start()))
        start = searched = end + 1
    return prompt.joined([*kept, (start, len(characters))]), tuple(tags)


def _lora_tag(prompt: _Text, place: int, arguments: Span) -> LoraTag:
    values, named = _arguments(prompt.characters, arguments)
    for name, (start, _) in named.items():
        if name not in _NAMED_WEIGHTS:
            raise prompt.error(start - len(name) - 1, f"a LoRA tag has no argument {_quoted(name)}, allowed are te= and unet=")
    name = prompt.characters[slice(*values[0])] if values else ""
    if not name.strip():
        raise prompt.error(place, "the tag does not name a LoRA")
    if len(values) > 3:
        raise prompt.error(values[3][0], "a LoRA tag has at most two weights, for the text encoder and for the UNet")
    by_position = [prompt.weight(span) for span in values[1:]]
    by_name = {argument: prompt.weight(span) for argument, span in named.items()}
    text_encoder_weight = by_name.get("te", by_position[0] if by_position else 1.0)
    unet_weight = by_name.get("unet", by_position[1] if len(by_position) > 1 else text_encoder_weight)
    return LoraTag(name, unet_weight, text_encoder_weight)


def _arguments(characters: str, span: Span) -> tuple[list[Span], dict[str, Span]]:
    """The places of a tag's values, by position and by name."""
    values: list[Span] = []
    named: dict[str, Span] = {}
    start, end = span
    for argument in characters[start:end].split(":"):
        if argument.count("=") == 1:
            name = argument.partition("=")[0]
            named[name] = (start + len(name) + 1, start + len(argument))
        else:
            values.append((start, start + len(argument)))
        start += len(argument) + 1
    return values, named
