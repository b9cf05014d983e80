"""Offsets in one arena for blocks of known lifetimes."""

from graphopt.memory.planning.check import check_offsets
from graphopt.memory.planning.plan import Outcome, Plan, plan_offsets
from graphopt.memory.planning.problem import Problem

__all__ = ["Outcome", "Plan", "Problem", "check_offsets", "plan_offsets"]
