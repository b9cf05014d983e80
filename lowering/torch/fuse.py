"""Several ops of a layer joined where one kernel, or one product, does the work of all.

Each rule makes an op of `graphopt.ir.ops.fused`, which has a reference and a fast form like any
other, so that the program after it is verified and run like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from graphopt.ir.dead_code import remove_dead
from graphopt.ir.encoding import Packed
from graphopt.ir.feed_forward import read_hidden
from graphopt.ir.functional import ACTIVATIONS
from graphopt.ir.graph import Call, Node, Program, Value
from graphopt.ir.types import Type
from graphopt.lowering.kernels import triton as triton_family
from graphopt.lowering.kernels.in_front import why_apart
from graphopt.lowering.kernels.plan_kernels import compute_dtype
from graphopt.lowering.kernels.planning import why_no_kernel
from graphopt.lowering.torch.fuse_quantised import (
    QUANTISED_RULES,
    fuse_gate_with_linears,
    fuse_norm_with_linears,
    fuse_rotations_with_transforms,
    fuse_rounding_with_cache,
    fuse_transform_with_linears,
)
from graphopt.lowering.torch.fuse_sums import (
    annotate_sums,
    fuse_attention_with_sum,
    fuse_linear_with_sum,
)
from graphopt.lowering.torch.packed import encodings as encodings_of
from graphopt.lowering.torch.packed import with_uniform_encodings
from graphopt.pass_manager.contract import Context, Pass, PassResult
from graphopt.plan import AttentionSpec
from graphopt.report.record import Record
from graphopt.rewrite import (
    Match,
    NoMatch,
    Rule,
    Site,
    apply_rules,
    calls_of,
    rule,
    types_of,
)
from graphopt.runtime.packed_codes import span_of
from graphopt.targets import get_target


class FusedOps(Record):
    """How often each rule was applied, and for which reason each left something, over all calls."""

    rules: dict[str, int]
    left: dict[str, int]

    def line(self) -> str:
        return ", ".join(f"{name} x{count}" for name, count in self.rules.items())


@dataclass
class FuseLayerOps(Pass):
    """Join what kernels of layers do at once: sums with norms, gates, rotations, products, experts.

    Legality, rule by rule:

    1. `fuse_experts`: experts that a sum adds to a feed-forward part of the same input, the same
       activation and the same form (gated or not), whose result nothing else reads, become one
       `moe` with that part; other experts become a `moe` without one.
    2. `fuse_routing`: a linear whose scores `top_k_gating` alone reads becomes a `route` with it.
    3. `fuse_activation_with_product`: an activation that a product alone reads becomes an
       `act_mul` with it.
    4. `fuse_sum_with_norm`: a sum and the first RMS norm of it, by a weight of the function or by
       none, become an `add_rms_norm`.
    5. `fuse_rotations`: two rotations by the same tables and attributes, nothing between which
       reads the first, become a `rope_pair`.
    6. `fuse_linears`: linears of one input, each with dense weights that nothing else in the
       program reads, and all or none with a bias, become a `fused_linear`.
    7. `fuse_packed_linears`: linears of one input, whose weights are packed in one way that kernels
       read (four bits, groups of a multiple of 32 along the inputs), and all or none with a bias,
       become a `packed_linear`; one whose weight something else reads becomes one by itself.
    8. `fuse_rounding_with_linears`: a symmetric rounding of tokens that `packed_linear`s alone
       read, whose clips are weights of one number, becomes a `transformed` that gives codes, and
       they become `integer_linear`s.
    9. `fuse_transform_with_rounding`: a Kronecker transform by weights becomes part of the
       `transformed` that alone reads it, or one by itself; a single dense product does not.
    10. `fuse_front_with_transform`: a norm by a weight, or a gate, which a `transformed` alone
        reads, becomes part of it.
    11. `fuse_gate_with_linears`: a gate of both results of a `packed_linear` or `integer_linear`,
        which it alone reads and whose weights are of one size, becomes its `act`, where the target
        has tiles of the kernel for few tokens, which takes it.
    12. `fuse_norm_with_linears`: a norm by a weight or none, which a `packed_linear` alone reads,
        becomes a `norm_packed_linear` with it and with the norm's sum, on the same targets.
    13. `fuse_transform_with_linears`: a `transformed` without rounding, by weights, which a
        `packed_linear` alone reads, becomes a `transformed_packed_linear` with it, on targets whose
        file lets products transform what they read, where its figures say that this takes less.
    14. `fuse_rotations_with_transforms`: transforms by one factor as wide as a head, a weight,
        which alone read the results of a `rope_pair`, become part of it, on the same targets.
    15. `fuse_rounding_with_cache`: roundings with zero points, to 4 or 8 bits alike, of the new
        keys and values that an attention with a past alone reads, become its own, where a kernel
        of the target reads codes of such heads.
    16. `fuse_linear_with_sum`: a linear of a dense weight, whose result `all_reduce` alone reads,
        becomes a `linear_all_reduce` with it, on targets whose file says what sums over ranks take.
    17. `fuse_attention_with_sum`: such a `linear_all_reduce` without a bias, of the merged heads of
        a causal attention without an additive bias, whose output nothing else reads, becomes an
        `attention_linear_all_reduce` of that output, for two ranks; not where policies, the host's
        memory or pictures decide what attentions of the program see.
    18. No weight is read or changed.

    Options:
        target: Name of the target whose kernels run what is joined.
    """

    target: str = "cpu"

    name: ClassVar[str] = "fuse-layer-ops"
    takes_ranks: ClassVar[bool] = True
    record: ClassVar[type[Record]] = FusedOps

    def run(self, program: Program, context: Context) -> PassResult:
        program = with_uniform_encodings(program)
        calls, types = calls_of(program), types_of(program)
        target = get_target(self.target)
        dtype = compute_dtype(program, target)

        def why_unread(query: Type, key: Type, value: Type, kv_bits: int) -> str | None:
            spec = AttentionSpec(
                head_dim=int(query.shape[3]), value_dim=int(value.shape[3]),
                heads=int(query.shape[1]), kv_heads=int(key.shape[1]), dtype=dtype,
                kv_bits=kv_bits,
            )  # fmt: skip
            return why_no_kernel(spec, target)

        last = fuse_rounding_with_cache(why_unread)
        counts: Counter[str] = Counter()
        left: Counter[str] = Counter()
        for name, function in program.functions.items():
            times = len(calls[name])
            if not times:
                continue
            slots = len(function.weights)
            counts["dead code"] += (remove_dead(function) + slots - len(function.weights)) * times
            encodings = encodings_of(program, calls[name][0])
            alone = _read_once(program, calls[name])
            linears = fuse_linears(alone - set(encodings)), fuse_packed_linears(encodings, alone)
            summed = fuse_linear_with_sum(set(encodings), target), fuse_attention_with_sum(program)
            tiles = triton_family.quantised_tiles(target)
            few = tiles is not None and tiles.few
            around = [fuse_gate_with_linears, fuse_norm_with_linears] if few else []
            if tiles is not None and triton_family.transforms_in_front(target):
                around.append(fuse_transform_with_linears(partial(why_apart, tiles=tiles)))
                around.append(fuse_rotations_with_transforms)
            for fusion in (*RULES, *linears, *QUANTISED_RULES, *around, last, *summed):
                rewritten = apply_rules(function, [fusion], calls[name], types[name])
                for applied, count in rewritten.counts.items():
                    counts[applied] += count * times
                for refusing, refusal in rewritten.refused:
                    left[f"{refusing}: {refusal.reason}"] += times
            annotate_sums(function, types[name], target)
        program.prune_unused()
        rules = {name: count for name, count in counts.items() if count}
        total = sum(rules.values())
        record = FusedOps(rules=rules, left=dict(left))
        return PassResult(program, total + sum(left.values()), total, record=record)


def _read_once(program: Program, calls: Sequence[Call]) -> set[str]:
    """Return the slots of weights that one slot of one call reads: what joins them has a copy."""
    reads = Counter(name for call in program.calls for name in call.weights.values())
    return {
        slot for slot in calls[0].weights if all(reads[call.weights[slot]] == 1 for call in calls)
    }


@rule("experts")
def fuse_experts(site: Site) -> Match | NoMatch:
    """add(linear(act(..)), experts(x, ..)) -> moe(x, .., shared weights); else experts -> moe."""
    routed = site.node
    operands = [*routed.inputs, *[None] * (7 - len(routed.inputs))]
    total = site.only_reader(routed.output)
    if total is not None and total.op == "add":
        other = next((v for v in total.inputs if v is not routed.output), None)
        shared = _shared_weights(site, other)
        if shared:
            return site.join([total], "moe", [*operands, *shared], routed.attrs, before=total)
    return site.join([routed], "moe", operands, routed.attrs, before=routed)


def _shared_weights(site: Site, value: Value | None) -> list[Value | None]:
    """Return the weights of a feed-forward part that reads what experts read; [] for none."""
    routed = site.node
    down = None if value is None else value.node
    if down is None or down.op != "linear" or len(site.uses[down.output]) > 1:
        return []
    hidden = read_hidden(down.inputs[0], set(site.function.weights.values()))
    if hidden is None or hidden[0] != routed.attrs["act"]:
        return []
    _, gate, up = hidden
    if up.inputs[0] is not routed.inputs[0] or (gate is None) != (site.operand(4) is None):
        return []

    def factors(linear: Node | None) -> tuple[Value | None, Value | None]:
        if linear is None:
            return None, None
        return site.operand(1, linear), site.operand(2, linear)

    (up_weight, up_bias), (gate_weight, gate_bias), (down_weight, down_bias) = map(
        factors, (up, gate, down)
    )
    return [up_weight, down_weight, gate_weight, up_bias, gate_bias, down_bias]


@rule("top_k_gating")
def fuse_routing(site: Site) -> Match | NoMatch:
    """top_k_gating(linear(x, weight, bias), ..) -> route(x, weight, router_bias, ..)."""
    gates = site.node
    scores = site.maker(0, "linear")
    if scores is None:
        return site.no("its scores are not those of a linear")
    if site.only_reader(scores.output) is not gates:
        return site.no("something else reads its scores", scores)
    operands = [*scores.inputs, *[None] * (3 - len(scores.inputs)), *gates.inputs[1:]]
    return site.join([gates], "route", operands, gates.attrs, before=gates)


@rule("mul")
def fuse_activation_with_product(site: Site) -> Match | NoMatch:
    """mul(act(gate), up) -> act_mul(gate, up)."""
    product = site.node
    reason = site.no("neither factor is an activation")
    for place in (0, 1):
        act = site.maker(place, *ACTIVATIONS)
        if act is None:
            continue
        if site.only_reader(act.output) is not product:
            reason = site.no("something else reads the activation", act)
            continue
        operands = [act.inputs[0], product.inputs[1 - place]]
        return site.join([product], "act_mul", operands, {"act": act.op}, before=product)
    return reason


@rule("rms_norm")
def fuse_sum_with_norm(site: Site) -> Match | NoMatch:
    """rms_norm(add(x, y), weight) -> the second result of add_rms_norm(x, y, weight)."""
    norm, weight = site.node, site.operand(1)
    total = site.maker(0, "add")
    if total is None:
        return site.no("what it norms is no sum")
    if weight is not None and not site.is_weight(weight):
        return site.no("its gain is computed behind the sum")
    # At the sum's place: whatever reads it may stand before the norm.
    operands = [*total.inputs, weight]
    return site.join([total, norm], "add_rms_norm", operands, norm.attrs, before=total)


@rule("rope")
def fuse_rotations(site: Site) -> Match | NoMatch:
    """rope(q, cos, sin), rope(k, cos, sin) -> rope_pair(q, k, cos, sin)."""
    first = site.node
    nodes = site.function.nodes
    between: list[Node] = []
    for other in nodes[nodes.index(first) + 1 :]:
        between.append(other)
        if other.op != "rope" or other.inputs[1:] != first.inputs[1:]:
            continue
        if other.attrs != first.attrs:
            continue
        reader = next((node for node in between if first.output in node.inputs), None)
        if reader is not None:
            return site.no("something reads it before the other rotation", reader)
        operands = [first.inputs[0], *other.inputs]
        return site.join([first, other], "rope_pair", operands, other.attrs, before=other)
    return site.no("nothing else is rotated by its tables")


def fuse_linears(packable: Collection[str]) -> Rule:
    """Return the rule that joins linears of one input.

    Args:
        packable: Weight slots that may be put into one with others.
    """

    @rule("linear")
    def fuse_linears(site: Site) -> Match | NoMatch:
        """linear(x, a), linear(x, b) -> fused_linear(x, a, b)."""
        slots = site.function.slots_by_value()

        def may_be_joined(node: Node) -> bool:
            return all(slots.get(v) in packable and len(site.uses[v]) == 1 for v in _factors(node))

        if not may_be_joined(site.node):
            return site.no("its weights are read elsewhere, or computed")
        group = _of_one_input(site, may_be_joined)
        if len(group) == 1:
            return site.no("nothing else multiplies its input")
        return _joined(site, group, "fused_linear")

    return fuse_linears


def fuse_packed_linears(encodings: Mapping[str, Packed], alone: Collection[str]) -> Rule:
    """Return the rule that gives linears of packed weights to the kernels that read them.

    Args:
        encodings: Of packed weights, by slot.
        alone: Slots of weights that nothing else reads.
    """

    @rule("linear")
    def fuse_packed_linears(site: Site) -> Match | NoMatch:
        """linear(x, a), linear(x, b) -> packed_linear(x, a, b)."""
        slots = site.function.slots_by_value()

        def encoding(node: Node) -> Packed | None:
            weight = node.operand(1)
            return None if weight is None else encodings.get(slots.get(weight, ""))

        own = encoding(site.node)
        if own is None:
            return site.no("its weight is not packed")
        if own.bits != 4 or own.axis != 1 or not _read_by_kernels(site, own):
            return site.no(f"its weight is {own}, and kernels read other codes")

        def may_be_joined(node: Node) -> bool:
            return encoding(node) == own and all(
                slots.get(v) in alone and len(site.uses[v]) == 1 for v in _factors(node)
            )

        group = _of_one_input(site, may_be_joined) if may_be_joined(site.node) else [site.node]
        return _joined(site, group, "packed_linear")

    return fuse_packed_linears


def _read_by_kernels(site: Site, encoding: Packed) -> bool:
    """Return whether kernels read the groups of the node's weight."""
    weight = site.operand(1)
    assert weight is not None
    widths = {types[weight].shape[1] for types in site.types}
    return all(span_of(int(width), encoding.group) is not None for width in widths)


def _factors(linear: Node) -> list[Value]:
    """Return the weight of a linear, and its bias if it has one."""
    return [value for value in linear.inputs[1:] if value is not None]


def _of_one_input(site: Site, may_be_joined: Callable[[Node], bool]) -> list[Node]:
    """Return the linears of the node's input, itself among them, that may be joined with it."""
    count = len(_factors(site.node))
    return [
        node
        for node in site.function.nodes
        if node.op == "linear"
        and node.inputs[0] is site.node.inputs[0]
        and len(_factors(node)) == count
        and may_be_joined(node)
    ]


def _joined(site: Site, linears: Sequence[Node], op: str) -> Match:
    """Return the match that makes one product of linears; factors are all weights, then biases."""
    columns = zip(*(_factors(node) for node in linears), strict=True)
    operands = [site.node.inputs[0], *(value for column in columns for value in column)]
    return site.join(linears, op, operands, {"parts": len(linears)}, before=linears[0])


RULES = (
    fuse_experts,
    fuse_routing,
    fuse_activation_with_product,
    fuse_sum_with_norm,
    fuse_rotations,
)
"""The rules, in the order in which they run: each, until it applies nowhere, before the next."""
