"""What whoever runs the server may set: each variable has one rule, and what is wrong is refused by its name."""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest

from stable_diffusion.core.errors import SettingError
from stable_diffusion.core.settings import LIMIT_VARIABLES, Limits, Settings, StoreAddress, read_limits, read_settings, unknown_variables
from tests.pages import PAGES, ROOT

FLAGS = {"SD_LOG_PROMPTS": "log_prompts", "SD_WITHOUT_KEYS": "without_keys"}
OTHERS = (
    *("SD_MODEL", "SD_SAFETY", "SD_OPEN", "SD_RATE_LIMIT", "SD_SHARED_STATE", "SD_EXECUTION"),
    *(name for name, _ in LIMIT_VARIABLES.values()),
)
HOME = "core/settings.py"


def test_what_is_not_set_has_its_default() -> None:
    assert read_limits({}) == read_limits(dict.fromkeys((name for name, _ in LIMIT_VARIABLES.values()), " ")) == Limits()


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_variable_is_not_set(empty: str) -> None:
    assert read_settings({}) == read_settings(dict.fromkeys((*FLAGS, *OTHERS), empty)) == Settings()


def test_each_variable_sets_its_limit() -> None:
    values = {name: str(number) for number, (name, _) in enumerate(LIMIT_VARIABLES.values(), 1)}
    assert read_limits(values) == read_settings(values).limits == Limits(1, 2, 3, 4)


def test_each_variable_sets_its_field() -> None:
    values = {"SD_MODEL": " /a/model ", "SD_SAFETY": "always", "SD_OPEN": "docs, metrics,", "SD_RATE_LIMIT": "30", "SD_EXECUTION": "eager"}
    assert read_settings({**values, **dict.fromkeys(FLAGS, "1")}) == Settings(
        model="/a/model",
        safety="always",
        log_prompts=True,
        execution="eager",
        open=frozenset({"docs", "metrics"}),
        without_keys=True,
        requests_per_minute=30,
    )


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        *((text, True) for text in ("1", "true", "True", "TRUE", "yes", "Yes", "on", "ON", " 1 ")),
        *((text, False) for text in ("0", "false", "False", "no", "NO", "off", "Off", "", " ")),
    ],
)
@pytest.mark.parametrize("name", FLAGS)
def test_what_is_on_or_off_is_said_in_the_same_words_everywhere(name: str, value: str, meant: bool) -> None:
    assert asdict(read_settings({name: value})) == asdict(Settings()) | {FLAGS[name]: meant}


@pytest.mark.parametrize("value", ["maybe", "2", "-1", "1.0", "y", "t", "enabled", "yes please", "none", "x" * 5000])
@pytest.mark.parametrize("name", FLAGS)
def test_any_other_word_is_refused_by_the_name_of_its_variable(name: str, value: str) -> None:
    with pytest.raises(SettingError) as refused:
        read_settings({name: value})
    assert str(refused.value) == f"{name} must be 1, true, yes or on, or else 0, false, no, off or empty, not {value[:60]!r}"


@pytest.mark.parametrize("value", ['"1"', "'1'", ' "demo" ', '""'])
@pytest.mark.parametrize("name", [*FLAGS, *OTHERS])
def test_a_value_that_still_has_its_quotes_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(SettingError) as refused:
        read_settings({name: value})
    assert str(refused.value) == f"{name}: the value is in quotes. Leave them out: Docker keeps the quotes in an env file"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e10", "ten", "1,5"])
@pytest.mark.parametrize("name", [name for name, _ in LIMIT_VARIABLES.values()])
def test_what_cannot_be_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=rf"{name} must be a number above 0, at most \d+, not "):
        read_limits({name: value})


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("SD_SAFETY", "on", "SD_SAFETY is 'on', allowed are always, default-on, off"),
        ("SD_OPEN", "docs,ui", "SD_OPEN: 'ui' cannot be opened, only docs and metrics"),
        ("SD_RATE_LIMIT", "0", "SD_RATE_LIMIT: must be a whole number from 1 to 100000, generation requests per minute, not '0'"),
        ("SD_STUCK_STEP_S", "soon", "SD_STUCK_STEP_S must be a number above 0, at most 86400, not 'soon'"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(name: str, value: str, told: str) -> None:
    with pytest.raises(SettingError, match=f"^{re.escape(told)}$"):
        read_settings({name: value})


@pytest.mark.parametrize("name", [*FLAGS, *OTHERS[1:]])
def test_a_long_value_is_cut(name: str) -> None:
    with pytest.raises(SettingError, match=f"^{name}") as refused:
        read_settings({name: "x" * 5000})
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("", "auto"),
        ("auto", "auto"),
        ("graphs", "graphs"),
        ("graphs+channels_last", "channels_last+graphs"),
        (" compile + graphs + channels_last ", "channels_last+compile+graphs"),
    ],
)
def test_ways_of_computing_are_combined_in_any_order(value: str, meant: str) -> None:
    assert read_settings({"SD_EXECUTION": value}).execution == meant


