"""What a feed-forward part that is carved has of the calibration text."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from graphopt.calibration.neuron_energy import relative_energies
from graphopt.calibration.output_path import OutputNorm
from graphopt.calibration.token_power import token_power
from graphopt.execute.hidden_states import BlockStep, PerBatch
from graphopt.ir.feed_forward import FeedForward
from graphopt.ir.graph import Value
from graphopt.passes.carve_moe.division import Tokens, initial_k_activations
from graphopt.passes.carve_moe.parts import entry_of
from graphopt.support.clock import Clock
from graphopt.support.devices import room_for
from graphopt.support.ranks import Ranks


@dataclass(frozen=True)
class PartActivations:
    """A part that is carved, and its activations on the calibration text.

    Attributes:
        shared: Neuron groups of it that every token will run.
        weights: Its projections in fp32, by `gate`, `up` and `down`.
        x: Its input, [T, D] for every batch.
        hidden: Its hidden activations, [T, N] for every batch, with the neurons that were added.
        energy: The energy of its neurons in units of the stream's power, [T, N] for every batch.
        learn: How many of the batches, the first ones, are learnt from; the others are held out.
        added: Neurons of zeros.
        held: Whether all of these are made once and held, or made anew each time.
    """

    block: BlockStep
    part: FeedForward
    shared: int
    weights: dict[str, Tensor]
    x: PerBatch[Tensor]
    hidden: PerBatch[Tensor]
    energy: PerBatch[Tensor]
    learn: int
    added: int
    held: bool

    @property
    def ranks(self) -> Ranks:
        """Who shares the tokens."""
        return self.block.stream.ranks

    @property
    def learnt(self) -> Tokens:
        return Tokens(self.x[: self.learn], self.energy[: self.learn], self.ranks, self.held)

    @property
    def held_out(self) -> Tokens:
        return Tokens(self.x[self.learn :], self.energy[self.learn :], self.ranks, self.held)

    @property
    def width(self) -> int:
        """Neurons, with those that were added."""
        return self.weights["down"].shape[1] + self.added

    @classmethod
    def of(
        cls,
        block: BlockStep,
        form: FeedForward,
        shared: int,
        groups: int,
        norm: OutputNorm | None,
        clock: Clock,
        memory: int | None,
    ) -> PartActivations:
        """Return a part's activations on what the carved blocks before it give.

        They are made of the residual stream in front of the part, batch by batch: once where a GPU
        has room for all of them, and else anew each time.

        Args:
            form: The part.
            shared: Neuron groups of it that every token will run, of all `groups`.
            norm: What its output goes through before it is added to the residual stream.
            clock: Counts the seconds in which the model runs.
            memory: Bytes of the GPU that the pass may have; None on a CPU.
        """
        entry = entry_of(block, form)
        if entry is not None:
            with clock.counting("model"):
                block.keep(entry)
        slots = block.function.slots_by_value()
        nodes = {"gate": form.gate, "up": form.up, "down": form.down}
        weights = {
            name: block.weights[slots[node.inputs[1]]]  # type: ignore[index]
            for name, node in nodes.items()
            if node is not None
        }
        down = weights["down"]
        added = -down.shape[1] % groups
        padded = F.pad(down, (0, added))
        held = block.stream.fits_at_once or _has_room(
            block, len(weights["up"]) + added, weights["up"].shape[1], memory
        )

        def value_of(value: Value) -> PerBatch[Tensor]:
            def maker(batch: int) -> Tensor:
                with clock.counting("model"):
                    return block.values(batch, [value])[0].flatten(0, -2).float()

            batches = range(len(block.hidden))
            return PerBatch.of(batches, maker, held)

        hidden = value_of(form.hidden)
        if added:
            hidden = hidden.map(lambda hidden_TN: F.pad(hidden_TN, (0, added)))
        powers = [token_power(behind_TD) for behind_TD in value_of(block.function.results[0])]
        energy = PerBatch.of(
            range(len(powers)),
            lambda batch: relative_energies(hidden[batch], powers[batch], padded, norm),
            held,
        )
        return cls(
            block, form, shared, weights, value_of(form.x), hidden, energy,
            block.stream.held_out.index(True), added, held,
        )  # fmt: skip


HELD_SHARE = 1 / 8
"""Of a GPU's memory, what a part's activations may take: the rest is for batches of blocks."""


def _has_room(block: BlockStep, neurons: int, width: int, memory: int | None) -> bool:
    """Return whether a GPU holds a part's activations on all tokens.

    For each token those are in fp32 its input, hidden activations and energies, and in 64 bits the
    numbers of some neurons.
    """
    if memory is None:
        return False
    tokens = sum(ids.numel() for ids in block.stream.ids)
    size = tokens * (4 * width + 8 * neurons + 8 * initial_k_activations(neurons))
    device = block.stream.device
    return size <= HELD_SHARE * memory and room_for(size, device) == device
