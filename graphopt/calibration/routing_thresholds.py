"""Routing thresholds of a carved program, set so that a token runs as many experts as it is to."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.execute.block_runner import calibration_runner
from graphopt.execute.hidden_states import BlockStep, HiddenStateStream
from graphopt.ir.graph import Node, Program, Value, resolve_attrs
from graphopt.ir.ops.experts import routing_threshold
from graphopt.ir.weights import Array
from graphopt.support.progress import Progress, silent


def calibrate_thresholds(
    program: Program, windows: Tensor, device: torch.device, progress: Progress = silent
) -> list[str]:
    """Move the biases of routers with thresholds, in place, until the means hold on a text.

    Of every `top_k_gating` with `mean_active_experts` the bias of the router's projection is moved
    by one number for all experts, so that on these windows a token runs that many experts. Parts
    are calibrated in order, each on what the calibrated parts before it give. A fit, or a training,
    sees its own text too well to set thresholds: the windows should be others.

    Args:
        program: Its routers' biases are replaced.
        windows: int64 [N, S].

    Returns:
        Names of the biases that were replaced.
    """
    stream = HiddenStateStream(
        calibration_runner(program, device), windows,
        progress=progress, what="calibrating thresholds",
    )  # fmt: skip
    moved: list[str] = []
    for block in stream:
        own: list[str] = []
        for node in block.function.nodes:
            attrs = resolve_attrs(node, block.call)
            if node.op == "top_k_gating" and attrs.get("mean_active_experts"):
                own.append(_calibrate(program, block, node, attrs["mean_active_experts"]))
        if own:
            block.replace()
        moved += own
    return moved


def _calibrate(program: Program, block: BlockStep, gating: Node, mean: int) -> str:
    logits, bias = gating.inputs[0], _router_bias(gating)
    slots = block.function.slots_by_value()
    assert logits is not None and bias in slots
    selection_bias = gating.operand(1)
    ranked: list[Tensor] = []
    for batch in range(len(block.stream.ids)):
        logits_TE = block.values(batch, [logits])[0].flatten(0, -2).float()
        if selection_bias is not None:
            logits_TE = logits_TE + block.weights[slots[selection_bias]]
        ranked.append(logits_TE)
    threshold = routing_threshold(block.stream.ranks.gathered(torch.cat(ranked)), mean)
    weight = program.weights[block.call.weights[slots[bias]]]
    value = weight.load()
    program.weights.replace(weight.with_producer(Array(value - threshold.to(value))))
    return weight.name


def _router_bias(gating: Node) -> Value | None:
    """Return the bias of the projection that makes a choice's router logits."""
    logits = gating.inputs[0]
    router = None if logits is None else logits.node
    return router.operand(2) if router is not None and router.op == "linear" else None
