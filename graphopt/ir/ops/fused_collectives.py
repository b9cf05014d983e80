"""What a kernel does at once of a computation and of the collective behind it.

As with other fused ops, lowering alone makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from graphopt.ir import collectives
from graphopt.ir.graph import Node, Value
from graphopt.ir.ops.base import Attrs, Op, Tensors, Types, get_op, register
from graphopt.ir.ops.collectives import Ranks
from graphopt.ir.types import Dim, Type, dim

FUSED_COLLECTIVES = frozenset({"linear_all_reduce", "attention_linear_all_reduce"})
"""The ops of this file."""


@register
class LinearAllReduce(Op):
    """The sum over the ranks of x weight^T + bias: `linear`, and `all_reduce` of what it makes.

    Each rank has a part of the features x [..., in] and of the weight [out, in]; a bias adds up.
    """

    name = "linear_all_reduce"
    operands = ("x", "weight", "bias?")
    attributes = {"ranks": Ranks}  # noqa: RUF012
    fused = True

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        return get_op("all_reduce").infer(get_op("linear").infer(types, {}), attrs)

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        product = get_op("linear").flops(types, outputs, {})
        return dim(product + get_op("all_reduce").flops(outputs, outputs, attrs))

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        return get_op("all_reduce").reference(get_op("linear").reference(tensors, {}), attrs)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, weight, *bias = tensors
        assert x is not None and weight is not None
        return (collectives.linear_all_reduce(x, weight, *bias, **attrs),)


@register
class AttentionLinearAllReduce(Op):
    """The sum over the ranks of x weight^T, x the output of an attention, [B, H, S, D].

    It is `merge_heads`, `linear` by the weight [out, H D], and `all_reduce`; an op of its own,
    since attention of the next rows may run while the sum of those before is on its way.
    Source: FastAttention, arXiv 2410.16663, tiling-AllReduce.
    """

    name = "attention_linear_all_reduce"
    operands = ("x", "weight")
    attributes = {"ranks": Ranks}  # noqa: RUF012
    fused = True

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        return get_op("linear_all_reduce").infer(self._merged_types(types), attrs)

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        return get_op("linear_all_reduce").flops(self._merged_types(types), outputs, attrs)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        merged = get_op("merge_heads").reference(tensors[:1], {})
        return get_op("linear_all_reduce").reference([*merged, *tensors[1:]], attrs)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, weight = tensors
        assert x is not None and weight is not None
        return (collectives.attention_linear_all_reduce(x, weight, **attrs),)

    @staticmethod
    def _merged_types(types: Types) -> list[Type | None]:
        return [*get_op("merge_heads").infer(types[:1], {}), *types[1:]]


def unfused(node: Node) -> list[Node]:
    """Return the nodes that a fused op of this file stands for, the last of which is a collective.

    Values between them are new. Of any other op the node alone is returned.
    """
    if node.op == "linear_all_reduce":
        product = Node("linear", node.inputs, {})
        product.outputs = [Value(f"{node.output.name}_part", product)]
        return [product, Node("all_reduce", [product.output], node.attrs, node.outputs)]
    if node.op == "attention_linear_all_reduce":
        merged = Node("merge_heads", node.inputs[:1], {})
        merged.outputs = [Value(f"{node.output.name}_merged", merged)]
        inputs = [merged.output, *node.inputs[1:]]
        return [merged, *unfused(Node("linear_all_reduce", inputs, node.attrs, node.outputs))]
    return [node]


def types_between(stages: Sequence[Node], types: Mapping[Value, Type]) -> dict[Value, Type]:
    """Return the types of what the nodes of `unfused` make.

    Args:
        types: Of what they read from elsewhere.
    """
    made: dict[Value, Type] = {}
    for stage in stages:
        given = [None if v is None else made[v] if v in made else types[v] for v in stage.inputs]
        made |= zip(stage.outputs, get_op(stage.op).infer(given, stage.attrs), strict=True)
    return made
