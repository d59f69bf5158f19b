"""JSON bodies: NaN and Infinity are refused with the name of their field; byte order marks and encodings."""

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
def test_an_error_names_the_field_that_is_not_a_number(body: str, field: str, constant: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(body % constant, "body")
    assert caught.value.message == f"{field}: {constant} is not a number in JSON"
    assert [problem.field for problem in caught.value.problems] == [field]


@pytest.mark.parametrize("body", ["NaN", "[NaN]", "[[1, [NaN]]]"])
def test_an_error_outside_any_field_names_the_body(body: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(body, "body")
    assert caught.value.message == "body: NaN is not a number in JSON"
    assert [problem.field for problem in caught.value.problems] == ["body"]


def test_a_long_name_is_truncated() -> None:
    with pytest.raises(InvalidRequest, match="^x{60}: NaN is not"):
        parse_json(f'{{"{"x" * 5000}": NaN}}', "body")


def test_an_error_names_the_first_of_several_fields() -> None:
    with pytest.raises(InvalidRequest, match="^a: Infinity is not"):
        parse_json('{"a": [Infinity, NaN], "b": NaN}', "body")


def test_the_text_nan_is_a_valid_string() -> None:
    assert parse_json('{"prompt": "NaN", "words": ["Infinity"]}', "body") == {"prompt": "NaN", "words": ["Infinity"]}


def test_nested_lists_are_checked_at_any_depth() -> None:
    depth = 500
    with pytest.raises(InvalidRequest, match="^deep: NaN is not"):
        parse_json('{"deep": ' + "[" * depth + "NaN" + "]" * depth + "}", "body")


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("body", [BOM + b'{"prompt": "x"}', BOM + b' \r\n{"prompt": "x"}', "\ufeff" + '{"prompt": "x"}'], ids=repr)
def test_a_byte_order_mark_is_ignored(body: bytes | str) -> None:
    assert parse_json(body, "body") == {"prompt": "x"}


@pytest.mark.parametrize("body", [BOM + BOM + b'{"prompt": "x"}', b'{"prompt": "x"}' + BOM, b"{" + BOM + b'"prompt": "x"}', BOM], ids=repr)
def test_only_one_byte_order_mark_at_the_beginning_is_ignored(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="^body: not valid JSON"):
        parse_json(body, "body")


def test_a_byte_order_mark_within_a_string_is_kept() -> None:
    assert parse_json(BOM + b'{"prompt": "' + BOM + b'x"}', "body") == {"prompt": "\ufeffx"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_another_encoding_than_utf_8_is_refused(encoding: str) -> None:
    """RFC 8259, 8.1: JSON is UTF-8."""
    with pytest.raises(InvalidRequest, match="^body: not"):
        parse_json('{"prompt": "\u00e9"}'.encode(encoding), "body")
