"""The graph of a program: its calls, lowered one by one, and where its weights lie."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import onnx_ir as ir
import sympy
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphopt.errors import LoweringError
from graphopt.files.finite import check_finite
from graphopt.ir.graph import Call, Node, Program, Value
from graphopt.ir.shapes import infer_program
from graphopt.ir.sighted import PICTURES
from graphopt.ir.types import B, P, S, Type
from graphopt.ir.weights import Weight
from graphopt.lowering.onnx import moe
from graphopt.lowering.onnx.builder import ONNX_DTYPES, GraphBuilder
from graphopt.lowering.onnx.external import DataFile, Layout
from graphopt.lowering.onnx.inputs import bind_sizes, picture_numbers, taken
from graphopt.lowering.onnx.moe import Fused, Kind, Plan
from graphopt.lowering.onnx.ops import Heads, Lowering, Pack, Sum, translation_of
from graphopt.lowering.onnx.quantised import QuantisedMatrix
from graphopt.lowering.onnx.rounded import Rounded
from graphopt.lowering.onnx_accuracy import EXACT

# Weights smaller than this many elements are written into the model file itself.
_INLINE = 256

# Operands that are read as [in, out].
_TURNED = {("linear", 1), ("experts", 3)}


def _single(kind: Type) -> Type:
    """Return a type as the graph has it: it computes in fp32, whatever the checkpoint holds."""
    return Type(kind.shape, torch.float32) if kind.dtype.is_floating_point else kind


def _shape(kind: Type) -> ir.Shape:
    labels = {B: "batch", S: "sequence", P: "rows", P + S: "total"}
    return ir.Shape([size if isinstance(size, int) else labels.get(size, str(size))
                     for size in kind.shape])  # fmt: skip


class Graph:
    """Lowers a program call by call into one graph.

    Args:
        continues: The graph can go on from a cache with several rows and several tokens.
        moe: Experts become com.microsoft::MoE where they can.
        policy_op: Attention with a KV policy becomes an operator of the domain `graphopt`.
        as_stored: Linears read weights as [out, in].
        accuracy_level: MatMulNBits' for products of packed weights with what is not rounded.
        by_rows: Weights that another graph on the same data file reads by their rows.

    Attributes:
        fused: How many parts did.
    """

    def __init__(
        self,
        program: Program,
        data: DataFile,
        *,
        continues: bool = True,
        moe: bool = False,
        policy_op: bool = False,
        as_stored: bool = False,
        accuracy_level: int = EXACT,
        by_rows: Collection[str] = (),
    ) -> None:
        self.program = program
        self.as_stored, self.accuracy_level = as_stored, accuracy_level
        self.data = data
        self.builder = GraphBuilder()
        # A cache of which a policy selects pages has room for tokens to come, in whole pages.
        policies = [state.policy for state in program.states.values() if state.policy is not None]
        pages = math.lcm(*(policy.budget.page for policy in policies))
        self.room = f"room_multiple_of_{pages}" if policies else ""
        self.shared: dict[object, object] = {
            "transposed": set(),
            "continues": continues,
            "room": bool(policies),
            "policy_op": policy_op,
        }
        self.weights: dict[str, ir.Value | QuantisedMatrix] = {}
        self.transposed = self._transposable() - set(by_rows)
        self.uses = Counter(self._reads())
        self.moe = moe
        self.fused = 0
        self._kind: Kind | None = None
        self._plain: dict[str, list[str]] = {}

    def _transposable(self) -> set[str]:
        """Return the weights that are stored as [in, out], since nothing reads them otherwise."""
        turned: set[str] = set()
        other: set[str] = set()
        for call in self.program.calls:
            function = self.program.functions[call.function]
            slots = function.slots_by_value()
            for node in function.nodes:
                for index, value in enumerate(node.inputs):
                    if value in slots:
                        # Experts' matrices are divided by their rows in the graph's own layout.
                        is_turned = (node.op, index) in _TURNED and not (
                            self.as_stored and node.op == "linear"
                        )
                        (turned if is_turned else other).add(call.weights[slots[value]])
        return turned - other

    def _reads(self) -> Iterator[str]:
        """Yield the name of a weight for every operand it is."""
        for call in self.program.calls:
            function = self.program.functions[call.function]
            slots = function.slots_by_value()
            for node in function.nodes:
                yield from (call.weights[slots[v]] for v in node.inputs if v in slots)

    def _packs(self, call: Call) -> dict[Node, Pack]:
        """Return the linears of a call whose weights are stored side by side.

        These are queries, keys and values of one input: GroupQueryAttention takes them as one
        product. For others the saved start of a product is spent again on taking it apart.
        """
        function, weights = self.program.functions[call.function], self.program.weights
        slots = function.slots_by_value()
        siblings: dict[Value | None, list[tuple[Node, Weight]]] = {}
        uses = function.uses()
        for node in function.nodes:
            if node.op != "linear" or node.inputs[1] not in slots:
                continue
            if any(user.op != "split_heads" for user, _ in uses[node.output]):
                continue
            weight = weights[call.weights[slots[node.inputs[1]]]]
            alone = self.uses[weight.name] == 1 and weight.encoding is None
            if alone and not weight.constant and weight.numel >= _INLINE:
                siblings.setdefault(node.inputs[0], []).append((node, weight))
        packs: dict[Node, Pack] = {}
        for members in siblings.values():
            if len(members) > 1:
                matrices = [weight for _, weight in members]
                stem = matrices[0].name.removesuffix(".weight")
                label = self.builder.unique(f"{stem}.and_{len(members) - 1}_more")
                layout = Layout(tuple(matrices), transposed=not self.as_stored)
                tensor = self.data.reserve(layout, label)
                matrix = self.builder.widened(self.builder.initializer(label, tensor))
                if not self.as_stored:
                    self.shared["transposed"].add(matrix)  # type: ignore[attr-defined]
                pack = Pack(tuple(node for node, _ in members), matrix)
                packs |= dict.fromkeys(pack.nodes, pack)
        return packs

    def _experts(self, call: Call, types: Mapping[Value, Type]) -> dict[Node, Fused]:
        """Return the experts of a call that com.microsoft::MoE computes, and note the others."""
        function = self.program.functions[call.function]
        found: dict[Node, Fused] = {}
        for node in function.nodes:
            if node.op != "experts":
                continue
            made = moe.plan(self.program, call, function, node, types)
            if isinstance(made, Plan):
                if any(self.uses[name] > 1 for name in made.weights):
                    made = "something else reads its matrices"
                elif self._kind not in (None, made.kind):
                    made = "a file has one body for it, which is that of other experts"
            if isinstance(made, str):
                self._plain.setdefault(made, []).append(call.path or function.name)
                continue
            self._kind = made.kind
            self.builder.functions[moe.NAME] = moe.body(made.kind)
            self.fused += 1
            found[node] = self._fused(made)
        return found

    def _fused(self, made: Plan) -> Fused:
        experts = made.experts

        def held(names: Sequence[str], parts: int = 1) -> ir.Value:
            weights = tuple(self.program.weights[name] for name in names)
            layout = Layout(weights, alternating=len(weights) > 1, parts=parts)
            more = f".and_{len(names) - 1}_more" if len(names) > 1 else ""
            label = self.builder.unique(f"{names[0]}{more}")
            shape = layout.shape
            if len(shape) < 3:
                shape = (experts, shape[0] // experts, *shape[1:])
            if layout.numel < _INLINE:
                value = layout.load().view(shape)
                return self.builder.initializer(label, ir.tensor(value.float().numpy(), name=label))
            stored = self.builder.initializer(label, self.data.reserve(layout, label, shape))
            return self.builder.widened(stored)

        first = held(made.first)
        bias = held(made.biases) if made.biases else None
        return Fused(made, first, bias, held([made.last], experts))

    @property
    def in_place(self) -> bool:
        """Whether the graph, once built, can write new keys into a buffer that holds the old."""
        return bool(self.shared.get("in_place", True))

    def plain(self) -> list[tuple[str, str]]:
        """Return where experts did not become com.microsoft::MoE, and why."""
        return [
            (
                f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else paths[0],
                f"experts in plain operators, not com.microsoft::MoE: {reason}",
            )
            for reason, paths in self._plain.items()
        ]

    def build(self) -> ir.Model:
        program, builder = self.program, self.builder
        inputs = {name: self._input(name, program.inputs[name]) for name in taken(program)}
        bind_sizes(builder, program.inputs, inputs, bool(program.states))
        pasts, outputs = self._caches()
        graph_inputs = [*inputs.values(), *pasts.values()]
        inferred, carried_types = infer_program(program)
        kinds = [{value: _single(kind) for value, kind in types.items()} for types in inferred]
        carried: dict[str, object] = dict(inputs)
        if PICTURES in program.inputs:
            assert program.vision is not None
            sizes = builder.size(B), builder.size(P)
            token = program.vision.image_token
            carried[PICTURES] = picture_numbers(builder, inputs["input_ids"], token, *sizes)
        presents: dict[str, ir.Value] = {}
        for call, types in zip(program.calls, kinds, strict=True):
            function = program.functions[call.function]
            builder.scope = call.path.replace(".", "/") or function.name
            lower = Lowering(builder, program, call, function, types, {}, inputs, self.shared)
            lower.packs = self._packs(call)
            packed = {node.inputs[1] for node in lower.packs}
            if self.moe:
                lower.fused = self._experts(call, types)
                packed |= {value for node in lower.fused for value in node.inputs[2:]}
            lower.values.update(
                {p: carried[a] for p, a in zip(function.params, call.args, strict=True)}  # type: ignore[misc]
            )
            for slot, value in function.weights.items():
                if value not in packed:
                    lower.values[value] = self._weight(call.weights[slot])
            for cache in function.caches:
                state = call.caches[cache.slot]
                lower.values[cache.past_k] = pasts[f"{state}.key"]
                lower.values[cache.past_v] = pasts[f"{state}.value"]
                for number, value in enumerate(cache.past_state):
                    lower.values[value] = pasts[f"{state}.{number}"]
            self._lower(lower)
            for name, value in zip(call.results, function.results, strict=True):
                made = lower.values[value]
                carried[name] = lower.whole(value) if isinstance(made, Heads) else made
            for cache in function.caches:
                state = call.caches[cache.slot]
                presents[f"{state}.key"] = lower.whole(cache.present_k)
                presents[f"{state}.value"] = lower.whole(cache.present_v)
                for number, value in enumerate(cache.present_state):
                    presents[f"{state}.{number}"] = lower.whole(value)
        builder.scope = ""
        results = []
        for name in program.outputs:
            result = carried[name]
            whole = result.whole(builder) if isinstance(result, Sum | Rounded) else result
            results.append(self._output(name, whole, _single(carried_types[name])))
        for key, (name, kind) in outputs.items():
            results.append(self._output(name, presents[key], kind))
        metadata = {"graphopt.source": program.source, "graphopt.program": program.name}
        model = builder.model(program.name, graph_inputs, results, metadata)
        # A size that is at hand need not have been asked for.
        RemoveUnusedNodesPass()(model)
        return model

    def _lower(self, lower: Lowering) -> None:
        for node in lower.function.nodes:
            form = translation_of(node.op)
            assert form is not None
            try:
                made = form(lower, node)
            except ValueError as error:
                where = lower.call.path or lower.function.name
                raise LoweringError(
                    f"{where}: {node.outputs[0].name} = {node.op}: {error}.",
                    "Emit torch instead (--emit torch).",
                ) from error
            values: Sequence[object] = made if isinstance(made, list) else [made]
            for value, result in zip(node.outputs, values, strict=False):
                lower.values[value] = result  # type: ignore[assignment]

    def _input(self, name: str, kind: Type) -> ir.Value:
        # attention_mask's length is that of the cache and the new tokens together.
        return ir.Value(name=name, shape=_shape(kind), type=ir.TensorType(ONNX_DTYPES[kind.dtype]))

    def _output(self, name: str, value: object, kind: Type) -> ir.Value:
        """Give a result its public name."""
        assert isinstance(value, ir.Value)
        result = value
        if not self.room or value.producer() is None:
            result = self.builder.op("Identity", value, name=f"output/{name}")
        assert isinstance(result, ir.Value)
        result.name = name
        result.shape = _shape(kind)
        result.type = ir.TensorType(ONNX_DTYPES[kind.dtype])
        return result

    def _caches(self) -> tuple[dict[str, ir.Value], dict[str, tuple[str, Type]]]:
        """Return the cache inputs, and the names and types of the cache outputs, by state."""
        pasts: dict[str, ir.Value] = {}
        outputs: dict[str, tuple[str, Type]] = {}
        for number, state in enumerate(self.program.states.values()):
            for part, width in (("key", state.k_dim), ("value", state.v_dim)):
                key = f"{state.name}.{part}"
                dims: list[int | str | None] = ["batch", state.heads, self.room or "past", width]
                pasts[key] = ir.Value(
                    name=f"past_key_values.{number}.{part}",
                    shape=ir.Shape(dims),
                    type=ir.TensorType(ir.DataType.FLOAT),
                )
                after = sympy.Symbol(self.room) if self.room else P + S
                kind = Type((B, state.heads, after, width), torch.float32)
                outputs[key] = (f"present.{number}.{part}", kind)
            if state.policy is None:
                continue
            # What differs in the size of a page has a name of its own.
            pages = sympy.Symbol(f"pages_of_{state.policy.budget.page}")
            kept = state.policy.state_types(state.kv_heads, pages, B)
            for place, (part, (sizes, dtype)) in enumerate(kept.items()):
                kind, key = _single(Type(tuple(sizes), dtype)), f"{state.name}.{place}"
                pasts[key] = ir.Value(
                    name=f"past_policy.{number}.{part}",
                    shape=_shape(kind),
                    type=ir.TensorType(ONNX_DTYPES[kind.dtype]),
                )
                outputs[key] = (f"present_policy.{number}.{part}", kind)
        return pasts, outputs

    def _weight(self, name: str) -> ir.Value | QuantisedMatrix:
        """Return the initializer of a program weight, or a packed one as ops may read it."""
        if name in self.weights:
            return self.weights[name]
        weight = self.program.weights[name]
        if weight.encoding is not None:
            matrix = self.weights[name] = QuantisedMatrix.stored(
                weight, self.builder, self.data, self.accuracy_level
            )
            return matrix
        label = self.builder.unique(name)
        if weight.constant or weight.numel < _INLINE:
            value = weight.load(torch.float32).contiguous()
            if not weight.constant:
                check_finite(name, value)
            tensor: ir.TensorProtocol = ir.tensor(value.numpy(), name=label)
        else:
            tensor = self.data.reserve(Layout((weight,), name in self.transposed), label)
        made = self.builder.widened(self.builder.initializer(label, tensor))
        if name in self.transposed:
            if weight.constant or weight.numel < _INLINE:
                turned = ir.tensor(value.t().contiguous().numpy(), name=label)
                made = self.builder.initializer(label, turned)
            self.shared["transposed"].add(made)  # type: ignore[attr-defined]
        self.weights[name] = made
        return made
