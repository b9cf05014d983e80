"""Where affine transforms can stand in a layer, found by following its dataflow.

A linear map may be put in front of matrices that read a value, and its inverse into the matrices,
whatever the value is: a norm's output, the stream itself, gated neurons, merged heads, the tokens
of a mixture's experts. Where values and outputs of an attention are heads of plain projections, one
more map of a head's features goes from the rows of the one into the columns of the other. Keys and
queries may be mapped right in front of their attention, by a matrix and its inverse transpose: what
comes before may be a rotation by position, which no other map commutes with.

Source of the placement: Sun et al., FlatQuant, arXiv 2410.09426, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from graphopt.ir.blocks import layer_calls
from graphopt.ir.feed_forward import read_hidden
from graphopt.ir.graph import Call, Function, Node, Program, Value
from graphopt.ir.mixture import Mixture, read_mixture, stack_of
from graphopt.ir.ops.attention import KEY, QUERY, VALUE
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import Type

Kind: TypeAlias = Literal["input", "hidden", "heads"]
"""What is transformed: what linears read, gated neurons, or the merged heads of an attention."""

EXPERTS_UP, EXPERTS_DOWN, EXPERTS_GATE = 2, 3, 4
"""Operands of the op `experts`."""

NORMS = ("rms_norm", "layer_norm")


@dataclass(frozen=True)
class Reader:
    """A weight that multiplies the features of a site.

    Attributes:
        node: What multiplies by it.
        weight: The slot's value: a matrix [out, in], or a stack of experts' matrices.
        axis: The axis of the weight along which the features lie.
    """

    node: Node
    weight: Value
    axis: int


@dataclass(frozen=True)
class ValuePath:
    """The way of an attention's values, whose features are mapped in one matrix, back in another.

    Attributes:
        linear: What makes the values [B, S, G D].
        split: What makes heads of them, for the attention alone.
        attention: The attention.
    """

    linear: Node
    split: Node
    attention: Node


@dataclass(frozen=True)
class InputSite:
    """A value that matrices read, and that a transform may stand behind.

    Attributes:
        kind: What the value is.
        stem: What weights of a transform are named by, such as `mlp.down_proj`.
        x: The value, [.., N].
        entries: The (node, operand) places that read it there, and are to read the transformed one.
        readers: The weights behind them.
        scaled: The norm whose gain, or the linear whose rows, can take in a scale of the features;
            None for none.
        unscaled: Why there is none, as a clause.
        heads: The attention whose merged heads the value is.
        values: The way of that attention's values; None where they cannot be mapped.
        unmapped: Why not, as a clause.
    """

    kind: Kind
    stem: str
    x: Value
    entries: tuple[tuple[Node, int], ...]
    readers: tuple[Reader, ...]
    scaled: Node | None = None
    unscaled: str = ""
    heads: Node | None = None
    values: ValuePath | None = None
    unmapped: str = ""


@dataclass(frozen=True)
class KeySite:
    """Queries and keys of an attention, as it reads them.

    Attributes:
        query_stem, key_stem: What weights of the transforms are named by.
        attention: The attention.
    """

    query_stem: str
    key_stem: str
    attention: Node


@dataclass
class Sites:
    """The sites of one function.

    Attributes:
        inputs: In the function's order.
        keys: One an attention.
        left: What cannot be transformed, as pairs of its name and the reason.
    """

    inputs: list[InputSite] = field(default_factory=list)
    keys: list[KeySite] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)


def find_sites(program: Program) -> dict[str, Sites]:
    """Return the sites of every function that layers call, by the function's name."""
    kinds, _ = infer_program(program)
    found: dict[str, Sites] = {}
    for position in layer_calls(program):
        call = program.calls[position]
        if call.function not in found:
            function = program.functions[call.function]
            found[call.function] = SiteFinder(function, call, kinds[position]).run()
    return {name: sites for name, sites in found.items() if sites != Sites()}


