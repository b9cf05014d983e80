"""Names a reader expects: x for the stream, h for what a norm makes, q, k, v, a."""

from __future__ import annotations

from graphopt.capture.slots import SlotSources
from graphopt.ir.graph import Function, Node, Value, unique_name

_SHORT = {
    "rms_norm": ["h"],
    "layer_norm": ["h"],
    "attention": ["a", "present_k", "present_v"],
    "rope_table": ["cos", "sin"],
    "embedding": ["x"],
    "add": ["x"],
    "scale": ["scaled"],
    "softcap": ["capped"],
}
_ACTIVATIONS = {"relu", "relu2", "silu", "sigmoid", "tanh", "gelu", "gelu_tanh", "quick_gelu"}


_BEHIND = {
    "linear": "{}",
    "split_heads": "{}_heads",
    "transpose_heads": "{}_heads",
    "rope": "{}_rope",
    "rms_norm": "{}_norm",
    "layer_norm": "{}_norm",
    "scale": "{}_scaled",
}
"""How values on the way to an attention's operand are called."""

_LONGEST_CHAIN = 8


def name_values(function: Function, logits: Value | None = None) -> None:
    """Give every value a short unique name; parameters keep theirs where they are plain.

    Args:
        logits: The value that is the program's result, if it is made here.
    """
    wanted: dict[Value, str] = {}
    for node in function.nodes:
        short = _SHORT.get(node.op)
        for index, output in enumerate(node.outputs):
            if short is not None:
                wanted[output] = short[index]
            elif node.op == "linear":
                wanted[output] = _projection(function, node.inputs[1])
            elif node.op == "mul" and any(_is_activated(value) for value in node.inputs):
                wanted[output] = "gated"
            else:
                wanted[output] = node.op.split(".")[1] if "." in node.op else node.op
    named: set[Value] = set()
    for node in function.nodes:
        if node.op == "attention":
            for letter, operand in zip("qkv", node.inputs, strict=False):
                for value in _chain(operand):
                    pattern = _BEHIND.get(value.node.op) if value.node is not None else None
                    if pattern is not None and value not in named:
                        wanted[value] = pattern.format(letter)
                        named.add(value)
    if logits in wanted:
        wanted[logits] = "logits"
    taken = {value.name for value in [*function.params, *function.weights.values()]}
    for cache in function.caches:
        taken |= {value.name for value in cache.pasts}
    for node in function.nodes:
        for value in node.outputs:
            value.name = unique_name(wanted[value], taken)
            taken.add(value.name)


def _is_activated(value: Value | None) -> bool:
    return value is not None and value.node is not None and value.node.op in _ACTIVATIONS


def _chain(value: Value | None) -> list[Value]:
    """Return an attention's operand and what it is made of, back to the linear."""
    found: list[Value] = []
    while value is not None and value.node is not None and len(found) < _LONGEST_CHAIN:
        found.append(value)
        if value.node.op == "linear":
            break
        value = value.node.inputs[0] if value.node.inputs else None
    return found


def _projection(function: Function, weight: Value | None) -> str:
    slot = next((s for s, v in function.weights.items() if v is weight), "linear.weight")
    parts = [part for part in slot.split(".") if part not in ("weight", "t") and part]
    parts = [part for part in parts if not part.isdigit()] or ["linear"]
    return parts[-1].removesuffix("_proj")


def name_slots(function: Function, slots: SlotSources) -> None:
    """Call the parts of a fused projection by their role, and a lone transpose by its origin."""
    roles: dict[str, str] = {}
    names = function.slots_by_value()
    for node in function.nodes:
        if node.op != "attention":
            continue
        for letter, value in zip("qkv", node.inputs, strict=False):
            for linear in _linears_behind(value):
                for operand in linear.inputs[1:]:
                    if operand in names:
                        roles[names[operand]] = letter
    for node in function.nodes:
        if node.op == "mul" and None not in node.inputs:
            _name_gate(node.inputs, names, roles)
    for slot in list(function.weights):
        if slot not in slots.derived:
            continue
        stem, _, leaf = slot.rpartition(".")
        origin = slots.origin(slot)
        base = stem.rpartition(".")[0].removesuffix(".t")
        if stem.endswith(".t") and origin not in function.weights:
            _rename(function, slots, slot, origin)
        elif slot in roles:
            role = f"{base}.{roles[slot]}.{leaf}".lstrip(".")
            if role not in function.weights:
                _rename(function, slots, slot, role)


def _linears_behind(value: Value | None) -> list[Node]:
    """Return the linear that q, k or v is made by, through heads, norms and rotations."""
    return [v.node for v in _chain(value) if v.node is not None and v.node.op == "linear"]


def _name_gate(inputs: list, names: dict, roles: dict[str, str]) -> None:  # type: ignore[type-arg]
    """In act(gate) * up, call the two linears gate and up."""
    for a, b in (inputs, inputs[::-1]):
        if a.node is None or b.node is None or b.node.op != "linear":
            continue
        inner = a.node.inputs[0] if len(a.node.inputs) == 1 else None
        if inner is not None and inner.node is not None and inner.node.op == "linear":
            for node, role in ((inner.node, "gate"), (b.node, "up")):
                for operand in node.inputs[1:]:
                    if operand in names:
                        roles[names[operand]] = role


def _rename(function: Function, slots: SlotSources, old: str, new: str) -> None:
    value = function.weights.pop(old)
    value.name = new
    function.weights[new] = value
    slots.rename(old, new)
