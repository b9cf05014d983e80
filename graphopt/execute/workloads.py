"""Steps of a program whose memory is looked at: prefill, decode, training, calibration.

Weights are made up, since how much memory they take does not depend on what they are: none is
read, and on a device without memory none is held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.errors import UsageError, unknown_name
from graphopt.execute.block_runner import training_autocast
from graphopt.execute.function_run import CacheContents
from graphopt.execute.hidden_states import HiddenStateStream
from graphopt.execute.interpreter import Runner
from graphopt.execute.simulated_ranks import rank_alone
from graphopt.ir.dataflow import angle_weights
from graphopt.ir.graph import Program, Value
from graphopt.ir.kv_memory import PagedKV, PolicyKV
from graphopt.ir.ranks import group_of
from graphopt.memory.recording import Tags
from graphopt.memory.workload import Workload
from graphopt.support.ranks import ALONE

Phase = Literal["prefill", "decode", "train", "calibrate"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class ZeroRunner(Runner):
    """Runs a program with weights that are all zero, on whatever device torch has or stands in."""

    def weight(self, name: str) -> Tensor:
        """Return a weight of zeros in the dtype and on the device that the true one would have."""
        if name in self._kept:
            return self._kept[name]
        if self._angles is None:
            self._angles = angle_weights(self.program) if self.dtype.itemsize < 4 else set()
        weight = self.program.weights[name]
        dtype = torch.float32 if name in self._angles else self.dtype
        kind = dtype if weight.dtype.is_floating_point else weight.dtype
        value: Tensor = torch.zeros(weight.shape, dtype=kind, device=self.device)
        if kind.is_floating_point:
            value = nn.Parameter(value, requires_grad=False)  # what a recorder knows as a weight
        if self.keep_weights:
            self._kept[name] = value
        return value

    @contextlib.contextmanager
    def _autocasting(self) -> Iterator[None]:
        """Compute products in another dtype, also where torch has no CUDA to ask for it."""
        if self.autocast is None:
            yield
            return
        kind = self.device.type
        before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        torch.set_autocast_enabled(kind, True)
        torch.set_autocast_dtype(kind, self.autocast)
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_enabled(kind, before[0])
            torch.set_autocast_dtype(kind, before[1])
            torch.set_autocast_cache_enabled(cached)


def program_workload(
    program: Program,
    phase: str,
    device: torch.device,
    *,
    batch: int = 1,
    seq: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> Workload:
    """Return a step of a program; of one that is split over devices, a step of one rank.

    * `prefill` runs prompts of `seq` tokens and fills the cache, where the program has one.
    * `decode` runs one token of each text behind `seq` tokens in the cache, which grows.
    * `train` is a step of training all weights: next-token cross-entropy, its gradients, fused
      AdamW; weights, gradients and states are in `dtype`.
    * `calibrate` walks windows of `seq` tokens over the blocks, all at once, weights streamed in
      fp32 and products as in training passes, and sums second moments of what each linear reads.

    Args:
        phase: One of `PHASES`.
        device: Where to compute.
        batch: Texts at once.
        seq: Tokens of each.
        dtype: Of weights, activations and cache; calibration has its own.

    Raises:
        UsageError: There is no such phase, a size is not positive, or a decode step is asked for of
            a program without KV states.
    """
    if phase not in PHASES:
        raise unknown_name("phase", phase, PHASES)
    for what, size in (("batch", batch), ("seq", seq)):
        if size < 1:
            raise UsageError(f"{what} is {size}.", "Give at least 1.")
    name = f"{phase} of {program.name}, batch {batch}, {seq} tokens"
    ranks = len(group_of(program))
    if ranks:
        name, program = f"{name}, one of {ranks} ranks", rank_alone(program)
    ids = torch.zeros(batch, seq, dtype=torch.long, device=device)
    if phase == "calibrate":
        return _calibration(program, ids, name)
    runner = ZeroRunner(program, dtype=dtype, device=device)
    for weight in program.used_weights():
        runner.weight(weight.name)
    if phase == "train":
        return _training(runner, ids, name)
    return _prefill(runner, ids, name) if phase == "prefill" else _decode(runner, ids, name)


def _weights(runner: Runner) -> dict[str, Tensor]:
    return {weight.name: runner.weight(weight.name) for weight in runner.program.used_weights()}


def _kv(state: CacheContents) -> dict[str, Tensor]:
    """Return the tensors of a cache by name."""
    found: dict[str, Tensor] = {}
    for name, held in state.items():
        kv = held.kv if isinstance(held, PolicyKV) else held
        tensors = [kv.k, kv.v, kv.block_table] if isinstance(kv, PagedKV) else list(kv)
        tensors += held.state if isinstance(held, PolicyKV) else ()
        found.update({f"{name}.{number}": tensor for number, tensor in enumerate(tensors)})
    return found


def _prefill(runner: Runner, ids: Tensor, name: str) -> Workload:
    cache: dict[str, Tensor] = {}

    def step() -> Any:
        cache.clear()
        outputs, state = runner.run({"input_ids": ids})
        cache.update(_kv(state))
        return outputs

    def tags() -> Tags:
        return {"weight": _weights(runner), "input": {"input_ids": ids}, "kv": cache}

    return Workload(name, step, runner.device, tags)


def _decode(runner: Runner, ids: Tensor, name: str) -> Workload:
    program = runner.program
    if not program.states:
        raise UsageError(
            f"{program.name} has no KV cache, and so no decode step.",
            "Put insert-kv-cache among its passes.",
        )
    batch, past = ids.shape
    held = {"state": _filled(runner, batch, past)}
    token = ids[:, :1].clone()
    length = past

    def step() -> Any:
        nonlocal length
        length += 1
        mask = torch.ones(batch, length, dtype=torch.long, device=runner.device)
        outputs, held["state"] = runner.run(
            {"input_ids": token, "attention_mask": mask}, held["state"]
        )
        return outputs

    def tags() -> Tags:
        return {"weight": _weights(runner), "input": {"input_ids": token}, "kv": _kv(held["state"])}

    return Workload(name, step, runner.device, tags)


def _filled(runner: Runner, batch: int, past: int) -> CacheContents:
    """Return a cache that holds `past` tokens of each text, or of a ring as many as it has."""
    states = runner.program.states
    if any(state.layout.page is not None or state.policy for state in states.values()):
        ids = torch.zeros(batch, past, dtype=torch.long, device=runner.device)
        return runner.run({"input_ids": ids})[1]
    return {
        name: (
            torch.zeros(batch, s.heads, min(past, s.layout.ring or past), s.k_dim,
                        dtype=runner.dtype, device=runner.device),
            torch.zeros(batch, s.heads, min(past, s.layout.ring or past), s.v_dim,
                        dtype=runner.dtype, device=runner.device),
        )
        for name, s in states.items()
    }  # fmt: skip


def _training(runner: ZeroRunner, ids: Tensor, name: str) -> Workload:
    program = runner.program
    trained = {
        weight.name: nn.Parameter(runner.weight(weight.name))
        for weight in program.used_weights()
        if weight.dtype.is_floating_point and not weight.constant
    }
    runner._kept.update(trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, fused=True)

    def step() -> Any:
        values = runner.window_inputs(ids)
        for _ in runner.run_calls([values], 0, len(program.calls)):
            pass
        logits = values[program.outputs[0]]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        values.clear()
        del logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def tags() -> Tags:
        states = {
            f"{name}.{key}": value
            for name, parameter in trained.items()
            for key, value in optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }
        return {"weight": _weights(runner), "input": {"input_ids": ids}, "optimizer": states}

    return Workload(name, step, runner.device, tags, warm_up=1)


def _calibration(program: Program, ids: Tensor, name: str) -> Workload:
    device = ids.device
    runner = ZeroRunner(
        program, device=device, keep_weights=False, autocast=training_autocast(device)
    )

    def step() -> None:
        stream = HiddenStateStream(runner, ids, tokens_at_once=ids.numel(), ranks=ALONE)
        for block in stream:
            sums: dict[Value, Tensor] = {}
            read = {node.inputs[0] for node in block.function.nodes if node.op == "linear"}
            made = [value for value in read if value is not None and value.node is not None]
            block.advance(observers={value: _summing(sums, value) for value in made})

    return Workload(name, step, device, lambda: {"input": {"input_ids": ids}})


def _summing(sums: dict[Value, Tensor], value: Value) -> Any:
    """Return what adds a batch's second moments of a value to a sum, fp32 [N, N]."""

    def add(batch: int, x: Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.float().flatten(0, -2)
            gram = rows.t() @ rows
        sums[value] = gram if value not in sums else sums[value] + gram

    return add