@pytest.mark.parametrize("value", ["on", "GRAPHS", "eager+graphs", "auto+graphs", "graphs+graphs", "graphs+", "graphs,compile", "tensorrt"])
def test_an_unknown_way_of_computing_is_refused_with_what_there_is(value: str) -> None:
    with pytest.raises(SettingError) as refused:
        read_settings({"SD_EXECUTION": value})
    allowed = "auto, eager, or one or more of channels_last, compile, graphs joined by +"
    assert str(refused.value) == f"SD_EXECUTION must be {allowed}, not {value!r}"


@pytest.mark.parametrize("value", ["on", "off", "1"])
def test_the_switch_of_an_earlier_version_is_refused_with_what_took_its_place(value: str) -> None:
    with pytest.raises(SettingError, match="^SD_CUDA_GRAPHS is now SD_EXECUTION: graphs for on, eager for off, or auto"):
        read_settings({"SD_CUDA_GRAPHS": value})
    assert read_settings({"SD_CUDA_GRAPHS": ""}) == Settings()


def test_a_misspelt_variable_is_found_with_the_setting_that_is_meant() -> None:
    environment = {"SD_RATE_LIMT": "5", "SD_API_KEY": "x", "SD_WEBUI_URL": "http://127.0.0.1:3000", "PATH": "/bin", "MY_SD_MODEL": "x"}
    assert unknown_variables(environment) == {"SD_API_KEY": "SD_API_KEYS", "SD_RATE_LIMT": "SD_RATE_LIMIT", "SD_WEBUI_URL": ""}


def test_no_setting_of_the_page_is_unknown() -> None:
    names = set(re.findall(r"^\| `(SD_[A-Z_]+)` \|", PAGES["docs/configuration.md"], re.MULTILINE))
    assert len(names) == 17
    assert unknown_variables(dict.fromkeys([*names, "SD_SHARED_FOLDER", "SD_OPERATORS_THREADS"], "")) == {}


def test_the_page_has_each_variable_with_its_default() -> None:
    page = PAGES["docs/configuration.md"]
    for field, (name, _) in LIMIT_VARIABLES.items():
        assert f"\n| `{name}` | {getattr(Limits(), field):.0f} |" in page
    for name in (*FLAGS, *OTHERS, "SD_API_KEYS", "SD_API_KEYS_FILE"):
        assert f"\n| `{name}` |" in page


def test_no_other_module_has_the_name_of_a_variable() -> None:
    package = ROOT / "stable_diffusion"
    modules = {file.relative_to(package).as_posix(): file.read_text(encoding="utf-8") for file in package.rglob("*.py")}
    assert {path for path, text in modules.items() if re.search(r"""["']SD_[A-Z_]+["']""", text)} == {HOME}


@pytest.mark.parametrize(
    ("url", "address", "shown"),
    [
        ("redis://127.0.0.1", StoreAddress("127.0.0.1", 6379, False, None, None, 0), "127.0.0.1:6379"),
        ("redis://localhost:7000/3", StoreAddress("localhost", 7000, False, None, None, 3), "localhost:7000"),
        ("redis://[::1]:7000/", StoreAddress("::1", 7000, False, None, None, 0), "[::1]:7000"),
        ("rediss://:a%2Fb%40c@cache.example", StoreAddress("cache.example", 6379, True, None, "a/b@c", 0), "cache.example:6379"),
        ("rediss://alice:secret@192.0.2.1:1", StoreAddress("192.0.2.1", 1, True, "alice", "secret", 0), "192.0.2.1:1"),
    ],
)
def test_the_address_of_the_shared_state_is_read_from_a_url(url: str, address: StoreAddress, shown: str) -> None:
    read = read_settings({"SD_SHARED_STATE": url})
    assert read.shared_state == address
    assert str(address) == shown
    assert address.password is None or address.password not in repr(read)


@pytest.mark.parametrize("url", ["redis://:correct-horse@cache.example", "redis://:correct-horse@192.0.2.1:6379", "redis://0.0.0.0"])
def test_a_shared_state_on_another_machine_must_be_encrypted(url: str) -> None:
    with pytest.raises(
        SettingError, match="^SD_SHARED_STATE: redis:// would send .* unencrypted to another machine, .*; use rediss://$"
    ) as told:
        read_settings({"SD_SHARED_STATE": url})
    assert "horse" not in str(told.value)


@pytest.mark.parametrize(
    "url",
    [
        *("cache.example", "http://cache.example", "redis://", "redis://:correct-horse@", "rediss://:correct-horse@cache.example:port"),
        *("rediss://cache.example/horse", "rediss://cache.example/0?password=horse", "rediss://cache.example/0#horse", "redis://[::1"),
        *("rediss://cache.example:99999", "unix:///horse", "rediss://cache.example/-1"),
    ],
)
def test_a_url_of_no_shared_state_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(SettingError, match="^SD_SHARED_STATE must be rediss://") as told:
        read_settings({"SD_SHARED_STATE": url})
    assert "horse" not in str(told.value)
