"""Running a program: call by call, so that one layer's weights are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import sympy
import torch
from torch import Tensor

from graphopt.execute.paged_kv import PagedKV
from graphopt.ir.dataflow import angle_weights
from graphopt.ir.graph import Call, Function, KVState, Program, Value, resolve_attrs
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.ops.aten import concretize
from graphopt.ir.types import B, P, S
from graphopt.ir.weights import Array
from graphopt.support.devices import free_bytes

Mode = Literal["torch", "reference"]
CacheContents = dict[str, tuple[Tensor, Tensor] | PagedKV]
"""State name -> (keys [B, G, P, D], values [B, G, P, Dv]), of a ring its last tokens."""


def run_function(
    function: Function,
    call: Call,
    args: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    sizes: Mapping[sympy.Symbol, int],
    past: CacheContents | None = None,
    mode: Mode = "torch",
    watch: Callable[[Value, Tensor], None] | None = None,
) -> tuple[list[Tensor], CacheContents]:
    """Run one call.

    Args:
        args: Carried arguments in the function's order.
        weights: Value of every weight slot.
        sizes: B, S and P.
        past: KV cache contents of the call's states.
        watch: Called with every node output as it is made.

    Returns:
        The results in the function's order, and the new cache contents.
    """
    values: dict[Value, Tensor] = dict(zip(function.params, args, strict=True))
    values.update({value: weights[slot] for slot, value in function.weights.items()})
    for cache in function.caches:
        assert past is not None
        values[cache.past_k], values[cache.past_v] = past[call.caches[cache.slot]]
    outside = function.outside_values()
    last_use: dict[Value, int] = {}
    for index, node in enumerate(function.nodes):
        for value in node.inputs:
            if value is not None:
                last_use[value] = index
    for index, node in enumerate(function.nodes):
        op, attrs = get_op(node.op), resolve_attrs(node, call)
        if is_aten(node.op):
            attrs = {**concretize(attrs, sizes), "target": node.op}
        operands = [None if v is None else values[v] for v in node.inputs]
        outputs = op.torch(operands, attrs) if mode == "torch" else op.reference(operands, attrs)
        for value, tensor in zip(node.outputs, outputs, strict=False):
            values[value] = tensor
            if watch is not None:
                watch(value, tensor)
        for value in node.inputs:
            if value is not None and last_use[value] == index and value not in outside:
                values.pop(value, None)
    present: CacheContents = {
        call.caches[c.slot]: (values[c.present_k], values[c.present_v]) for c in function.caches
    }
    return [values[value] for value in function.results], present


def extend_caches(past: CacheContents, present: CacheContents) -> None:
    """Put the keys and values that a call leaves in the place of those that it found."""
    for name, (k, v) in present.items():
        held = past.get(name)
        past[name] = held.extended(k, v) if isinstance(held, PagedKV) else (k, v)


@dataclass
class Runner:
    """Runs a program with its real weights.

    Attributes:
        program: What to run.
        dtype: Floating-point type of weights and activations. What turns positions into angles is
            in 32 bits at least.
        device: Where to run.
        keep_weights: Hold every weight after its first use, instead of reading it again.
        mode: Which implementation of the ops.
    """

    program: Program
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    keep_weights: bool = True
    mode: Mode = "torch"
    _kept: dict[str, Tensor] = field(default_factory=dict)
    _angles: set[str] | None = None

    def weight(self, name: str) -> Tensor:
        """Return one weight's value in the runner's dtype on its device."""
        if name in self._kept:
            return self._kept[name]
        if self._angles is None:
            self._angles = angle_weights(self.program) if self.dtype.itemsize < 4 else set()
        dtype = torch.float32 if name in self._angles else self.dtype
        value = self.program.weights[name].load(dtype).to(self.device)
        if self.keep_weights:
            self._kept[name] = value
        return value

    def call_weights(self, call: Call) -> dict[str, Tensor]:
        return {slot: self.weight(name) for slot, name in call.weights.items()}

    def empty_cache(self, batch: int) -> CacheContents:
        """Return a cache without tokens for every state of the program."""

        def empty(state: KVState) -> tuple[Tensor, Tensor] | PagedKV:
            if state.layout.kind == "paged":
                return PagedKV.empty(state, batch, self.dtype, self.device)
            k, v = (
                torch.zeros(batch, state.heads, 0, size, dtype=self.dtype, device=self.device)
                for size in (state.k_dim, state.v_dim)
            )
            return k, v

        return {name: empty(state) for name, state in self.program.states.items()}

    def stream(
        self, batches: Sequence[Mapping[str, Tensor]], pasts: Sequence[CacheContents] | None = None
    ) -> Iterator[tuple[Call, list[dict[str, Tensor]]]]:
        """Walk the calls once, each over every batch; each layer's weights are read once.

        Args:
            batches: Program inputs by name, one mapping a batch.
            pasts: KV cache contents of each batch; they are extended in place. Batches that
                share one continue each other, and need their `attention_mask`s.

        Yields:
            The call just run and, for each batch, the live program values by name.
        """
        program = self.program
        environments = [dict(batch) for batch in batches]
        if pasts is None:
            pasts = [self.empty_cache(b["input_ids"].shape[0]) for b in batches]
        last_use = {name: len(program.calls) for name in program.outputs}
        for index, call in enumerate(program.calls):
            for name in call.args:
                last_use.setdefault(name, index)
                last_use[name] = max(last_use[name], index)
        lengths = [_past_length(batch, past) for batch, past in zip(batches, pasts, strict=True)]
        for index, call in enumerate(program.calls):
            function, weights = program.functions[call.function], self.call_weights(call)
            for environment, past, tokens_past in zip(environments, pasts, lengths, strict=True):
                ids = environment["input_ids"]
                sizes = {B: ids.shape[0], S: ids.shape[1], P: tokens_past}
                args = [environment[name] for name in call.args]
                results, present = run_function(
                    function, call, args, weights, sizes, past, self.mode
                )
                extend_caches(past, present)
                environment.update(zip(call.results, results, strict=True))
            del weights  # before the next layer's are read
            yield call, environments
            for environment in environments:
                for name in set(environment) - {"input_ids"}:
                    if last_use.get(name, -1) <= index:
                        del environment[name]

    def run(
        self, inputs: Mapping[str, Tensor], past: CacheContents | None = None
    ) -> tuple[list[Tensor], CacheContents]:
        """Run one batch and return the outputs and the extended cache.

        Args:
            inputs: `input_ids` [B, S], and optionally `attention_mask` [B, T] and
                `position_ids` [B, S]; see `complete_inputs`.
            past: From `empty_cache` or an earlier run.
        """
        contents = dict(past) if past is not None else None
        state = contents or self.empty_cache(inputs["input_ids"].shape[0])
        batch = complete_inputs(inputs, self._tokens_past(inputs, state))
        outputs: list[Tensor] = []
        with torch.no_grad():
            for _, environments in self.stream([batch], [state]):
                environment = environments[0]
                if all(name in environment for name in self.program.outputs):
                    outputs = [environment[name] for name in self.program.outputs]
        return outputs, state

    def _tokens_past(self, inputs: Mapping[str, Tensor], state: CacheContents) -> int:
        """Return how many tokens came before, by the mask or by a state that holds them all.

        Raises:
            ValueError: A ring that may be full is all there is.
        """
        if state and "attention_mask" in inputs:
            return int(inputs["attention_mask"].shape[1] - inputs["input_ids"].shape[1])
        lengths = {name: k.shape[2] for name, (k, _) in state.items()}
        rings = {name: s.layout.ring for name, s in self.program.states.items()}
        whole = [length for name, length in lengths.items() if rings[name] is None]
        if not whole and any(length == rings[name] for name, length in lengths.items()):
            raise ValueError("full rings don't say how many tokens came before: give the mask")
        return max(whole or lengths.values(), default=0)

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits [B, S, vocab] of a batch without past."""
        return self.run(inputs)[0][0]


