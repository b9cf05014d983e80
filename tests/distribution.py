"""Which of several workers runs what: whole files, and the long ones first.

A file is one worker's, so that what its fixtures make is made once. So are several files whose
tests begin with the same models: captures are shared within a process. A long file that comes last
leaves the other workers idle.
"""

from __future__ import annotations

from typing import Any

import pytest

TOGETHER = (
    # Captures of all families.
    ("capture/test_families", "passes/test_shard", "passes/test_affine", "lowering/test_torch"),
    # The Llama of four layers that has learnt to spell.
    ("passes/test_carve_moe", "test_calibrate"),
    # That of two layers.
    ("passes/test_tune_moe", "passes/test_tune_codes"),
    # The process that ranks are forked from.
    ("test_rank_commands", "test_rank_passes", "lowering/test_ranks", "ir/test_collectives"),
)
"""Files under tests/, without their ending, that one worker runs one after another."""

LONG = (
    "passes/test_flatquant_toy", "passes/test_fuse_blocks", "test_demo_end_to_end",
    "test_platforms", "test_fuzz", "lowering/test_ascend_attention", "test_trained_models",
    "plan/test_triton_plan", "test_chat_terminal", "passes/test_choosing_blocks",
)  # fmt: skip
"""Files of few tests that take long each."""

_FIRST = [*(file for files in TOGETHER for file in files), *LONG]
_GROUPS = {file: files[0] for files in TOGETHER for file in files}


def _file(nodeid: str) -> str:
    return nodeid.split("::")[0].removeprefix("tests/").removesuffix(".py")


def order(items: list[pytest.Item]) -> None:
    """Sort tests by file: those named above, then by how many slow tests a file has."""
    slow: dict[str, int] = {}
    for item in items:
        file = _file(item.nodeid)
        slow[file] = slow.get(file, 0) + ("slow" in item.keywords)
    place = {file: (number, 0) for number, file in enumerate(_FIRST)}
    items.sort(key=lambda item: place.get(f := _file(item.nodeid), (len(_FIRST), -slow[f])))


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Return what gives workers files in the order of the tests; None where that is not asked for.

    For `pytest_xdist_make_scheduler`.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = _file(nodeid)
            return _GROUPS.get(file, file)

    config.option.loadscopereorder = False  # by the number of their tests
    return Files(config, log)
