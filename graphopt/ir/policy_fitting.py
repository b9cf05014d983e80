"""What a KV policy has to know of a model: its rotary angles, and weights trained for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphopt.errors import UsageError
from graphopt.ir.graph import Call, Function, Node, Program, Value, resolve_attrs
from graphopt.ir.kv_policies import ExpectedAttention, KVHeads, KVPolicy, Predictor
from graphopt.ir.kv_policies.checkpoint import read_checkpoint
from graphopt.ir.ops.attention import KEY, QUERY, VALUE
from graphopt.ir.shapes import infer_program


@dataclass(frozen=True)
class QueryRotation:
    """How the queries of an attention are rotated.

    Attributes:
        frequencies: Angles per position of their pairs of features.
        interleaved: Pairs are neighbours, in place of halves.
    """

    frequencies: tuple[float, ...]
    interleaved: bool


def fitted_policy(
    program: Program,
    policy: KVPolicy,
    attentions: Sequence[tuple[Call, Node]],
    checkpoint: str | None = None,
) -> KVPolicy:
    """Return a policy with what it has to know of the attentions that are to follow it.

    Args:
        attentions: Each a call and an attention of its function.
        checkpoint: A file, for policies that are trained.

    Raises:
        SourceError: The checkpoint cannot be read.
        UsageError: A trained policy lacks a checkpoint, or another is given one; it was trained
            for another page or head layout; or the attentions rotate queries by different angles.
    """
    if isinstance(policy, Predictor):
        if checkpoint is None:
            raise UsageError(
                "The KV policy predictor has no weights.",
                "Name a checkpoint with weights=: `graphopt train-kv-policy` makes one.",
            )
        trained = read_checkpoint(checkpoint)
        for heads in dict.fromkeys(_heads(program, attentions)):
            policy = trained.policy(policy, heads, repr(checkpoint))
        return policy
    if checkpoint is not None:
        raise UsageError(
            f"weights={checkpoint}: the KV policy {policy.kind} is not trained.",
            "Leave weights out.",
        )
    if isinstance(policy, ExpectedAttention) and not policy.frequencies:
        rotations = {query_rotation(program, call, node) for call, node in attentions}
        if len(rotations) > 1:
            raise UsageError(
                f"The KV policy {policy.kind} is for one rotation of queries, and the attentions "
                f"of {program.name} have {len(rotations)}.",
                "Let layers of one rotation follow it.",
            )
        rotation = rotations.pop() if rotations else None
        if rotation is not None:
            return replace(
                policy, frequencies=rotation.frequencies, interleaved=rotation.interleaved
            )
    return policy


def query_rotation(program: Program, call: Call, node: Node) -> QueryRotation | None:
    """Return how the queries of an attention are rotated; None where they are not.

    Raises:
        UsageError: Their angles depend on the length of the text.
    """
    rope = _maker(node.inputs[QUERY])
    while rope is not None and rope.op != "rope":
        values = [value for value in rope.inputs if value is not None]
        rope = _maker(values[0]) if len(values) == 1 else None
    if rope is None:
        return None
    cos, owner = rope.inputs[1], call
    assert cos is not None
    if cos.node is None:
        owner, cos = _from_outside(program, call, cos)
    table = cos.node
    frequencies = None if table is None or table.op != "rope_table" else table.inputs[1]
    slot = None if frequencies is None else _slot(program.function_of(owner), frequencies)
    if slot is None:
        raise UsageError(
            f"The angles of {call.path or call.function} depend on the length of the text, and "
            "expected attention is for angles that do not.",
            "Take another KV policy.",
        )
    angles = program.weights[owner.weights[slot]].load().tolist()
    return QueryRotation(tuple(angles), bool(resolve_attrs(rope, call).get("interleaved", False)))


def _maker(value: Value | None) -> Node | None:
    return None if value is None else value.node


def _from_outside(program: Program, call: Call, param: Value) -> tuple[Call, Value]:
    """Return the call that makes an argument of another, and its result within that one."""
    name = call.args[program.function_of(call).params.index(param)]
    for maker in program.calls:
        if name in maker.results:
            results = program.function_of(maker).results
            return maker, results[list(maker.results).index(name)]
    return call, param


def _slot(function: Function, weight: Value) -> str | None:
    return next((slot for slot, value in function.weights.items() if value is weight), None)


def _heads(program: Program, attentions: Sequence[tuple[Call, Node]]) -> list[KVHeads]:
    """Return the sizes of attentions."""
    kinds, _ = infer_program(program)
    sizes = []
    for call, node in attentions:
        types = kinds[next(n for n, each in enumerate(program.calls) if each is call)]
        q, k, v = (node.inputs[place] for place in (QUERY, KEY, VALUE))
        assert q is not None and k is not None and v is not None
        key_heads, query_heads = int(types[k].shape[1]), int(types[q].shape[1])
        sizes.append(
            KVHeads(key_heads, query_heads, int(types[k].shape[3]), int(types[v].shape[3]))
        )
    return sizes
