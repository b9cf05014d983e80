"""Planning: the inequalities by which a kernel's tiles are found, from a target's figures.

Which family a target plans an attention with says `graphopt.lowering.kernels.plan_attention`.
"""

from __future__ import annotations

from graphopt.plan.base import AttentionPlan, Inequality, Planner
from graphopt.plan.spec import AttentionSpec

__all__ = ["AttentionPlan", "AttentionSpec", "Inequality", "Planner"]
