"""A function of the program as the body of a module's `forward`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import sympy
import torch

from graphopt.errors import LoweringError
from graphopt.ir.attach_policy import weight_name
from graphopt.ir.graph import Cache, Function, In, Node, Param, Value, unique_name
from graphopt.ir.kv_policies import KVPolicy, policy_to_dict
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.ops.attention import (
    ATTENTIONS,
    MASK,
    PAST_K,
    PAST_V,
    SELECTED,
    SINKS,
    is_general,
)
from graphopt.ir.ops.policy_attention import STATE
from graphopt.ir.printer import FunctionPrinter
from graphopt.lowering.torch.aten_form import aten_form
from graphopt.lowering.torch.cache_text import reads_present
from graphopt.lowering.torch.forms import callee_of, form_of
from graphopt.lowering.torch.packed import CLASS_NAME
from graphopt.lowering.torch.text import (
    HELPERS,
    attribute_names,
    identifier,
    joint_name,
    literal,
    quoted,
    size_text,
    sizes_of,
)

# Operands that are given even where they are absent.
_POSITIONAL = {"add_rms_norm": 3, "layer_norm": 3, "rms_norm": 2}
_BINDS = {"add": 1, "mul": 2, "scale": 2}
_GIVEN = ("B", "S", "P", "device", "pictures")
# Attributes that an attention with a policy is given as they are.
_OPTIONS = ("layer", "scale", "softcap")
# Where the factors of a product with several weights begin among its operands.
_OF_FACTORS = {
    "fused_linear": 1, "packed_linear": 1, "integer_linear": 2, "norm_packed_linear": 3,
    "transformed_packed_linear": 5,
}  # fmt: skip
# Products that take what stands in front of them as well: absent operands are given too.
_FRONTED = ("norm_packed_linear", "transformed_packed_linear")
# Ops of several results, of which those that nothing reads need no name.
_JOINED = ("add_rms_norm", "transformed", *_FRONTED)


class BodyPrinter(FunctionPrinter):
    """Prints a function as statements of a `forward`, in plain PyTorch.

    Args:
        function: A function without dead nodes.
        where: Where a call of it is, for messages.
        packed: Weight slots that hold packed codes.
        both_ways: Its attentions let tokens of one picture see each other both ways, where there
            are pictures.

    Attributes:
        params: Python name of every parameter, in order.
        pasts: Python name of the parameter for every cache slot.
        attributes: Attribute of the module for every weight slot that has one of its own.
        policies: Attribute of the module for the policy of each attention that has one.
        packs: Slots of the weights, or biases, that lie in one attribute, by its name.
        options: Attribute of the module for every call attribute.
        quantised: The packed weights; reading one gives the values that its codes stand for.
        apart: Whether something else than attention reads keys or values of a past.
        helpers: Functions of graphopt.ir.functional that the body calls.
        needs: Which of B, S, P, device and pictures the body mentions, in this order.
    """

    inline_width = 50
    keeps_order = False

    def __init__(
        self,
        function: Function,
        where: str,
        packed: Collection[str] = (),
        *,
        both_ways: bool = False,
    ) -> None:
        super().__init__(function)
        self.where, self.both_ways = where, both_ways
        self.helpers: set[str] = {CLASS_NAME} if packed else set()
        self._needs: set[str] = set()
        self._taken: set[str] = set()
        self.params = [self._claim(value.name) for value in function.params]
        self.pasts = {cache.slot: self._claim("past") for cache in function.caches}
        attrs = [attr for node in function.nodes for attr in node.attrs.values()]
        mentioned = dict.fromkeys(attr.name for attr in attrs if isinstance(attr, Param))
        self.attributes = attribute_names(list(function.weights))
        self.packs: dict[str, list[str]] = {}
        self._packed = {
            node: self._pack(node)
            for node in function.nodes
            if node.op in _OF_FACTORS and node.attrs["parts"] > 1
        }
        own = [*self.attributes.values(), *self.packs, *map(sizes_of, self.packs)]
        self.options = attribute_names(list(mentioned), own)
        self.policies = self._policies()
        self._names = dict(zip(function.params, self.params, strict=True))
        for slot, value in function.weights.items():
            if slot in self.attributes:
                self._names[value] = f"self.{self.attributes[slot]}"
                if slot in packed:
                    self._names[value] += "()"
        self._own = set(function.weights.values())
        self.quantised = {function.weights[slot] for slot in packed}
        self._cache_of = {c.past_k: c for c in function.caches}
        self._presents = self._whole_caches()
        for value in (v for c in function.caches for v in c.pasts):
            self._names[value] = self._claim(value.name)
        for node in function.nodes:
            for value in node.outputs:
                self._names[value] = self._claim(value.name)
        self.statements = self._statements()
        self.needs = [name for name in _GIVEN if name in self._needs]

    def _whole_caches(self) -> dict[Value, str]:
        """Return a name for each cache that an attention leaves whole, by its keys.

        Those are taken apart into keys and values that something else reads.
        """
        names: dict[Value, str] = {}
        for cache in self.function.caches:
            node = cache.present_k.node
            whole = node is not None and self._past(node) is cache
            if whole and not reads_present(self.function, cache):
                names[cache.present_k] = self._claim("present")
        return names

    def _claim(self, name: str) -> str:
        name = identifier(name, self._taken)
        self._taken.add(name)
        return name

    def _pack(self, node: Node) -> list[str]:
        """Move the factors of a packed product out of `attributes`; return where they lie."""
        slots = self.function.slots_by_value()
        parts = node.attrs["parts"]
        made: list[str] = []
        for start in range(_OF_FACTORS[node.op], len(node.inputs), parts):
            mine = [slots[v] for v in node.inputs[start : start + parts] if v is not None]
            taken = {*self.attributes.values(), *self.packs, *map(sizes_of, self.packs)}
            name = joint_name([self.attributes.pop(slot) for slot in mine], taken)
            self.packs[name] = mine
            made.append(name)
        return made

    def name(self, value: Value) -> str:
        return self._inline[value] if value in self._inline else self._names[value]

    def reads_once(self, value: Value) -> bool:
        """Return whether one operand alone is this value, which is not known outside."""
        return len(self._uses[value]) == 1 and value not in self._outside

    def target(self, value: Value) -> str:
        joined = value.node is not None and value.node.op in _JOINED
        unread = not self._uses[value] and value not in self._outside
        return "_" if joined and unread else self._names[value]

    def targets(self, node: Node) -> list[str]:
        texts = super().targets(node)
        if node.op == "policy_attention":
            # Keys, values and what the policy remembers come as one cache.
            return [texts[0], self._presents[node.outputs[1]]]
        if node.op == "attention" and self._pasts_of(node):
            # Keys and values come as one cache.
            cache = self._presents.get(node.outputs[1], f"({texts[1]}, {texts[2]})")
            texts[1:3] = [cache]
        return texts

    def results(self) -> list[str]:
        """Return what `forward` returns: the results, then each cache."""
        texts = [self.name(value) for value in self.function.results]
        for cache in self.function.caches:
            apart = f"({self.name(cache.present_k)}, {self.name(cache.present_v)})"
            texts.append(self._presents.get(cache.present_k, apart))
        return texts

    def _statements(self) -> list[str]:
        body = [statement for statement, _ in self.lines()]
        unpacked = self._unpacked()
        self.apart = bool(unpacked)
        return [*unpacked, *body]

    def _unpacked(self) -> list[str]:
        """Take caches apart whose keys or values something else than attention reads."""
        alone = set(self._outside)
        for node in self.function.nodes:
            alone.update(
                value
                for place, value in enumerate(node.inputs)
                if value is not None
                and not (self._past(node) is not None and place in (PAST_K, PAST_V))
            )
        return [
            f"{self._names[c.past_k]}, {self._names[c.past_v]} = {self.pasts[c.slot]}"
            for c in self.function.caches
            if c.past_k in alone or c.past_v in alone
        ]

    def expression(self, node: Node) -> str:
        try:
            if is_aten(node.op):
                return aten_form(self, node)
            form = form_of(node.op)
            if form is not None:
                return form(self, node)
            callee = callee_of(node.op)
            if callee is not None:
                return self.call(node, callee, node.inputs)
        except ValueError as error:
            raise self._refusal(node, str(error)) from error
        raise self._refusal(node, "this op has no form in PyTorch")

    def _refusal(self, node: Node, reason: str) -> LoweringError:
        return LoweringError(
            f"{self.where}: {node.outputs[0].name} = {node.op}: {reason}.",
            "Add a form in lowering/torch/forms.py, or leave torch out of --emit.",
        )

    def call(self, node: Node, callee: str, operands: Sequence[Value | None]) -> str:
        arguments = [*self.operands(node, operands), *self.options_of(node)]
        return self.helper(callee, ", ".join(arguments))

    def operands(self, node: Node, operands: Sequence[Value | None]) -> list[str]:
        """Return operands by place, and by name behind one that is absent."""
        names = [name.rstrip("?") for name in get_op(node.op).operands]
        given = _POSITIONAL.get(node.op, 0)
        texts: list[str] = []
        by_name = False
        for index in range(max(len(operands), given)):
            value = operands[index] if index < len(operands) else None
            if value is not None:
                texts.append(f"{names[index]}={self.name(value)}" if by_name else self.name(value))
            elif index < given:
                texts.append("None")
            else:
                by_name = True
        return texts

    def options_of(self, node: Node) -> list[str]:
        """Return the attributes that are not at their defaults."""
        defaults = get_op(node.op).defaults
        return [
            self.keyword(key, attr, node)
            for key, attr in node.attrs.items()
            if not (key in defaults and defaults[key] == attr)
        ]

    def keyword(self, key: str, value: Any, node: Node) -> str:
        """Return an attribute as an argument by name.

        Raises:
            ValueError: It has no such form.
        """
        if not key.isidentifier():
            raise ValueError(f"{key!r} is no name of an argument")
        return f"{key}={self.literal(value, node)}"

    def helper(self, callee: str, arguments: str) -> str:
        """Return a call, and remember its function if the file has to define it."""
        if callee in HELPERS:
            self.helpers.add(callee)
        return f"{callee}({arguments})"

    def infix(self, node: Node, sign: str, left: Value | None, right: str | Value | None) -> str:
        """Return `left sign right`, in the order of evaluation the graph has."""
        rest = right if isinstance(right, str) else self._operand(right, _BINDS[node.op] + 1)
        return f"{self._operand(left, _BINDS[node.op])} {sign} {rest}"

    def _operand(self, value: Value | None, least: int) -> str:
        assert value is not None
        inner = value.node.op if value in self._inline and value.node is not None else ""
        text = self.name(value)
        return f"({text})" if _BINDS.get(inner, least) < least else text

    def _past(self, node: Node) -> Cache | None:
        """Return the cache whose keys and values an attention reads as its past."""
        if node.op not in ATTENTIONS or len(node.inputs) <= PAST_V:
            return None
        k, v = node.inputs[PAST_K], node.inputs[PAST_V]
        cache = None if k is None else self._cache_of.get(k)
        return cache if cache is not None and cache.past_v is v else None

    @staticmethod
    def _pasts_of(node: Node) -> list[Value]:
        return [v for v in node.inputs[PAST_K : PAST_V + 1] if v is not None]

    def attention(self, node: Node) -> str:
        """Return an attention; one with a past takes it as its fourth argument."""
        pasts, general = self._pasts_of(node), is_general(node.attrs, node.inputs)
        by_rows = self._by_rows(node)
        if not pasts and not general and not self.both_ways:
            if by_rows:
                self.helpers.add("attention_by_rows")
                return self.call(node, "attention_by_rows", node.inputs[:PAST_K])
            return self.call(node, "attention", node.inputs[:PAST_K])
        texts = self.operands(node, node.inputs[:PAST_K])
        texts.insert(3, self._past_text(node, pasts) if pasts else "None")
        if general:
            texts.append(f"cached={bool(pasts)}")
            selected = node.operand(SELECTED)
            texts += [] if selected is None else [f"selected_blocks={self.name(selected)}"]
        texts += self.options_of(node)
        callee = "attention_results" if general else "cached_attention"
        if self.both_ways:
            self._needs.add("pictures")
            callee, texts = "picture_attention", [*texts, "pictures=pictures"]
        elif by_rows:
            self.helpers.add("cached_attention_by_rows")
            callee = "cached_attention_by_rows"
        call = self.helper(callee, ", ".join(texts))
        return call if len(node.outputs) > 1 else f"{call}[0]"

    def _by_rows(self, node: Node) -> bool:
        """Return whether what reads an attention's output asks for it row by row."""
        return {n.op for n, _ in self._uses[node.outputs[0]]} == {"attention_linear_all_reduce"}

    def policy_attention(self, node: Node) -> str:
        """Return an attention with a policy, which takes the whole cache.

        Raises:
            ValueError: Something else reads the keys or values that it leaves.
        """
        cache = self._past(node)
        if cache is None or node.outputs[1] not in self._presents:
            raise ValueError("something else reads its keys, which lie with what a policy keeps")
        self.helpers.update((node.op, "policy_of"))
        q, k, v = (self.name(value) for value in node.inputs[:3] if value is not None)
        texts = [q, k, v, self.pasts[cache.slot]]
        for name, place in (("mask", MASK), ("sinks", SINKS)):
            value = node.operand(place)
            texts += [] if value is None else [f"{name}={self.name(value)}"]
        texts.append(f"policy=self.{self.policies[node]}")
        plain = Node(node.op, node.inputs, {k: v for k, v in node.attrs.items() if k in _OPTIONS})
        return f"policy_attention({', '.join([*texts, *self.options_of(plain)])})"

    def _policies(self) -> dict[Node, str]:
        """Return the attribute of the module for the policy of each attention with one."""
        nodes = [node for node in self.function.nodes if node.op == "policy_attention"]
        taken = {*self.attributes.values(), *self.packs, *self.options.values()}
        names: dict[Node, str] = {}
        for node in nodes:
            names[node] = unique_name("policy", taken)
            taken.add(names[node])
        return names

    def policy_text(self, node: Node) -> str:
        """Return what makes the policy of an attention, of the module's weights."""
        policy: KVPolicy = node.attrs["policy"]
        fields = ", ".join(f"{quoted(k)}: {literal(v)}" for k, v in policy_to_dict(policy).items())
        given = [value for value in node.inputs[STATE:] if value in self._own]
        if not given:
            return f"policy_of({{{fields}}})"
        slots = self.function.slots_by_value()
        weights = ", ".join(
            f"{quoted(slots[value].removeprefix(weight_name('')))}: {self._names[value]}"
            for value in given
        )
        return f"policy_of({{{fields}}}, {{{weights}}})"

    def _past_text(self, node: Node, pasts: Sequence[Value]) -> str:
        cache = self._past(node)
        return f"({', '.join(map(self.name, pasts))})" if cache is None else self.pasts[cache.slot]

    def fused_linear(self, node: Node) -> str:
        """Return the products of one tensor with several weights."""
        assert node.inputs[0] is not None
        factors = self._packed[node]
        names = [self.name(node.inputs[0]), *(f"self.{name}" for name in factors)]
        product = self.helper("linear", ", ".join(names))
        return f"{product}.split(self.{sizes_of(factors[0])}, -1)"

    def packed_linear(self, node: Node) -> str:
        """Return the products of one tensor, or of codes and scales, with weights that are packed.

        The function gets the weights as they are kept.
        """
        self.helpers.add(CLASS_NAME)
        start = _OF_FACTORS[node.op]
        fronted = node.op in _FRONTED
        given = [
            "None" if value is None else self.name(value)
            for value in node.inputs[:start]
            if fronted or value is not None
        ]
        if node in self._packed:
            factors = [f"self.{name}" for name in self._packed[node]]
        else:
            factors = [self.name(value) for value in node.inputs[start:] if value is not None]
        weight, *bias = factors
        weight = weight.removesuffix("()")
        act = node.attrs.get("act", "")
        if fronted:
            options = [
                f"{name}={self.literal(node.attrs[name], node)}"
                for name in ("before", "total", "eps", "offset", "act")
                if name in node.attrs
            ]
            if node in self._packed and not act:
                options.append(f"sizes={weight}.sizes")
            return self.helper(node.op, ", ".join([*given, weight, *bias, *options]))
        if act:
            arguments = [*given, weight, *bias, f"act={quoted(act)}"]
            return self.helper(f"gated_{node.op}", ", ".join(arguments))
        product = self.helper(node.op, ", ".join([*given, weight, *bias]))
        return f"{product}.split({weight}.sizes, -1)" if node in self._packed else product

    def literal(self, value: Any, node: Node) -> str:
        """Return an attribute as Python text.

        Raises:
            ValueError: It has no such form.
        """
        if isinstance(value, Param):
            return f"self.{self.options[value.name]}"
        if isinstance(value, In):
            operand = node.inputs[value.index]
            return "None" if operand is None else self.name(operand)
        if isinstance(value, torch.device):
            return self._device(node)
        if isinstance(value, sympy.Expr):
            self._needs |= {symbol.name for symbol in value.free_symbols}
            return size_text(value)
        if isinstance(value, list | tuple):
            return f"[{', '.join(self.literal(item, node) for item in value)}]"
        return literal(value)

    def _device(self, node: Node) -> str:
        """Return the device of the first operand; without one, that of the input ids."""
        operand = next((v for v in node.inputs if v is not None), None)
        text = "" if operand is None else self.name(operand)
        if re.fullmatch(r"[\w.]+", text):
            return f"{text}.device"
        self._needs.add("device")
        return "device"
