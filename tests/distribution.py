"""Which of several workers runs what: whole files, and the long ones first.

A file is one worker's, so that what its fixtures make is made once. So are several files whose
tests begin with the same models: captures are shared within a process. A long file that comes last
leaves the other workers idle.
"""

from __future__ import annotations

import collections
from typing import Any

import pytest

TOGETHER = (
    # Captures of all families.
    (
        "capture/test_families", "passes/test_shard", "passes/test_affine", "passes/test_flatquant",
        "lowering/test_torch", "lowering/test_hf", "ir/test_feed_forward", "ir/test_blocks",
        "test_behind_norm",
    ),
    # The Llama of four layers that has learnt to spell.
    ("passes/test_carve_moe", "test_calibrate"),
    # That of two layers.
    ("passes/test_tune_moe", "passes/test_tune_codes"),
    # Programs of small models that see.
    ("vision/",),
    # The process that ranks are forked from.
    ("test_rank_commands", "test_rank_passes", "lowering/test_ranks", "ir/test_collectives"),
)  # fmt: skip
"""Files and folders under tests/ that one worker runs one after another."""

LONG = (
    "passes/test_flatquant_toy", "passes/test_fuse_blocks", "test_demo_end_to_end",
    "test_platforms", "test_fuzz", "lowering/test_ascend_attention", "test_trained_models",
    "plan/test_triton_plan", "test_chat_terminal", "passes/test_choosing_blocks",
)  # fmt: skip
"""Files of few tests that take long each."""

_FIRST = {
    file: (number, files[0])
    for number, files in enumerate((*TOGETHER, *((file,) for file in LONG)))
    for file in files
}


def _place(nodeid: str) -> tuple[int, str]:
    """Return where among the first a test comes, and by what name its worker is found."""
    file = nodeid.split("::")[0].removeprefix("tests/").removesuffix(".py")
    folder = file[: file.find("/") + 1]
    return _FIRST.get(file) or _FIRST.get(folder) or (len(_FIRST), file)


def order(items: list[pytest.Item]) -> None:
    """Sort tests: those of files named above first, then by how many slow tests their file has."""
    places = {item: _place(item.nodeid) for item in items}
    slow = collections.Counter(places[item] for item in items if "slow" in item.keywords)
    items.sort(key=lambda item: (places[item][0], -slow[places[item]]))


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Return what gives workers files in the order of the tests; None where that is not asked for.

    For `pytest_xdist_make_scheduler`.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _place(nodeid)[1]

    config.option.loadscopereorder = False  # by the number of their tests
    return Files(config, log)
