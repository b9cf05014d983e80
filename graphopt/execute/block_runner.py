"""A range of a program's blocks, run differentiably, with weights that may be trained."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphopt.execute.compiled import kind, run_compiled
from graphopt.execute.function_run import CacheContents, Observer
from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Call, Function, Program
from graphopt.ir.types import B, P, S
from graphopt.ir.weights import SharedSources


class Parametrisation(nn.Module, ABC):
    """A weight while it is trained: a differentiable function of its parameters.

    Attributes:
        counts: Whether the gradients are counts over a step's tokens, in place of a mean.
    """

    counts = False

    @abstractmethod
    def forward(self) -> Tensor:
        """Return the weight's value in fp32, differentiable in the parameters."""

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Return groups of parameters, each with the factor of the schedule's learning rate."""
        return [(1.0, list(self.parameters()))]

    def step(self) -> None:
        """Move parameters that have no rate, by their gradients; called once a training step."""


class WeightGroup(nn.Module, ABC):
    """Several weights of one call while they are trained, as functions of common parameters.

    Attributes:
        names: The weights, by their names in the program.
        recordable: Whether a GPU can record the computation as a graph.
    """

    names: frozenset[str]
    recordable = True
    counts = False

    @abstractmethod
    def forward(self) -> dict[str, Tensor]:
        """Return the weights' values by name, differentiable in the parameters."""

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Return groups of parameters, each with the factor of the schedule's learning rate."""
        return [(1.0, list(self.parameters()))]

    def step(self) -> None:
        """Move parameters that have no rate, by their gradients; called once a training step."""


def training_autocast(device: torch.device) -> torch.dtype | None:
    """Return the dtype of products beside weights in fp32: bf16 on a GPU that has it."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    return torch.bfloat16 if bf16 else None


def calibration_runner(
    program: Program, device: torch.device, sources: SharedSources | None = None
) -> Runner:
    """Return a runner that computes as training does, and reads a weight each time it is needed.

    Weights and the residual stream are in fp32, products as `training_autocast` says.

    Args:
        sources: Through which weights are read, where other runners read the same.
    """
    return Runner(
        program, device=device, keep_weights=False, mode="fused",
        autocast=training_autocast(device), sources=sources,
    )  # fmt: skip


class BlockRunner(Runner):
    """Runs a range of a program's blocks differentiably, some of their weights parametrised.

    Weights are in fp32, products as `training_autocast` says. Calls in front of the first block
    of the program are run without gradient.

    Args:
        program: The model.
        first, stop: The range as positions of calls: `first` is that of its first block, and
            `stop` is behind its last one.
        parametrisations: The parametrisations of the weights that are trained, by name.
        device: Where to compute.
        groups: Weights that are trained together.
        keep_weights: Hold on the device what is not trained, after its first use; otherwise a
            block's weights are brought there each time.

    Attributes:
        embedding: Position of the program's first block, behind its embedding.
        compiled: Whether blocks that take a gradient are run by compiled functions.
        recomputes: Whether the backward pass runs each block again: between the passes only the
            residual stream is held, and not what is inside blocks.
    """

    def __init__(
        self,
        program: Program,
        first: int,
        stop: int,
        parametrisations: Mapping[str, Parametrisation],
        device: torch.device,
        groups: Sequence[WeightGroup] = (),
        *,
        keep_weights: bool = True,
    ) -> None:
        super().__init__(
            program, device=device, keep_weights=keep_weights, mode="fused",
            autocast=training_autocast(device),
        )  # fmt: skip
        self.first, self.stop = first, stop
        blocks = find_blocks(program)
        self.embedding = blocks[0].position
        self._stream = {block.position: block.stream for block in blocks}
        self._block_calls = {program.calls[block.position] for block in blocks}
        self.parametrisations = {name: p.to(device) for name, p in parametrisations.items()}
        self.groups = [group.to(device) for group in groups]
        self.compiled = self.recomputes = False

    @property
    def trained(self) -> list[Parametrisation | WeightGroup]:
        """Everything that has parameters."""
        return [*self.parametrisations.values(), *self.groups]

    @property
    def kinds(self) -> list[Function]:
        """The different functions that its blocks are, each of which is compiled."""
        kinds = {}
        for call in self.program.calls[self.first : self.stop]:
            if call in self._block_calls:
                function = self.program.functions[call.function]
                weights = [self.program.weights[name] for name in call.weights.values()]
                kinds[kind(function, call, weights)] = function
        return list(kinds.values())

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter."""
        return [p for part in self.trained for p in part.parameters() if p.requires_grad]

    @property
    def entry(self) -> str:
        """The program value that is the residual stream in front of the range."""
        return self.stream_into(self.first)

    @property
    def exit(self) -> str:
        """The program value that is the residual stream behind the range."""
        return self.program.calls[self.stop - 1].results[0]

    def stream_into(self, position: int) -> str:
        """Return the program value that is the stream in front of the block at a position."""
        return self.program.calls[position].args[self._stream[position]]

    @property
    def kept_dtype(self) -> torch.dtype:
        """The dtype in which hidden states are kept: that of products."""
        return self.autocast or torch.float32

    def weight(self, name: str) -> Tensor:
        parametrised = self.parametrisations.get(name)
        return super().weight(name) if parametrised is None else parametrised()

    def call_weights(self, call: Call) -> dict[str, Tensor]:
        wanted = set(call.weights.values())
        made: dict[str, Tensor] = {}
        for group in self.groups:
            if group.names & wanted:
                made |= group()
        return {
            slot: made[name] if name in made else self.weight(name)
            for slot, name in call.weights.items()
        }

    def run_range(self, values: dict[str, Any], first: int, stop: int) -> None:
        """Run the calls from position `first` to before `stop` on program values by name.

        What the calls make is added to `values`, and what no later call reads is taken out.
        """
        for _ in self.run_calls([values], first, stop):
            pass

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
        own = self.program.functions[call.function]
        plain = function is None and observe is None and not own.caches
        plain &= call in self._block_calls and torch.is_grad_enabled()
        if self.recomputes and plain:
            run = functools.partial(super().run_call, call, tokens_past=tokens_past)

            def block(*args: Tensor | None) -> list[Tensor]:
                return run(args, size, weights)[0]

            # No op draws random numbers, and a tensor that stands for a GPU's has another device
            # in a check than outside.
            results = checkpoint(
                block, *args, use_reentrant=False, preserve_rng_state=False,
                determinism_check="none",
            )  # fmt: skip
            return list(results), {}
        if self.compiled and plain:
            sizes = {B: size[0], S: size[1], P: tokens_past}
            with self._autocasting():
                return run_compiled(own, call, args, weights, sizes), {}
        return super().run_call(
            call, args, size, weights,
            function=function, past=past, tokens_past=tokens_past, observe=observe,
        )  # fmt: skip
