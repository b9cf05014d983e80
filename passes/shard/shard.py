"""Tensor parallelism: matrices, heads, experts and vocabulary on several devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from graphopt.errors import PassError, UsageError
from graphopt.ir.graph import Program
from graphopt.ir.ranks import group_of
from graphopt.pass_manager.contract import Context, Pass, PassResult, Skip, register_pass
from graphopt.passes.shard.account import account
from graphopt.passes.shard.record import ShardedProgram
from graphopt.passes.shard.run import shard
from graphopt.report.record import Record


@register_pass
@dataclass
class Shard(Pass):
    """Split the matrices of a program over several devices, each of which runs the same text.

    A matrix whose rows are split makes a part of a value, one whose columns are split a partial
    sum of it; collectives put parts together, and add up partial sums, where another node needs
    all of them.
    Source: Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3.

    Legality:

    1. What lies between a matrix split by rows and one split by columns computes every feature, or
       every head, by itself. A norm, a transform or a rounding over the features that would be
       split gets them all, put together; the matrix behind it is split by rows.
    2. The devices divide the heads of an attention, and its key heads, or these divide the devices:
       then several have a copy of a key head. Else the attention is left whole.
    3. The neurons of every expert are divided alike, so that no choice of experts leaves a device
       without work; a router is left whole.
    4. Packed codes are split between groups. Where the devices do not divide the groups of a row,
       the matrix is split by rows, and what it gives is put together.
    5. A bias that is added to partial sums is added on one device.
    6. A vocabulary that the devices do not divide gets rows of zeros, whose logits are cut off.
    7. A KV policy chooses pages for a key head by all query heads that read it, so that a key head
       on several devices leaves the attention whole.

    Options:
        tp: How many devices there are, one a rank.
        device: What they are.
    """

    tp: Annotated[int, Field(le=1024)] = 2
    device: Literal["cuda", "cpu", "npu"] = "cuda"

    name: ClassVar[str] = "shard"
    behind_cache: ClassVar[bool] = True
    takes_ranks: ClassVar[bool] = True  # to be refused with a reason of its own
    record: ClassVar[type[Record]] = ShardedProgram

    def check_options(self) -> None:
        """Refuse to split over fewer than two devices.

        Raises:
            UsageError: There are fewer.
        """
        if self.tp < 2:
            raise UsageError(
                f"shard{{tp={self.tp}}} splits over {self.tp} devices, and it takes two or more.",
                "Leave shard out for one device.",
            )

    def check(self, program: Program) -> None:
        """Refuse a program that was split before, or keeps keys in its device's host.

        Raises:
            PassError: It was, or does.
        """
        devices = group_of(program)
        if devices:
            raise PassError(
                f"{program.name} is split over {len(devices)} devices already.",
                "Begin with the program before it was: compile the source model.",
            )
        hosted = [state.name for state in program.states.values() if state.host is not None]
        if hosted:
            raise PassError(
                f"Keys of {program.name} lie in the host's memory ({hosted[0]}), as one device "
                "reads them there.",
                "Leave out place-kv, or shard.",
            )

    def run(self, program: Program, context: Context) -> PassResult:
        devices = tuple(f"{self.device}:{rank}" for rank in range(self.tp))
        before = program.copy()
        sharded = shard(program, devices)
        record = account(before, sharded)
        here = torch.cuda.device_count() if self.device == "cuda" else 0
        record.here = here if 0 < here < self.tp else None
        if not record.split:
            raise PassError(
                f"Nothing of {program.name} splits over {self.tp} devices.",
                "Give tp= a number that divides its heads and its feed-forward width.",
            )
        skipped = [
            Skip(".".join(filter(None, (call.path, slot.removesuffix(".weight")))), why)
            for call, slot, why in sharded.whole()
        ]
        changed = sum(part.weights for part in record.split)
        return PassResult(program, changed + len(skipped), changed, skipped=skipped, record=record)
