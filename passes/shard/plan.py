"""What of one function is split over the ranks, and what is left whole and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from graphopt.ir.graph import Call, Function, Node, Value
from graphopt.ir.mixture import GROUPED_PRODUCTS
from graphopt.ir.ops.attention import ATTENTIONS, KEY, QUERY
from graphopt.ir.split import Split
from graphopt.ir.types import Type
from graphopt.passes.shard.regions import Regions, Whole

_NEITHER = "neither what it reads nor what it gives comes in parts"
_MOVES = ("aten.transpose.int", "aten.permute.default", "aten.t.default", "aten.reshape.default")
_OVER_FEATURES = ("kronecker", "quantise_dequantise")
_SMALL = {
    "kronecker": "every rank applies the transform, whose factors are small",
    "embedding": "it is looked up by something else than tokens",
}


@dataclass
class Planned:
    """What is split of a function.

    Attributes:
        regions: The values that are.
        columns: Linears whose rows are split although all of their output is read.
        whole: Why weights are not, by slot; of some that are not it is not known.
        attentions: How many attentions have their heads split, several ranks a key head, or
            not: "split", "copied" and "whole".
    """

    regions: Regions
    columns: list[Node] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)
    attentions: dict[str, int] = field(default_factory=dict)


def plan_function(
    function: Function,
    call: Call,
    types: Mapping[Value, Type],
    ranks: int,
    given: Mapping[Value, Split],
    may_split: Callable[[str, Split], None],
    vocabularies: Collection[str],
    *,
    shares_keys: bool,
) -> Planned:
    """Choose what is split of a function, as one of its calls uses it.

    Args:
        types: Of its values, of the whole.
        given: The parameters that come in parts.
        may_split: Raises `ValueError` where the weight in a slot does not split so.
        vocabularies: Slots of matrices with a row for every token that there is.
        shares_keys: Whether other calls attend to a rank's keys that this one makes.
    """
    regions = Regions(function, call, types, ranks, given, may_split, shares_keys)
    plan = Planned(regions)
    _vocabularies(plan, vocabularies)
    for node in function.nodes:
        if node.op in ATTENTIONS:
            _attention(plan, node)
    for node in function.nodes:
        if node.op == "experts":
            _experts(plan, node)
    reasons: dict[str, str] = {}
    slots = function.slots_by_value()
    for node in function.nodes:
        if not _multiplies(node) or node in regions.chosen:
            continue
        why = ""
        for x in _in_front(node):
            try:
                regions.grow(x, Split(len(types[x].shape) - 1))
                break
            except Whole as error:
                why = why or str(error)
        else:
            for slot in _slots_of(function, node):
                reasons[slot] = f"{_NEITHER}: {why}"
    _columns(plan)
    for node in function.nodes:
        for value in node.inputs[1:] if node.op in _SMALL else ():
            if value in slots:
                reasons.setdefault(slots[value], _SMALL[node.op])
    for slot, why in reasons.items():
        plan.whole.setdefault(slot, why)
    done = {slots[v] for v in regions.splits if v in slots}
    done |= {slots[node.inputs[1]] for node in plan.columns if node.inputs[1] in slots}
    plan.whole = {slot: why for slot, why in plan.whole.items() if slot not in done}
    return plan


def _in_front(node: Node) -> list[Value]:
    """Return what a product reads, and what that was in front of transforms over all features."""
    value = node.inputs[0]
    found: list[Value] = []
    while value is not None:
        found.append(value)
        maker = value.node
        value = maker.inputs[0] if maker is not None and maker.op in _OVER_FEATURES else None
    return found


def _multiplies(node: Node) -> bool:
    return node.op in ("linear", "aten.bmm.default", "aten.matmul.default", *GROUPED_PRODUCTS)


def _slots_of(function: Function, node: Node) -> list[str]:
    """Return the slots of what a node multiplies with, transposed or not."""
    slots = function.slots_by_value()
    value = node.operand(1)
    while value is not None and value not in slots:
        maker = value.node
        value = maker.inputs[0] if maker is not None and maker.op in _MOVES else None
    return [] if value is None else [slots[value]]


def _around(function: Function, node: Node) -> list[str]:
    """Return the slots of the matrices next to a node, in front of it and behind it."""
    found: dict[str, None] = {}
    seen: set[Node] = {node}
    uses = function.uses()
    waiting = [(v.node, False) for v in node.inputs if v is not None and v.node is not None]
    waiting += [(user, True) for user, _ in uses[node.outputs[0]]]
    while waiting:
        other, behind = waiting.pop()
        if other in seen:
            continue
        seen.add(other)
        if _multiplies(other):
            found |= dict.fromkeys(_slots_of(function, other))
        elif behind:
            if other.op != "add":
                waiting += [(user, True) for v in other.outputs for user, _ in uses[v]]
        else:
            waiting += [(v.node, False) for v in other.inputs if v is not None and v.node]
    return list(found)


def _vocabularies(plan: Planned, slots: Collection[str]) -> None:
    """Split the rows of embeddings and heads."""
    regions = plan.regions
    for slot in slots:
        weight = regions.function.weights[slot]
        try:
            if weight not in regions.splits:
                regions.grow(weight, Split(0))
        except Whole as error:
            plan.whole[slot] = str(error)


def _attention(plan: Planned, node: Node) -> None:
    """Split the heads of an attention, and what makes and reads them."""
    regions = plan.regions
    q, k = node.inputs[QUERY], node.inputs[KEY]
    assert q is not None and k is not None
    heads, key_heads = (int(regions.types[v].shape[1]) for v in (q, k))
    ranks = regions.ranks
    try:
        if heads % ranks:
            raise Whole(f"its {heads} heads do not divide by {ranks} ranks")
        if key_heads % ranks and ranks % key_heads:
            raise Whole(
                f"its {key_heads} key heads do not divide by {ranks} ranks, nor the other way"
            )
        regions.grow(node.outputs[0], Split(1))
        how = "copied" if key_heads < ranks else "split"
        if key_heads == 1:
            why = "every rank's query heads read its one key head"
            plan.whole |= dict.fromkeys(_around(regions.function, node), why)
    except Whole as error:
        how = "whole"
        why = f"its attention is left whole: {error}"
        plan.whole |= dict.fromkeys(_around(regions.function, node), why)
    plan.attentions[how] = plan.attentions.get(how, 0) + 1


def _experts(plan: Planned, node: Node) -> None:
    """Split the neurons of every expert that was carved out of a dense part."""
    regions = plan.regions
    gates, up = node.inputs[1], node.inputs[2]
    assert gates is not None and up is not None
    try:
        regions.grow(up, Split(0, sections=int(regions.types[gates].shape[-1])))
    except Whole as error:
        slots = regions.function.slots_by_value()
        matrices = [v for v in node.inputs[2:] if v in slots]
        plan.whole |= dict.fromkeys((slots[v] for v in matrices if v is not None), str(error))


def _columns(plan: Planned) -> None:
    """Split the rows of matrices that read what was put together from parts.

    A transform or a rounding over all features stands between the parts and a matrix that would
    have read them: each rank then makes a part of what the matrix gives, and it is put together.
    """
    regions = plan.regions
    slots = regions.function.slots_by_value()
    for node in regions.function.nodes:
        if node.op != "linear" or node in regions.chosen:
            continue
        weight = node.inputs[1]
        if weight not in slots or not _reads_gathered(regions, node):
            continue
        if weight in regions.splits or int(regions.types[weight].shape[0]) % regions.ranks:
            continue
        try:
            regions.may_split(slots[weight], Split(0))
        except ValueError:
            continue
        plan.columns.append(node)


def _reads_gathered(regions: Regions, node: Node) -> bool:
    """Return whether what a linear reads was put together from parts, and then transformed."""
    return not regions.gathered.isdisjoint(_in_front(node))
