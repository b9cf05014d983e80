"""Types of every value, derived for one call or for a whole program."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.errors import VerifyError
from graphopt.ir.graph import Call, Function, Program, Value, resolve_attrs
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.types import Type


def infer_function(
    function: Function, call: Call, args: Sequence[Type], program: Program
) -> dict[Value, Type]:
    """Return the type of every value of `function` as `call` uses it.

    Args:
        args: Types of the carried arguments.

    Raises:
        VerifyError: An op refuses its operands.
    """
    types: dict[Value, Type] = dict(zip(function.params, args, strict=True))
    for slot, value in function.weights.items():
        weight = program.weights[call.weights[slot]]
        types[value] = weight.local_type
    for cache in function.caches:
        state = program.states[call.caches[cache.slot]]
        types[cache.past_k], types[cache.past_v] = state.types
        kept = list(state.policy_types.values())
        if len(kept) != len(cache.past_state):
            raise VerifyError(
                f"{call.path or function.name}: state {state.name!r} keeps {len(kept)} tensors for "
                f"its policy, and {len(cache.past_state)} are read."
            )
        types.update(zip(cache.past_state, kept, strict=True))
    for node in function.nodes:
        operands = [None if v is None else types[v] for v in node.inputs]
        try:
            op, attrs = get_op(node.op), resolve_attrs(node, call)
            op.check({**attrs, "target": node.op} if is_aten(node.op) else attrs, operands)
            op.check_encodings(operands)
            outputs = op.infer(operands, attrs)
            if len(outputs) != len(node.outputs):
                raise ValueError(f"{len(node.outputs)} outputs where there are {len(outputs)}")
        except (ValueError, KeyError, TypeError) as error:
            where = f"{call.path or function.name}: {node.outputs[0].name} = {node.op}"
            absent = f"attribute {error} is not set" if isinstance(error, KeyError) else ""
            raise VerifyError(f"{where}: {absent or error}.") from error
        types.update(zip(node.outputs, outputs, strict=True))
    return types


def infer_program(program: Program) -> tuple[list[dict[Value, Type]], dict[str, Type]]:
    """Return the types of every call's values, in call order, and of every program value."""
    carried: dict[str, Type] = dict(program.inputs)
    per_call: list[dict[Value, Type]] = []
    seen: dict[object, dict[Value, Type]] = {}
    for call in program.calls:
        function = program.functions[call.function]
        args = [carried[name] for name in call.args]
        # Equal signatures have equal types: 80 layers are inferred once.
        key = (
            call.function,
            tuple(args),
            tuple(
                (slot, program.weights[name].local_type)
                for slot, name in sorted(call.weights.items())
            ),
            repr(sorted(call.attrs.items())),
            tuple(
                (slot, state.types, tuple(state.policy_types.items()))
                for slot, state in (
                    (slot, program.states[name]) for slot, name in sorted(call.caches.items())
                )
            ),
        )
        if key not in seen:
            seen[key] = infer_function(function, call, args, program)
        types = seen[key]
        per_call.append(types)
        for name, value in zip(call.results, function.results, strict=True):
            carried[name] = types[value]
    return per_call, carried
