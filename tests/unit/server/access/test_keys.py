"""API keys: the formats that operators may write and requests may carry. No secret stays in memory or appears in a message."""

from __future__ import annotations

import base64
import hashlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from stable_diffusion.core.errors import SettingError
from stable_diffusion.server.access.keys import Key, carries_key, keep_only_digests, name_of_key, read_keys
from tests.http.servers import ROOT

ALICE, BOB = "correct-horse-battery-staple", "tr0ub4dor/and+three=="
DIGEST = hashlib.sha256(BOB.encode()).hexdigest()
KEYS = read_keys({"SD_API_KEYS": f"alice:{ALICE},bob:sha256:{DIGEST}"})


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def named(**headers: str) -> str | None:
    return name_of_key(KEYS, Headers({name.replace("_", "-"): value for name, value in headers.items()}))


def test_a_key_has_an_optional_name_and_may_be_a_digest() -> None:
    keys = read_keys({"SD_API_KEYS": f" alice:{ALICE} , sha256:{DIGEST.upper()},, {'x' * 16} "})
    assert [key.name for key in keys] == ["alice", "key2", "key3"]
    assert [key.digest.hex() for key in keys] == [hashlib.sha256(one.encode()).hexdigest() for one in (ALICE, BOB, "x" * 16)]


def test_unset_and_empty_variables_give_no_keys() -> None:
    assert read_keys({}) == read_keys({"SD_API_KEYS": "", "SD_API_KEYS_FILE": ""}) == ()


def test_a_key_file_has_one_key_per_line_and_comments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the office\nalice:{ALICE}\n\n  bob:sha256:{DIGEST}\n")
    file.chmod(0o600)
    variables = {"SD_API_KEYS_FILE": str(file)}
    assert read_keys(variables) == KEYS
    assert caplog.text == ""
    file.chmod(0o640)
    with caplog.at_level(logging.WARNING):
        assert read_keys(variables) == KEYS
    assert f"chmod 600 {file}" in caplog.text
    assert [key.name for key in read_keys({**variables, "SD_API_KEYS": "carol:" + "c" * 20})] == ["carol", "alice", "bob"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("alice:secret-of-15-ch", "SD_API_KEYS, entry 1 (alice): a key must have at least 16 characters, got 15"),
        (f"alice:{ALICE},bob:", "SD_API_KEYS, entry 2 (bob): a key must have at least 16 characters, got 0"),
        ("my name:" + "s" * 20, "SD_API_KEYS, entry 1: the name before the colon must be 1 to 64 letters, digits"),
        ('{"key":"' + "s" * 20 + '"}', "SD_API_KEYS, entry 1: the name before the colon must be 1 to 64 letters, digits"),
        ("alice:" + "s" * 20 + " s", "must be printable ASCII without spaces"),
        ("alice:" + "s" * 20 + ":s", "without spaces, commas or colons"),
        ("alice:" + "sü" * 20, "must be printable ASCII"),
        ("alice:sha256:0123", "sha256: must be followed by 64 hexadecimal digits"),
        ("sha256:" + "g" * 64, "sha256: must be followed by 64 hexadecimal digits"),
        (f"alice:{ALICE},alice:{BOB}", "two keys have the name alice"),
        (f"bob:{BOB},carol:sha256:{DIGEST}", "bob and carol are the same key"),
        (" , ", "SD_API_KEYS is set but contains no key"),
        *(
            (f"{quote}{entries}{quote}", "SD_API_KEYS: the value is in quotes. Leave them out: Docker keeps the quotes in an env file")
            for entries in (f"alice:sha256:{DIGEST}", f"alice:{ALICE},bob:{BOB}", "s" * 20, "")
            for quote in "\"'"
        ),
        (f'alice:{ALICE},"bob:{BOB}"', "SD_API_KEYS, entry 2: must not be in quotes"),
        (f'alice:{ALICE},bob:"{BOB}"', "SD_API_KEYS, entry 2: must not be in quotes"),
        (f"alice:{ALICE},SD_API_KEYS=bob:{BOB}", "SD_API_KEYS, entry 2: leave out 'SD_API_KEYS='"),
    ],
)
def test_an_error_names_the_invalid_entry_and_never_the_secret(value: str, words: str) -> None:
    with pytest.raises(SettingError) as refused:
        read_keys({"SD_API_KEYS": value})
    assert words in str(refused.value)
    assert not [secret for secret in (ALICE, BOB, "secret-of", "ssss") if secret in str(refused.value)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f'"alice:sha256:{DIGEST}"', "SD_API_KEYS_FILE, line 2: must not be in quotes"),
        (f"SD_API_KEYS=alice:sha256:{DIGEST}", "SD_API_KEYS_FILE, line 2: leave out 'SD_API_KEYS='"),
    ],
)
def test_a_line_copied_from_an_env_file_is_refused_in_a_key_file(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the office\n{line}\n")
    file.chmod(0o600)
    with pytest.raises(SettingError, match=words):
        read_keys({"SD_API_KEYS_FILE": str(file)})
    with pytest.raises(SettingError, match="SD_API_KEYS_FILE: the value is in quotes"):
        read_keys({"SD_API_KEYS_FILE": f'"{file}"'})


@pytest.mark.parametrize("others", [{}, {"SD_API_KEYS": f"alice:{ALICE}"}])
def test_a_variable_named_like_an_entry_is_refused(others: dict[str, str]) -> None:
    """Docker makes such a variable of the env file line `bob:tr0ub4dor/and+three==`; it drops the line `bob:sha256:...`."""
    name, _, value = f"bob:{BOB}".partition("=")
    with pytest.raises(SettingError) as refused:
        read_keys({**others, name: value})
    assert "a variable whose name begins with 'bob:'" in str(refused.value)
    assert "the line must begin with SD_API_KEYS=" in str(refused.value)
    assert "tr0ub4dor" not in str(refused.value)
    assert read_keys({"IMAGE": f"sha256:{DIGEST}", "a:b": "c", "with space:" + "s" * 20: "x"}) == ()


def test_a_missing_or_empty_key_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="SD_API_KEYS_FILE: .*missing cannot be read: No such file"):
        read_keys({"SD_API_KEYS_FILE": str(tmp_path / "missing")})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match=f"SD_API_KEYS_FILE: {tmp_path}/keys cannot be read: No such file"):
        read_keys({"SD_API_KEYS_FILE": "keys"})
    (tmp_path / "empty").write_text("# nobody\n")
    (tmp_path / "empty").chmod(0o600)
    with pytest.raises(SettingError, match="SD_API_KEYS_FILE is set but contains no key"):
        read_keys({"SD_API_KEYS_FILE": str(tmp_path / "empty")})


