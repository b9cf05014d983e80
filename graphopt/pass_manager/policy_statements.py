"""What is stated of programs whose KV states got policies, checked without trusting those."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.attach_policy import with_budget, without_policies
from graphopt.ir.graph import Call, KVState, Node, Program, resolve_attrs
from graphopt.ir.kv_policies import Dense, KVPolicy, PageBudget
from graphopt.ir.ops import get_op
from graphopt.ir.ops.attention import PAST_K, VALUE
from graphopt.ir.ops.policy_attention import STATE
from graphopt.pass_manager.contract import Statement
from graphopt.pass_manager.lockstep import compare_calls
from graphopt.pass_manager.numbering import same_outputs

_MOST_TOKENS = 256
"""Tokens of the texts with which two programs are compared, at most."""


@dataclass(frozen=True)
class PolicyProgram(Statement):
    """Some states got a policy; where it is left out again, the program is the one before.

    Three things are checked: that by expressions; that steps give the logits of before where the
    budget covers every page, in fp64; and that no step reads more pages than the budget has, by
    values that tell which keys an output is made of.

    Attributes:
        policy: What the states got.
        states: Their names.
    """

    policy: KVPolicy
    states: tuple[str, ...]

    def check(self, before: Program, after: Program) -> str | None:
        for name, state in after.states.items():
            wanted = self.policy if name in self.states else _policy_before(before, name)
            if state.policy != wanted:
                return f"state {name!r} has another policy"
        if not same_outputs(_stripped(before), without_policies(after)):
            return "without its policies it is not the program of before"
        for call, node, state in _with_policies(after):
            read = pages_read(after, call, node, state)
            if read is not None and read > self.policy.budget.pages:
                return (
                    f"a step of {call.path or call.function} reads {read} pages of a key head, and "
                    f"the budget has {self.policy.budget.pages}"
                )
        if not (before.has_values() and after.has_values()):
            return None
        comparison = compare_calls(_stripped(before), _reading_everything(after, self.policy))
        if comparison.error is not None:
            return f"with a budget of everything, {comparison.error}"
        return None


def _policy_before(before: Program, name: str) -> KVPolicy | None:
    return before.states[name].policy if name in before.states else None


def _stripped(program: Program) -> Program:
    return without_policies(program) if any(s.policy for s in program.states.values()) else program


def _reading_everything(program: Program, policy: KVPolicy) -> Program:
    """Return a program whose steps read all pages, and have several of them in short texts."""
    paged = [state.layout.page for state in program.states.values() if state.layout.page]
    page = paged[0] if paged else 4
    return with_budget(program, PageBudget(page, _MOST_TOKENS, min(policy.budget.sink, 1), 1))


def _with_policies(program: Program) -> list[tuple[Call, Node, KVState]]:
    """Return the attentions with a policy, one for each that a function has."""
    found: dict[Node, tuple[Call, Node, KVState]] = {}
    for call in program.calls:
        for cache in program.functions[call.function].caches:
            node = cache.present_k.node
            if node is not None and node.op == "policy_attention":
                found.setdefault(node, (call, node, program.states[call.caches[cache.slot]]))
    return list(found.values())


def pages_read(program: Program, call: Call, node: Node, state: KVState) -> int | None:
    """Return of how many pages for a key head the output of one step is made, at most.

    Random queries and keys, and values of which each page has a feature of its own: where the
    output has something of it, the page was read. None where every step reads all keys.
    """
    attrs, op = resolve_attrs(node, call), get_op(node.op)
    policy: KVPolicy = attrs["policy"]
    if policy.calibrate_every == 1 or isinstance(policy, Dense):
        return None
    budget, generator = policy.budget, torch.Generator().manual_seed(0)
    pages = budget.pages + 3
    prompt = (pages - 1) * budget.page + 1
    query_heads = state.query_heads or state.heads

    def random(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, state.k_dim, generator=generator)

    slots = {value: slot for slot, value in program.functions[call.function].weights.items()}
    weights = [
        program.weights[call.weights[slots[value]]].load(torch.float32)
        for value in node.inputs[STATE:]
        if value in slots
    ]
    nothing = torch.zeros(1, state.heads, 0, state.k_dim), torch.zeros(1, state.heads, 0, pages)
    names = policy.state_types(state.kv_heads, 0, 1)
    empty = [
        torch.zeros(shape, dtype=torch.float32 if kind.is_floating_point else kind)
        for shape, kind in names.values()
    ]
    v = F.one_hot(torch.arange(pages * budget.page) // budget.page).float()
    v = v.expand(1, state.heads, -1, -1)
    extras = [None] * (PAST_K - VALUE - 1)
    past, kept, most, start = nothing, empty, 0, 0
    with torch.no_grad():
        for stop in (prompt, *range(prompt + 1, prompt + budget.page)):
            given: dict[str, Tensor] = dict(zip(names, kept, strict=True))
            due = policy.due(given, attrs.get("layer", 0)) if start else None
            operands = [
                random(query_heads, stop - start),
                random(state.heads, stop - start),
                v[:, :, start:stop],
                *extras, *past, *kept, *weights,
            ]  # fmt: skip
            out, past_k, past_v, *kept = op.torch(operands, attrs)
            past = past_k, past_v
            if start and not (due is not None and bool(due.any())):
                read = (out[0, :, 0] != 0).unflatten(0, (state.heads, -1)).any(1)
                most = max(most, int(read.sum(-1).max()))
            start = stop
    return most
