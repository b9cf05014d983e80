"""What is stated of programs whose weights became codes, and whose activations are rounded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.ir.blocks import find_blocks
from graphopt.ir.encoding import Packed
from graphopt.ir.graph import Node, Program, Value
from graphopt.ir.weights import Array, Weight
from graphopt.pass_manager.contract import Statement
from graphopt.pass_manager.numbering import ValueNumbers
from graphopt.pass_manager.verification import compare, jumps, make_probe, measure

ROUNDED = "quantise_dequantise"
"""The op that rounds activations."""

TOLERANCE = 1e-3
"""How far a weight's error, summed on another device in another order, may be from the stated."""

FARTHEST = 5.0
"""What the squared error of codes may be, relative to the matrix's square, that serve the products
with inputs which are rounded themselves. They may be far from the matrix, since they make up for
errors of its inputs, but not turned away from it, and at most twice as long: |V - W|^2 is
|V|^2 - 2 <V, W> + |W|^2."""


@dataclass(frozen=True)
class PackedMatrix:
    """A weight that became codes.

    Its error is bounded, whatever is stated: by that of the nearest codes of the full range of each
    group where the codes are nearest ones; otherwise they have something in common with the
    matrix, and their error is `FARTHEST` at most.

    Attributes:
        name: The weight's.
        encoding: How it is stored.
        error: Squared error relative to the square of the source's.
        nearest: Whether each element is the nearest of the values that its group's codes stand for.
    """

    name: str
    encoding: Packed
    error: float
    nearest: bool


@dataclass(frozen=True)
class RoundedProgram(Statement):
    """Weights became codes, and activations are rounded; nothing else changed.

    Attributes:
        weights: Those that became codes.
        activations: Bits of what `readers` read; None for no change.
        kv: Bits of the keys and values that attentions read; None for no change.
        scaled: What was rounded, where that is not the source itself but computes the same, its
            features scaled. Where that took wider numbers than the source has, what does not become
            codes is rounded back to the source's.
        readers: The weights by whose linears in blocks a rounded value is read.
    """

    weights: tuple[PackedMatrix, ...]
    activations: int | None = None
    kv: int | None = None
    scaled: Program | None = None
    readers: frozenset[str] = frozenset()

    def check(self, before: Program, after: Program) -> str | None:
        if self.scaled is not None:
            untrue = _not_the_same(before, self.scaled)
            if untrue is not None:
                return untrue
            scaled = with_dtypes_of(self.scaled, before, {weight.name for weight in self.weights})
        else:
            scaled = before
        added = added_roundings(scaled, after)
        names = {weight.name for weight in self.weights}
        untrue = check_roundings(after, added, self.readers, self.activations, self.kv)
        if untrue is not None:
            return untrue
        numbers = ValueNumbers()
        nothing: Mapping[str, list[Node]] = {}
        if _outputs(numbers, scaled, names, nothing) != _outputs(numbers, after, names, added):
            return "something else than the weights and roundings stated changed as well"
        for weight in self.weights:
            if weight.name not in after.weights:
                return f"{weight.name} is not read any more"
            made, dtype = after.weights[weight.name], before.weights[weight.name].dtype
            if made.dtype != dtype:
                return f"{weight.name}: it is of {made.dtype}, not {dtype}"
            untrue = _check_weight(scaled.weights[weight.name], made, weight)
            if untrue is not None:
                return f"{weight.name}: {untrue}"
        return None


@dataclass(frozen=True)
class RetunedCodes(Statement):
    """Weights of blocks have other values, in the encodings that they had; nothing else changed."""

    def check(self, before: Program, after: Program) -> str | None:
        blocks = {before.calls[block.position].path for block in find_blocks(before)}
        names = {
            name
            for call in before.calls
            if call.path in blocks
            for name in call.weights.values()
            if not before.weights[name].constant
        }
        numbers = ValueNumbers()
        nothing: Mapping[str, list[Node]] = {}
        if _outputs(numbers, before, names, nothing) != _outputs(numbers, after, names, nothing):
            return "something else than weights of blocks changed as well"
        for name in sorted(names):
            if name not in after.weights:
                return f"{name} is not read any more"
            old, new = before.weights[name], after.weights[name]
            if old.encoding != new.encoding or old.shape != new.shape:
                kinds = [f"{list(w.shape)} {w.encoding or 'dense'}" for w in (new, old)]
                return f"{name} is {kinds[0]}, not {kinds[1]}"
            if not bool(new.load(torch.float32).isfinite().all()):
                return f"{name} holds NaN or infinity"
        return None


