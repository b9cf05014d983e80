"""What a shell completes beside commands and options: targets, passes and recipes."""

from __future__ import annotations


def complete_target(incomplete: str) -> list[str]:
    """Return the targets that begin with what was typed."""
    from graphopt.targets import all_targets

    return [name for name in all_targets() if name.startswith(incomplete)]


def complete_pass(incomplete: str) -> list[str]:
    """Return the passes that begin with what was typed."""
    from graphopt.pass_manager.contract import declared_passes

    return [name for name in sorted(declared_passes()) if name.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Return the recipes of which the last pass is completed; none while its options are typed."""
    before, comma, last = incomplete.rpartition(",")
    if incomplete.count("{") != incomplete.count("}"):
        return []
    return [f"{before}{comma}{name}" for name in complete_pass(last)]
