"""What is stated of mixtures that lost experts, or whose experts were carved; see `statements`."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch

from graphopt.ir.blocks import Block, block_name, find_blocks
from graphopt.ir.expert_neurons import keep_neurons, mask_neurons
from graphopt.ir.graph import Function, Program
from graphopt.ir.mixture import Mixture, keep_experts, own_slots, read_mixture, stack_of
from graphopt.ir.shapes import infer_program
from graphopt.pass_manager.contract import Statement
from graphopt.pass_manager.numbering import ValueNumbers
from graphopt.pass_manager.statements import ChangedBlocks, check_changed_blocks


@dataclass(frozen=True)
class KeptOfMixture:
    """Which experts of one mixture are left.

    Attributes:
        block: From 0.
        experts: By their numbers in the source, ascending.
        merged: Whether others were merged into them, so that their own weights differ.
        reconstructed: Whether their down projections were solved for anew.
    """

    block: int
    experts: tuple[int, ...]
    merged: bool
    reconstructed: bool = False


@dataclass(frozen=True)
class KeptExperts(Statement):
    """Mixtures have some of the source's experts, and nothing else changed.

    Attributes:
        mixtures: Those that lost experts.
    """

    mixtures: tuple[KeptOfMixture, ...]

    def check(self, before: Program, after: Program) -> str | None:
        stated = ChangedBlocks(frozenset(mixture.block for mixture in self.mixtures))
        untrue = stated.check(before, after)
        if untrue is not None:
            return untrue
        expected = before.copy()
        try:
            keep_experts(expected, {m.block: m.experts for m in self.mixtures})
        except ValueError as error:
            return f"a mixture cannot be left with these experts: {error}"
        blocks = list(zip(find_blocks(expected), find_blocks(after), strict=True))
        numbers = ValueNumbers()
        for mixture in self.mixtures:
            old, new = blocks[mixture.block]
            free = _own_weights(expected, old) if mixture.merged else set()
            if mixture.reconstructed:
                function, part = _mixture_of(expected, old)
                free.add(stack_of(function, part.last)[0])
            untrue = _check_block(numbers, expected, old, after, new, free)
            if untrue is not None:
                return f"{block_name(after, new)}: {untrue}"
        return None


@dataclass(frozen=True)
class CarvedMixture:
    """How the neurons of the experts of one mixture were divided.

    Attributes:
        block: From 0.
        orders: For each expert the source's neurons that are left, those that every row runs first.
        shared: How many these are.
        active: How many groups of the others a row runs; 0 where there are none.
        reconstructed: Whether the down projections were solved for anew.
        beside: Whether another part of the block was divided as well, of which another statement
            is made.
    """

    block: int
    orders: tuple[tuple[int, ...], ...]
    shared: int
    active: int
    reconstructed: bool
    beside: bool = False


@dataclass(frozen=True)
class CarvedExperts(Statement):
    """Experts are made of the source's neurons, each at most once, and masked by their own routers.

    Attributes:
        mixtures: Those that were carved.
        others: Blocks that changed in another way, of which another statement is made.
    """

    mixtures: tuple[CarvedMixture, ...]
    others: frozenset[int] = frozenset()

    def check(self, before: Program, after: Program) -> str | None:
        expected, numbers = before.copy(), ValueNumbers()

        def check_mixture(old: Block, new: Block, mixture: CarvedMixture) -> str | None:
            return _check_carved(numbers, expected, old, after, new, mixture)

        return check_changed_blocks(before, after, self.mixtures, self.others, check_mixture)


def _check_carved(
    numbers: ValueNumbers,
    expected: Program,
    old: Block,
    after: Program,
    new: Block,
    mixture: CarvedMixture,
) -> str | None:
    if any(len(set(order)) != len(order) for order in mixture.orders):
        return "a neuron is used twice"
    try:
        keep_neurons(expected, {mixture.block: mixture.orders})
    except ValueError as error:
        return f"its experts cannot be left with these neurons: {error}"
    call, other = expected.calls[old.position], after.calls[new.position]
    function, part = _mixture_of(expected, old)
    own = _own_weights(expected, old)
    last = stack_of(function, part.last)[0]
    free = {last} if mixture.reconstructed else set()
    if mixture.beside:
        for slot in own - free:
            wanted = expected.weights[call.weights[slot]]
            found = after.weights[other.weights[slot]]
            if not torch.equal(wanted.load(), found.load()):
                return f"{found.name} is not the source's, of the neurons stated"
        return None
    if mixture.active:
        stem = last.rpartition(".")[0]
        routers = [f"{stem}.{name}" if stem else name for name in ("router.weight", "router.bias")]
        if any(slot not in other.weights for slot in routers):
            return "it has no routers of its experts' own"
        values = [after.weights[other.weights[slot]].load() for slot in routers]
        mask_neurons(expected, mixture.block, mixture.shared, mixture.active, *values)
        free |= set(routers)
    return _check_block(numbers, expected, old, after, new, free)


def _check_block(
    numbers: ValueNumbers,
    expected: Program,
    old: Block,
    after: Program,
    new: Block,
    free: Set[str],
) -> str | None:
    """Return what of a block is not as expected.

    Args:
        free: Slots of weights that may have any value.
    """
    call, other = expected.calls[old.position], after.calls[new.position]
    if call.weights.keys() != other.weights.keys():
        return "it has other weights than the source's"
    held: dict[str, int] = {}
    for slot, name in call.weights.items():
        wanted, found = expected.weights[name], after.weights[other.weights[slot]]
        if wanted.shape != found.shape:
            return f"{found.name} is {list(found.shape)}, not {list(wanted.shape)}"
        held[slot] = numbers.of("slot", new.position, slot)
        if slot in free or numbers.weight(wanted) == numbers.weight(found):
            continue
        if not (expected.has_values() and torch.equal(wanted.load(), found.load())):
            return f"{found.name} is not the source's, of the experts or neurons stated"
    args = [numbers.of("argument", new.position, number) for number in range(len(call.args))]
    results = [
        numbers.call(program, one, args, weights=held, without_past=True).results
        for program, one in ((expected, call), (after, other))
    ]
    if results[0] != results[1]:
        return "it computes something else than the source with these experts"
    return None


def _mixture_of(program: Program, block: Block) -> tuple[Function, Mixture]:
    call = program.calls[block.position]
    function = program.function_of(call)
    mixture = read_mixture(function, call, infer_program(program)[0][block.position])
    assert isinstance(mixture, Mixture)
    return function, mixture


def _own_weights(program: Program, block: Block) -> set[str]:
    """Return the slots of what is an expert's own: all of a mixture but its router."""
    function, mixture = _mixture_of(program, block)
    return set(own_slots(function, mixture, infer_program(program)[0][block.position]))
