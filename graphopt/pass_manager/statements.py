"""What lossy passes state of the programs they make, checked against weights and calls.

A lossy pass changes results, so that no tolerance tells its work from a mistake. It states which
blocks it took out, changed or divided; all else must be the same expressions of the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from graphopt.ir.blocks import Block, block_name, find_blocks, sub_blocks
from graphopt.ir.feed_forward import FeedForward, feed_forwards, read_hidden
from graphopt.ir.graph import Call, Node, Program, Value
from graphopt.ir.weights import SharedSources
from graphopt.pass_manager.contract import Statement
from graphopt.pass_manager.numbering import ValueNumbers, number_program


@dataclass(frozen=True)
class RemovedParts(Statement):
    """Block b of the result is a block of the source, less the parts that are named.

    Attributes:
        parts: Pairs of a block of the source, from 0, and `block`, `attention` or `ffn`.
    """

    parts: tuple[tuple[int, str], ...]

    def check(self, before: Program, after: Program) -> str | None:
        numbers = ValueNumbers()
        outputs, left = self._without(numbers, before)
        found = find_blocks(after)
        if len(found) != len(left):
            return f"{len(left)} blocks are left, and the program has {len(found)}"
        if outputs != number_program(numbers, after, without_past=True)[0]:
            return self._first(numbers, left, after) or "what is not in a block changed as well"
        return None

    def _without(
        self, numbers: ValueNumbers, program: Program
    ) -> tuple[list[int], list[tuple[str, int]]]:
        """Number a program as if the parts were gone.

        Returns:
            Its outputs, and for each block that is left its name and the number of its result.
        """
        blocks = {block.position: (n, block) for n, block in enumerate(find_blocks(program))}
        carried = {name: numbers.of("input", name) for name in program.inputs}
        left: list[tuple[str, int]] = []
        for position, call in enumerate(program.calls):
            number, block = blocks.get(position, (-1, None))
            kinds = {kind for index, kind in self.parts if index == number}
            instead: dict[Value, Value] = {}
            if block is not None and kinds:
                instead = _without_terms(program, call, block, kinds)
                if not instead:
                    carried[call.results[0]] = carried[call.args[block.stream]]
                    continue
            args = [carried[name] for name in call.args]
            made = numbers.call(program, call, args, without_past=True, instead=instead)
            results = program.function_of(call).results
            carried.update(
                (name, made.values[instead.get(value, value)])
                for name, value in zip(call.results, results, strict=True)
            )
            if block is not None:
                left.append((block_name(program, block), carried[call.results[0]]))
        return [carried[name] for name in program.outputs], left

    @staticmethod
    def _first(numbers: ValueNumbers, left: list[tuple[str, int]], after: Program) -> str | None:
        """Return the first block that is not what is left of the source's."""
        carried = {name: numbers.of("input", name) for name in after.inputs}
        results: dict[int, int] = {}
        for position, call in enumerate(after.calls):
            args = [carried[name] for name in call.args]
            made = numbers.call(after, call, args, without_past=True)
            carried.update(zip(call.results, made.results, strict=True))
            results[position] = made.results[0]
        for (name, expected), block in zip(left, find_blocks(after), strict=True):
            if results[block.position] != expected:
                return f"{block_name(after, block)} is not what is left of {name}"
        return None


def _without_terms(
    program: Program, call: Call, block: Block, kinds: set[str]
) -> dict[Value, Value]:
    """Return which values are read in place of sums with these parts; {} if nothing is left."""
    terms = sub_blocks(program.function_of(call), block.stream)
    if "block" in kinds or (terms and all(term.kind in kinds for term in terms)):
        return {}
    instead: dict[Value, Value] = {}
    adders = {term.node for term in terms if term.kind in kinds}
    gone, sums = {term.term for term in terms if term.kind in kinds}, set[Value]()
    for node in program.function_of(call).nodes:
        if node not in adders and sums.isdisjoint(v for v in node.inputs if v is not None):
            continue
        left = [v for v in node.inputs if v is not None and v not in gone]
        if left:
            instead[node.output] = left[0]
        else:  # of terms that are added to each other first, such as routed and shared experts
            gone.add(node.output)
            sums.add(node.output)
    for value in instead:
        while instead[value] in instead:
            instead[value] = instead[instead[value]]
    return instead


