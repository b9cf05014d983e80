"""A part of a program, run differentiably, with weights in forms that are trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.execute.compiled import kind, run_compiled
from graphopt.execute.interpreter import Runner, complete_inputs, run_function
from graphopt.ir.blocks import find_blocks
from graphopt.ir.dataflow import mask_is_for_attention_alone
from graphopt.ir.graph import Call, Program, Value
from graphopt.ir.types import B, P, S


class Form(nn.Module, ABC):
    """A weight while it is trained."""

    @abstractmethod
    def forward(self) -> Tensor:
        """Return the weight's value in fp32, differentiable in the form's parameters."""

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Return the parameters, with what the schedule's learning rate is times for each."""
        return [(1.0, list(self.parameters()))]

    def step(self) -> None:
        """Move parameters that have no rate, by their gradients; called once a training step."""


class Student:
    """A part of a program, run differentiably with some of its weights in trained forms.

    Args:
        program: The model.
        first, stop: The blocks that are run, as positions of calls, from `first` to before
            `stop`. Calls in front of the first block of the program are run without gradient.
        forms: What is trained, by weight name.
        device: Where to compute. On CUDA products are in bf16 where it has it, weights in fp32.
        keep_weights: Hold every weight after its first use, instead of reading it again.
    """

    def __init__(
        self,
        program: Program,
        first: int,
        stop: int,
        forms: Mapping[str, Form],
        device: torch.device,
        *,
        keep_weights: bool = True,
    ) -> None:
        self.program, self.device = program, device
        self.first, self.stop = first, stop
        blocks = find_blocks(program)
        self.embedding = blocks[0].position
        self._stream = {block.position: block.stream for block in blocks}
        self.entry = self.stream_into(first)
        self.forms = {name: form.to(device) for name, form in forms.items()}
        self._runner = Runner(program, torch.float32, device, keep_weights)
        self._half = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        self._unmasked = mask_is_for_attention_alone(program)
        self._inputs = {"input_ids", *program.inputs}
        self._last_use = {
            name: position for position, call in enumerate(program.calls) for name in call.args
        }
        self.compiled = False
        """Whether blocks that take a gradient are run by compiled functions."""

    @property
    def kinds(self) -> int:
        """How many different functions its blocks are, each of which is compiled."""
        return len(
            {
                kind(
                    self.program.functions[call.function],
                    call,
                    [self.program.weights[name] for name in call.weights.values()],
                )
                for at in self._stream
                if self.first <= at < self.stop
                for call in [self.program.calls[at]]
            }
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter."""
        return [p for form in self.forms.values() for p in form.parameters() if p.requires_grad]

    def stream_into(self, position: int) -> str:
        """Return the program value that is the stream in front of the block at a position."""
        return self.program.calls[position].args[self._stream[position]]

    @property
    def kept_dtype(self) -> torch.dtype:
        """What its streams are kept in."""
        return torch.bfloat16 if self._half else torch.float32

    @property
    def exit(self) -> str:
        """The program value that the last call makes."""
        return self.program.calls[self.stop - 1].results[0]

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        """Return the program's inputs for windows of token ids [B, S] without padding."""
        values: dict[str, Any] = dict(complete_inputs({"input_ids": ids}))
        if self._unmasked:
            # Nothing is padded, and attention without a mask is several times faster.
            values["attention_mask"] = None
        return values

    def run(
        self,
        values: dict[str, Any],
        first: int,
        stop: int,
        watch: Callable[[Value, Tensor], None] | None = None,
    ) -> None:
        """Run calls; what they make is added to `values`.

        Without gradients, what no later call reads is taken out again.

        Args:
            watch: Called with every value inside a call as it is made.
        """
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self._half, cache_enabled=False
        ):
            for position, call in enumerate(self.program.calls[first:stop], first):
                compiled = self.compiled and position in self._stream and watch is None
                results = self._call(call, values, watch, compiled)
                values.update(zip(call.results, results, strict=True))
                if not torch.is_grad_enabled():
                    for name in call.args:
                        if self._last_use[name] == position and name not in self._inputs:
                            values.pop(name, None)

    def _call(
        self,
        call: Call,
        values: Mapping[str, Any],
        watch: Callable[[Value, Tensor], None] | None,
        compiled: bool,
    ) -> list[Tensor]:
        batch, length = values["input_ids"].shape
        function = self.program.functions[call.function]
        with torch.autocast(self.device.type, enabled=False):
            weights = {
                slot: self.forms[name]() if name in self.forms else self._runner.weight(name)
                for slot, name in call.weights.items()
            }
        past = self._runner.empty_cache(batch) if function.caches else {}
        sizes = {B: batch, S: length, P: 0}
        args = [values[name] for name in call.args]
        if compiled and torch.is_grad_enabled() and not past:
            return run_compiled(function, call, args, weights, sizes)
        return run_function(function, call, args, weights, sizes, past, watch=watch)[0]
