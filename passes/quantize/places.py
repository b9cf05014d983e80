"""What of a program is rounded: linears of blocks by the input that they share, keys and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Function, Node, Program, Value
from graphopt.ir.mixture import Mixture, find_mixtures
from graphopt.ir.weights import Weight
from graphopt.pass_manager.contract import Skip
from graphopt.pass_manager.outside_blocks import outside_blocks
from graphopt.pass_manager.rounding_statements import ROUNDED

_NO_PRODUCTS = ("rms_norm", "layer_norm", "add", "mul", "embedding")
"""Ops whose operands are gains, biases and tables, whatever shape they have."""


@dataclass(frozen=True)
class Stage:
    """The linears of a function that read one value, in order.

    Attributes:
        x: What they read.
        linears: By the slots of their weights.
    """

    x: Value
    linears: Mapping[str, Node]


@dataclass
class Places:
    """Where a program can be rounded.

    Attributes:
        stages: By function of blocks, its linears whose input can be rounded, however their weights
            are stored.
        packable: By position of the call of a block, the slots of weights that can become codes.
        attentions: By function of blocks, the attentions whose keys and values can be rounded.
        skipped: Weights that stay as they are, with the reason.
    """

    stages: dict[str, list[Stage]] = field(default_factory=dict)
    packable: dict[int, frozenset[str]] = field(default_factory=dict)
    attentions: dict[str, list[Node]] = field(default_factory=dict)
    skipped: list[Skip] = field(default_factory=list)

    def packable_stages(self, program: Program, position: int) -> list[Stage]:
        """Return the stages of a call, each with the linears alone whose weights can be packed."""
        packable = self.packable[position]
        kept = [
            Stage(stage.x, {s: node for s, node in stage.linears.items() if s in packable})
            for stage in self.stages[program.calls[position].function]
        ]
        return [stage for stage in kept if stage.linears]


def find_places(program: Program) -> Places:
    """Return the places of a program's blocks; nothing is read or changed."""
    places = Places(skipped=outside_blocks(program))
    positions: dict[str, list[int]] = {}
    for block in find_blocks(program):
        positions.setdefault(program.calls[block.position].function, []).append(block.position)
        places.packable[block.position] = frozenset()
    readers = Counter(name for call in program.calls for name in call.weights.values())
    routers: dict[str, set[Node]] = {}
    for block, mixture in find_mixtures(program):
        if isinstance(mixture, Mixture):
            called = program.calls[block.position].function
            routers.setdefault(called, set()).add(mixture.router)
    for name, called_at in positions.items():
        function = program.functions[name]
        stages: dict[Value, dict[str, Node]] = {}
        uses, of_value = function.uses(), function.slots_by_value()
        for value, slot in of_value.items():
            weights = {at: program.weights[program.calls[at].weights[slot]] for at in called_at}
            weight = weights[called_at[0]]
            if len(weight.shape) < 2 or weight.constant or not weight.dtype.is_floating_point:
                continue
            if uses[value] and all(node.op in _NO_PRODUCTS for node, _ in uses[value]):
                continue
            reason = _reason(uses, value, routers.get(name, set()))
            if reason is not None:
                places.skipped.append(Skip(f"{name}: {slot}", reason))
                continue
            ((node, _),) = uses[value]
            assert node.inputs[0] is not None
            stages.setdefault(node.inputs[0], {})[slot] = node
            # Layers that share a function may store a weight each in its own way.
            kept = {at: _why_kept(weight, readers) for at, weight in weights.items()}
            for at, why in kept.items():
                if why is None:
                    places.packable[at] |= {slot}
            whole = len(set(kept.values())) == 1
            said = {
                f"{name}: {slot}" if whole else weights[at].name: why for at, why in kept.items()
            }
            places.skipped += [Skip(where, why) for where, why in said.items() if why is not None]
        order = {node: number for number, node in enumerate(function.nodes)}
        ordered = [
            Stage(x, dict(sorted(linears.items(), key=lambda item: order[item[1]])))
            for x, linears in stages.items()
        ]
        ordered.sort(key=lambda stage: order[next(iter(stage.linears.values()))])
        places.stages[name] = ordered
        places.attentions[name] = [node for node in function.nodes if node.op == "attention"]
    return places


def _why_kept(weight: Weight, readers: Mapping[str, int]) -> str | None:
    """Return why a layer's weight stays as it is stored, though one linear alone reads its slot.

    Args:
        readers: How many slots of calls a weight stands in, by its name.
    """
    if readers[weight.name] > 1:
        return "another layer reads it too"
    return None if weight.encoding is None else f"it is {weight.encoding} already"


def _reason(
    uses: Mapping[Value, Sequence[tuple[Node, int]]], weight: Value, routers: set[Node]
) -> str | None:
    """Return why a matrix with these readers is not packed."""
    readers = uses[weight]
    if not readers:
        return "nothing reads it"
    others = [node.op for node, index in readers if (node.op, index) != ("linear", 1)]
    if others:
        return f"{others[0]} reads it, which takes dense matrices alone"
    if len(readers) > 1:
        return f"{len(readers)} linears read it"
    node = readers[0][0]
    if node in routers or any(reader.op == "top_k_gating" for reader, _ in uses[node.output]):
        return "experts are chosen by it"
    return None


def round_activations(function: Function, stages: Sequence[Stage], bits: int) -> int:
    """Put a rounding in front of linears, one for each input that they share; return how many."""
    for stage in stages:
        first = next(iter(stage.linears.values()))
        rounded = function.add(
            ROUNDED, [stage.x], {"bits": bits, "symmetric": True},
            [f"{stage.x.name}_q{bits}"], before=first,
        )  # fmt: skip
        for node in stage.linears.values():
            node.inputs[0] = rounded.output
    return len(stages)


def round_kv(function: Function, attentions: Sequence[Node], bits: int) -> int:
    """Put a rounding in front of attentions, on new keys and values; return how many."""
    for node in attentions:
        for index in (1, 2):
            value = node.inputs[index]
            assert value is not None
            rounded = function.add(
                ROUNDED, [value], {"bits": bits, "symmetric": False},
                [f"{value.name}_q{bits}"], before=node,
            )  # fmt: skip
            node.inputs[index] = rounded.output
    return 2 * len(attentions)
