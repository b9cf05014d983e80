"""A KV policy as a user names it: its budget in tokens, or as a share of a text."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from graphopt.errors import UsageError, unknown_name
from graphopt.evaluate.kv_policy import policy_layers
from graphopt.ir.graph import Program
from graphopt.ir.kv_policies import POLICIES, KVPolicy, PageBudget, policy_from_dict
from graphopt.ir.kv_policies.predictor import Predictor
from graphopt.ir.policy_fitting import fitted_policy

DEFAULTS = {"page": 16, "sink": 64, "local": 64, "dense_layers": 0}
"""Tokens of a page, and those at the front and the newest ones that are always read; and how many
layers read all."""


@dataclass(frozen=True)
class PolicySpec:
    """A policy whose budget may hang on the length of the texts that it is measured on.

    Attributes:
        kind: The name of the policy.
        budget: Tokens that a step reads for each KV head, sink and local included; or which share
            of a text's tokens, below 1. None for policies that read all.
        page, sink, local: In tokens.
        dense_layers: How many attentions at the front of a model read all keys.
        dense: Names of others that do.
        own: The fields that the policy has beside its budget, as plain values.
        checkpoint: The file with the weights of a policy that is learned; None for others.
        text: As it was written.
    """

    kind: str
    budget: int | Fraction | None
    page: int
    sink: int
    local: int
    dense_layers: int
    dense: tuple[str, ...] = ()
    own: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    text: str = ""

    @classmethod
    def of(cls, kind: str, options: Mapping[str, Any]) -> PolicySpec:
        """Return the policy of a name and of options as text.

        Args:
            options: Texts, or lists of them: `budget`, such as "1/8" or "1024"; `page`, `sink`,
                `local`, `dense_layers` and `dense`; `calibrate`, the steps from one dense step to
                the next; `checkpoint`, the file of a policy that is learned; and what the policy
                has of its own.

        Raises:
            UsageError: There is no such policy or option, a value is none of its kind, or the
                budget is missing.
        """
        if kind not in POLICIES:
            raise unknown_name("KV policy", kind, POLICIES)
        fields = _own_fields(POLICIES[kind])
        known = [
            *DEFAULTS,
            "dense",
            "budget",
            *("calibrate" if n == CALIBRATE else n for n in fields),
        ]
        known += ["checkpoint"] if kind in LEARNED else []
        numbers, own, budget, checkpoint = dict(DEFAULTS), {}, None, None
        dense: tuple[str, ...] = ()
        for name, value in options.items():
            if name == "budget":
                budget = _budget(str(value))
            elif name == "dense":
                dense = (value,) if isinstance(value, str) else tuple(value)
            elif name == "checkpoint" and name in known:
                checkpoint = str(value)
            elif name in DEFAULTS:
                numbers[name] = _plain(name, value, int)
            elif name in known:
                name = CALIBRATE if name == "calibrate" else name
                own[name] = _plain(name, value, fields[name])
            else:
                raise unknown_name(f"option of the KV policy {kind}", name, known)
        if budget is None and kind not in READ_ALL:
            raise UsageError(
                f"The KV policy {kind} has no budget.",
                f"Write {kind}{{budget=1/8}} for an eighth of a text's tokens, or a number of "
                "tokens per KV head, sink and local included.",
            )
        if checkpoint is None and kind in LEARNED:
            raise UsageError(
                f"The KV policy {kind} is learned, and has no checkpoint.",
                f"Write {kind}{{budget=1/8,checkpoint=FILE}}; graphopt train-kv-policy writes it.",
            )
        values = [x if isinstance(x, str) else f"[{','.join(x)}]" for x in options.values()]
        given = ",".join(map("=".join, zip(options, values, strict=True)))
        return cls(
            kind,
            budget,
            **numbers,
            dense=dense,
            own=own,
            checkpoint=checkpoint,
            text=f"{kind}{{{given}}}" if given else kind,
        )

    def budget_tokens(self, tokens: int) -> int | None:
        """Return the budget for texts of so many tokens; None where all is read.

        Of a share the whole pages count.
        """
        if self.budget is None:
            return None
        if isinstance(self.budget, int):
            return self.budget
        return int(self.budget * tokens) // self.page * self.page if self.page > 0 else 0

    def policy_for(self, program: Program, tokens: int, device: torch.device) -> KVPolicy:
        """Return the policy for a program's texts of so many tokens, fitted to the program.

        Raises:
            UsageError: As `policy` does, or the weights were trained for other pages or heads.
            SourceError: There are no such weights, or no attention can follow a policy.
        """
        layers, _ = policy_layers(program, self.dense_layers, self.dense)
        attentions = [(program.calls[layer.position], layer.node) for layer in layers]
        policy = fitted_policy(program, self.policy(tokens), attentions, self.checkpoint)
        if not isinstance(policy, Predictor) or policy.weights is None:
            return policy
        return policy.with_weights({name: x.to(device) for name, x in policy.weights.items()})

    def policy(self, tokens: int) -> KVPolicy:
        """Return the policy for texts of so many tokens, without weights.

        Raises:
            UsageError: Pages do not come out even, the budget is below sink plus local, or the
                policy refuses a value.
        """
        given = self.budget_tokens(tokens)
        least = self.sink + self.local
        budget = PageBudget.of(self.page, least if given is None else given, self.sink, self.local)
        values = {"kind": self.kind, **dataclasses.asdict(budget), **self.own}
        return policy_from_dict(values)


CALIBRATE = "calibrate_every"
READ_ALL, LEARNED = ("dense",), ("predictor",)


def _own_fields(policy: type[KVPolicy]) -> dict[str, Any]:
    """Return the types of the fields that a policy has beside its budget, without weights."""
    hints = typing.get_type_hints(policy)
    return {
        each.name: hints[each.name]
        for each in dataclasses.fields(policy)
        if each.name != "budget" and each.compare
    }


def _budget(text: str) -> int | Fraction:
    """Return tokens, or a share below 1.

    Raises:
        UsageError: It is neither.
    """
    try:
        budget = Fraction(text)
    except (ValueError, ZeroDivisionError):
        budget = Fraction(0)
    if 0 < budget < 1:
        return budget
    if budget < 1 or budget.denominator != 1:
        raise UsageError(
            f"A budget of {text!r}.",
            "Give a share such as 1/8, or a whole number of tokens per KV head.",
        )
    return int(budget)


def _plain(name: str, text: str | Sequence[str], hint: Any) -> Any:
    """Return the value of a text, or of a list of texts, as a field has it.

    Raises:
        UsageError: It is none.
    """
    if typing.get_origin(hint) is tuple and not isinstance(text, str):
        return tuple(_plain(name, each, typing.get_args(hint)[0]) for each in text)
    hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in hints and text == "none":
        return None
    if isinstance(text, str):
        for kind in hints:
            with contextlib.suppress(ValueError):
                if kind is bool and text in ("true", "false"):
                    return text == "true"
                if kind in (int, float, str):
                    return kind(text)
    named = " or ".join(getattr(kind, "__name__", str(kind)) for kind in hints)
    raise UsageError(f"{name}={text} is no {named}.", "Give such a value.")