class SiteFinder:
    """Finds the sites of one function, as a call of it has types."""

    def __init__(self, function: Function, call: Call, types: Mapping[Value, Type]) -> None:
        self.function, self.call, self.types = function, call, types
        self.uses, self.slots = function.uses(), function.slots_by_value()
        self.outside = function.outside_values()
        self.mixture = read_mixture(function, call, types)
        self.sites = Sites()

    def run(self) -> Sites:
        groups: dict[Value, list[tuple[tuple[Node, int], list[Reader]]]] = {}
        for node in self.function.nodes:
            for x, entry, readers in self._reads(node):
                groups.setdefault(x, []).append((entry, readers))
        for x, parts in groups.items():
            entries = tuple(entry for entry, _ in parts)
            weights = tuple(reader for _, several in parts for reader in several)
            self.sites.inputs.append(self._site(x, entries, weights))
        for node in self.function.nodes:
            if node.op == "attention":
                self._keys(node)
        self._note_left()
        return self.sites

    # Matrices and what they read

    def _reads(self, node: Node) -> list[tuple[Value, tuple[Node, int], list[Reader]]]:
        """Return the values that a node multiplies by weights: value, entry and the weights."""
        if node.op == "linear":
            operands = [1]
        elif node.op == "experts":
            operands = [n for n in (EXPERTS_UP, EXPERTS_GATE) if node.operand(n) is not None]
            down = node.operand(EXPERTS_DOWN)
            if down in self.slots:
                self._leave(self.slots[down], "its neurons are inside the op `experts`")
        elif isinstance(self.mixture, Mixture) and node is self.mixture.last:
            return self._experts(self.mixture)
        else:
            return []
        x = node.inputs[0]
        assert x is not None
        if self._chooses_experts(node):
            slot = self.slots.get(node.operand(1))  # type: ignore[arg-type]
            self._leave(
                slot or node.output.name, "it chooses experts, and reads what it always did"
            )
            return []
        readers: list[Reader] = []
        for operand in operands:
            weight = node.operand(operand)
            assert weight is not None
            reason = self._unusable(weight)
            if reason:
                self._leave(self.slots.get(weight, node.output.name), reason)
                return []
            readers.append(Reader(node, weight, 1))
        return [(x, (node, 0), readers)]

    def _unusable(self, weight: Value) -> str:
        if weight not in self.slots:
            return "its matrix is computed, not stored"
        if len(self.uses[weight]) > 1:
            return "its matrix is read by several operations"
        return ""

    def _chooses_experts(self, node: Node) -> bool:
        if isinstance(self.mixture, Mixture) and node is self.mixture.router:
            return True
        readers = {user.op for user, _ in self.uses[node.output]}
        return bool(readers & {"top_k_gating", "abs"}) and "top_k_gating" in {
            n.op for n in self.function.nodes
        }

    def _experts(self, mixture: Mixture) -> list[tuple[Value, tuple[Node, int], list[Reader]]]:
        """Return what a mixture's grouped products read: its tokens, and the experts' neurons."""
        found: list[tuple[Value, tuple[Node, int], list[Reader]]] = []
        gather = mixture.rows.node
        assert gather is not None
        several = mixture.first, (mixture.last,)
        places = (gather, 0), (mixture.last, 0)
        values = mixture.tokens, mixture.hidden
        for products, entry, x in zip(several, places, values, strict=True):
            readers: list[Reader] = []
            for product in products:
                try:
                    slot, transposed = stack_of(self.function, product)
                except ValueError as error:
                    self._leave(product.outputs[0].name, str(error))
                    break
                readers.append(Reader(product, self.function.weights[slot], 2 if transposed else 1))
            else:
                rows_read = {user for user, _ in self.uses[mixture.rows]}
                if products is mixture.first and rows_read != set(products):
                    self._leave(mixture.rows.name, "something else than its experts reads it")
                    continue
                found.append((x, entry, readers))
        return found

    # What stands in front of a value

    def _site(
        self, x: Value, entries: tuple[tuple[Node, int], ...], readers: tuple[Reader, ...]
    ) -> InputSite:
        stem = _stem(self.slots[readers[0].weight])
        source = x.node
        scaled, unscaled = self.scale_home(x, entries)
        if source is not None and source.op in NORMS:
            gain = source.operand(1)
            if gain in self.slots:
                stem = _stem(self.slots[gain])  # type: ignore[index]
        if source is not None and source.op == "merge_heads":
            attention = source.inputs[0].node if source.inputs[0] is not None else None
            if attention is not None and attention.op == "attention":
                path = self._value_path(attention, self._alone(x, entries))
                unmapped = path if isinstance(path, str) else ""
                return InputSite(
                    "heads", stem, x, entries, readers, None, "its heads are mapped instead",
                    attention, None if isinstance(path, str) else path, unmapped,
                )  # fmt: skip
        kind: Kind = "hidden" if self._gated(x) else "input"
        return InputSite(kind, stem, x, entries, readers, scaled, unscaled)

    def _alone(self, x: Value, entries: Sequence[tuple[Node, int]]) -> bool:
        return len(self.uses[x]) == len(entries) and x not in self.outside

    def scale_home(self, x: Value, entries: Sequence[tuple[Node, int]]) -> tuple[Node | None, str]:
        """Return the norm or the linear that can take in a scale of a value's features.

        Args:
            entries: The places that read the value scaled.

        Returns:
            None where there is none, and why, as a clause.
        """
        source, alone = x.node, self._alone(x, entries)
        if source is not None and source.op in NORMS:
            reason = self._gain_reason(source) if alone else "something else reads the norm too"
            return (None, reason) if reason else (source, "")
        hidden = read_hidden(x, set(self.function.weights.values()))
        if hidden is None:
            return None, "neither a norm nor a linear in front of it can take it in"
        _, gate, up = hidden
        if gate is None:
            return None, "its neurons have no gate beside which they could be scaled"
        if not alone or len(self.uses[up.output]) > 1:
            return None, "something else reads its neurons too"
        weights = [v for v in (up.inputs[1], up.operand(2)) if v is not None]
        reason = next(filter(None, map(self._unusable, weights)), "")
        return (None, reason) if reason else (up, "")

    def _gain_reason(self, norm: Node) -> str:
        """Return why a norm's gain cannot take in a scale, or ""."""
        for operand in (norm.operand(1), norm.operand(2)):
            if operand is None:
                continue
            if operand not in self.slots:
                return "its norm's gain is computed, not stored"
            if len(self.uses[operand]) > 1 or len(self.types[operand].shape) != 1:
                return "its norm's gain is read in another place too"
        return ""

    def _gated(self, x: Value) -> bool:
        """Return whether a value is a product of neurons, or those of a mixture."""
        if isinstance(self.mixture, Mixture) and x is self.mixture.hidden:
            return True
        if read_hidden(x, set(self.function.weights.values())) is not None:
            return True
        return x.node is not None and x.node.op == "mul"

    def _value_path(self, attention: Node, alone: bool) -> ValuePath | str:
        if not alone or len(self.uses[attention.outputs[0]]) > 1:
            return "its attention's output is read by something else too"
        value = attention.inputs[VALUE]
        split = None if value is None else value.node
        if value is None or split is None or split.op != "split_heads":
            return "its attention's values are not heads of a linear's output"
        made = split.inputs[0].node if split.inputs[0] is not None else None
        if made is not None and made.op == "kronecker" and made.operand(1) is None:
            made = made.inputs[0].node if made.inputs[0] is not None else None
        if made is None or made.op != "linear":
            return "its attention's values are not heads of a linear's output"
        weights = [v for v in (made.inputs[1], made.operand(2)) if v is not None]
        if reason := next(filter(None, map(self._unusable, weights)), ""):
            return reason
        if any(len(self.uses[v]) > 1 or v in self.outside for v in (value, made.output)):
            return "its attention's values are read by something else too"
        return ValuePath(made, split, attention)

    def _keys(self, attention: Node) -> None:
        query, key = attention.inputs[QUERY], attention.inputs[KEY]
        assert query is not None and key is not None
        stems = [self._linear_behind(value) for value in (query, key)]
        name = stems[1] or key.name
        if key in self.outside or any(node is not attention for node, _ in self.uses[key]):
            self._leave(f"keys of {name}", "they are read by something else than one attention")
            return
        if key.node is None:
            self._leave(f"keys of {name}", "they come from another layer")
            return
        first, second = (
            stem or f"{attention.outputs[0].name}.{side}"
            for stem, side in zip(stems, ("queries", "keys"), strict=True)
        )
        self.sites.keys.append(KeySite(first, second, attention))

    def _linear_behind(self, value: Value) -> str:
        """Return the stem of the projection that queries or keys come from, or ""."""
        node = value.node
        while node is not None and node.op != "linear":
            first = next((v for v in node.inputs if v is not None and v.node is not None), None)
            node = None if first is None else first.node
        return "" if node is None else _stem(self.slots.get(node.inputs[1], ""))  # type: ignore[arg-type]

    # What is left alone

    def _leave(self, where: str, reason: str) -> None:
        if (_stem(where), reason) not in self.sites.left:
            self.sites.left.append((_stem(where), reason))

    def _note_left(self) -> None:
        """Name matrices that no site reads, and parts that no attention was recognised in."""
        read = {reader.weight for site in self.sites.inputs for reader in site.readers}
        named = {where for where, _ in self.sites.left}
        if isinstance(self.mixture, str):
            self._leave("its experts", self.mixture)
        for value, slot in self.slots.items():
            matrix = len(self.types[value].shape) > 1 and self.types[value].dtype.is_floating_point
            if not matrix or value in read or _stem(slot) in named or not self.uses[value]:
                continue
            node = self.uses[value][0][0]
            if node.op not in ("embedding", "kronecker"):
                self._leave(slot, f"it is read by {node.op}, in which no transform is known")
        for site in self.sites.inputs:
            if site.unmapped:
                self._leave(f"values of {site.stem}", site.unmapped)


def _stem(slot: str) -> str:
    return slot.removesuffix(".weight")
