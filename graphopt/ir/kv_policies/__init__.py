"""Policies that decide which pages of a KV cache a decoding step reads, a file each.

`POLICIES` has them by name; `policy_to_dict` and `policy_from_dict` are how a policy is saved.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from graphopt.errors import UsageError, unknown_name
from graphopt.ir.kv_policies.base import STEPS, KVHeads, KVPolicy, State, TensorType
from graphopt.ir.kv_policies.dense import Dense
from graphopt.ir.kv_policies.ema import Ema
from graphopt.ir.kv_policies.expected_attention import ExpectedAttention
from graphopt.ir.kv_policies.key_codes import KeyCodes
from graphopt.ir.kv_policies.last_row import LastRow
from graphopt.ir.kv_policies.oracle import OracleTopK, OracleTopP
from graphopt.ir.kv_policies.page_range import PageRange
from graphopt.ir.kv_policies.pages import Filled, PageBudget, select_pages
from graphopt.ir.kv_policies.predictor import Predictor
from graphopt.ir.kv_policies.probabilities import Scoring, page_probabilities
from graphopt.ir.kv_policies.quest import Quest
from graphopt.ir.kv_policies.sink_local import SinkLocal
from graphopt.ir.kv_policies.snapkv import SnapKV

__all__ = [
    "POLICIES",
    "STEPS",
    "Dense",
    "Ema",
    "ExpectedAttention",
    "Filled",
    "KVHeads",
    "KVPolicy",
    "KeyCodes",
    "LastRow",
    "OracleTopK",
    "OracleTopP",
    "PageBudget",
    "PageRange",
    "Predictor",
    "Quest",
    "Scoring",
    "SinkLocal",
    "SnapKV",
    "State",
    "TensorType",
    "page_probabilities",
    "policy_from_dict",
    "policy_to_dict",
    "select_pages",
]

POLICIES: dict[str, type[KVPolicy]] = {
    policy.kind: policy
    for policy in (
        Dense,
        SinkLocal,
        LastRow,
        Ema,
        Quest,
        PageRange,
        KeyCodes,
        SnapKV,
        ExpectedAttention,
        Predictor,
        OracleTopK,
        OracleTopP,
    )
}
"""Kind -> policy."""


def policy_to_dict(policy: KVPolicy) -> dict[str, Any]:
    """Return a policy as plain values: its `kind`, the fields of its budget, and its own.

    Weights are no part of it.
    """
    own = {
        field.name: getattr(policy, field.name)
        for field in dataclasses.fields(policy)
        if field.name != "budget" and field.compare
    }
    return {"kind": policy.kind, **dataclasses.asdict(policy.budget), **own}


def policy_from_dict(values: Mapping[str, Any]) -> KVPolicy:
    """Return the policy that `policy_to_dict` gave plain values of.

    A policy's own fields may be missing where they have a default; lists stand for tuples.

    Raises:
        UsageError: There is no such policy, a field is missing, unknown or of another type, or
            the policy refuses a value.
    """
    kind = values.get("kind")
    if kind not in POLICIES:
        raise unknown_name("KV policy", str(kind), POLICIES)
    policy = POLICIES[kind]
    budget = {field.name: int for field in dataclasses.fields(PageBudget)}
    hints = typing.get_type_hints(policy)
    own = {
        field.name: hints[field.name]
        for field in dataclasses.fields(policy)
        if field.name != "budget" and field.compare
    }
    given = {name: value for name, value in values.items() if name != "kind"}
    for name, value in given.items():
        if name not in budget and name not in own:
            raise unknown_name(f"field of the KV policy {kind}", name, [*budget, *own])
        if not _fits(value, budget.get(name) or own[name]):
            raise UsageError(f"{value!r} is no {name} of the KV policy {kind}.")
    missing = [name for name in budget if name not in given]
    missing += [
        field.name
        for field in dataclasses.fields(policy)
        if field.name in own and field.name not in given and field.default is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(f"The KV policy {kind} lacks {', '.join(missing)}.", "Add them.")
    numbers = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if name in own
    }
    return policy(PageBudget(**{name: given[name] for name in budget}), **numbers)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a plain value is of the type of a field."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        (item, _) = typing.get_args(hint)
        return isinstance(value, (list, tuple)) and all(_fits(one, item) for one in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)
