"""What each kind of process imports at its start, in a process of its own: imports are most of the time until a server is ready."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.pages import ROOT

# BentoML's processes import service.py like this, in the service's folder.
IMPORT_SERVICE = "import warnings; warnings.simplefilter('ignore'); import sys; import service; "
SHOW_MODULES = "; print(*sys.modules)"


def run(script: str, folder: Path) -> list[str]:
    environment = {**os.environ, "SD_SHARED_FOLDER": "/nowhere"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout.split()


def test_the_first_process_and_the_model_process_import_no_api() -> None:
    modules = run(IMPORT_SERVICE + SHOW_MODULES[2:], ROOT / "fp32")
    assert "stable_diffusion.server.service" in modules
    late = ("stable_diffusion.api", "stable_diffusion.web", "stable_diffusion.core.requests", "aiohttp", "ftfy", "torch", "transformers")
    assert [name for name in modules if name in late or name.startswith("diffusers")] == []


def test_an_api_worker_builds_the_whole_api_without_torch() -> None:
    modules = run(IMPORT_SERVICE + "app = service.svc.asgi_app; app.build_middleware_stack()" + SHOW_MODULES, ROOT / "fp32")
    assert {"stable_diffusion.api.native.routes", "stable_diffusion.server.front_door", "aiohttp"} <= set(modules)
    assert [name for name in modules if name.split(".")[0] in ("torch", "diffusers", "transformers", "scipy")] == []


def test_the_garbage_collector_waits_while_the_engine_is_imported_and_then_leaves_the_modules_out() -> None:
    script = (
        "import warnings; warnings.simplefilter('ignore'); import gc, sys\n"
        "from stable_diffusion.runner import startup\n"
        "collections = []; gc.callbacks.append(lambda phase, info: collections.append(phase))\n"
        "startup._import_engine(); gc.callbacks.clear()\n"
        "print('torch' in sys.modules, len(collections), gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    assert run(script, ROOT) == ["True", "0", "True", "True"]
