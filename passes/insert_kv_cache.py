"""KV caches for causal attention: prefill and decode in one program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import sympy
from pydantic import Field

from graphopt.errors import UsageError, VerifyError
from graphopt.ir.graph import (
    Cache,
    Call,
    Function,
    KVLayout,
    KVState,
    Node,
    Program,
    Value,
    resolve_attrs,
    unique_name,
)
from graphopt.ir.ops import is_aten
from graphopt.ir.ops.attention import ATTENTIONS, BIAS, MASK, PAST_K
from graphopt.ir.relayout import with_layouts
from graphopt.ir.shapes import infer_program
from graphopt.ir.token_mixing import mixes_tokens
from graphopt.ir.types import B, P, S, Type, dim
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import Context, Pass, PassResult, Skip, register_pass
from graphopt.passes.places import laid_out_from_start, start_at_past
from graphopt.rewrite import calls_of, types_of, uniform_attribute

_MASK_INPUT = "attention_mask"


@register_pass
@dataclass
class InsertKVCache(Pass):
    """Give every attention a KV cache, so that a step computes new tokens alone.

    Attentions get the operands `past_k` and `past_v` and the results `present_k` and
    `present_v`; the program gets a state `kv.0`, `kv.1`, ... a layer, in layer order, and its
    `attention_mask` becomes [B, P + S]. Where the tokens of a step are counted, or take the first
    rows of a table, they are counted from P on.

    Legality:

    1. The attention is causal in every call: a cached key never changes.
    2. Its keys are those of the step itself, S of them, made without a cache so far.
    3. Its additive bias has one row for all queries: a bias a query needs rows of is laid out
       for a step that starts at position 0.
    4. Its padding mask is the program's `attention_mask` itself, and nothing but attention
       reads that input: what is computed from it is laid out for S keys.
    5. Nothing else lets a token's result depend on other tokens or on their number: a
       convolution along tokens, a shift, a sum over them, or an attention that capture did not
       recognise would need a state too.
    6. All attentions of the program or none: with some left alone the mask would fit neither.
    7. A ring holds all that is seen: the attention has a window, and nothing in it is counted from
       the first token on (chunks, pages).

    Options:
        ring: Whether attentions with a window keep the last window + step - 1 tokens alone: the
            window of every query of a step is still there when the step's keys are written.
        step: How many tokens a step has at most, with ring.
        page: How many tokens a page of the other caches has; none for caches without pages.
    """

    ring: bool = False
    step: Annotated[int, Field(ge=1)] = 1
    page: Annotated[int, Field(ge=1)] | None = None

    name: ClassVar[str] = "insert-kv-cache"

    def check_options(self) -> None:
        """Refuse a step that nothing asks for.

        Raises:
            UsageError: `step` is given without `ring`.
        """
        if self.step != 1 and not self.ring:
            raise UsageError(
                f"step={self.step} is how far a ring reaches beyond its window, and ring is false.",
                "Give ring=true, or leave step out.",
            )

    def run(self, program: Program, context: Context) -> PassResult:
        result = PassResult(program)
        calls = calls_of(program)
        for name, function in program.functions.items():
            result.matched += len(_attentions(function)) * len(calls[name])
        result.skipped = _illegal(program)
        pending = any(not _is_cached(n) for f in program.functions.values() for n in _attentions(f))
        if result.skipped or not (pending or self.ring or self.page):
            return result
        cached = program.copy()
        result.changed = _insert(cached) if pending else 0
        layouts = self._layouts(cached)
        if self.ring and not any(layout.ring for layout in layouts.values()):
            result.skipped.append(Skip(program.name, "no attention has a window to keep in a ring"))
        moved = [name for name, layout in layouts.items() if cached.states[name].layout != layout]
        if not pending and not moved:
            return result
        try:
            cached = with_layouts(cached, {name: layouts[name] for name in moved})
            result.changed = result.changed or len(moved)
            verify(cached)
        except VerifyError as error:
            result.changed = 0
            result.skipped.append(
                Skip(program.name, f"with a cache it is no model: {error.message}")
            )
            return result
        result.program = cached
        return result

    def _layouts(self, program: Program) -> dict[str, KVLayout]:
        """Return the layout that each state is to have, by its name."""
        layouts: dict[str, KVLayout] = {}
        for call in program.calls:
            for cache in program.functions[call.function].caches:
                name = call.caches[cache.slot]
                layout = program.states[name].layout
                node = cache.present_k.node
                slots = None if node is None else self._slots(resolve_attrs(node, call))
                if self.ring and slots is not None:
                    layout = KVLayout("ring", slots)
                elif self.page is not None:
                    layout = KVLayout("paged", self.page)
                layouts[name] = layout
        return layouts

    def _slots(self, attrs: Mapping[str, Any]) -> int | None:
        """Return the slots of a ring for an attention; None where a ring does not hold its keys."""
        window = attrs.get("window")
        counted = any(attrs.get(key) is not None for key in ("chunk", "page", "page_max"))
        return None if window is None or counted else int(window) + self.step - 1


def _attentions(function: Function) -> list[Node]:
    return [node for node in function.nodes if node.op in ATTENTIONS]


def _is_cached(node: Node) -> bool:
    return node.operand(PAST_K) is not None


def _illegal(program: Program) -> list[Skip]:
    """Return the places that keep the program from having caches, with the reason."""
    skipped: list[Skip] = []
    calls, types = calls_of(program), types_of(program)
    always, ever = _values_of_input(program, _MASK_INPUT)
    for name, function in program.functions.items():
        places = {n for kinds in types[name] for n in laid_out_from_start(function, kinds)}
        for node in function.nodes if calls[name] else []:
            reason: str | None = None
            if node.op not in ATTENTIONS:
                if ever[name] & set(node.inputs):
                    reason = (
                        f"{node.op} makes something else of the padding mask than attention does, "
                        "for the tokens of a text without a past"
                    )
                elif node not in places and _mixes_tokens(node, calls[name], types[name]):
                    reason = (
                        f"{node.op} mixes tokens outside attention, and what it would need of "
                        "earlier ones is no key or value"
                    )
            elif not _is_cached(node):
                mask = node.operand(MASK)
                if uniform_attribute(node, "causal", calls[name]) is not True:
                    reason = "its tokens see later ones too, in some layer at least"
                elif mask is not None and mask not in always[name]:
                    reason = (
                        f"it is masked by {mask.name}, which is more than the padding of a text"
                    )
                else:
                    reason = _layout_reason(node, types[name])
            if reason:
                skipped.append(Skip(f"{name}: {node.outputs[0].name}", reason))
    return skipped


def _mixes_tokens(node: Node, calls: list[Call], kinds: list[dict[Value, Type]]) -> bool:
    tried: set[str] = set()
    for attrs in [resolve_attrs(node, call) for call in calls] if is_aten(node.op) else []:
        for types in kinds:
            key = repr((attrs, [types[v] for v in node.inputs if v is not None]))
            if key not in tried and mixes_tokens(node, attrs, types):
                return True
            tried.add(key)
    return False


def _layout_reason(node: Node, kinds: list[dict[Value, Type]]) -> str | None:
    bias = node.operand(BIAS)
    for types in kinds:
        k = node.inputs[1]
        assert k is not None
        if types[k].shape[2] != S:
            return f"its keys {types[k]} are not one for each token of a text"
        if bias is None:
            continue
        shape = types[bias].shape
        if len(shape) >= 2 and shape[-2] != 1:
            return f"its bias {types[bias]} has a row for each query, counted from the first token"
        if any(isinstance(size, sympy.Expr) and S in size.free_symbols for size in shape):
            return f"its bias {types[bias]} is laid out for a text without a past"
    return None


def _values_of_input(
    program: Program, name: str
) -> tuple[dict[str, set[Value]], dict[str, set[Value]]]:
    """Return, for every function, which parameters are the program input `name`.

    First those that are in every call, then those that are in any.
    """
    bound = {name}
    always = {key: set(function.params) for key, function in program.functions.items()}
    ever: dict[str, set[Value]] = {key: set() for key in program.functions}
    for call in program.calls:
        function = program.functions[call.function]
        handed = {v for v, arg in zip(function.params, call.args, strict=True) if arg in bound}
        always[call.function] &= handed
        ever[call.function] |= handed
        for value, result in zip(function.results, call.results, strict=True):
            (bound.add if value in handed else bound.discard)(result)
    return always, ever


def _insert(program: Program) -> int:
    """Rewrite every attention; return how many, over all calls."""
    kinds, _ = infer_program(program)
    known = types_of(program)
    for name, function in program.functions.items():
        for node in laid_out_from_start(function, known[name][0]) if known[name] else []:
            start_at_past(node)
        for node in _attentions(function):
            if not _is_cached(node):
                _add_cache(function, node)
    inputs = program.inputs
    if _MASK_INPUT in inputs:
        inputs[_MASK_INPUT] = Type((B, dim(P + S)), inputs[_MASK_INPUT].dtype)
    inserted = 0
    states: dict[str, KVState] = dict(program.states)
    for call, types in zip(program.calls, kinds, strict=True):
        function = program.functions[call.function]
        for cache in function.caches:
            if cache.slot in call.caches:
                continue
            assert cache.present_k.node is not None
            _, k, v = cache.present_k.node.inputs[:3]
            assert k is not None and v is not None
            name = unique_name(f"kv.{len(states)}", set(states))
            states[name] = KVState(
                name,
                int(types[k].shape[1]),
                int(types[k].shape[3]),
                int(types[v].shape[3]),
                types[k].dtype,
            )
            call.caches[cache.slot] = name
            inserted += 1
    program.states = states
    return inserted


def _add_cache(function: Function, node: Node) -> None:
    taken = function.value_names()

    def fresh(name: str) -> Value:
        value = Value(unique_name(name, taken))
        taken.add(value.name)
        return value

    past_k, past_v, present_k, present_v = map(
        fresh, ("past_k", "past_v", "present_k", "present_v")
    )
    node.inputs += [None] * (PAST_K + 2 - len(node.inputs))
    node.inputs[PAST_K], node.inputs[PAST_K + 1] = past_k, past_v
    for index, value in enumerate((present_k, present_v), start=1):
        value.node = node
        node.outputs.insert(index, value)
    for index, value in enumerate(node.outputs):
        value.index = index
    slot = unique_name("kv", {cache.slot for cache in function.caches})
    function.caches.append(Cache(slot, past_k, past_v, present_k, present_v))
