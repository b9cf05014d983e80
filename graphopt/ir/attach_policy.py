"""Giving the KV states of a program policies, which select the pages that a step reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.dead_code import remove_dead
from graphopt.ir.graph import (
    Cache,
    Call,
    Function,
    KVState,
    Node,
    Param,
    Program,
    Value,
    resolve_attrs,
    unique_name,
)
from graphopt.ir.kv_policies import KVPolicy, PageBudget
from graphopt.ir.ops.attention import (
    BIAS,
    PAST_K,
    PAST_V,
    QUERY,
    SELECTED,
    SLOPES,
    is_general,
)
from graphopt.ir.shapes import infer_program
from graphopt.ir.verify import verify
from graphopt.ir.weights import Array, Weight

_KEPT = ("scale", "causal", "softcap")
"""Attributes that an attention has with a policy as well."""


def reason_not_its_own(program: Program, call: Call, cache: Cache) -> str | None:
    """Return why keys are not the past of one causal attention alone, as a clause; or None."""
    node = cache.present_k.node
    if node is None or node.op not in ("attention", "policy_attention"):
        return "its keys are not those of an attention"
    if node.op == "policy_attention":
        policy = program.states[call.caches[cache.slot]].policy
        return f"its state has the policy {policy and policy.kind} already"
    if (node.operand(PAST_K), node.operand(PAST_V)) != (cache.past_k, cache.past_v):
        return "it reads keys of another state than the one that it extends"
    attrs = resolve_attrs(node, call)
    if attrs["causal"] is not True:
        return "its tokens see later ones too"
    if is_general(attrs, node.inputs):
        return "it reads selected pages already, or gives the log-sum-exp or page maxima"
    return None


def reason_against(program: Program, call: Call, cache: Cache, policy: KVPolicy) -> str | None:
    """Return why a policy has no meaning for an attention and its state, as a clause; or None."""
    node, state = cache.present_k.node, program.states[call.caches[cache.slot]]
    reason = reason_not_its_own(program, call, cache)
    if reason is not None or node is None:
        return reason
    attrs = resolve_attrs(node, call)
    if state.host is not None:
        return "some of its keys lie in the host's memory"
    limited, added = limit_of_keys(attrs), added_to_scores(node)
    if limited is not None:
        return f"{limited}: a step reads no more than that anyway"
    if added is not None:
        return f"{added}, of which a policy does not know"
    if attrs.get("kv_bits", 16) != 16:
        return f"its cache holds codes of {attrs['kv_bits']} bits"
    if state.layout.kind == "ring":
        return "its state is a ring, whose pages move"
    if state.layout.page not in (None, policy.budget.page):
        return (
            f"its state has pages of {state.layout.page} tokens, and the policy selects pages of "
            f"{policy.budget.page}"
        )
    return None


def limit_of_keys(attrs: Mapping[str, Any]) -> str | None:
    """Return what keeps an attention from reading all keys, as a clause; None for nothing."""
    for name in ("window", "chunk"):
        if attrs.get(name) is not None:
            return f"it has a {name} of {attrs[name]} tokens"
    return None


def added_to_scores(node: Node) -> str | None:
    """Return that something is added to an attention's scores, as a clause; None for nothing."""
    if node.operand(SLOPES) is not None:
        return "slopes (ALiBi) are added to its scores"
    return None if node.operand(BIAS) is None else "a bias is added to its scores"


def with_policies(
    program: Program,
    policies: Mapping[str, KVPolicy],
    weights: Mapping[str, Tensor] | None = None,
) -> Program:
    """Return a copy of a program of which some states have policies.

    Calls of one function that differ in that call functions of their own then. Layers are numbered
    in the order of the states, so that they take turns in being calibrated.

    Args:
        policies: By the names of states; without weights.
        weights: Of the policies, by their names in `KVPolicy.weight_types`; all share them. They
            become weights of the program, `kv_policy.NAME`.

    Raises:
        UsageError: There is no such state, or its attention cannot have a policy.
        VerifyError: A policy does not fit the heads of an attention.
    """
    result = program.copy()
    for name in policies:
        if name not in result.states:
            raise UsageError(
                f"There is no state {name!r}.", "Run insert-kv-cache, or name one of its states."
            )
    for name, value in (weights or {}).items():
        result.weights.add(Weight(weight_name(name), Array(value)))
    kinds, _ = infer_program(result)
    layers = {name: number for number, name in enumerate(result.states)}
    made: dict[tuple[str, tuple[tuple[str, KVPolicy], ...]], str] = {}
    for call, types in zip(result.calls, kinds, strict=True):
        function = result.functions[call.function]
        chosen: dict[str, KVPolicy] = {}
        for cache in function.caches:
            state = result.states[call.caches[cache.slot]]
            if state.name not in policies:
                continue
            policy = policies[state.name]
            reason = reason_against(result, call, cache, policy)
            if reason is not None:
                raise UsageError(
                    f"{call.path or function.name}: the state {state.name!r} cannot have the "
                    f"policy {policy.kind}: {reason}.",
                    "Leave this state out.",
                )
            node = cache.present_k.node
            assert node is not None
            q = node.inputs[QUERY]
            assert q is not None
            state.policy, state.query_heads = policy, int(types[q].shape[1])
            chosen[cache.slot] = policy
        if chosen:
            key = call.function, tuple(chosen.items())
            if key not in made:
                made[key] = _variant(result, call, chosen)
            _retarget(result, call, made[key], layers)
    result.prune_unused()
    verify(result)
    return result


