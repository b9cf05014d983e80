"""The program that is trained: transforms folded, and roundings behind them, with their clips."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt.calibration.affine_plan import AffinePlan, FunctionPlan, insert_transforms
from graphopt.ir.affine import add_weights, fold_transforms
from graphopt.ir.affine_sites import NORMS, InputSite, Sites, find_sites
from graphopt.ir.blocks import find_blocks
from graphopt.ir.dead_code import remove_dead
from graphopt.ir.graph import Call, Function, Node, Program, Value, resolve_attrs, unique_name
from graphopt.ir.ops.attention import KEY, VALUE
from graphopt.ir.shapes import infer_program
from graphopt.pass_manager.rounding_statements import ROUNDED
from graphopt.rewrite import calls_of
from graphopt.training.affine import Rounding, TrainedKeys, TrainedSite


@dataclass(frozen=True)
class Bits:
    """Into how many bits a program is rounded; 16 leaves alone.

    Attributes:
        w, a, kv: Of weights, of what linears read, and of keys and values.
        group: Neighbours along the input that share a scale of weights, of which `group_of` makes
            what divides a row; 0 for all of a row.
    """

    w: int
    a: int
    kv: int
    group: int = 0


@dataclass
class RoundedFunction:
    """What is rounded in a function.

    Attributes:
        linears: The slots of weights that are rounded, with how.
        readers: The slots of weights whose linears read rounded values.
        clips: The slots of the clips of activations, keys and values.
    """

    linears: dict[str, Rounding] = field(default_factory=dict)
    readers: list[str] = field(default_factory=list)
    clips: list[str] = field(default_factory=list)


def fold_all(program: Program) -> None:
    """Multiply all transforms' inverses, scales and maps of values into a program's weights."""
    kinds = infer_program(program)[0]
    places = {id(call): number for number, call in enumerate(program.calls)}
    for name, calls in calls_of(program).items():
        fold_transforms(program, program.functions[name], calls, kinds[places[id(calls[0])]])
    program.prune_unused()


def transform(program: Program, plan: AffinePlan) -> None:
    """Insert the transforms of a plan into the program it was made of, and fold them."""
    insert_transforms(program, plan)
    fold_all(program)


def insert_roundings(
    program: Program, bits: Bits, *, per_linear: bool = False
) -> tuple[dict[str, RoundedFunction], list[tuple[str, str]]]:
    """Put roundings in front of linears and attentions of a program's blocks, in place.

    Each has a clip, a weight of every call that is 1 at first. Linears of one value share a
    rounding; `per_linear` gives each its own, with a clip for what is below 0 and one for above.

    Returns:
        What is rounded, by function, and weights that are not, with the reason.
    """
    found: dict[str, RoundedFunction] = {}
    left: list[tuple[str, str]] = []
    blocks = dict.fromkeys(program.calls[b.position].function for b in find_blocks(program))
    calls = calls_of(program)
    sites_of = find_sites(program)
    for name in blocks:
        function, rounded = program.functions[name], RoundedFunction()
        sites = sites_of.get(name, Sites())
        where = calls[name][0].path or name
        for site in sites.inputs:
            left += _round_site(program, function, calls[name], site, bits, per_linear, rounded,
                                where)  # fmt: skip
        if bits.kv < 16:
            _round_kv(program, function, calls[name], sites, bits.kv, per_linear, rounded)
        found[name] = rounded
    return found, left


def _round_kv(
    program: Program,
    function: Function,
    calls: list[Call],
    sites: Sites,
    bits: int,
    split: bool,
    rounded: RoundedFunction,
) -> None:
    """Round the keys and values that a function's attentions read, another layer's as well."""
    slots = function.slots_by_value()
    stems = {key.attention: {"keys": key.key_stem} for key in sites.keys}
    for site in sites.inputs:
        if site.values is not None:
            weight = slots[site.values.linear.inputs[1]]  # type: ignore[index]
            named = stems.setdefault(site.values.attention, {})
            named["values"] = weight.removesuffix(".weight")
    for node in [node for node in function.nodes if node.op == "attention"]:
        for place, what in ((KEY, "keys"), (VALUE, "values")):
            stem = stems.get(node, {}).get(what, node.outputs[0].name)
            value = node.inputs[place]
            assert value is not None
            node.inputs[place] = _rounding(
                program, function, calls, value, node, f"{stem}.{what}", bits, False, rounded,
                split=split,
            )  # fmt: skip


def _round_site(
    program: Program,
    function: Function,
    calls: list[Call],
    site: InputSite,
    bits: Bits,
    per_linear: bool,
    rounded: RoundedFunction,
    where: str,
) -> list[tuple[str, str]]:
    slots = function.slots_by_value()
    linears: list[Node] = []
    left: list[tuple[str, str]] = []
    for reader in site.readers:
        slot = slots[reader.weight]
        if reader.node.op != "linear":
            left.append((f"{where}.{slot}", f"it is read by {reader.node.op}: matrices alone are "
                         "rounded"))  # fmt: skip
            continue
        if bits.w < 16:
            rounded.linears[slot] = Rounding(bits.w, bits.group)
        linears.append(reader.node)
    if not linears or bits.a >= 16:
        return left
    value = linears[0].inputs[0]
    assert value is not None
    rounded.readers += [slots[node.inputs[1]] for node in linears]  # type: ignore[index]
    for several in [[node] for node in linears] if per_linear else [linears]:
        stem = slots[several[0].inputs[1]].removesuffix(".weight")  # type: ignore[index]
        made = _rounding(program, function, calls, value, several[0], f"{stem}.input", bits.a, True,
                         rounded, split=per_linear)  # fmt: skip
        for node in several:
            node.inputs[0] = made
    return left


def _rounding(
    program: Program,
    function: Function,
    calls: list[Call],
    value: Value,
    before: Node,
    stem: str,
    bits: int,
    symmetric: bool,
    rounded: RoundedFunction,
    *,
    split: bool,
) -> Value:
    """Insert a rounding of a value in front of a node, with one clip or two; return its output."""
    slots = [_clip_slot(function, f"{stem}.{end}")
             for end in (("clip_low", "clip_high") if split else ("clip",))]  # fmt: skip
    for call in calls:
        one = {slot: torch.ones(1) for slot in slots}
        add_weights(program, call, {slot: slot for slot in slots}, one, torch.float32)
    clips = [function.weights[slot] for slot in slots]
    node = function.add(
        ROUNDED, [value, clips[0], clips[-1]],
        {"bits": bits, "symmetric": symmetric, "straight_through": True},
        [f"{value.name}_q{bits}"], before=before,
    )  # fmt: skip
    rounded.clips += slots
    return node.output


def _clip_slot(function: Function, wanted: str) -> str:
    slot = unique_name(wanted, set(function.weights))
    name = unique_name(slot.replace(".", "_"), function.value_names())
    function.weights[slot] = Value(name)
    return slot


def without_roundings(program: Program) -> Program:
    """Return a copy of a program whose activations, keys and values are not rounded."""
    result = program.copy()
    for function in result.functions.values():
        for node in [node for node in function.nodes if node.op == ROUNDED]:
            assert node.inputs[0] is not None
            function.replace(node.output, node.inputs[0])
        remove_dead(function)
    result.prune_unused()
    return result


def trained_sites(
    program: Program, part: FunctionPlan, number: int
) -> tuple[list[TrainedSite], list[TrainedKeys]]:
    """Return what is trained of one layer.

    Args:
        program: With the plan's transforms folded.
        number: Of the layer among the calls of the plan's function.
    """
    slots = part.function.slots_by_value()
    call = part.calls[number]
    sites: list[TrainedSite] = []
    for item, made, factors in zip(part.inputs, part.slots, part.factors[number], strict=False):
        site, home = item.site, item.site.scaled
        scaled = "scale" in item.roles and home is not None
        gain = bias = None
        rows: tuple[str, ...] = ()
        offset = 0.0
        if scaled and home is not None and home.op in NORMS:
            gain = slots[home.inputs[1]]  # type: ignore[index]
            third = home.operand(2)
            bias = None if third is None else slots[third]
            offset = float(resolve_attrs(home, call).get("offset", 0.0))
        elif scaled and home is not None:
            rows = tuple(slots[v] for v in home.inputs[1:] if v is not None)
        path = site.values if "values" in item.roles else None
        sites.append(
            TrainedSite(
                factors,
                {role: made[role] for role in ("left", "right") if role in item.roles},
                tuple((slots[reader.weight], reader.axis) for reader in site.readers),
                gain, bias, offset, rows,
                () if path is None else tuple(slots[v] for v in path.linear.inputs[1:] if v),
            )
        )  # fmt: skip
    keys = [
        TrainedKeys(matrix, made["keys"], made["queries"])
        for matrix, made in zip(
            part.key_matrices[number], part.slots[len(part.inputs) :], strict=True
        )
    ]
    return sites, keys


def base_values(
    source: Program,
    call: Call,
    sites: list[TrainedSite],
    rounded: RoundedFunction,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the weights that follow transforms or are rounded, as they were before them.

    Args:
        source: The program before the transforms.
        call: Its call of the layer.

    Returns:
        By slot, in fp32 on the device.
    """
    slots = list(rounded.linears)
    missing: dict[str, Tensor] = {}
    for site in sites:
        slots += [slot for slot, _ in site.readers]
        slots += [slot for slot in (site.gain, site.bias, *site.rows, *site.values) if slot]
        if site.gain is not None and site.gain not in call.weights:
            assert site.factors.scale is not None
            # A norm without a gain has got one.
            width = len(site.factors.scale)
            missing[site.gain] = torch.full((width,), 1.0 - site.offset, device=device)
    return {
        slot: missing[slot]
        if slot in missing
        else source.weights[call.weights[slot]].load(torch.float32).to(device)
        for slot in dict.fromkeys(slots)
    }