@dataclass(frozen=True)
class ChangedBlocks(Statement):
    """The blocks that are named were changed, and nothing else was.

    Attributes:
        blocks: Indices of blocks of the program, from 0; None for all.
    """

    blocks: frozenset[int] | None = None

    def check(self, before: Program, after: Program) -> str | None:
        found = find_blocks(before), find_blocks(after)
        if len(found[0]) != len(found[1]):
            return f"there were {len(found[0])} blocks, and there are {len(found[1])}"
        numbers = ValueNumbers()
        sides = [
            list(self._numbered(numbers, program, blocks))
            for program, blocks in zip((before, after), found, strict=True)
        ]
        for (name, old), (_, new) in zip(*sides, strict=False):
            if old != new:
                return f"{name} changed as well"
        return None if len(sides[0]) == len(sides[1]) else "what is not in a block changed as well"

    def _numbered(
        self, numbers: ValueNumbers, program: Program, blocks: list[Block]
    ) -> Iterator[tuple[str, list[int]]]:
        """Yield what calls are called and the numbers of their results."""
        places = {block.position: number for number, block in enumerate(blocks)}
        carried = {name: numbers.of("input", name) for name in program.inputs}
        for position, call in enumerate(program.calls):
            number = places.get(position)
            if number is not None and (self.blocks is None or number in self.blocks):
                results = [numbers.of("block", number)]
            else:
                args = [carried[name] for name in call.args]
                results = numbers.call(program, call, args, without_past=True).results
            carried.update(zip(call.results, results, strict=True))
            yield call.path or call.function, results
        yield "the order of outputs", [carried[name] for name in program.outputs]


class InBlock(Protocol):
    """What a statement says of one block, from 0."""

    @property
    def block(self) -> int: ...


Stated = TypeVar("Stated", bound=InBlock)


def check_changed_blocks(
    before: Program,
    after: Program,
    parts: Sequence[Stated],
    others: frozenset[int],
    check: Callable[[Block, Block, Stated], str | None],
) -> str | None:
    """Return what is untrue of blocks that changed as stated, with the block's name.

    Args:
        parts: What is stated, a block each. Without values of weights only that no other changed
            is checked.
        others: Blocks that changed in another way.
        check: Told the block of the source, that of the result and what is stated.
    """
    untrue = ChangedBlocks(others | {part.block for part in parts}).check(before, after)
    if untrue is not None or not (before.has_values() and after.has_values()):
        return untrue
    blocks = list(zip(find_blocks(before), find_blocks(after), strict=True))
    for part in parts:
        old, new = blocks[part.block]
        untrue = check(old, new, part)
        if untrue is not None:
            return f"{block_name(after, new)}: {untrue}"
    return None


@dataclass(frozen=True)
class DividedPart:
    """How the neurons of one feed-forward part were divided.

    Attributes:
        block: From 0.
        order: The source's neurons that are left: shared ones, then the experts' side by side.
            Numbers from the part's width on are neurons of zeros.
        shared: How many are shared.
        reconstructed: Whether the down projection was solved for anew.
        solved: Names of other weights of the source's block that were solved for anew, such as the
            gain of a norm behind the part.
    """

    block: int
    order: tuple[int, ...]
    shared: int
    reconstructed: bool
    solved: frozenset[str] = frozenset()


@dataclass(frozen=True)
class DividedNeurons(Statement):
    """Feed-forward parts are made of the source's neurons, each at most once.

    Attributes:
        parts: Those that were divided.
        others: Blocks that changed in another way, of which another statement is made.
    """

    parts: tuple[DividedPart, ...]
    others: frozenset[int] = frozenset()

    def check(self, before: Program, after: Program) -> str | None:
        def check_part(old: Block, new: Block, part: DividedPart) -> str | None:
            return _check_neurons(before, old, after, new, part)

        return check_changed_blocks(before, after, self.parts, self.others, check_part)


