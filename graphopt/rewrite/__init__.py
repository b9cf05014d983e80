"""The rewriting kit: rules, the driver that applies them, and the removal of repeated code.

What rules leave unread goes by `graphopt.ir.dead_code`.
"""

from __future__ import annotations

from graphopt.rewrite.cse import attribute_key, equal_node, merge_equal_nodes
from graphopt.rewrite.driver import Rewritten, apply_rules, calls_of, types_of
from graphopt.rewrite.rule import VARIES, Match, NoMatch, Rule, Site, rule, uniform_attribute

__all__ = [
    "VARIES",
    "Match",
    "NoMatch",
    "Rewritten",
    "Rule",
    "Site",
    "apply_rules",
    "attribute_key",
    "calls_of",
    "equal_node",
    "merge_equal_nodes",
    "rule",
    "types_of",
    "uniform_attribute",
]