def with_dtypes_of(program: Program, source: Program, but: Collection[str] = ()) -> Program:
    """Return a program whose weights have the dtypes that they have in its source.

    Args:
        but: Names of weights that stay as they are, as do those that the source does not have.
    """
    made = program.copy()
    for weight in list(made.weights):
        if weight.name in but or weight.name not in source.weights:
            continue
        dtype = source.weights[weight.name].dtype
        if weight.dtype != dtype:
            made.weights.replace(weight.with_producer(Array(weight.load().to(dtype))))
    return made


def _not_the_same(before: Program, scaled: Program) -> str | None:
    """Return how far a program with scaled features is from its source, where it is too far."""
    probe = make_probe(before, "", None)
    dtype = torch.float64 if jumps(before) else torch.float32
    difference = compare(*measure([before, scaled], probe, dtype=dtype))
    if difference.within_tolerance:
        return None
    return (
        f"with features scaled, logits differ by {difference.max_abs_logit_delta:.3g}, and by "
        f"{difference.tolerance:.3g} at most where nothing but rounding changes them"
    )


def _rounds(node: Node, bits: int, symmetric: bool, clipped: bool) -> bool:
    """Return whether a node rounds so, as it is to stay: without a gradient of its own."""
    return (
        node.op == ROUNDED
        and node.attrs.get("bits") == bits
        and node.attrs.get("symmetric") is symmetric
        and not node.attrs.get("straight_through", False)
        and (clipped or all(clip is None for clip in node.inputs[1:]))
    )


def added_roundings(before: Program, after: Program) -> dict[str, list[Node]]:
    """Return the roundings that functions did not have before, by the function."""
    added: dict[str, list[Node]] = {}
    for name, function in after.functions.items():
        old = before.functions.get(name)
        known = set() if old is None else {n.outputs[0].name for n in old.nodes if n.op == ROUNDED}
        added[name] = [
            node for node in function.nodes if node.op == ROUNDED and node.output.name not in known
        ]
    return added


def check_roundings(
    after: Program,
    added: Mapping[str, Sequence[Node]],
    readers: Collection[str],
    activations: int | None,
    kv: int | None,
    *,
    clipped: bool = False,
) -> str | None:
    """Return what is untrue of the roundings that functions of blocks have.

    Args:
        added: Those that are new: each stands where one is asked for.
        readers: The weights by whose linears a rounded value is read.
        activations: Bits of what these linears read; None where nothing is asked.
        kv: Bits of the keys and values that attentions of blocks read; None likewise.
        clipped: Whether roundings may have clips; else they cover the whole range of each token.
    """
    expected: dict[str, set[Node]] = {name: set() for name in after.functions}
    for block in find_blocks(after):
        call = after.calls[block.position]
        function = after.functions[call.function]
        slots = function.slots_by_value()
        for node in function.nodes:
            places: list[tuple[int, int, bool]] = []
            read = call.weights.get(slots.get(node.operand(1), ""))  # type: ignore[arg-type]
            if activations is not None and node.op == "linear" and read in readers:
                places = [(0, activations, True)]
            if kv is not None and node.op == "attention":
                places = [(1, kv, False), (2, kv, False)]
            for place, bits, symmetric in places:
                value = node.inputs[place]
                rounding = None if value is None else value.node
                if rounding is None or not _rounds(rounding, bits, symmetric, clipped):
                    where = f"{call.path or function.name}: operand {place} of {node.op}"
                    return f"{where} is not rounded to {bits} bits as stated"
                expected[call.function].add(rounding)
    for name, nodes in added.items():
        others = [node for node in nodes if node not in expected[name]]
        if others:
            return f"{name}: {others[0].output.name} is rounded as well"
    return None