def test_child_processes_inherit_digests_and_no_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"bob:{BOB}")
    file.chmod(0o600)
    variables = {"SD_API_KEYS": f"alice:{ALICE}", "SD_API_KEYS_FILE": str(file)}
    keep_only_digests(variables)
    assert list(variables) == ["SD_API_KEYS"]
    assert ALICE not in str(variables)
    assert BOB not in str(variables)
    assert read_keys(variables) == KEYS
    before = dict(variables)
    keep_only_digests(variables)
    assert variables == before


def test_invalid_keys_are_left_for_read_keys_to_report() -> None:
    variables = {"SD_API_KEYS": "short"}
    keep_only_digests(variables)
    assert variables == {"SD_API_KEYS": "short"}


def test_a_request_carries_its_key_in_any_of_three_ways() -> None:
    assert named(Authorization=f"Bearer {ALICE}") == "alice"
    assert named(Authorization=f"bearer  {ALICE} ") == "alice"
    assert named(Authorization=basic("anything", BOB)) == "bob"
    assert named(Authorization=basic("", BOB)) == "bob"
    assert named(X_API_Key=ALICE) == "alice"
    assert named(Authorization=basic("of", "the proxy before us"), X_API_Key=ALICE) == "alice"


@pytest.mark.parametrize(
    "authorization",
    [
        *("", "Bearer", "Bearer ", "Basic", "Basic !", "Basic é", ALICE, f"Digest {ALICE}", f"Bearer {ALICE}x", f"Bearer {ALICE[:-1]}"),
        *(f"Bearer alice:{ALICE}", f"Bearer {DIGEST}", f"Bearer sha256:{DIGEST}", f"Bearer {ALICE.upper()}", f"Bearer {ALICE},{BOB}"),
        *(basic(ALICE, ""), basic("alice", ALICE + "\n"), basic("alice", "alice"), f"Basic {ALICE}"),
    ],
)
def test_other_credentials_match_no_key(authorization: str) -> None:
    assert named(Authorization=authorization) is None


def test_an_empty_header_carries_no_key_but_a_wrong_key_counts_as_one() -> None:
    assert not any(
        carries_key(Headers(headers)) for headers in ({}, {"Authorization": ""}, {"Authorization": "Bearer "}, {"X-API-Key": ""})
    )
    assert all(carries_key(Headers(headers)) for headers in ({"Authorization": "Bearer wrong"}, {"X-API-Key": "wrong"}))


def test_the_representation_of_a_key_has_no_secret() -> None:
    assert ALICE not in repr(KEYS)
    assert str(KEYS[1]) == f"bob:sha256:{DIGEST}"


def test_the_command_prints_a_new_key_and_its_digest_line() -> None:
    outputs = [run("carol") for _ in range(2)]
    for output in outputs:
        secret, line = (text.strip() for text in output.stdout.splitlines() if text.startswith("  "))
        assert len(secret) == 43
        assert read_keys({"SD_API_KEYS": line}) == (Key("carol", hashlib.sha256(secret.encode()).digest()),)
        assert read_keys({"SD_API_KEYS": f"carol:{secret}"}) == read_keys({"SD_API_KEYS": line})
    assert outputs[0].stdout != outputs[1].stdout


@pytest.mark.parametrize("arguments", [(), ("--help",), ("a", "b"), ("a name",)])
def test_the_command_explains_its_usage(arguments: tuple[str, ...]) -> None:
    finished = run(*arguments)
    assert finished.returncode == 1
    assert "NAME" in finished.stderr
    assert finished.stdout == ""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stable_diffusion.keys", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
