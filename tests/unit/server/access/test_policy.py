"""The operator's access policy, and at which addresses a server starts with it."""

from __future__ import annotations

import logging

import pytest

from stable_diffusion.core.addresses import is_loopback
from stable_diffusion.core.errors import SettingError
from stable_diffusion.server.access.keys import read_keys
from stable_diffusion.server.access.policy import Access, caller_at, check_exposure, read_access

KEY = "correct-horse-battery-staple"
KEYED = Access(read_keys({"SD_API_KEYS": f"alice:{KEY}"}))


def test_without_settings_there_are_no_keys_and_no_limits() -> None:
    assert read_access({}) == Access()


def test_every_variable_is_read() -> None:
    access = read_access({"SD_API_KEYS": KEY, "SD_OPEN": "docs, metrics", "SD_WITHOUT_KEYS": "1", "SD_RATE_LIMIT": "30"})
    assert access == Access(read_keys({"SD_API_KEYS": KEY}), frozenset({"docs", "metrics"}), True, 30)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SD_OPEN", "docs,ui", "SD_OPEN: 'ui' cannot be opened, only docs and metrics"),
        ("SD_WITHOUT_KEYS", "maybe", "SD_WITHOUT_KEYS must be 1, true, yes or on, or else 0, false, no, off or empty, not 'maybe'"),
        *(
            ("SD_RATE_LIMIT", value, "SD_RATE_LIMIT: must be a whole number from 1 to 100000")
            for value in ("0", "-1", "1.5", "1e3", "٣", "x")
        ),
        ("SD_RATE_LIMIT", "9" * 5000, "SD_RATE_LIMIT: must be a whole number"),
    ],
)
def test_an_error_names_the_variable_and_the_allowed_values(name: str, value: str, words: str) -> None:
    with pytest.raises(SettingError) as refused:
        read_access({name: value})
    assert words in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
def test_loopback_addresses_are_recognised(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "::ffff:10.0.0.1", "localhost", ""])
def test_other_addresses_are_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("in_bento", [True, False])
def test_a_server_without_keys_starts_quietly_on_a_loopback_address(in_bento: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        check_exposure(Access(), "127.0.0.1", in_bento=in_bento)
    assert caplog.text == ""


def test_a_source_checkout_without_keys_starts_on_other_addresses_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_exposure(Access(), "0.0.0.0", in_bento=False)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("NO API KEY IS SET, AND THE SERVER LISTENS ON 0.0.0.0: everyone who reaches")


def test_a_bento_without_keys_starts_on_other_addresses_only_on_request(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SettingError) as refused:
        check_exposure(Access(), "0.0.0.0", in_bento=True)
    assert all(words in str(refused.value) for words in ("SD_API_KEYS", "python -m stable_diffusion.keys", "SD_WITHOUT_KEYS=1"))
    assert "In an env file the line is SD_API_KEYS=alice:sha256:..., without quotes" in str(refused.value)
    check_exposure(Access(is_without_keys_on_purpose=True), "0.0.0.0", in_bento=True)
    assert "NO API KEY IS SET" in caplog.text


def test_a_server_with_keys_starts_on_any_address_and_logs_only_their_names(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        check_exposure(KEYED, "0.0.0.0", in_bento=True)
    assert "Keys: alice" in caplog.text
    assert KEY not in caplog.text
    assert KEYED.keys[0].digest.hex() not in caplog.text


@pytest.mark.parametrize(
    ("address", "another", "is_the_same"),
    [
        ("2001:db8:1:2:3::4", "2001:db8:1:2:ffff::", True),
        ("2001:db8:1:2::", "2001:db8:1:3::", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("192.0.2.1", "192.0.2.1", True),
        ("testclient", "", False),
    ],
)
def test_all_addresses_of_an_ipv6_network_are_one_caller(address: str, another: str, is_the_same: bool) -> None:
    assert (caller_at(address) == caller_at(another)) is is_the_same
