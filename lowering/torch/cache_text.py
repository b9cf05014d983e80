"""The text of what the class `Model` has for its caches: how they lie, and empty ones."""

from __future__ import annotations

from dataclasses import astuple

from graphopt.ir.graph import Cache, Function, Program, Value, resolve_attrs
from graphopt.ir.kv_policies import policy_to_dict
from graphopt.ir.ops.attention import PAST_K
from graphopt.lowering.torch.text import literal, quoted, series, wrap


class CacheText:
    """Statements about the caches of a program.

    Args:
        program: What runs.
        with_kernels: It runs by kernels of a target, with caches of every layout.

    Attributes:
        has_policies: Whether any of them has a policy.
    """

    def __init__(self, program: Program, *, with_kernels: bool) -> None:
        self.program, self.with_kernels = program, with_kernels
        self.has_policies = any(state.policy for state in program.states.values())

    def empty_cache(self) -> list[str]:
        """Return the method `empty_cache`."""
        lines = ["    def empty_cache(self, batch: int = 1) -> list[KV]:"]
        states = [state.of_rank() for state in self.program.states.values()]
        if not states:
            return [
                *lines,
                '        """Return an empty list: this model has no cache."""',
                "        return []",
            ]
        sizes = [(state.heads, state.k_dim, state.v_dim) for state in states]
        shapes = series([f"({', '.join(map(literal, row))})" for row in sizes])
        paged = any(state.layout.kind == "paged" for state in states)
        made: str | None = None
        if self.with_kernels and (paged or self.has_policies):
            more = ", self.kv_policies" if self.has_policies else ""
            made = f"kernels.growing_caches(empty, self.kv_layouts{more})"
        elif self.has_policies:
            made = "policies.empty_caches(empty, self.kv_policies)"
        return [
            *lines,
            '        """Return the cache before the first token: keys and values of each layer."""',
            "        like = next(p for p in self.parameters() if p.is_floating_point())",
            f"        {'return' if made is None else 'empty ='} [",
            "            (like.new_zeros(batch, heads, 0, k), like.new_zeros(batch, heads, 0, v))",
            *wrap(f"for heads, k, v in {shapes}", 12),
            "        ]",
            *([] if made is None else [f"        return {made}"]),
        ]

    def layouts(self) -> list[str]:
        """Return the statements that say how the caches of all layers lie, and their policies."""
        if not self.with_kernels:
            return [*self._policies(), ""] if self.has_policies else []
        if not self.program.states:
            return []
        layouts = [state.layout for state in self.program.states.values()]
        rows = series([f"({quoted(layout.kind)}, {layout.size})" for layout in layouts])
        hosts = self._hosts() if any(state.host for state in self.program.states.values()) else []
        about = "    # Of each layer's keys and values; slots of a ring, or tokens of a page."
        held = "    # Bits of their codes in a cache of fixed room; 16 where they are not rounded."
        bits = series([str(kv_bits(self.program, name)) for name in self.program.states])
        return [
            about, *wrap(f"kv_layouts = {rows}", 4), held, *wrap(f"kv_bits = {bits}", 4), *hosts,
            *(self._policies() if self.has_policies else []), "",
        ]  # fmt: skip

    def past_tokens(self) -> list[str]:
        """Return the statements that set P, which a ring does not tell once it is full."""
        rings = [state.layout.ring is not None for state in self.program.states.values()]
        number = 0 if all(rings) else rings.index(False)
        item = f"cache[{number}]"
        if self.with_kernels:
            held = f"kernels.tokens_held({item})"
        elif list(self.program.states.values())[number].policy is not None:
            held = f"{item}.kv[0].shape[2]"
        else:
            held = f"{item}[0].shape[2]"
        if not all(rings):
            return [f"P = {held}"]
        return [
            f"if attention_mask is None and {held}:",
            '    raise ValueError("rings don\'t tell how many tokens came before: give the mask")',
            "P = 0 if attention_mask is None else attention_mask.shape[1] - S",
        ]

    def _hosts(self) -> list[str]:
        """Return the statement that says which layers' keys lie in the host's memory, and how."""
        rows = [
            "None" if state.host is None else str(astuple(state.host))
            for state in self.program.states.values()
        ]
        about = [
            "    # Keys in host memory: tokens and texts that they were placed for, and the tokens",
            "    # that stay on the device, tokens that a step copies to it.",
        ]
        return [*about, *wrap(f"kv_hosts = {series(rows)}", 4)]

    def _policies(self) -> list[str]:
        """Return the statement that says which policy each layer's cache has."""
        rows: list[str] = []
        for state in self.program.states.values():
            fields = {} if state.policy is None else policy_to_dict(state.policy)
            texts = [f"{quoted(name)}: {literal(value)}" for name, value in fields.items()]
            rows.append(f"{{{', '.join(texts)}}}" if texts else "None")
        about = "    # What selects the pages that a step of one token reads; None reads all."
        return [about, *wrap(f"kv_policies = {series(rows)}", 4)]


def kv_bits(program: Program, state: str) -> int:
    """Return to how many bits the attention rounds what a state holds; 16 for not at all."""
    return max(
        (
            resolve_attrs(node, call).get("kv_bits", 16)
            for call in program.calls
            for slot, name in call.caches.items()
            if name == state
            for node in program.functions[call.function].nodes
            if node.op == "attention"
            and node.operand(PAST_K) is _past_k(program.functions[call.function], slot)
        ),
        default=16,
    )


def _past_k(function: Function, slot: str) -> Value | None:
    return next((cache.past_k for cache in function.caches if cache.slot == slot), None)


def reads_present(function: Function, cache: Cache) -> bool:
    """Return whether anything but a cache takes the keys or values that an attention leaves."""
    uses = function.uses()
    present = (cache.present_k, cache.present_v)
    return any(uses[value] or value in function.results for value in present)