def weight_name(name: str) -> str:
    """Return what a weight of policies is called in a program."""
    return f"kv_policy.{name}"


def _variant(program: Program, call: Call, chosen: Mapping[str, KVPolicy]) -> str:
    """Add a function whose attentions of some cache slots have policies; return its name."""
    kinds = "_".join(dict.fromkeys(policy.kind for policy in chosen.values()))
    name = unique_name(f"{call.function}_{kinds}".replace("-", "_"), set(program.functions))
    function = program.functions[call.function].clone(name)
    for cache in function.caches:
        if cache.slot in chosen:
            state = program.states[call.caches[cache.slot]]
            _give(function, cache, chosen[cache.slot], state)
    program.functions[name] = function
    return name


def _give(function: Function, cache: Cache, policy: KVPolicy, state: KVState) -> None:
    """Make an attention read what a policy selects, in place."""
    node = cache.present_k.node
    assert node is not None
    taken = function.value_names()

    def fresh(name: str, node: Node | None = None) -> Value:
        value = Value(unique_name(name, taken), node)
        taken.add(value.name)
        return value

    names = list(state.policy_types)
    cache.past_state = [fresh(f"past_{name}") for name in names]
    cache.present_state = [fresh(f"present_{name}", node) for name in names]
    node.op = "policy_attention"
    node.inputs = [*node.inputs, *[None] * (SELECTED - len(node.inputs))][:SELECTED]
    node.inputs += cache.past_state
    for name in policy.weight_types(state.kv_heads):
        slot = weight_name(name)
        if slot not in function.weights:
            function.weights[slot] = fresh(slot.replace(".", "_"))
        node.inputs.append(function.weights[slot])
    node.attrs = {key: node.attrs[key] for key in _KEPT if node.attrs.get(key) is not None}
    node.attrs["policy"] = policy
    if policy.calibrate_every is not None:
        used = {p.name for n in function.nodes for p in n.attrs.values() if isinstance(p, Param)}
        node.attrs["layer"] = Param(unique_name("layer", used))
    node.outputs += cache.present_state
    for index, value in enumerate(node.outputs):
        value.index = index


def _retarget(program: Program, call: Call, name: str, layers: Mapping[str, int]) -> None:
    """Let a call apply another function, with the weights and numbers of its policies."""
    function = program.functions[name]
    call.function = name
    call.weights |= {slot: slot for slot in function.weights if slot not in call.weights}
    used = {p.name for n in function.nodes for p in n.attrs.values() if isinstance(p, Param)}
    call.attrs = {key: value for key, value in call.attrs.items() if key in used}
    for cache in function.caches:
        node = cache.present_k.node
        layer = None if node is None else node.attrs.get("layer")
        if isinstance(layer, Param):
            call.attrs[layer.name] = layers[call.caches[cache.slot]]


def without_policies(program: Program) -> Program:
    """Return a copy of a program whose states have no policies: a step reads all keys."""
    result = program.copy()
    for function in result.functions.values():
        for cache in function.caches:
            node = cache.present_k.node
            if node is None or node.op != "policy_attention":
                continue
            node.op = "attention"
            node.inputs = node.inputs[:SELECTED]
            node.outputs = node.outputs[: len(node.outputs) - len(cache.present_state)]
            node.attrs = {key: node.attrs[key] for key in _KEPT if key in node.attrs}
            cache.past_state, cache.present_state = [], []
        remove_dead(function)
    for state in result.states.values():
        state.policy = state.query_heads = None
    for call in result.calls:
        function = result.functions[call.function]
        used = {p.name for n in function.nodes for p in n.attrs.values() if isinstance(p, Param)}
        call.attrs = {key: value for key, value in call.attrs.items() if key in used}
    result.prune_unused()
    verify(result)
    return result


def with_budget(program: Program, budget: PageBudget) -> Program:
    """Return a copy of a program whose policies have another budget."""
    result = program.copy()
    for function in result.functions.values():
        for node in function.nodes:
            if node.op == "policy_attention":
                node.attrs["policy"] = replace(node.attrs["policy"], budget=budget)
    for state in result.states.values():
        if state.policy is not None:
            state.policy = replace(state.policy, budget=budget)
    verify(result)
    return result
