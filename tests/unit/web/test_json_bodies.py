"""What is no number in JSON is refused wherever it stands, by the name under which it stands."""

from __future__ import annotations

import pytest

from stable_diffusion.core.errors import InvalidRequest
from stable_diffusion.web.body import parse_json


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"prompt": "x", "guidance_scale": %s}', "guidance_scale"),
        ('{"prompt": "x", "sizes": [1, [2, [%s]], 3], "seed": 1}', "sizes"),
        ('{"outer": {"inner": %s}}', "inner"),
        ('{"outer": [{"inner": [%s]}]}', "inner"),
        ('{"outer": [{"inner": 1}, %s]}', "outer"),
    ],
)
def test_the_field_that_is_no_number_is_named(body: str, field: str, constant: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(body % constant, "body")
    assert caught.value.message == f"{field}: {constant} is not a number in JSON"
    assert [problem.field for problem in caught.value.problems] == [field]


@pytest.mark.parametrize("body", ["NaN", "[NaN]", "[[1, [NaN]]]"])
def test_where_no_field_is_the_body_is_named(body: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(body, "body")
    assert caught.value.message == "body: NaN is not a number in JSON"
    assert [problem.field for problem in caught.value.problems] == ["body"]


def test_a_long_name_is_cut() -> None:
    with pytest.raises(InvalidRequest, match="^x{60}: NaN is not"):
        parse_json(f'{{"{"x" * 5000}": NaN}}', "body")


def test_the_first_of_several_is_told() -> None:
    with pytest.raises(InvalidRequest, match="^a: Infinity is not"):
        parse_json('{"a": [Infinity, NaN], "b": NaN}', "body")


def test_a_text_that_says_the_same_is_a_text() -> None:
    assert parse_json('{"prompt": "NaN", "words": ["Infinity"]}', "body") == {"prompt": "NaN", "words": ["Infinity"]}


def test_lists_within_lists_are_looked_at_however_deep_they_are() -> None:
    depth = 500
    with pytest.raises(InvalidRequest, match="^deep: NaN is not"):
        parse_json('{"deep": ' + "[" * depth + "NaN" + "]" * depth + "}", "body")


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("body", [BOM + b'{"prompt": "x"}', BOM + b' \r\n{"prompt": "x"}', "\ufeff" + '{"prompt": "x"}'], ids=repr)
def test_a_byte_order_mark_is_no_part_of_the_document(body: bytes | str) -> None:
    assert parse_json(body, "body") == {"prompt": "x"}


@pytest.mark.parametrize("body", [BOM + BOM + b'{"prompt": "x"}', b'{"prompt": "x"}' + BOM, b"{" + BOM + b'"prompt": "x"}', BOM], ids=repr)
def test_only_one_and_only_at_the_begin(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="^body: not valid JSON"):
        parse_json(body, "body")


def test_a_mark_within_a_text_is_kept() -> None:
    assert parse_json(BOM + b'{"prompt": "' + BOM + b'x"}', "body") == {"prompt": "\ufeffx"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_another_encoding_is_refused_by_name(encoding: str) -> None:
    """RFC 8259, 8.1: it is UTF-8."""
    with pytest.raises(InvalidRequest, match="^body: not"):
        parse_json('{"prompt": "\u00e9"}'.encode(encoding), "body")
