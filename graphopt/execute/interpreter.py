"""Running a program: call by call, so that one layer's weights are in memory at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphopt.execute.function_run import (
    CacheContents,
    Mode,
    Observer,
    function_values,
    run_function,
)
from graphopt.execute.simulated_ranks import as_one_program
from graphopt.ir.dataflow import angle_weights, mask_is_for_attention_alone
from graphopt.ir.graph import Call, Function, KVState, Program, Value
from graphopt.ir.kv_memory import PagedKV, PolicyKV
from graphopt.ir.picture_inputs import picture_inputs
from graphopt.ir.types import B, P, S
from graphopt.ir.weights import Array, SharedSources
from graphopt.support.devices import free_bytes


def extend_caches(past: CacheContents, present: CacheContents) -> None:
    """Put the keys and values that a call leaves in the place of those that it found."""
    for name, left in present.items():
        k, v = left
        held = past.get(name)
        kv = held.kv if isinstance(held, PolicyKV) else held
        if isinstance(kv, PagedKV):
            kv = kv.extended(k[:, :, kv.length :], v[:, :, kv.length :])
        else:
            kv = (k, v)
        past[name] = PolicyKV(kv, left.state) if isinstance(left, PolicyKV) else kv


@dataclass
class Runner:
    """Runs a program with its real weights.

    Attributes:
        program: What to run; of one that is split over devices, all ranks in lockstep.
        dtype: Floating-point type of weights and activations. What turns positions into angles is
            in 32 bits at least.
        device: Where to run.
        keep_weights: Hold every weight after its first use, instead of reading it again.
        mode: Which implementation of the ops.
        autocast: Type of products, where it is another than that of weights and sums; see
            `training_autocast`.
        sources: Through which weights are read, where other runners read the same.
    """

    program: Program
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    keep_weights: bool = True
    mode: Mode = "torch"
    autocast: torch.dtype | None = None
    sources: SharedSources | None = None
    _kept: dict[str, Tensor] = field(default_factory=dict)
    _angles: set[str] | None = None

    def __post_init__(self) -> None:
        self.program = as_one_program(self.program)

    def weight(self, name: str) -> Tensor:
        """Return one weight's value in the runner's dtype on its device."""
        if name in self._kept:
            return self._kept[name]
        if self._angles is None:
            self._angles = angle_weights(self.program) if self.dtype.itemsize < 4 else set()
        dtype = torch.float32 if name in self._angles else self.dtype
        value = self.program.weights[name].load(None, self.sources)
        if value.is_floating_point() and value.dtype.itemsize > dtype.itemsize:
            value = value.to(dtype)
        value = value.to(self.device)  # in whichever dtype has fewer bytes to bring there
        if value.is_floating_point():
            value = value.to(dtype)
        if self.keep_weights:
            self._kept[name] = value
        return value

    def call_weights(self, call: Call) -> dict[str, Tensor]:
        return {slot: self.weight(name) for slot, name in call.weights.items()}

    @contextlib.contextmanager
    def holding(self, first: int, stop: int) -> Iterator[None]:
        """Hold the weights of some calls meanwhile, also where weights are not kept.

        Args:
            first, stop: Positions of the first call and of the one behind the last.
        """
        calls = self.program.calls[first:stop]
        held = {name for call in calls for name in call.weights.values()}.difference(self._kept)
        self._kept.update({name: self.weight(name) for name in held})
        try:
            yield
        finally:
            for name in () if self.keep_weights else held:
                del self._kept[name]

    def empty_cache(self, batch: int, names: Iterable[str] | None = None) -> CacheContents:
        """Return a cache without tokens for states of the program, by default all."""

        def empty(state: KVState) -> tuple[Tensor, Tensor] | PagedKV | PolicyKV:
            k, v = (
                torch.zeros(batch, state.heads, 0, size, dtype=self.dtype, device=self.device)
                for size in (state.k_dim, state.v_dim)
            )
            page = state.layout.page
            kv = (k, v) if page is None else PagedKV.empty(k, v, page)
            if state.policy is None:
                return kv
            kept = [
                torch.zeros(
                    kind.concrete({B: batch, S: 0, P: 0}),
                    dtype=self.dtype if kind.dtype.is_floating_point else kind.dtype,
                    device=self.device,
                )
                for kind in state.policy_types.values()
            ]
            return PolicyKV(kv, tuple(kept))

        states = self.program.states
        return {name: empty(states[name]) for name in (states if names is None else names)}

    @functools.cached_property
    def _needs_no_mask(self) -> bool:
        return mask_is_for_attention_alone(self.program)

    def window_inputs(self, ids: Tensor, past: int = 0) -> dict[str, Any]:
        """Return the program's inputs for windows of token ids without padding.

        Args:
            ids: int64 [N, P + S]; what stands for pictures among them says where those stand.
            past: How many tokens of each, P, a cache holds.
        """
        values: dict[str, Any] = dict(complete_inputs({"input_ids": ids[:, past:]}, past))
        if self._needs_no_mask:
            # Nothing is padded, and attention without a mask is several times faster.
            values["attention_mask"] = None
        return values | picture_inputs(self.program.vision, ids, past)

    def run_call(
        self,
        call: Call,
        args: Sequence[Tensor | None],
        size: tuple[int, int],
        weights: Mapping[str, Tensor],
        *,
        function: Function | None = None,
        past: CacheContents | None = None,
        tokens_past: int = 0,
        observe: Observer | None = None,
    ) -> tuple[list[Tensor], CacheContents]:
        """Run one call on arguments.

        Args:
            args: In the order of the function's parameters.
            size: B and S of the inputs that the arguments were made of.
            weights: Value of every weight slot.
            function: A variant of the call's function to run in its place.
            past: KV cache contents of the call's states; none by default.
            tokens_past: How many tokens they hold.
            observe: Called with every value inside the function as it is made.

        Returns:
            As for `run_function`.
        """
        function = function or self.program.functions[call.function]
        past = past if past is not None else self.empty_cache(size[0], call.caches.values())
        sizes = {B: size[0], S: size[1], P: tokens_past}
        with self._autocasting():
            return run_function(function, call, args, weights, sizes, past, self.mode, observe)

    def call_values(
        self,
        call: Call,
        args: Sequence[Tensor | None],
        size: tuple[int, int],
        weights: Mapping[str, Tensor],
        wanted: Sequence[Value],
        *,
        function: Function | None = None,
        known: Mapping[Value, Tensor] | None = None,
    ) -> list[Tensor]:
        """Return values inside one call without a past; see `function_values`.

        Args:
            function: A variant of the call's function to run in its place.
        """
        function = function or self.program.functions[call.function]
        past = self.empty_cache(size[0], call.caches.values())
        sizes = {B: size[0], S: size[1], P: 0}
        with self._autocasting():
            return function_values(
                function, call, args, weights, sizes, wanted, known=known, past=past, mode=self.mode
            )

    def _autocasting(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast, cache_enabled=False)

    @functools.cached_property
    def _last_uses(self) -> dict[str, int]:
        """The position of the last call that reads each program value.

        The ids, which say how large a batch is, and the outputs are always needed.
        """
        calls = enumerate(self.program.calls)
        last = {name: position for position, call in calls for name in call.args}
        for name in ("input_ids", *self.program.outputs):
            last.pop(name, None)
        return last

    def run_calls(
        self,
        environments: Sequence[dict[str, Any]],
        first: int,
        stop: int,
        *,
        pasts: Sequence[CacheContents] | None = None,
        observe: Observer | None = None,
    ) -> Iterator[Call]:
        """Run calls one by one, each over every batch; each call's weights are read once.

        Args:
            environments: For every batch the program values by name. What calls make is added,
                and what no later call reads is taken out when the iteration goes on.
            first, stop: Positions of the first call and of the one behind the last.
            pasts: KV cache contents of each batch, extended in place; by default there are none,
                and none are kept.
            observe: Called with every value inside the calls as it is made.

        Yields:
            The call just run.
        """
        past_of: list[CacheContents | None] = [None] * len(environments)
        lengths = [0] * len(environments)
        if pasts is not None:
            past_of = list(pasts)
            lengths = list(map(_past_length, environments, pasts))
        for position, call in enumerate(self.program.calls[first:stop], first):
            weights = self.call_weights(call)
            for environment, past, length in zip(environments, past_of, lengths, strict=True):
                args = [environment[name] for name in call.args]
                size = environment["input_ids"].shape
                results, present = self.run_call(
                    call, args, (size[0], size[1]), weights,
                    past=past, tokens_past=length, observe=observe,
                )  # fmt: skip
                if past is not None:
                    extend_caches(past, present)
                environment.update(zip(call.results, results, strict=True))
                del args, results, present
            del weights  # before the next layer's are read
            yield call
            for environment in environments:
                for name in call.args:
                    if self._last_uses.get(name) == position:
                        environment.pop(name, None)

    def stream(
        self, batches: Sequence[Mapping[str, Tensor]], pasts: Sequence[CacheContents] | None = None
    ) -> Iterator[tuple[Call, list[dict[str, Any]]]]:
        """Run the whole program, call by call, each over every batch.

        Args:
            batches: Program inputs by name, one mapping a batch.
            pasts: KV cache contents of each batch; they are extended in place. Batches that
                share one continue each other, and need their `attention_mask`s.

        Yields:
            The call just run and, for each batch, the live program values by name.
        """
        environments: list[dict[str, Any]] = [dict(batch) for batch in batches]
        for call in self.run_calls(environments, 0, len(self.program.calls), pasts=pasts):
            yield call, environments

    def run(
        self, inputs: Mapping[str, Any], past: CacheContents | None = None
    ) -> tuple[list[Tensor], CacheContents]:
        """Run one batch and return the outputs and the extended cache.

        Args:
            inputs: `input_ids` [B, S], and optionally `attention_mask` [B, T] and
                `position_ids` [B, S]; see `complete_inputs`.
            past: From `empty_cache` or an earlier run.
        """
        contents = dict(past) if past is not None else None
        state = contents or self.empty_cache(inputs["input_ids"].shape[0])
        past_tokens = self._tokens_past(inputs, state)
        given = {} if past_tokens else picture_inputs(self.program.vision, inputs["input_ids"])
        environment: dict[str, Any] = dict(complete_inputs({**given, **inputs}, past_tokens))
        with torch.no_grad():
            for _ in self.run_calls([environment], 0, len(self.program.calls), pasts=[state]):
                pass
        return [environment[name] for name in self.program.outputs], state

    def _tokens_past(self, inputs: Mapping[str, Any], state: CacheContents) -> int:
        """Return how many tokens came before, by the mask or by a state that holds them all.

        Raises:
            ValueError: A ring that may be full is all there is.
        """
        mask = inputs.get("attention_mask")
        if state and mask is not None:
            return int(mask.shape[1] - inputs["input_ids"].shape[1])
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
