"""Keys in the memory of a device's host: what may lie there, and programs that have some."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.ir.attach_policy import added_to_scores, limit_of_keys, reason_not_its_own
from graphopt.ir.graph import Cache, Call, Program, resolve_attrs
from graphopt.ir.kv_host import HostShare
from graphopt.ir.ops.attention import KEY, VALUE
from graphopt.ir.placement import Placement
from graphopt.ir.verify import verify

ON_HOST = Placement(("cpu",))


def reason_to_stay(program: Program, call: Call, cache: Cache) -> str | None:
    """Return why the keys of an attention stay on the device, as a clause; or None.

    On the host a step attends to parts of the keys, and the parts are merged.
    """
    reason = reason_not_its_own(program, call, cache)
    node, state = cache.present_k.node, program.states[call.caches[cache.slot]]
    if reason is not None or node is None:
        return reason
    attrs = resolve_attrs(node, call)
    limited, added = limit_of_keys(attrs), added_to_scores(node)
    if limited is not None:
        return f"{limited}: a step reads so few keys that they are best on the device"
    if added is not None:
        return f"{added}, by the numbers of keys that parts do not know"
    if state.layout.kind != "contiguous":
        return f"its state is {state.layout}, and parts have the order of tokens"
    if state.placement not in (None, ON_HOST):
        return f"its state is {state.placement}"
    return None


def rounded_bits(call: Call, cache: Cache) -> int:
    """Return to how many bits keys and values are rounded, so that codes are kept; else 16."""
    node = cache.present_k.node
    bits: set[int] = set()
    for index in (KEY, VALUE):
        value = None if node is None else node.operand(index)
        maker = None if value is None else value.node
        if maker is None or maker.op != "quantise_dequantise" or len(maker.inputs) > 1:
            return 16
        attrs = resolve_attrs(maker, call)
        if attrs.get("symmetric") is not False:
            return 16
        bits.add(int(attrs["bits"]))
    return bits.pop() if bits in ({4}, {8}) else 16


def with_hosts(program: Program, shares: Mapping[str, HostShare]) -> Program:
    """Return a copy of a program of which some states lie on the host, and no others.

    Args:
        shares: By the names of states.

    Raises:
        VerifyError: A state is a ring or has pages or a policy.
    """
    result = program.copy()
    for state in result.states.values():
        if state.host is not None:
            state.host = state.placement = None
        if state.name in shares:
            state.host, state.placement = shares[state.name], ON_HOST
    verify(result)
    return result
