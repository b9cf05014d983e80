"""What an emitter is: it turns a program into files for one kind of runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, TypeAlias

import torch

from graphopt.errors import LoweringError
from graphopt.ir.graph import Program, resolve_attrs
from graphopt.ir.ops.attention import SELECTED, is_general
from graphopt.ir.ranks import group_of
from graphopt.ir.weights import Weight
from graphopt.pass_manager.contract import Pass
from graphopt.storage.stored_weight import StoredWeight
from graphopt.support.progress import Progress

StoredTensor: TypeAlias = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor in a file."""

NOTHING: Mapping[str, StoredWeight] = MappingProxyType({})


@dataclass
class Emitted:
    """What an emitter left behind.

    Attributes:
        files: Every file written.
        storage: Program weight name -> where its bytes are.
        shared: The names of those that another form had stored, whose files this one reads.
        usage: Lines that tell the user how to run it.
        notes: What a user should know, as (where, what).
        fallbacks: What runs by less than the target's kernels, as (where, reason).
    """

    files: list[Path] = field(default_factory=list)
    storage: dict[str, StoredWeight] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    usage: list[str] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    fallbacks: list[tuple[str, str]] = field(default_factory=list)


def check_placements(program: Program, *, ranks: bool) -> None:
    """Refuse a program that is to run on devices of its choice.

    Args:
        ranks: The form may be one for several ranks, each of which runs all of the program's calls
            on its own part of the weights.

    Raises:
        LoweringError: Naming what is placed, and where.
    """
    group = group_of(program) if ranks else ()
    placed = [(f"Weight {w.name!r}", w.placement) for w in program.weights]
    # A device's host is no other device: what emits such a state says how it is read.
    states = [state for state in program.states.values() if state.host is None]
    placed += [(f"State {s.name!r}", s.placement) for s in states]
    placed += [(f"The call at {c.path or c.function!r}", c.placement) for c in program.calls]
    for what, placement in placed:
        if placement is None or (group and placement.devices == group):
            continue
        if group:
            raise LoweringError(
                f"{what} is {placement}, and other parts of the program are on {', '.join(group)}.",
                "Place all that is placed on the same devices, one a rank.",
            )
        if len(placement.devices) > 1:
            raise LoweringError(
                f"{what} is {placement}: the program is split over several devices, and of all "
                "forms the torch one alone runs so.",
                "Give --emit torch, or leave shard out.",
            )
        raise LoweringError(
            f"{what} is {placement}, and emitted models run on one device.",
            "Take the placements out of the program.",
        )


def check_attentions(program: Program, where: str) -> None:
    """Refuse attentions that read selected pages, or give more than their output, keys and values.

    Args:
        where: What has no place for that.

    Raises:
        LoweringError: Naming the attention.
    """
    for call in program.calls:
        for node in program.functions[call.function].nodes:
            if node.op != "attention" or not is_general(resolve_attrs(node, call), node.inputs):
                continue
            selects = node.operand(SELECTED) is not None
            what = "reads selected pages" if selects else "gives the log-sum-exp or page maxima"
            raise LoweringError(
                f"{call.path or call.function}: {node.outputs[0].name} = {node.op}: it {what}, "
                f"which {where} has no place for.",
                "Emit torch, or leave this out.",
            )


def check_no_policies(program: Program, where: str) -> None:
    """Refuse KV policies.

    Args:
        where: What has no place for them.

    Raises:
        LoweringError: A state has one; naming it.
    """
    kinds = {state.policy.kind: None for state in program.states.values() if state.policy}
    if kinds:
        raise LoweringError(
            f"{where} has no place for the KV policy {', '.join(kinds)}.",
            "Emit torch or onnx, or leave attach-kv-policy out.",
        )


def check_no_hosts(program: Program, where: str) -> None:
    """Refuse KV states that lie in the host's memory.

    Args:
        where: What has no place for them.

    Raises:
        LoweringError: Naming the first state.
    """
    name = next((state.name for state in program.states.values() if state.host), None)
    if name is not None:
        raise LoweringError(
            f"{where} has no place for keys in the host's memory, and state {name!r} is there.",
            "Emit torch for a GPU target, or leave place-kv out.",
        )


class Emitter(ABC):
    """Writes one form of a program under an output folder.

    Attributes:
        name: What `--emit` calls the form.
        shares: It can read weights where another form has stored them, so it is written last.
        for_ranks: It writes programs whose weights are split over several devices.
    """

    name: ClassVar[str]
    shares: ClassVar[bool] = False
    for_ranks: ClassVar[bool] = False

    @abstractmethod
    def check(self, program: Program, target: str) -> None:
        """Refuse what cannot be emitted, before any weight is read.

        Raises:
            LoweringError: With the reason and the remedy.
        """

    def without_pictures(self, program: Program) -> str | None:
        """Return why the form of a model that sees takes no pictures; None where it takes them."""
        return "it takes token ids: pictures need the checkpoint (hf) or the package (torch)"

    def passes(self, target: str) -> list[Pass]:
        """Return the exact passes that emission for a target runs first, in their order.

        What they make is not saved: the output folder holds the program as it came.
        """
        return []

    def fallbacks(self, program: Program, target: str) -> list[tuple[str, str]]:
        """Return what would run by less than the target's kernels, as (where, reason).

        What its structure alone shows: no weight is read.
        """
        return []

    def stored_dtype(self, program: Program, weight: Weight, target: str) -> torch.dtype:
        """Return the dtype in which a dense tensor of `Weight.tensors` is stored."""
        return weight.dtype

    def tensors(self, program: Program, target: str) -> dict[str, StoredTensor]:
        """Return what will be stored of the weights, by the names that other forms may read.

        No weight is read. What is no weight by itself (several in one tensor, say) may have any
        name that no weight has.
        """
        return {
            tensor.name: (
                tensor.shape,
                self.stored_dtype(program, weight, target) if tensor is weight else tensor.dtype,
            )
            for weight in program.weights
            for tensor in weight.tensors()
        }

    def kept(self, program: Program, target: str) -> set[str]:
        """Return the names of the tensors of `program.weights.tensors()` that the form will hold.

        It holds them as the program does, and `emit` says where; the output folder needs the others
        a second time, as a program that is opened again. No weight is read. Constants, vectors
        and scales do not count.
        """
        return {tensor.name for tensor in program.weights.tensors()}

    def element_type(self, program: Program, target: str) -> str | None:
        """Return what most elements of weights are stored as, where no dtype says it.

        Of a program that was written that is what was written, and else what is planned.
        """
        return None

    @abstractmethod
    def emit(
        self,
        program: Program,
        root: Path,
        target: str,
        progress: Progress,
        stored: Mapping[str, StoredWeight] = NOTHING,
    ) -> Emitted:
        """Write the files under `root`.

        Args:
            stored: Where other forms of the folder have stored weights that a reader finds by
                name and takes as they are.
        """
