"""Giving every attention its mask: what it sees as attributes, the rest as an additive operand."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.capture.attention import Term
from graphopt.capture.hoist import LayerKind
from graphopt.capture.masks import MaskForm, MaskRecogniser
from graphopt.capture.rewriting import Raiser
from graphopt.ir.graph import In, Node, Value
from graphopt.ir.types import B, Type


def set_masks(
    kind: LayerKind, outer: Raiser, inputs: dict[str, Value], recogniser: MaskRecogniser
) -> list[tuple[str, str]]:
    """Turn the terms of every attention into attributes, or leave them as an additive bias.

    Returns:
        (value name, reason) for terms without a closed form.
    """
    notes: list[tuple[str, str]] = []
    kind.attrs = kind.attrs or [{} for _ in kind.layer_calls]
    for number, item in enumerate(kind.raised):
        node = item.node
        suffix = "" if number == 0 else f"_{number}"
        while len(node.inputs) < 7:
            node.inputs.append(None)
        # Where one term is a plain causal mask, its rows decide which keys a bias is added to.
        assert node.inputs[0] is not None
        heads = int(kind.raiser.types[node.inputs[0]].shape[1])
        forms = [_forms(kind, recogniser, term, heads) for term in item.terms]
        per_call: list[dict[str, Any]] = [
            {"causal": node.attrs["causal"], "window": None, "chunk": None}
            for _ in kind.layer_calls
        ]
        padding = False
        slopes: tuple[float, ...] | None = None
        biases: list[Term] = []
        for term, found in zip(item.terms, forms, strict=True):
            if found is None:
                biases.append(term)
                continue
            if found[0].slopes is not None:
                slopes = found[0].slopes
            for attrs, form in zip(per_call, found, strict=True):
                attrs["causal"] = attrs["causal"] or form.causal
                attrs["window"] = attrs["window"] or form.window
                attrs["chunk"] = attrs["chunk"] or form.chunk
                padding = padding or form.padding
        if (padding or slopes is not None) and "attention_mask" in inputs:
            node.inputs[3] = _input_param(kind, outer, "attention_mask", inputs)
        if slopes is not None:
            node.inputs[5] = _slope_slot(kind.raiser, slopes)
        if biases:
            node.inputs[4] = _bias(kind, node, biases)
            notes += [(t.value.name, "mask without a closed form, kept additive") for t in biases]
        for key in ("causal", "window", "chunk"):
            values = [attrs[key] for attrs in per_call]
            if all(value == values[0] for value in values):
                node.attrs[key] = values[0]
            else:
                from graphopt.ir.graph import Param

                node.attrs[key] = Param(key + suffix)
                for call_attrs, value in zip(kind.attrs, values, strict=True):
                    call_attrs[key + suffix] = value
        while node.inputs and node.inputs[-1] is None:
            node.inputs.pop()
        item.terms = []
    return notes


def _forms(
    kind: LayerKind, recogniser: MaskRecogniser, term: Term, heads: int
) -> list[MaskForm] | None:
    """Return each call's closed form of a term; None if some call's has none."""
    if term.value not in kind.raiser.function.params:
        return None
    forms = [recogniser.form(value, term.kind, heads) for value in kind.arguments(term.value)]
    known = [form for form in forms if form is not None]
    if len(known) != len(forms) or len({f.padding for f in known}) > 1:
        return None
    if len({f.slopes for f in known}) > 1:
        return None
    return known


def _input_param(kind: LayerKind, outer: Raiser, name: str, inputs: dict[str, Value]) -> Value:
    values = [inputs[name]] * len(kind.layer_calls)
    for param in kind.raiser.function.params:
        if kind.arguments(param) == values:
            return param
    return kind.add_param(name, values, outer)


def _slope_slot(raiser: Raiser, slopes: tuple[float, ...]) -> Value:
    """Return the layer's constant slot that holds the slopes."""
    slot = "alibi.slopes"
    if slot in raiser.function.weights:
        return raiser.function.weights[slot]
    raiser.constants[slot] = torch.tensor(slopes, dtype=torch.float32)
    return raiser.add_weight(slot, (len(slopes),), torch.float32)


def _bias(kind: LayerKind, node: Node, terms: list[Term]) -> Value:
    """Return the sum of terms as one additive bias; a bool becomes 0 and minus infinity."""
    raiser = kind.raiser
    total: Value | None = None
    for term in terms:
        value = term.value
        if len(raiser.types[value].shape) == 3:
            heads = int(raiser.types[node.inputs[0]].shape[1])  # type: ignore[index]
            _, *rest = raiser.types[value].shape
            value = aten_before(raiser, "aten.reshape.default", value, [In(0), [B, heads, *rest]],
                          Type((B, heads, *rest), raiser.types[value].dtype), node)  # fmt: skip
        if term.kind != "add":
            if term.kind == "block":
                value = aten_before(raiser, "aten.logical_not.default", value, [In(0)],
                              Type(raiser.types[value].shape, torch.bool), node)  # fmt: skip
            value = aten_before(raiser, "aten.where.Scalar", value, [In(0), 0.0, float("-inf")],
                          Type(raiser.types[value].shape, torch.float32), node)  # fmt: skip
        total = value if total is None else raiser.insert("add", [total, value], {}, node).output
    assert total is not None
    return total


def aten_before(
    raiser: Raiser, op: str, x: Value, args: list[Any], kind: Type, before: Node
) -> Value:
    """Add an ATen operation of one operand in front of a node; return its result of type `kind`."""
    node = raiser.function.add(
        op, [x], {"args": args, "kwargs": {}, "types": [kind]}, before=before
    )
    raiser.types[node.output] = kind
    return node.output
