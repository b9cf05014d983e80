"""Makes the helper modules beside this file importable from every test folder; shared fixtures."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from distribution import order, scheduler
from interpreted import leave_out_idle_work

TEXTS = Path(__file__).resolve().parents[2] / "shared" / "data"

# Read when a GPU is first used: no stream stands behind what waits in another (side_by_side.py).
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Prepare a process that runs tests: this is called before a folder's conftest is imported."""
    given = pluginmanager.get_plugin("pytestconfig").known_args_namespace
    if getattr(given, "numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        return  # It hands them out to others, which it starts two seconds earlier without torch.
    import torch
    from hypothesis import HealthCheck, settings

    # Before anything imports Triton, whose own functions are either compiled or interpreted too.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # No test measures time: on a busy machine an example may take any.
    unhurried = [HealthCheck.too_slow]
    settings.register_profile("untimed", deadline=None, suppress_health_check=unhurried)
    settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the compiled twins of modules that tests import, also where nothing writes them.

    Containers often set PYTHONDONTWRITEBYTECODE. Then half of collecting is asserts rewritten as
    they were before, and every process that a test starts spends two seconds on compiling graphopt.
    """
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, False
    try:
        return (yield)
    finally:
        sys.dont_write_bytecode = before


def pytest_collection_finish() -> None:
    """Make the interpreter and the garbage collector faster, once all is imported."""
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in sys.modules:
        leave_out_idle_work()
    # Tracing makes objects by the million, and every full collection goes through all that torch
    # and transformers made when they were imported: a sixth of the time of a capture.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is exhaustive is slow too, and what needs a GPU is skipped where there is none.

    So `-m "not slow"` takes the place of "not exhaustive".
    """
    import torch

    no_gpu = pytest.mark.skip(reason="there is no CUDA device")
    for item in items:
        if "exhaustive" in item.keywords:
            item.add_marker("slow")
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
    order(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return scheduler(config, log)


@pytest.fixture(autouse=True)
def _no_gpu_by_itself(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep models of other tests than those of a GPU on the CPU, where their figures hold."""
    import torch

    if torch.cuda.is_available() and "gpu" not in request.keywords:
        monkeypatch.setattr("graphopt.backends.placement.found_gpu", lambda: None)
        monkeypatch.setattr("graphopt.support.devices.found_gpu", lambda: None)


@pytest.fixture(scope="session")
def demo() -> str:
    """Return the demo's name once it is in the cache; skip where it cannot be fetched."""
    from graphopt.errors import SourceError
    from graphopt.sources.demo import demo_file

    try:
        demo_file()
    except SourceError as error:
        pytest.skip(f"the demo model is not here: {error.message}")
    return "demo"


@pytest.fixture(scope="session")
def test_text() -> Path:
    """Return the WikiText-2 test text that lies beside the repository; skip where it doesn't."""
    return _wikitext("test-dev.txt")


@pytest.fixture(scope="session")
def calibration_text() -> Path:
    """Return the WikiText-2 validation text beside the repository; skip where it is not."""
    return _wikitext("valid.txt")


def _wikitext(name: str) -> Path:
    path = TEXTS / "wikitext2" / name
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    return path


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return `tools/browser.py`; skip where there is no Chromium."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "tools"))
    import browser

    if browser.chromium() is None:
        pytest.skip("there is no Chromium here: install it, or set CHROMIUM to its path")
    return browser
