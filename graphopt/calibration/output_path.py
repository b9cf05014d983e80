"""The way from a projection to the residual stream: straight, times a factor, or through a norm.

Gemma 2 and 3, OLMo 2 and 3, GLM-4 and others have a norm behind their attentions and feed-forward
parts; Granite and MiniCPM multiply these by a factor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.execute.hidden_states import BlockStep
from graphopt.ir.blocks import SubBlock, sub_blocks
from graphopt.ir.graph import Call, Function, Node, Program, Value, resolve_attrs

NORMS = ("rms_norm", "layer_norm")


@dataclass(frozen=True)
class OutputPath:
    """What a projection's output goes through before it is added to the residual stream.

    Attributes:
        projection: The `linear` node.
        inner: `scale` nodes behind the projection, in front of a norm.
        norm: The norm, or None.
        outer: `scale` nodes behind the norm.
    """

    projection: Node
    inner: tuple[Node, ...]
    norm: Node | None
    outer: tuple[Node, ...]

    @classmethod
    def of(cls, function: Function, part: SubBlock) -> OutputPath | str:
        """Return the path of a term of a block, or why it has none."""
        uses = function.uses()
        before: list[Node] = []
        behind: list[Node] = []
        norm: Node | None = None
        value: Value | None = part.term
        while value is not None and value.node is not None and len(uses[value]) == 1:
            node = value.node
            if node.op == "linear":
                return cls(node, tuple(before), norm, tuple(behind))
            if node.op in NORMS and norm is None:
                norm, behind, before = node, before, []
            elif node.op == "scale":
                before.append(node)
            else:
                break
            value = node.inputs[0]
        if value is not None and value.node is not None and len(uses[value]) > 1:
            return "what it adds to the residual stream is used in other places of its layer too"
        return "what it adds to the residual stream is not the output of a projection"

    @classmethod
    def behind(cls, function: Function, stream: int, projection: Node) -> OutputPath | None:
        """Return the path of a block's projection to its stream, None where it has none."""
        paths = (cls.of(function, part) for part in sub_blocks(function, stream))
        found = (path for path in paths if isinstance(path, OutputPath))
        return next((path for path in found if path.projection is projection), None)

    def factor(self, call: Call) -> float:
        """Return what the projection's output is times, in front of a norm if there is one."""
        return _product(self.inner, call)

    def output_norm(
        self, program: Program, block: BlockStep, *, with_bias: bool = True
    ) -> OutputNorm | None:
        """Return the norm with the tensors that a block's call has; None where there is none.

        Args:
            with_bias: Whether the norm's operand gets the projection's bias, which otherwise is
                one more feature of the projection.
        """
        if self.norm is None:
            return None
        slots = block.function.slots_by_value()
        weight, bias = self.norm.operand(1), self.norm.operand(2)
        gain, shift = (
            block.weights[slots[value]].float() if value in slots else None
            for value in (weight, bias)
        )
        added = self.projection.operand(2) if with_bias else None
        attrs = resolve_attrs(self.norm, block.call)
        offset = float(attrs.get("offset", 0.0))
        return OutputNorm(
            None if gain is None else gain + offset,
            shift,
            float(attrs["eps"]),
            centred=self.norm.op == "layer_norm",
            factor=_product(self.outer, block.call),
            operand_bias=(
                block.weights[slots[added]].float() * self.factor(block.call)
                if added in slots
                else None
            ),
            gain_weight=own_weight(program, block, weight),
            offset=offset,
        )


def own_weight(program: Program, block: BlockStep, value: Value | None) -> str | None:
    """Return the name of a weight that a block reads in one place and no other call reads."""
    slots = block.function.slots_by_value()
    if value is None or value not in slots:
        return None
    name = block.call.weights[slots[value]]
    readers = sum(list(call.weights.values()).count(name) for call in program.calls)
    return name if readers == 1 and len(block.function.uses()[value]) == 1 else None


def _product(nodes: tuple[Node, ...], call: Call) -> float:
    factor = 1.0
    for node in nodes:
        factor *= float(resolve_attrs(node, call)["factor"])
    return factor


@dataclass(frozen=True)
class OutputNorm:
    """A norm between a projection and the residual stream: y -> factor (n(y + b) gain + bias).

    Attributes:
        gain, bias: fp32 [D] or None; the gain as it is used, with Gemma's 1.
        eps: Added to the mean square.
        centred: Whether the mean is subtracted first, as by a layer norm.
        factor: What the norm's output is times.
        operand_bias: What is added to the operand first, b: [D] or None.
        gain_weight: The name of the gain's weight; None where there is none, or where something
            else reads it.
        offset: What is added to that weight to give the gain, 1 in Gemma.
    """

    gain: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool = False
    factor: float = 1.0
    operand_bias: Tensor | None = None
    gain_weight: str | None = None
    offset: float = 0.0

    def slope(self, width: int, device: torch.device) -> Tensor:
        """Return what a normalised channel is times before it is added, fp32 [D]."""
        one = torch.ones(width, device=device) if self.gain is None else self.gain.to(device)
        return one * self.factor

    def with_slope(self, slope: Tensor) -> OutputNorm:
        """Return the norm with another slope [D]."""
        return replace(self, gain=slope / self.factor)

    def normalise(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return y [..., D] over its root mean square, and that root [..., 1]."""
        if self.operand_bias is not None:
            y = y + self.operand_bias.to(y.device)
        if self.centred:
            y = y - y.mean(-1, keepdim=True)
        root = (y.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return y / root, root

    def __call__(self, y: Tensor) -> Tensor:
        """Return what is added to the stream for the projection's output y [..., D], in fp32."""
        normal, _ = self.normalise(y.float())
        added = normal * self.slope(y.shape[-1], y.device)
        return added if self.bias is None else added + self.bias.to(y.device) * self.factor
