"""A measured cap serves the next start under the same conditions, and no other."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from stable_diffusion.engine.calibration import BatchLimit
from stable_diffusion.runner.batch_limit_cache import batch_limits_file, keep, recall

KEY: dict[str, str | int] = {"device": "Tesla T4", "dtype": "torch.float16", "width": 512}


@pytest.fixture(autouse=True)
def empty_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_kept_cap_comes_back_with_its_reason_and_the_log_says_from_where(caplog: pytest.LogCaptureFixture) -> None:
    assert recall(KEY) is None
    keep(KEY, BatchLimit(4, "3.1x the pictures"))
    with caplog.at_level(logging.INFO, "stable_diffusion"):
        recalled = recall(KEY)
    assert recalled is not None
    assert recalled.jobs == 4
    assert recalled.reason.startswith("3.1x the pictures; measured on 20")
    assert str(batch_limits_file()) in caplog.text
    assert str(batch_limits_file()) not in recalled.reason, "the reason is shown in /metrics"


def test_a_cap_is_measured_again_after_a_week(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(KEY, BatchLimit(4, "because"))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 6 * 86_400)
    assert recall(KEY) is not None
    monkeypatch.setattr(time, "time", lambda: now + 8 * 86_400)
    assert recall(KEY) is None


def test_a_user_without_a_home_has_a_place_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert batch_limits_file().is_absolute()


@pytest.mark.parametrize("change", [{"device": "H100"}, {"dtype": "torch.float32"}, {"width": 768}, {"torch": "3"}])
def test_a_cap_of_other_conditions_does_not_count(change: dict[str, str | int]) -> None:
    keep(KEY, BatchLimit(4, "because"))
    assert recall(KEY | change) is None


def test_a_newer_cap_takes_the_place_of_the_older_one_and_leaves_the_others() -> None:
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
def test_a_damaged_file_is_measured_over(content: str) -> None:
    batch_limits_file().parent.mkdir(parents=True)
    batch_limits_file().write_text(content)
    assert recall({}) is None
    keep(KEY, BatchLimit(4, "because"))
    assert recall(KEY) is not None


def test_a_folder_that_cannot_be_written_to_is_said_and_no_failure(
    empty_cache_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (empty_cache_folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache_folder / "file"))
    with caplog.at_level(logging.INFO, "stable_diffusion"):
        keep(KEY, BatchLimit(4, "because"))
    assert "cannot be kept" in caplog.text
    assert recall(KEY) is None
