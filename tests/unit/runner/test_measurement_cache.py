"""A measured batch limit applies to later starts under the same conditions, and to no others."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from stable_diffusion.engine.calibration import BatchLimit
from stable_diffusion.runner.measurement_cache import keep, measurements_file, recall

KEY: dict[str, str | int] = {"device": "Tesla T4", "dtype": "torch.float16", "width": 512}


@pytest.fixture(autouse=True)
def empty_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_stored_batch_limit_is_recalled_with_its_reason_and_the_log_names_the_file(caplog: pytest.LogCaptureFixture) -> None:
    assert recall(KEY) is None
    keep(KEY, BatchLimit(4, "3.1x the images"))
    with caplog.at_level(logging.INFO, "stable_diffusion"):
        recalled = recall(KEY)
    assert recalled is not None
    assert recalled.jobs == 4
    assert recalled.reason.startswith("3.1x the images; measured on 20")
    assert str(measurements_file()) in caplog.text
    assert str(measurements_file()) not in recalled.reason, "the reason is shown in /metrics"


def test_a_batch_limit_expires_after_a_week(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(KEY, BatchLimit(4, "because"))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 6 * 86_400)
    assert recall(KEY) is not None
    monkeypatch.setattr(time, "time", lambda: now + 8 * 86_400)
    assert recall(KEY) is None


def test_the_file_of_a_user_without_a_home_is_a_temporary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert measurements_file().is_absolute()


@pytest.mark.parametrize("change", [{"device": "H100"}, {"dtype": "torch.float32"}, {"width": 768}, {"torch": "3"}])
def test_a_batch_limit_of_other_conditions_is_not_recalled(change: dict[str, str | int]) -> None:
    keep(KEY, BatchLimit(4, "because"))
    assert recall(KEY | change) is None


def test_a_new_batch_limit_replaces_only_the_one_with_the_same_key() -> None:
    other = KEY | {"device": "H100"}
    keep(KEY, BatchLimit(4, "first"))
    keep(other, BatchLimit(10, "other"))
    keep(KEY, BatchLimit(2, "second"))
    assert [batch_limit.jobs for batch_limit in (recall(KEY), recall(other)) if batch_limit] == [2, 10]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        "\x00",
        '[{"key": {}}]',
        '[{"jobs": 4, "reason": "x", "measured_s": 9e9}]',
        '[{"key": {}, "jobs": "4", "reason": "x", "measured_s": 9e9}]',
    ],
)
def test_a_damaged_file_is_overwritten(content: str) -> None:
    measurements_file().parent.mkdir(parents=True)
    measurements_file().write_text(content)
    assert recall({}) is None
    keep(KEY, BatchLimit(4, "because"))
    assert recall(KEY) is not None


def test_a_folder_without_write_permission_is_logged_and_does_not_fail_the_start(
    empty_cache_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (empty_cache_folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache_folder / "file"))
    with caplog.at_level(logging.INFO, "stable_diffusion"):
        keep(KEY, BatchLimit(4, "because"))
    assert "cannot be stored" in caplog.text
    assert recall(KEY) is None
