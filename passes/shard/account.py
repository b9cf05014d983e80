"""What the ranks of a split program hold, and what they send."""

from __future__ import annotations

import sympy

from graphopt.ir.graph import Program, resolve_attrs
from graphopt.ir.ops import get_op
from graphopt.ir.ops.collectives import COLLECTIVES, Collective
from graphopt.ir.placement import Placement
from graphopt.ir.ranks import group_of
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import B, P, S, Type
from graphopt.passes.shard.record import LeftWhole, ShardedProgram, SplitWeights
from graphopt.passes.shard.run import Sharded

PREFILL = 1024
"""Tokens of the text for which it is said what ranks send."""


def account(before: Program, sharded: Sharded) -> ShardedProgram:
    """Return the record of a program that was split.

    Args:
        before: The program before it was.
    """
    program = sharded.program
    itemsize = program.checkpoint_dtype.itemsize
    kv = [state.heads * (state.k_dim + state.v_dim) * itemsize for state in program.states.values()]
    own = [
        size // (1 if state.placement is None else state.placement.parts)
        for size, state in zip(kv, program.states.values(), strict=True)
    ]
    attentions: dict[str, int] = {}
    for plan in sharded.plans:
        for how, count in plan.attentions.items():
            attentions[how] = attentions.get(how, 0) + count
    collectives, token, logits = _sent(program, 1)
    _, prefill, _ = _sent(program, PREFILL)
    return ShardedProgram(
        devices=list(group_of(program)),
        split=_split(sharded),
        whole=_whole(sharded),
        attentions=attentions,
        padded=sharded.vocabulary.padded,
        weight_bytes=(
            sum(w.nbytes for w in before.used_weights()),
            sum(_own_bytes(w.nbytes, w.placement) for w in program.used_weights()),
        ),
        kv_bytes=(sum(kv), sum(own)),
        collectives=collectives,
        sent_token=token,
        sent_logits=logits,
        sent_prefill=prefill - (PREFILL - 1) * logits,
        prefill=PREFILL,
    )


def _own_bytes(size: int, placement: Placement | None) -> int:
    return size if placement is None else size // placement.parts


def _split(sharded: Sharded) -> list[SplitWeights]:
    program = sharded.program
    rows: dict[tuple[str, str], list[tuple[int, int]]] = {}
    seen: set[str] = set()
    for call, plan in zip(program.calls, sharded.plans, strict=True):
        slots = plan.regions.function.slots_by_value()
        gathered = {slots[node.inputs[1]] for node in plan.columns if node.inputs[1] in slots}
        vocabulary = sharded.vocabulary.slots.get(plan.regions.function.name, ())
        for slot, name in call.weights.items():
            weight = program.weights[name]
            placement = weight.placement
            if placement is None or placement.axis is None or len(weight.shape) < 2 or name in seen:
                continue
            seen.add(name)
            how = _how(placement, len(weight.shape))
            if slot in gathered:
                how += ", and what it gives is put together"
            elif slot in vocabulary:
                how = "vocabulary"
            sizes = weight.nbytes, _own_bytes(weight.nbytes, placement)
            rows.setdefault((_title(sharded.program, slot, name), how), []).append(sizes)
    return [
        SplitWeights(
            what=what,
            how=how,
            weights=len(sizes),
            bytes_whole=sum(whole for whole, _ in sizes),
            bytes_rank=sum(own for _, own in sizes),
        )
        for (what, how), sizes in rows.items()
    ]


def _how(placement: Placement, dimensions: int) -> str:
    axis = placement.axis
    how = ("rows", "columns")[axis] if dimensions == 2 and axis is not None else f"axis {axis}"
    if placement.sections > 1:
        how += f" of each of {placement.sections} sections"
    return how + (f", a part on {placement.copies} ranks" if placement.copies > 1 else "")


def _title(program: Program, slot: str, name: str) -> str:
    """Return what a table calls a weight: by its slot, if several calls have one in it."""
    several = sum(slot in call.weights for call in program.calls) > 1
    return (slot if several else name).removesuffix(".weight")


def _whole(sharded: Sharded) -> list[LeftWhole]:
    rows: dict[tuple[str, str], list[int]] = {}
    seen: set[str] = set()
    for call, slot, why in sharded.whole():
        name = call.weights[slot]
        if name not in seen:
            seen.add(name)
            nbytes = sharded.program.weights[name].nbytes
            rows.setdefault((_title(sharded.program, slot, name), why), []).append(nbytes)
    return [
        LeftWhole(what=what, reason=why, weights=len(sizes), bytes=sum(sizes))
        for (what, why), sizes in rows.items()
    ]


def _sent(program: Program, tokens: int) -> tuple[dict[str, int], int, int]:
    """Return how many collectives a step of one text runs, and what a rank sends in it.

    Returns:
        The collectives by kind, the bytes in the checkpoint's dtype, and those of them that the
        outputs take.
    """
    sizes = {B: 1, S: tokens, P: 0}
    counts: dict[str, int] = {}
    total = outputs = 0
    kinds, _ = infer_program(program)
    for call, types in zip(program.calls, kinds, strict=True):
        function = program.function_of(call)
        gives = not set(program.outputs).isdisjoint(call.results)
        for node in function.nodes:
            if node.op not in COLLECTIVES:
                continue
            op, x = get_op(node.op), node.inputs[0]
            assert isinstance(op, Collective) and x is not None
            counts[node.op] = counts.get(node.op, 0) + 1
            operand = Type(types[x].shape, program.checkpoint_dtype)
            sent = op.communicated([operand], resolve_attrs(node, call))
            number = int(sympy.ceiling(sympy.sympify(sent).subs(sizes)))
            total += number
            outputs += number if gives and node.op == "all_gather" else 0
    return counts, total, outputs
