"""Passes: one transformation a file.

Importing this package registers the passes below. To add one, write its file and name it here;
a pass of another distribution names its module under the entry point group `graphopt.passes`.
"""

from graphopt.pass_manager.contract import (
    Context,
    Pass,
    PassResult,
    Skip,
    all_passes,
    get_pass,
    register_pass,
)
from graphopt.passes import (
    carve_moe,
    common_subexpression,
    dead_code,
    fold_constants,
    fuse_blocks,
    insert_kv_cache,
    normalise,
    prune_blocks,
    tune_moe,
)

__all__ = [
    "Context",
    "Pass",
    "PassResult",
    "Skip",
    "all_passes",
    "carve_moe",
    "common_subexpression",
    "dead_code",
    "fold_constants",
    "fuse_blocks",
    "get_pass",
    "insert_kv_cache",
    "normalise",
    "prune_blocks",
    "register_pass",
    "tune_moe",
]
