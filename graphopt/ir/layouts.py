"""How the values of a sharded program lie on its ranks, derived from the placements of weights.

A value is the same on every rank, a part of a whole along an axis, or a summand of a sum over the
ranks. Each node either works on what it is given like that, or the program is wrong: a partial sum
that is used before it was added up, parts of different axes that meet, a bias that every rank adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graphopt.errors import VerifyError
from graphopt.ir.graph import Call, Function, Node, Program, Value, resolve_attrs
from graphopt.ir.ops import is_aten
from graphopt.ir.ops.collectives import COLLECTIVES
from graphopt.ir.ops.fused_collectives import types_between, unfused
from graphopt.ir.placement import Placement
from graphopt.ir.ranks import group_of
from graphopt.ir.split import Alignment, Layout, Split
from graphopt.ir.splits import adds, alignments, keeps_sums, pieces, takes_any
from graphopt.ir.types import Type


def layout_of(placement: Placement | None) -> Layout:
    """Return how a weight or state lies on the ranks."""
    if placement is None:
        return None
    if placement.summed:
        return "sum"
    if placement.axis is None:
        return None
    return Split(placement.axis, placement.sections, placement.copies)


def verify_layouts(program: Program, types: Sequence[Mapping[Value, Type]]) -> None:
    """Check that placements, shapes and collectives of a sharded program agree.

    Args:
        types: Of the values of every call, as `infer_program` gives them.

    Raises:
        VerifyError: With the place and what is wrong there.
    """
    devices = group_of(program)
    if not devices:
        _refuse_collectives(program)
        return
    _same_group(program, devices)
    carried: dict[str, Layout] = {}
    for call, kinds in zip(program.calls, types, strict=True):
        given = [carried.get(name) for name in call.args]
        layouts = function_layouts(program, call, kinds, given)
        function = program.function_of(call)
        where = call.path or function.name
        for cache in function.caches:
            wanted = layout_of(program.states[call.caches[cache.slot]].placement)
            for value in cache.presents:
                expected = wanted if len(kinds[value].shape) > 2 else None
                if layouts.get(value) != expected:
                    raise VerifyError(
                        f"{where}: {value.name}, which state {call.caches[cache.slot]!r} keeps, is "
                        f"{described(layouts.get(value))}, and the state {described(expected)}."
                    )
        for name, value in zip(call.results, function.results, strict=True):
            layout = layouts.get(value)
            if layout == "sum":
                raise VerifyError(f"{where}: {value.name}, a partial sum, is a result.")
            carried[name] = layout
    for name in program.outputs:
        if carried.get(name) is not None:
            raise VerifyError(f"program output {name!r} is {described(carried[name])}.")


def _refuse_collectives(program: Program) -> None:
    """Refuse collectives of a program on one device, unless it is one rank's: that has no group."""
    for weight in program.weights:
        if weight.placement is not None:
            for function in program.functions.values():
                for node in function.nodes:
                    if node.op in COLLECTIVES:
                        raise VerifyError(
                            f"function {function.name!r}: {node.output.name} = {node.op}: the "
                            "program is on one device."
                        )
            return


def _same_group(program: Program, devices: tuple[str, ...]) -> None:
    placed = [(f"weight {w.name!r}", w.placement) for w in program.weights]
    placed += [(f"state {s.name!r}", s.placement) for s in program.states.values()]
    for what, placement in placed:
        if placement is not None and len(placement.devices) > 1 and placement.devices != devices:
            raise VerifyError(f"{what} is {placement}, and others are on {', '.join(devices)}.")


def function_layouts(
    program: Program, call: Call, types: Mapping[Value, Type], given: Sequence[Layout]
) -> dict[Value, Layout]:
    """Return how the values of a call lie on the ranks; those that are not in it are whole.

    Args:
        types: Of the values of the call's function, a rank's.
        given: How its arguments lie.

    Raises:
        VerifyError: A node cannot work on what it is given.
    """
    function = program.function_of(call)
    ranks = len(group_of(program))
    layouts: dict[Value, Layout] = dict(zip(function.params, given, strict=True))
    for slot, value in function.weights.items():
        layouts[value] = layout_of(program.weights[call.weights[slot]].placement)
    for cache in function.caches:
        layout = layout_of(program.states[call.caches[cache.slot]].placement)
        for value in cache.pasts:
            layouts[value] = layout if len(types[value].shape) > 2 else None
    known: dict[Value, Layout] = {v: layout for v, layout in layouts.items() if layout is not None}
    walk = _Walk(function, call, types, ranks, known)
    for node in function.nodes:
        try:
            walk.node(node)
        except ValueError as error:
            where = f"{call.path or function.name}: {node.outputs[0].name} = {node.op}"
            raise VerifyError(f"{where}: {error}.") from error
    return walk.layouts


def described(layout: Layout) -> str:
    """Return how a value lies, as a clause."""
    if layout is None:
        return "the same on every rank"
    if layout == "sum":
        return "a partial sum"
    sections = f" in each of {layout.sections} sections" if layout.sections > 1 else ""
    copies = f", each on {layout.copies} ranks" if layout.copies > 1 else ""
    return f"a part along axis {layout.axis}{sections}{copies}"


