"""Rules that give rounding, transforms and what stands in front of them to one kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from graphopt.ir.graph import Node, Value
from graphopt.ir.ops.attention import KEY, PAST_K, QUERY, VALUE, is_general
from graphopt.ir.types import Type
from graphopt.lowering.kernels.in_front import FrontShape, WhyApart
from graphopt.rewrite import Match, NoMatch, Rule, Site, rule
from graphopt.rewrite.rule import VARIES
from graphopt.runtime.packed_codes import span_of

_LEFT, _RIGHT, _CLIP_LOW, _CLIP_HIGH = 3, 4, 5, 6


@rule("quantise_dequantise")
def fuse_rounding_with_linears(site: Site) -> Match | NoMatch:
    """packed_linear(quantise_dequantise(x), ..) -> integer_linear(*transformed(x, bits), ..)."""
    rounding = site.node
    value = rounding.output
    readers = [node for node, _ in site.uses[value]]
    if value in site.outside or not readers:
        return site.no("its values leave the function")
    for node, index in site.uses[value]:
        if node.op != "packed_linear" or index != 0:
            return site.no("something reads its values that does not read codes", node)
    bits = site.attr("bits")
    if site.attr("symmetric") is not True or bits is VARIES:
        return site.no("its codes have zero points, or another width in another layer")
    clips = [site.operand(1), site.operand(2)]
    if not all(_is_one_number(site, clip) for clip in clips):
        return site.no("its clips are no weights of one number")

    def rewrite() -> None:
        names = [f"{value.name}_codes", f"{value.name}_scales"]
        operands = _trimmed([rounding.inputs[0], None, None, None, None, *clips])
        made = site.function.add(
            "transformed", operands, {"bits": bits}, names, before=rounding, outputs=2
        )
        for node in readers:
            node.op, node.inputs = "integer_linear", [*made.outputs, *node.inputs[1:]]

    return Match(rewrite)


@rule("kronecker")
def fuse_transform_with_rounding(site: Site) -> Match | NoMatch:
    """transformed(kronecker(x, left, right), bits) -> transformed(x, left, right, bits)."""
    node = site.node
    x, left, right = site.operand(0), site.operand(1), site.operand(2)
    if not all(factor is None or site.is_weight(factor) for factor in (left, right)):
        return site.no("its factors are computed")
    if left is None and _is_dense(site, x, right):
        return site.no("it is one dense product")
    reader = site.only_reader(node.output)
    if reader is None or reader.op != "transformed" or _front_of(reader):
        return site.change("transformed", _trimmed([x, None, None, left, right]))
    operands = _trimmed([x, None, None, left, right, *_clips(reader)])
    return site.join([reader], "transformed", operands, dict(reader.attrs), before=reader)


@rule("transformed")
def fuse_front_with_transform(site: Site) -> Match | NoMatch:
    """transformed(norm(x)) or transformed(act_mul(x, y)) -> transformed(x, y, before=..)."""
    node = site.node
    if node.attrs.get("before", ""):
        return site.no("a norm or a gate is in it already")
    front = site.maker(0, "add_rms_norm", "rms_norm", "act_mul")
    if front is None:
        return site.no("what it transforms is made by neither a norm nor a gate")
    made = front.outputs[-1]
    if node.inputs[0] is not made or site.only_reader(made) is not node:
        return site.no("something else reads what it transforms", front)
    behind = [*node.inputs[1:], *[None] * 6][2:6]
    if not all(value is None or site.is_weight(value) for value in behind):
        return site.no("its factors or clips are computed")
    attrs = dict(node.attrs)
    if front.op == "act_mul":
        given = [*front.inputs, None]
        attrs["before"] = front.attrs["act"]
    else:
        attrs |= {"before": "norm", **front.attrs}
        given = [*front.inputs, None, None][:3]
        if front.op == "rms_norm":
            given = [front.inputs[0], None, site.operand(1, front)]
        if given[2] is not None and not site.is_weight(given[2]):
            return site.no("the norm's gain is computed", front)
        if front.op == "add_rms_norm":
            attrs["total"] = True
    operands = _trimmed([*given, *behind])

    outputs = [*front.outputs[:-1], *node.outputs]
    # At the front's place: whatever reads the sum may stand before the transform.
    return site.join([front, node], "transformed", operands, attrs, before=front, outputs=outputs)


@rule("act_mul")
def fuse_gate_with_linears(site: Site) -> Match | NoMatch:
    """act_mul of both results of a packed_linear, or of an integer_linear -> its `act`."""
    gate = site.node
    made = [site.maker(index, "packed_linear", "integer_linear") for index in (0, 1)]
    linear = made[0]
    if linear is None or made[1] is not linear or len(linear.outputs) != 2:
        return site.no("what it multiplies is not both results of one product of packed weights")
    first, second = gate.inputs
    if first is second or any(site.only_reader(value) is not gate for value in linear.outputs):
        return site.no("something else reads the product", linear)
    start = 1 if linear.op == "packed_linear" else 2
    factors = linear.inputs[start:]
    sizes = [{types[factor].shape[0] for factor in factors[:2] if factor} for types in site.types]
    if any(len(size) != 1 for size in sizes):
        return site.no("its weights are of different sizes", linear)
    if first is linear.outputs[1]:
        factors = [factor for pair in _pairs(factors) for factor in reversed(pair)]
    operands = [*linear.inputs[:start], *factors]
    attrs = {**linear.attrs, "act": gate.attrs["act"]}
    return site.join(
        [linear, gate], linear.op, operands, attrs, before=linear, outputs=gate.outputs
    )


@rule("packed_linear")
def fuse_norm_with_linears(site: Site) -> Match | NoMatch:
    """packed_linear(add_rms_norm(x, y, weight)) -> norm_packed_linear(x, y, weight, ..)."""
    linear = site.node
    norm = site.maker(0, "add_rms_norm", "rms_norm")
    if norm is None:
        return site.no("what it multiplies is made by no norm")
    normed = norm.outputs[-1]
    if site.only_reader(normed) is not linear:
        return site.no("something else reads the norm", norm)
    given = [*norm.inputs, None][:3]
    if norm.op == "rms_norm":
        given = [norm.inputs[0], None, site.operand(1, norm)]
    if given[2] is not None and not site.is_weight(given[2]):
        return site.no("the norm's gain is computed", norm)
    # Of a norm without a sum the first result is what it reads: nothing reads that of this.
    whole: Sequence[Value | None] = norm.outputs[:-1] or [None]
    return site.join(
        [norm, linear], "norm_packed_linear", [*given, *linear.inputs[1:]],
        {**norm.attrs, **linear.attrs}, before=norm, outputs=[*whole, *linear.outputs],
    )  # fmt: skip


def fuse_transform_with_linears(why_apart: WhyApart) -> Rule:
    """Return the rule that lets products transform what they read, where that takes less."""

    @rule("packed_linear")
    def fuse_transform_with_linears(site: Site) -> Match | NoMatch:
        """packed_linear(transformed(x, .., left, right)) -> transformed_packed_linear(x, ..)."""
        linear = site.node
        made = site.maker(0, "transformed")
        if made is None:
            return site.no("what it multiplies is made by no transform")
        value = made.outputs[-1]
        if site.only_reader(value) is not linear:
            return site.no("something else reads the transform", made)
        factors = [made.operand(_LEFT), made.operand(_RIGHT)]
        if linear.inputs[0] is not value or not any(factors):
            return site.no("what it multiplies is not transformed", made)
        for types in site.types:
            reason = why_apart(_front_shape(linear, made, types))
            if reason is not None:
                return site.no(reason)
        front = [*made.inputs, *[None] * 5][:5]
        # At the transform's place: whatever reads the sum may stand before the product.
        return site.join(
            [made, linear], "transformed_packed_linear", [*front, *linear.inputs[1:]],
            {**made.attrs, **linear.attrs}, before=made,
            outputs=[*made.outputs[:-1], *linear.outputs],
        )  # fmt: skip

    return fuse_transform_with_linears


@rule("rope_pair")
def fuse_rotations_with_transforms(site: Site) -> Match | NoMatch:
    """kronecker of both results of rope_pair by dense factors -> its q_right and k_right."""
    pair = site.node
    if len(pair.inputs) != 4:
        return site.no("its results are transformed already")
    readers = [site.only_reader(value) for value in pair.outputs]
    factors: list[Value] = []
    for value, reader in zip(pair.outputs, readers, strict=True):
        if reader is None or reader.op != "kronecker" or reader.inputs[0] is not value:
            return site.no("queries or keys are read by something else than a transform")
        right = reader.operand(2)
        if reader.operand(1) is not None or right is None or not site.is_weight(right):
            return site.no("a transform is not by one factor that is a weight", reader)
        if not _is_dense(site, value, right):
            return site.no("a factor is not as wide as a head", reader)
        factors.append(right)

    def rewrite() -> None:
        function = site.function
        operands = [*pair.inputs, *factors]
        fused = function.add("rope_pair", operands, pair.attrs, before=pair)
        fused.outputs = [reader.output for reader in readers if reader is not None]
        for index, output in enumerate(fused.outputs):
            output.node, output.index = fused, index
        gone = (pair, *readers)
        function.nodes = [node for node in function.nodes if node not in gone]

    return Match(rewrite)


def _front_shape(linear: Node, made: Node, types: Mapping[Value, Type]) -> FrontShape:
    """Return the sizes of a transform and of the product that reads it."""
    left, right = made.operand(_LEFT), made.operand(_RIGHT)
    width = int(types[made.outputs[-1]].shape[-1])
    n1 = 0 if left is None else int(types[left].shape[0])
    n2 = 0 if right is None else int(types[right].shape[0])
    parts = linear.attrs["parts"]
    weights = [value for value in linear.inputs[1 : 1 + parts] if value is not None]
    encoding = types[weights[0]].encoding
    span = None if encoding is None else span_of(width, encoding.group)
    return FrontShape(
        n1 or width // n2, n2 or width // n1, left is not None, right is not None,
        sum(int(types[weight].shape[0]) for weight in weights),
        made.attrs.get("before", ""), linear.attrs.get("act", ""), span or 0,
    )  # fmt: skip


def _pairs(factors: Sequence[Value | None]) -> list[Sequence[Value | None]]:
    """Return both weights, and both biases where there are any."""
    return [factors[start : start + 2] for start in range(0, len(factors), 2)]


WhyUnread = Callable[[Type, Type, Type, int], str | None]
"""Says of queries, keys, values and bits why no kernel reads such a cache; None where one does."""


def fuse_rounding_with_cache(why_unread: WhyUnread) -> Rule:
    """Return the rule that leaves the rounding of keys and values to the cache.

    Where no kernel reads the codes, the reference would unpack the whole cache in every step.
    """

    @rule("attention")
    def fuse_rounding_with_cache(site: Site) -> Match | NoMatch:
        """attention(q, quantise_dequantise(k), .. (v), past) -> attention(q, k, v, .., kv_bits).

        A cache then holds codes, and new keys and values are rounded where they are written.
        """
        return _rounded_by_cache(site, why_unread)

    return fuse_rounding_with_cache


def _rounded_by_cache(site: Site, why_unread: WhyUnread) -> Match | NoMatch:
    node = site.node
    roundings = [site.maker(index, "quantise_dequantise") for index in (KEY, VALUE)]
    bits = {None if r is None else site.attr("bits", r) for r in roundings}
    plain = all(
        r is not None and site.attr("symmetric", r) is False and len(r.inputs) == 1
        for r in roundings
    )
    if not plain or len(bits) > 1 or not bits <= {4, 8}:
        return site.no("its keys and values are not both rounded to 4 or 8 bits, with zero points")
    if node.operand(PAST_K) is None or is_general(node.attrs, node.inputs):
        return site.no("it has no cache, or gives more than its output")
    for index in (KEY, VALUE):
        value = site.operand(index)
        if value is None or site.only_reader(value) is not node:
            return site.no("something else reads its rounded keys or values")
    (kv_bits,) = bits
    query, key, value = (node.inputs[index] for index in (QUERY, KEY, VALUE))
    assert query is not None and key is not None and value is not None and kv_bits is not None
    for types in site.types:
        reason = why_unread(types[query], types[key], types[value], kv_bits)
        if reason is not None:
            return site.no(f"no kernel reads codes of its keys and values: {reason}")
    operands = list(node.inputs)
    for index, rounding in zip((KEY, VALUE), roundings, strict=True):
        assert rounding is not None
        operands[index] = rounding.inputs[0]
    return site.change("attention", operands, {**node.attrs, "kv_bits": kv_bits})


def _front_of(node: Node) -> bool:
    """Return whether a `transformed` does more than rounding."""
    factors = (node.operand(_LEFT), node.operand(_RIGHT))
    return bool(node.attrs.get("before", "")) or factors != (None, None)


def _clips(node: Node) -> list[Value | None]:
    return [node.operand(_CLIP_LOW), node.operand(_CLIP_HIGH)]


def _is_dense(site: Site, x: Value | None, right: Value | None) -> bool:
    """Return whether a right factor is as wide as what it transforms, or nothing says it isn't."""
    assert x is not None and right is not None
    return all(types[right].shape[0] == types[x].shape[-1] for types in site.types)


def _is_one_number(site: Site, value: Value | None) -> bool:
    if value is None:
        return True
    known = site.is_weight(value) and len(site.types) > 0
    return known and all(types[value].numel == 1 for types in site.types)


def _trimmed(operands: Sequence[Value | None]) -> list[Value | None]:
    """Return operands without the absent ones at their end."""
    kept = list(operands)
    while kept and kept[-1] is None:
        kept.pop()
    return kept


QUANTISED_RULES = (
    fuse_rounding_with_linears,
    fuse_transform_with_rounding,
    fuse_front_with_transform,
)
"""The rules, in the order in which they run, behind those of linears and norms.

Behind them `fuse_gate_with_linears`, `fuse_norm_with_linears`, `fuse_transform_with_linears`,
`fuse_rotations_with_transforms` and `fuse_rounding_with_cache` are for a target.
"""
