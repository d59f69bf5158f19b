"""What all tests share: images to send, and servers that are started once. Loads no torch: most tests do without."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image, ImageDraw

from tests.http.servers import ROOT, Server, serve

# The same cases in every run, and nothing of them is kept in the repository.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
# Tests compute beside servers that compute: threads that spin while they wait would hold the processor that others need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests that run side by side share the cores out among themselves and the servers that they start.
if side_by_side := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // side_by_side)))

# The longest files come first: at the end, when nothing is left to share out, only short ones run.
_FOLDERS = ("slow", "model", "benchmarks", "http", "browser", "deployment", "unit", "image")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each folder of tests has a marker of its name, and its place in the order."""
    folder_of_tests = Path(__file__).parent
    place: dict[pytest.Item, int] = {}
    for item in items:
        folder = item.path.relative_to(folder_of_tests).parts[0]
        place[item] = _FOLDERS.index(folder) if folder in _FOLDERS else len(_FOLDERS)
        if folder in _FOLDERS:
            item.add_marker(folder)
    items.sort(key=place.__getitem__)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Servers of one run share what they keep; nothing is left of an earlier run."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """The server of a precision, started when it is first asked for: a source checkout without weights, so the demo model."""
    with ExitStack() as started:

        @functools.cache
        def start(precision: str) -> Server:
            home = tmp_path_factory.mktemp(precision)
            return started.enter_context(serve(ROOT / precision, "service:svc", home, {"BENTOML_CONFIG": "configuration.yaml"}))

        yield start


@pytest.fixture(scope="session")
def server(start_server: Callable[[str], Server]) -> Server:
    """fp32/: on a CPU fp16/ computes the same, which test_fp16.py checks."""
    return start_server("fp32")


@pytest.fixture(scope="session")
def fp16_server(start_server: Callable[[str], Server]) -> Server:
    return start_server("fp16")


@pytest.fixture(scope="session")
def input_picture() -> Image.Image:
    """A yellow square in the upper left on green, 64x64."""
    picture = Image.new("RGB", (64, 64), (40, 160, 70))
    ImageDraw.Draw(picture).rectangle((8, 8, 31, 31), fill=(250, 230, 45))
    return picture


@pytest.fixture(scope="session")
def right_half_mask() -> Image.Image:
    """White, that is repainted, in the right half."""
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((32, 0, 63, 63), fill=255)
    return mask