class _Walk:
    def __init__(
        self, function: Function, call: Call, types: Mapping[Value, Type], ranks: int,
        layouts: dict[Value, Layout],
    ) -> None:  # fmt: skip
        self.call, self.types, self.ranks, self.layouts = call, dict(types), ranks, layouts
        # What has equal entries along an axis is a part of more of them as well.
        self.repeated: dict[Value, set[int]] = {}

    def node(self, node: Node) -> None:
        """Derive how a node's results lie.

        Raises:
            ValueError: It cannot work on its operands.
        """
        attrs = resolve_attrs(node, self.call)
        parts = self._in_parts(node, attrs)
        if parts:
            for part in parts:
                self.node(part)
            return
        several = pieces(node, attrs)
        if several != [node]:
            for piece in several:
                self.node(piece)
            return
        stages = unfused(node)
        if stages != [node]:
            self.types |= types_between(stages, self.types)
            for stage in stages:
                self.node(stage)
            return
        given = [None if value is None else self.layouts.get(value) for value in node.inputs]
        if node.op in COLLECTIVES:
            self._collective(node, attrs)
            return
        if all(layout is None for layout in given):
            self._note_repeated(node, attrs)
            return
        operands = [None if value is None else self.types[value] for value in node.inputs]
        summed = [place for place, layout in enumerate(given) if layout == "sum"]
        parted = [
            place
            for place, layout in enumerate(given)
            if isinstance(layout, Split) and not takes_any(node.op, place)
        ]
        if summed and not parted:
            if keeps_sums(node.op, attrs, operands, summed):
                self.layouts |= dict.fromkeys(node.outputs, "sum")
                return
            raise ValueError(self._unsummed(node, summed))
        if not parted:
            self._note_repeated(node, attrs)
            return
        for made in self._results(node, attrs, given, operands):
            self.layouts |= made
            return
        if summed and not all(adds(node.op, place) for place in summed):
            raise ValueError(self._unsummed(node, summed))
        told = ", ".join(
            f"{value.name} is {described(layout)}"
            for value, layout in zip(node.inputs, given, strict=True)
            if value is not None and layout is not None
        )
        raise ValueError(f"it does not work on parts like these: {told}")

    def _in_parts(self, node: Node, attrs: Mapping[str, Any]) -> list[Node]:
        """Return a product of packed weights as what stands in front of it, itself and its gate.

        And rotations as themselves and the transforms behind them. Empty where there is neither.
        """
        first = node.outputs[0]
        if node.op == "rope_pair" and len(node.inputs) > 4:
            turned = [Value(f"{value.name} before its transform") for value in node.outputs]
            self.types |= {t: self.types[v] for t, v in zip(turned, node.outputs, strict=True)}
            triples = zip(turned, node.inputs[4:], node.outputs, strict=True)
            return [
                Node("rope_pair", node.inputs[:4], dict(attrs), turned),
                *(Node("kronecker", [x, None, right], {}, [out]) for x, right, out in triples),
            ]
        if node.op == "norm_packed_linear":
            normed = Value(f"the norm in {first.name}")
            self.types[normed] = self.types[first]
            norm = {name: attrs[name] for name in ("eps", "offset") if name in attrs}
            product = {name: attrs[name] for name in ("parts", "act") if name in attrs}
            inputs = [normed, *node.inputs[3:]]
            return [
                Node("add_rms_norm", node.inputs[:3], norm, [first, normed]),
                Node("packed_linear", inputs, product, node.outputs[1:]),
            ]
        if node.op == "transformed_packed_linear":
            made = Value(f"the transform in {first.name}")
            assert node.inputs[0] is not None
            self.types[made] = self.types[node.inputs[0]]
            product = {name: attrs[name] for name in ("parts", "act") if name in attrs}
            front = {name: attrs[name] for name in attrs if name not in product}
            sums = int(attrs.get("total", False))
            return [
                Node("transformed", node.inputs[:5], front, [*node.outputs[:sums], made]),
                Node("packed_linear", [made, *node.inputs[5:]], product, node.outputs[sums:]),
            ]
        if node.op not in ("packed_linear", "integer_linear") or not attrs.get("act"):
            return []
        halves = [Value(f"the {half} half of {first.name}") for half in ("first", "last")]
        self.types |= dict.fromkeys(halves, self.types[first])
        return [
            Node(node.op, node.inputs, {"parts": 2}, halves),
            Node("act_mul", [*halves], {"act": attrs["act"]}, node.outputs),
        ]

    def _unsummed(self, node: Node, summed: Sequence[int]) -> str:
        value = node.inputs[summed[0]]
        assert value is not None
        return f"it reads {value.name}, a partial sum that no all_reduce has added up"

    def _collective(self, node: Node, attrs: Mapping[str, object]) -> None:
        ranks, axis = attrs["ranks"], attrs.get("axis")
        x = node.inputs[0]
        assert x is not None and (axis is None or isinstance(axis, int))
        layout = self.layouts.get(x)
        if ranks != self.ranks:
            raise ValueError(f"ranks={ranks}, and the program has {self.ranks}")
        if node.op == "all_gather":
            if layout != Split(axis or 0):
                raise ValueError(f"{x.name} is {described(layout)}, not a part along axis {axis}")
        elif layout != "sum":
            raise ValueError(f"{x.name} is {described(layout)}, not a partial sum")
        elif node.op == "reduce_scatter":
            self.layouts[node.output] = Split(axis or 0)

    def _note_repeated(self, node: Node, attrs: Mapping[str, object]) -> None:
        if not is_aten(node.op):
            return
        source = self.types.get(node.inputs[0]) if node.inputs else None  # type: ignore[arg-type]
        name, made = node.op.split(".")[1], self.types[node.outputs[0]]
        axes = set(range(len(made.shape)))
        if name in ("expand", "repeat_interleave") and source is not None:
            back = len(made.shape) - len(source.shape)
            axes = {a for a in axes if a < back or source.shape[a - back] == 1 != made.shape[a]}
        elif not name.startswith(("new_zeros", "new_ones", "new_full", "zeros", "ones", "full")):
            return
        self.repeated[node.outputs[0]] = axes

    def _results(
        self, node: Node, attrs: Mapping[str, object], given: Sequence[Layout],
        operands: Sequence[Type | None],
    ) -> Iterator[dict[Value, Layout]]:  # fmt: skip
        """Yield how the results may lie, by every alignment that fits."""
        whole = [
            layout.of_whole(kind, self.ranks)
            if kind is not None and isinstance(layout, Split)
            else kind
            for kind, layout in zip(operands, given, strict=True)
        ]
        target = {**attrs, "target": node.op} if is_aten(node.op) else attrs
        tries = [
            (variant, results)
            for variant in self._variants(node, given, whole)
            for results in self._whole_results(node, given)
        ]
        if is_aten(node.op):
            # Sizes among its arguments are a rank's.
            tries.append((list(operands), [self.types[value] for value in node.outputs]))
        for variant, results in tries:
            for found in alignments(node.op, target, variant, results, self.ranks):
                made = self._by(found, node, given, variant)
                if made is not None:
                    yield made

    def _variants(
        self, node: Node, given: Sequence[Layout], whole: list[Type | None]
    ) -> Iterator[list[Type | None]]:
        """Yield the types of operands, with what is repeated as often as on one rank or on all."""
        yield whole
        parts = {layout.parts(self.ranks) for layout in given if isinstance(layout, Split)}
        for place, value in enumerate(node.inputs):
            kind = whole[place]
            if value is None or kind is None:
                continue
            for axis in sorted(self.repeated.get(value, ())):
                for number in parts:
                    if isinstance(kind.shape[axis], int):
                        split = Split(axis, copies=self.ranks // number)
                        yield [
                            *whole[:place],
                            split.of_whole(kind, self.ranks),
                            *whole[place + 1 :],
                        ]

    def _whole_results(self, node: Node, given: Sequence[Layout]) -> Iterator[list[Type]]:
        """Yield what the types of the results may be on one device: a rank's, or larger ones."""
        own = [self.types[value] for value in node.outputs]
        yield own
        copies = {layout.copies for layout in given if isinstance(layout, Split)}
        for count in sorted(copies):
            for axis in range(max(len(kind.shape) for kind in own)):
                split = Split(axis, copies=count)
                fits = [
                    axis < len(kind.shape) and isinstance(kind.shape[axis], int) for kind in own
                ]
                if any(fits):
                    yield [
                        split.of_whole(kind, self.ranks) if fit else kind
                        for kind, fit in zip(own, fits, strict=True)
                    ]

    def _by(
        self, found: Alignment, node: Node, given: Sequence[Layout], whole: Sequence[Type | None]
    ) -> dict[Value, Layout] | None:
        """Return how the results lie by an alignment; None where the operands do not fit it."""
        base: Split | None = None
        for place, layout in enumerate(given):
            value, member = node.inputs[place], found.operands.get(place)
            if value is None or takes_any(node.op, place):
                continue
            if layout == "sum":
                if not (found.sums and adds(node.op, place)):
                    return None
                continue
            if layout is None:
                if member is not None and whole[place] == self.types[value]:
                    return None  # all of it, where a part is needed
                if found.sums and adds(node.op, place):
                    return None  # a bias that every rank adds
                continue
            own = None if member is None else layout.over(member)
            if own is None or (base is not None and own != base):
                return None
            base = own
        if base is None:
            return None
        if node.op == "mean_square" and found.sums:
            # Every feature counts once, though several ranks have it.
            kind = whole[0]
            if kind is None or node.attrs["features"] != kind.shape[-1] * base.copies:
                return None
        elif found.sums and base.copies > 1:
            return None
        made: dict[Value, Layout] = {}
        for place, member in found.results.items():
            made[node.outputs[place]] = base.times(member)
        for value, layout in made.items():
            split = layout
            assert isinstance(split, Split)
            if split.axis >= len(self.types[value].shape):
                return None
        return made | {node.outputs[place]: "sum" for place in found.sums}
