"""Recognising tables of learned positions."""

from __future__ import annotations

from graphopt.capture.mask_operands import aten_before
from graphopt.capture.masks import GRID_LENGTH, padded_masks, positions_of
from graphopt.capture.rewriting import Raiser
from graphopt.ir.graph import In, Value
from graphopt.ir.types import B, P, S


def raise_position_embeddings(outer: Raiser, inputs: dict[str, Value]) -> None:
    """Learned positions: an embedding whose ids are position_ids plus a number."""
    if "position_ids" not in inputs and "attention_mask" not in inputs:
        return
    mask = padded_masks(GRID_LENGTH)
    wanted = positions_of(mask)
    real = mask.bool()
    for node in list(outer.function.nodes):
        if node.op != "embedding" or node.inputs[0] in inputs.values():
            continue
        ids = node.inputs[0]
        assert ids is not None
        values = {"attention_mask": mask, "position_ids": wanted}
        boundary = {inputs[n]: v for n, v in values.items() if n in inputs}
        try:
            (found,) = outer.evaluate([ids], boundary, {B: 4, S: GRID_LENGTH, P: 0})
        except (KeyError, RuntimeError, ValueError, IndexError):
            continue
        if found.numel() != wanted.numel():
            continue
        found = found.reshape(wanted.shape)
        offset = int(found[0, 0])
        if bool((found[real] == wanted[real] + offset).all()) and "position_ids" in inputs:
            attrs = {"offset": offset} if offset else {}
            operands = [inputs["position_ids"], node.inputs[1]]
            kind = outer.types[node.output]
            made = outer.insert("embedding", operands, attrs, node, ["p"]).output
            if outer.types[made] != kind:
                made = aten_before(outer, "aten.reshape.default", made, [In(0), list(kind.shape)],
                             kind, node)  # fmt: skip
            outer.function.replace(node.output, made)
    outer.sweep()
