"""Keys and values in the host's memory, where a GPU has not room for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import sympy
import torch
from pydantic import Field

from graphopt.errors import PassError, UsageError
from graphopt.ir.context import context_length, position_table
from graphopt.ir.graph import Program
from graphopt.ir.host_placement import reason_to_stay, rounded_bits, with_hosts
from graphopt.ir.kv_host import prefill_chunk
from graphopt.ir.kv_memory import row_bytes
from graphopt.ir.types import B
from graphopt.pass_manager.contract import Context, Pass, PassResult, Skip, register_pass
from graphopt.passes.place_kv.record import LayerPlace, PlacedKV
from graphopt.passes.place_kv.room import RESERVE, computing, has_codes
from graphopt.plan.host_kv import (
    HostedLayer,
    KVPlan,
    Machine,
    buffer_bytes,
    fastest,
    published,
    streamed,
)
from graphopt.plan.kv_policy import decode_figures
from graphopt.plan.measure_host import read_measured_host
from graphopt.report.record import Record
from graphopt.support.devices import found_gpu
from graphopt.support.quantities import format_bytes, parse_bytes
from graphopt.targets import HostFigures, Target, get_target, newest_gpu

CONTEXT = 32768
"""Tokens of a text where neither an option nor the model says how many."""


@register_pass
@dataclass
class PlaceKV(Pass):
    """Put keys and values of some layers into the host's memory, where the GPU lacks room for them.

    A step of one token attends to keys on the host in the way that is fastest by the figures of the
    host: its processors attend to them while the GPU works, or they are copied to the GPU in pieces
    while it computes, or both at once, each some of them. The results are merged by their
    log-sum-exp, so that the attention is the same as before. A prompt is read in parts, whose keys
    are written out while the next layers compute.

    Legality:

    1. The attention has a state of its own, which it reads and extends, and is causal.
    2. It has no window and no chunk: a step reads so few keys of those that they stay.
    3. No bias and no slopes (ALiBi) are added to its scores. A cap and sinks are known.
    4. Its state is contiguous, has no policy, and is placed nowhere else.
    5. Weights, what a part of a prompt computes, keys that stay and two pieces on their way fit the
       GPU; the rest of the keys fits the host.

    Options:
        gpu: Bytes of the GPU, such as 24GB; none for those of the GPU here.
        host: Bytes of the host's memory that keys may take, such as 128GB; none for any.
        context: Tokens of a text and its answer; none for what the model has positions for, and
            32,768 where nothing says it.
        batch: How many texts at once.
        method: `fastest` by the host's figures, layer by layer; or `published`, whole layers on
            either side as FastAttention has them.
        target: The GPU whose figures the plan is made by; none for the newest that is known.
        figures: File of `graphopt measure-host`, in place of the figures of the target's host.
    """

    gpu: str | None = None
    host: str | None = None
    context: Annotated[int, Field(ge=2, le=2**40)] | None = None
    batch: Annotated[int, Field(ge=1, le=2**20)] = 1
    method: Literal["fastest", "published"] = "fastest"
    target: str | None = None
    figures: str | None = None

    name: ClassVar[str] = "place-kv"
    requires: ClassVar[tuple[str, ...]] = ("kv-cache",)
    record: ClassVar[type[Record]] = PlacedKV

    def check_options(self) -> None:
        """Refuse sizes that are none, and machines without figures.

        Raises:
            UsageError: A size is none, the target is unknown or no GPU, it has no figures and none
                are given, or the file of figures is none.
        """
        for name, size in (("gpu", self.gpu), ("host", self.host)):
            if size is not None:
                parse_bytes(name, size)
        machine = self._machine()
        if machine.kind == "cpu":
            raise UsageError(
                f"{machine.name} is no GPU: all its keys lie in the host's memory.",
                "Give the target= of a GPU, or leave place-kv out.",
            )
        if machine.decode is None:
            raise UsageError(
                f"{machine.name}.toml has no [decode], by which it is planned where keys lie.",
                "Leave target= out for the newest GPU that has it, or add the table.",
            )
        self._host_figures(machine)

    def _machine(self) -> Target:
        return newest_gpu() if self.target is None else get_target(self.target)

    def _host_figures(self, machine: Target) -> HostFigures:
        if self.figures is not None:
            return read_measured_host(Path(self.figures)).figures()
        if machine.host is None:
            raise UsageError(
                f"{machine.name}.toml has no [host] with all figures, by which keys there are "
                "planned.",
                "Measure the host there by `graphopt measure-host -o host.json`, and give "
                "figures=host.json.",
            )
        return machine.host

    def check(self, program: Program) -> None:
        """Refuse a model none of whose keys can lie on the host.

        Raises:
            PassError: With the reasons.
        """
        chosen, skipped = self._places(program)
        if not chosen:
            why = "; ".join(dict.fromkeys(skip.reason for skip in skipped)) or "it has none"
            raise PassError(
                f"No layer of {program.name} can have keys on the host: {why}.",
                "Leave place-kv out, or give a model with attention over all its tokens.",
            )

    def run(self, program: Program, context: Context) -> PassResult:
        chosen, skipped = self._places(program)
        record, plan = self._plan(program, chosen)
        shares = {
            layer.layer.name: share
            for layer in plan.layers
            if (share := layer.share(plan.context, plan.batch)) is not None
        }
        placed_before = any(state.host for state in program.states.values())
        result = PassResult(program, len(chosen) + len(skipped), len(shares), skipped, record)
        if shares or placed_before:
            result.program = with_hosts(program, shares)
            result.changed = len(shares) or 1
        return result

    def _places(self, program: Program) -> tuple[list[HostedLayer], list[Skip]]:
        """Return the layers whose keys may lie on the host, and those that stay with the reason."""
        chosen: list[HostedLayer] = []
        skipped: list[Skip] = []
        for call in program.calls:
            for cache in program.functions[call.function].caches:
                reason = reason_to_stay(program, call, cache)
                if reason is not None:
                    skipped.append(Skip(call.path or call.function, reason))
                    continue
                state = program.states[call.caches[cache.slot]]
                sizes = (state.k_dim, state.v_dim)
                bits = rounded_bits(call, cache) if all(map(has_codes, sizes)) else 16
                k, v = (
                    2 * dim if bits == 16 else row_bytes(dim, bits)
                    for dim in (state.k_dim, state.v_dim)
                )
                chosen.append(HostedLayer(state.name, state.heads * (k + v), bits != 4))
        return chosen, skipped

    def _plan(self, program: Program, layers: list[HostedLayer]) -> tuple[PlacedKV, KVPlan]:
        """Return what lies where.

        Raises:
            PassError: The GPU or the host has too little memory, with how much is needed.
        """
        machine, tokens = self._machine(), self._context(program)
        figures, gpu = self._host_figures(machine), self._gpu_bytes()
        chunk = min(prefill_chunk(self.batch), tokens)
        weights, activations = computing(program, self.batch, chunk)
        hosted = {layer.name for layer in layers}
        other = sum(
            int(sympy.sympify(state.nbytes(tokens, 2)).subs(B, self.batch))
            for state in program.states.values()
            if state.name not in hosted
        )
        buffers = buffer_bytes(layers, tokens, self.batch)
        room = gpu - RESERVE - weights - activations - other - buffers
        if room < 0:
            raise PassError(
                f"gpu={self.gpu or format_bytes(gpu)} is too little for {program.name}: "
                f"{gpu - room:,} bytes ({format_bytes(gpu - room)}) are needed before other keys "
                f"have any room: {format_bytes(weights)} for weights, "
                f"{format_bytes(activations)} to compute, {format_bytes(other + buffers)} for keys "
                f"that stay and pieces on their way, {format_bytes(RESERVE)} for the driver.",
                "Give a larger gpu=, a smaller batch=, or weights of fewer bits (quantize).",
            )
        decode = decode_figures(machine)
        rest = weights / decode.bandwidth / max(len(program.states), 1)
        known = Machine(figures, decode.bandwidth, decode.launch, rest)
        if self.method == "published":
            plan = published(layers, tokens, self.batch, room, known)
        else:
            plan = fastest(layers, tokens, self.batch, room, known)
        if self.host is not None and plan.host_bytes() > parse_bytes("host", self.host):
            raise PassError(
                f"host={self.host} is too little for the keys of {self.batch} texts of {tokens:,} "
                f"tokens: {plan.host_bytes():,} bytes ({format_bytes(plan.host_bytes())}) are "
                "needed beside those on the GPU.",
                "Give a larger host= or gpu=, or a smaller context= or batch=.",
            )
        copied = streamed(layers, tokens, self.batch, known)
        record = PlacedKV(
            method=self.method, target=machine.name, measured=self._measured(), gpu=gpu,
            weights=weights, activations=activations, other=other, buffers=buffers, room=room,
            context=tokens, batch=self.batch, device=plan.device_bytes(), host=plan.host_bytes(),
            moved=plan.moved_bytes(), read=plan.read_bytes(), seconds=rest + plan.seconds,
            streamed_seconds=rest + copied.seconds,
            layers=[
                LayerPlace(
                    layer.layer.name, layer.way, layer.resident, layer.streamed, layer.computed,
                    layer.seconds, layer.others,
                )
                for layer in plan.layers
            ],
        )  # fmt: skip
        return record, plan

    def _measured(self) -> str:
        if self.figures is None:
            return ""
        found = read_measured_host(Path(self.figures))
        return f"{found.device}, {found.processor}, {found.threads} threads, {found.date}"

    def _context(self, program: Program) -> int:
        """Return the tokens of a text.

        Raises:
            PassError: The model has positions for fewer.
        """
        if self.context is None:
            return context_length(program) or CONTEXT
        known = position_table(program)
        if known is not None and self.context > known[1]:
            raise PassError(
                f"context={self.context}: {program.name} has a table of {known[1]:,} positions.",
                "Give a context= of no more.",
            )
        return self.context

    def _gpu_bytes(self) -> int:
        if self.gpu is not None:
            return parse_bytes("gpu", self.gpu)
        device = found_gpu()
        if device is None:
            raise UsageError(
                "place-kv needs to know how much memory the GPU has, and there is none here.",
                "Give gpu=24GB, or how much it has.",
            )
        return int(torch.cuda.get_device_properties(device).total_memory)