def _outputs(
    numbers: ValueNumbers, program: Program, names: set[str], added: Mapping[str, list[Node]]
) -> list[int]:
    """Number a program's outputs as if weights had not become codes, and without roundings.

    Args:
        names: The weights.
        added: The roundings, by function.
    """
    carried = {name: numbers.of("input", name) for name in program.inputs}
    for call in program.calls:
        instead: dict[Value, Value] = {}
        for node in added.get(call.function, []):
            value = node.inputs[0]
            assert value is not None
            instead[node.output] = instead.get(value, value)
        held = {
            slot: numbers.of("became codes", name)
            for slot, name in call.weights.items()
            if name in names
        }
        args = [carried[name] for name in call.args]
        made = numbers.call(program, call, args, weights=held, without_past=True, instead=instead)
        results = program.functions[call.function].results
        carried.update(
            (name, made.values[instead.get(value, value)])
            for name, value in zip(call.results, results, strict=True)
        )
    return [carried[name] for name in program.outputs]


def _check_weight(source: Weight, made: Weight, stated: PackedMatrix) -> str | None:
    if made.encoding != stated.encoding:
        return f"it is {made.encoding or 'dense'}, not {stated.encoding}"
    if made.shape != source.shape:
        return f"it is {list(made.shape)}, not {list(source.shape)}"
    tensors = {t.name.removeprefix(f"{made.name}."): t.load() for t in made.tensors()}
    if not bool(tensors["scales"].isfinite().all()) or bool((tensors["scales"] == 0).any()):
        return "it has a scale that is 0 or not finite"
    value, wanted = made.load(torch.float32), source.load(torch.float32)
    power = max(float(wanted.double().square().sum()), 1e-30)
    error = float((value.double() - wanted.double()).square().sum()) / power
    if abs(error - stated.error) > TOLERANCE * max(stated.error, 1e-6):
        return f"its squared error is {error:.4g} of its square, not {stated.error:.4g}"
    if error > (most := _most_error(value, wanted, tensors["scales"], stated)):
        return (
            f"its squared error is {error:.4g} of its square, and {most:.4g} at most for such codes"
        )
    if stated.nearest and _farther(value, wanted, tensors, stated.encoding):
        return "not every element is the nearest of the values that codes stand for"
    return None


def _most_error(value: Tensor, wanted: Tensor, scales: Tensor, stated: PackedMatrix) -> float:
    """Return the bound of a matrix's squared error, relative to its square."""
    goal = wanted.double()
    power = max(float(goal.square().sum()), 1e-30)
    if not stated.nearest:
        # What has nothing in common with the matrix is none of its roundings.
        alike = float((value.double() * goal).sum()) > 0 or power <= 1e-30
        return FARTHEST if alike else 0.0
    full = stated.encoding.dequantise(stated.encoding.quantise(goal))
    nearest = float((full - goal).square().sum()) / power
    # Chosen grids are no worse than the full range until their scales are rounded: to fp16, which
    # moves a value by half of its eps, to a wider one of the weight's, or up to the least scale.
    rounded = max(torch.finfo(dtype).eps for dtype in (torch.float16, scales.dtype))
    least = torch.finfo(torch.float16).tiny * (goal.numel() / power) ** 0.5
    return float(nearest**0.5 * (1 + rounded) + rounded + least) ** 2


def _farther(
    value: Tensor, wanted: Tensor, tensors: Mapping[str, Tensor], encoding: Packed
) -> bool:
    """Return whether an element is farther from what it should be than another code's value is."""
    rows, goal = (t.double().movedim(encoding.axis, -1) for t in (value, wanted))
    scales = tensors["scales"].double()[..., None]
    last, groups = 2**encoding.bits - 1, tensors["scales"].shape[1]
    zeros: Tensor | float = float(2 ** (encoding.bits - 1))
    if not encoding.symmetric:
        zeros = encoding.zero_points(tensors["zeros"], groups).double()[..., None]
    grouped = goal.unflatten(-1, (groups, encoding.group))
    nearest = ((grouped / scales).round() + zeros).clamp(0, last)
    best = ((nearest - zeros) * scales - grouped).abs()
    found = (rows.unflatten(-1, (groups, encoding.group)) - grouped).abs()
    # Values are rounded to the dtype of the scales when they are made, and scales were chosen in
    # fp32, in which a half may fall to either side.
    rounding = torch.finfo(tensors["scales"].dtype).eps * grouped.abs()
    return bool((found > best + rounding + 1e-5 * scales.abs()).any())