def _check_neurons(
    before: Program, old: Block, after: Program, new: Block, part: DividedPart
) -> str | None:
    if len(set(part.order)) != len(part.order):
        return "a neuron is used twice"
    # What is divided is made of rows of the source, which is read once for both.
    shared = SharedSources()
    source = _source(before, old, shared)
    made = _divided(after, new, shared)
    order = torch.tensor(part.order)
    for kind, value in source.items():
        if kind not in made:
            return f"it has no {kind} any more"
        if kind == "down" and part.reconstructed:
            continue
        missing = int(order.max()) + 1 - len(value)
        if missing > 0:
            value = torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
        if not torch.equal(made[kind], value[order]):
            return f"the neurons of {kind} are not those of the source in the order stated"
    call, other = before.calls[old.position], after.calls[new.position]
    numbers = ValueNumbers()
    kept = {numbers.weight(after.weights[name]) for name in other.weights.values()}
    parts = _weights_of(before, call, _only_part(before, old)) | part.solved
    for name in call.weights.values():
        if name not in parts and numbers.weight(before.weights[name]) not in kept:
            return f"{name} is not read any more"
    return None


def _only_part(program: Program, block: Block) -> FeedForward:
    function = program.function_of(program.calls[block.position])
    (part,) = feed_forwards(function, block.stream)
    assert isinstance(part, FeedForward)
    return part


def _weights_of(program: Program, call: Call, part: FeedForward) -> set[str]:
    slots = program.function_of(call).slots_by_value()
    nodes = [node for node in (part.gate, part.up, part.down) if node is not None]
    return {call.weights[slots[value]] for node in nodes for value in node.inputs if value in slots}


def _reader(
    program: Program, block: Block, shared: SharedSources
) -> Callable[[Value | None], Tensor | None]:
    """Return what gives the values of a block's weights."""
    call = program.calls[block.position]
    slots = program.function_of(call).slots_by_value()

    def read(value: Value | None) -> Tensor | None:
        if value is None:
            return None
        return shared.load(program.weights[call.weights[slots[value]]].producer)

    return read


def _operand(node: Node | None, index: int) -> Value | None:
    return None if node is None else node.operand(index)


def _rows(
    read: Callable[[Value | None], Tensor | None], gate: Node | None, up: Node, down: Node
) -> dict[str, Tensor]:
    """Return a part's tensors by what they are, with a row a neuron."""
    found = {
        "up": read(_operand(up, 1)),
        "up bias": read(_operand(up, 2)),
        "gate": read(_operand(gate, 1)),
        "gate bias": read(_operand(gate, 2)),
        "down": read(_operand(down, 1)),
    }
    rows = {kind: value for kind, value in found.items() if value is not None}
    rows["down"] = rows["down"].T
    return rows


def _source(program: Program, block: Block, shared: SharedSources) -> dict[str, Tensor]:
    part = _only_part(program, block)
    return _rows(_reader(program, block, shared), part.gate, part.up, part.down)


def _divided(program: Program, block: Block, shared: SharedSources) -> dict[str, Tensor]:
    """Return what a divided part is made of: shared neurons, then the experts'."""
    function = program.function_of(program.calls[block.position])
    read, weights = _reader(program, block, shared), set(function.weights.values())
    groups: list[dict[str, Tensor]] = []
    for node in function.nodes:
        hidden = read_hidden(node.inputs[0], weights) if node.op == "linear" else None
        if hidden is not None:
            groups.append(_rows(read, hidden[1], hidden[2], node))
    for node in function.nodes:
        if node.op == "experts":
            names = ("up", "down", "gate", "up bias", "gate bias")
            values = {name: read(_operand(node, 2 + i)) for i, name in enumerate(names)}
            held = {name: value for name, value in values.items() if value is not None}
            groups.append({**held, "down": held["down"].T})
    kinds = groups[0].keys() if groups else ()
    return {kind: torch.cat([group[kind] for group in groups]) for kind in kinds}
