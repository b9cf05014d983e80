"""The structural verifier: what every program must satisfy, between any two passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from graphopt.errors import VerifyError
from graphopt.ir.graph import Cache, Call, Function, KVState, Param, Program, Value, resolve_attrs
from graphopt.ir.layouts import verify_layouts
from graphopt.ir.ops import all_ops, get_op, is_aten
from graphopt.ir.ops.aten import resolve_target
from graphopt.ir.parts import check_split
from graphopt.ir.shapes import infer_program
from graphopt.ir.text import policy_text
from graphopt.ir.weights import Weight


def _is_torch(name: str) -> bool:
    try:
        resolve_target(name)
    except KeyError:
        return False
    return True


def verify_function(function: Function) -> set[str]:
    """Check one function and return the names of the call attributes it mentions.

    Raises:
        VerifyError: Names repeat, a value is read before it is made, an op is unknown or has
            the wrong number of operands, or an output points at another node.
    """
    where = f"function {function.name!r}"
    names: set[str] = set()
    for value in function.values():
        if value.name in names:
            raise VerifyError(f"{where}: two values are called {value.name!r}.")
        names.add(value.name)
    known: set[Value] = set(function.params) | set(function.weights.values())
    for cache in function.caches:
        known.update(cache.pasts)
    mentioned: set[str] = set()
    ops = all_ops()
    for node in function.nodes:
        if not node.outputs:
            raise VerifyError(f"{where}: a {node.op} node has no output.")
        label = f"{where}: {node.outputs[0].name} = {node.op}"
        if not (_is_torch(node.op) if is_aten(node.op) else node.op in ops):
            raise VerifyError(f"{label}: no such op.")
        if not is_aten(node.op):
            try:
                get_op(node.op).check_count(node.inputs)
            except ValueError as error:
                raise VerifyError(f"{label}: {error}.") from error
        for operand in node.inputs:
            if operand is not None and operand not in known:
                raise VerifyError(f"{label}: reads {operand.name!r} before it is made.")
        for index, output in enumerate(node.outputs):
            if output.node is not node or output.index != index:
                raise VerifyError(f"{label}: output {output.name!r} points at another node.")
            known.add(output)
        mentioned |= {v.name for v in node.attrs.values() if isinstance(v, Param)}
    for result in function.outside_values():
        if result not in known:
            raise VerifyError(f"{where}: result {result.name!r} is never made.")
    return mentioned


def _verify_ring(call: Call, cache: Cache, state: KVState, where: str) -> None:
    """Refuse a state that holds another number of tokens than its attention leaves in it."""
    node = cache.present_k.node
    if node is None or node.op != "attention":
        return
    ring = resolve_attrs(node, call).get("ring")
    if ring != state.layout.ring:
        raise VerifyError(
            f"{where}: state {state.name!r} is {state.layout}, and {node.outputs[0].name} keeps "
            f"{'all keys' if ring is None else f'the last {ring}'}."
        )


def _verify_policy(call: Call, cache: Cache, state: KVState, where: str) -> None:
    """Refuse a state whose policy is another than that of its attention."""
    node = cache.present_k.node
    policy = None if node is None else resolve_attrs(node, call).get("policy")
    if policy != state.policy:
        has, wants = (
            "no policy" if one is None else policy_text(one) for one in (state.policy, policy)
        )
        raise VerifyError(f"{where}: state {state.name!r} has {has}, and its attention {wants}.")
    page = state.layout.page
    if policy is not None and page not in (None, policy.budget.page):
        raise VerifyError(
            f"{where}: state {state.name!r} is {state.layout}, and its policy selects pages of "
            f"{policy.budget.page} tokens."
        )
    if policy is not None and state.layout.kind == "ring":
        raise VerifyError(f"{where}: state {state.name!r} is a ring, whose pages move.")


def _verify_names(program: Program) -> None:
    """Refuse a weight whose name is that of a tensor which another one is stored as."""
    names = [tensor.name for tensor in program.weights.tensors()]
    for name, count in Counter(names).items():
        if count > 1:
            raise VerifyError(f"two weights have a tensor that is called {name!r}.")


def _verify_placements(program: Program) -> None:
    """Refuse what does not split as its placement says; a call does not split at all."""
    for what, placed in _placed(program):
        try:
            if isinstance(placed, Weight):
                if placed.placement is not None:
                    check_split(placed, placed.placement)
            elif isinstance(placed, KVState):
                placed.check_placement()
            elif placed.placement is not None:
                placed.placement.check(())
        except ValueError as error:
            raise VerifyError(f"{what}: {error}.") from error


def _placed(program: Program) -> Iterator[tuple[str, Weight | KVState | Call]]:
    for weight in program.weights:
        yield f"weight {weight.name!r}", weight
    for state in program.states.values():
        yield f"state {state.name!r}", state
    for call in program.calls:
        yield f"call of {call.function!r} at {call.path or 'top'}", call


def verify(program: Program) -> None:
    """Check the whole program: functions, calls, weights, states and types.

    Raises:
        VerifyError: With the place and what is wrong there.
    """
    mentioned = {name: verify_function(f) for name, f in program.functions.items()}
    _verify_names(program)
    _verify_placements(program)
    carried = set(program.inputs)
    for call in program.calls:
        where = f"call of {call.function!r} at {call.path or 'top'}"
        if call.function not in program.functions:
            raise VerifyError(f"{where}: no such function.")
        function = program.functions[call.function]
        if len(call.args) != len(function.params):
            raise VerifyError(f"{where}: {len(call.args)} args for {len(function.params)}.")
        if len(call.results) != len(function.results):
            raise VerifyError(f"{where}: {len(call.results)} results, not as the function.")
        missing = [name for name in call.args if name not in carried]
        if missing:
            raise VerifyError(f"{where}: reads {missing[0]!r} before it is made.")
        if set(call.weights) != set(function.weights):
            odd = sorted(set(call.weights) ^ set(function.weights))[0]
            raise VerifyError(f"{where}: weight slot {odd!r} does not match the function.")
        for slot, name in call.weights.items():
            if name not in program.weights:
                raise VerifyError(f"{where}: slot {slot!r} names no weight {name!r}.")
        if set(call.caches) != {cache.slot for cache in function.caches}:
            raise VerifyError(f"{where}: cache slots do not match the function.")
        for name in call.caches.values():
            if name not in program.states:
                raise VerifyError(f"{where}: no state {name!r}.")
        absent = mentioned[call.function] - set(call.attrs)
        if absent:
            raise VerifyError(f"{where}: attribute {sorted(absent)[0]!r} is not set.")
        for cache in function.caches:
            state = program.states[call.caches[cache.slot]]
            _verify_ring(call, cache, state, where)
            _verify_policy(call, cache, state, where)
        carried |= set(call.results)
    for name in program.outputs:
        if name not in carried:
            raise VerifyError(f"program output {name!r} is never made.")
    types, _ = infer_program(program)
    verify_layouts(program, types)
