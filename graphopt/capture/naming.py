"""Names a reader expects: x for the stream, h for what a norm makes, q, k, v, a."""

from __future__ import annotations

from graphopt.capture.slots import SlotSources
from graphopt.ir.graph import Function, Value, unique_name

_SHORT = {
    "rms_norm": ["h"],
    "layer_norm": ["h"],
    "attention": ["a", "present_k", "present_v"],
    "rope_table": ["cos", "sin"],
    "embedding": ["x"],
    "add": ["x"],
}


def name_values(function: Function) -> None:
    """Give every value a short unique name; parameters keep theirs where they are plain."""
    wanted: dict[Value, str] = {}
    for node in function.nodes:
        short = _SHORT.get(node.op)
        for index, output in enumerate(node.outputs):
            if short is not None:
                wanted[output] = short[index]
            elif node.op == "linear":
                wanted[output] = _projection(function, node.inputs[1])
            else:
                wanted[output] = node.op.split(".")[1] if "." in node.op else node.op
    for node in function.nodes:
        if node.op == "attention":
            for letter, value in zip("qkv", node.inputs, strict=False):
                if value is not None and value in wanted:
                    wanted[value] = letter
    taken = {value.name for value in [*function.params, *function.weights.values()]}
    for cache in function.caches:
        taken |= {cache.past_k.name, cache.past_v.name}
    for node in function.nodes:
        for value in node.outputs:
            value.name = unique_name(wanted[value], taken)
            taken.add(value.name)


def _projection(function: Function, weight: Value | None) -> str:
    slot = next((s for s, v in function.weights.items() if v is weight), "linear.weight")
    parts = [part for part in slot.split(".") if part not in ("weight", "t") and part]
    parts = [part for part in parts if not part.isdigit()] or ["linear"]
    return parts[-1].removesuffix("_proj")


def name_slots(function: Function, slots: SlotSources) -> None:
    """Call the parts of a fused projection by their role, and a lone transpose by its origin."""
    roles: dict[str, str] = {}
    names = {value: slot for slot, value in function.weights.items()}
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


def _linears_behind(value: Value | None) -> list:  # type: ignore[type-arg]
    """Return the linear that q, k or v is made by, through heads, norms and rotations."""
    for _ in range(8):
        if value is None or value.node is None:
            return []
        if value.node.op == "linear":
            return [value.node]
        value = value.node.inputs[0] if value.node.inputs else None
    return []


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