def _past_length(batch: Mapping[str, Tensor], past: CacheContents) -> int:
    """Return how many cached tokens precede a batch when its step starts."""
    mask = batch.get("attention_mask")
    if past and mask is not None:
        return int(mask.shape[1] - batch["input_ids"].shape[1])
    return next((k.shape[2] for k, _ in past.values()), 0)


def complete_inputs(inputs: Mapping[str, Tensor], past: int = 0) -> dict[str, Tensor]:
    """Return `inputs` with `attention_mask` all ones and `position_ids` derived from the mask.

    Positions count the real tokens before each token; padding gets position 0.
    """
    result = dict(inputs)
    ids = result["input_ids"]
    if "attention_mask" not in result:
        result["attention_mask"] = torch.ones(
            ids.shape[0], past + ids.shape[1], dtype=torch.long, device=ids.device
        )
    if "position_ids" not in result:
        mask = result["attention_mask"].long()
        result["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return result


def resident(program: Program, dtype: torch.dtype, device: torch.device) -> Program:
    """Return the program with its weights in the memory of a device, if they fit in half of it.

    What runs a program many times would otherwise read and convert every weight each time. A
    program that does not fit is returned as it is, and streams its weights.
    """
    used = program.used_weights()
    size = sum(w.numel * (dtype if w.dtype.is_floating_point else w.dtype).itemsize for w in used)
    if size > free_bytes(device) // 2:
        return program
    result = program.copy()
    angles = angle_weights(program) if dtype.itemsize < 4 else set()
    for weight in used:
        value = weight.load(torch.float32 if weight.name in angles else dtype).to(device)
        result.weights.replace(weight.with_producer(Array(value)))
    return result
