"""The residual stream of a text, walked once over a program's blocks: what calibration stands on.

Scores, layer sensitivities, carving, reconstruction and expert loads all read activations of one
block after another on windows of text. Here is the one loop that they share:

    stream = HiddenStateStream(runner, windows)
    for block in stream:
        for batch in range(len(stream.ids)):
            (hidden,) = block.values(batch, [value])

One block's weights and one batch of its activations are in memory at a time. The residual stream
itself is kept for all windows, on the device or, where it is large, on the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from graphopt.execute.function_run import Observer
from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import Block, block_name, find_blocks
from graphopt.ir.graph import Call, Function, Value
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import B, Dim
from graphopt.support.devices import room_for
from graphopt.support.per_device import PerDevice
from graphopt.support.progress import Progress, silent
from graphopt.support.ranks import Ranks, sharing

TOKENS_AT_ONCE = PerDevice(cpu=8192, gpu=16384)
"""Tokens of a batch: those over which a block is run at once."""

STREAMS_KEPT = 6
"""How many times the hidden states of all windows are kept: in front of a block, inside it and
behind it, of a student and of its teacher."""

T = TypeVar("T")
U = TypeVar("U")


class PerBatch(Sequence[T]):
    """What is made of each batch, made anew each time that it is asked for.

    So one batch's is in memory at a time, however many batches there are.

    Args:
        makers: One for each batch.
        held: Make it once and hold it. By default where there is one batch.
    """

    def __init__(self, makers: Sequence[Callable[[], T]], held: bool | None = None) -> None:
        self._makers = list(makers)
        self._held = len(self._makers) == 1 if held is None else held
        self._made: dict[int, T] = {}

    @classmethod
    def of(
        cls, batches: Sequence[U], function: Callable[[U], T], held: bool | None = None
    ) -> PerBatch[T]:
        """Return what a function makes of each of some batches."""

        def maker(number: int) -> Callable[[], T]:
            return lambda: function(batches[number])

        return cls([maker(number) for number in range(len(batches))], held)

    def __len__(self) -> int:
        return len(self._makers)

    def __iter__(self) -> Iterator[T]:
        return (self[number] for number in range(len(self)))

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> PerBatch[T]: ...
    def __getitem__(self, number: int | slice) -> T | PerBatch[T]:
        if isinstance(number, slice):
            return PerBatch.of(range(len(self))[number], lambda one: self[one], held=False)
        if number in self._made:
            return self._made[number]
        value = self._makers[number]()
        if self._held:
            self._made[number] = value
        return value

    def map(self, function: Callable[[T], U]) -> PerBatch[U]:
        """Return what a function makes of each; it is held where this is."""
        return PerBatch.of(self, function, self._held)


class HiddenStateStream:
    """The residual stream of windows of text in front of one block of a program after another.

    Ranks share the windows: each runs its part of those that are learnt from and of those that are
    held out. What is summed over batches is summed over `ranks` by those who sum it.

    Iterating gives the blocks from the current one on, and moves the stream behind each where
    the body of the loop has not. Two streams, of a student and its teacher, can be moved side by
    side: each is moved by its own blocks.

    Args:
        runner: Runs the program, in its dtype, on its device.
        windows: int64 [windows, S], without padding.
        held_out: How many windows, the last ones, lie in batches of their own.
        tokens_at_once: The number of tokens of a batch; `TOKENS_AT_ONCE` by default.
        progress: Called with `what`, the number of blocks done and that of all.
        ranks: Who shares the windows; by default all ranks, where each gets some.

    Attributes:
        ranks: Who shares the windows; `ALONE` where every rank runs all of them.
        ids: This rank's windows of every batch, int64 [N, S].
        first_window: The number of the first of them among all that are learnt from.
        held_out: For every batch whether it is held out.
        blocks: The program's.
        index: The index of the current block; behind the last, the number of blocks.
        hidden: Hidden states of every batch in front of the current block: [N, S, D], or as the
            model lays them out; where `offload` put them.
        block_calls: How often blocks were run so far, counted in batches.
    """

    def __init__(
        self,
        runner: Runner,
        windows: Tensor,
        *,
        held_out: int = 0,
        tokens_at_once: int | None = None,
        progress: Progress = silent,
        what: str = "running blocks",
        ranks: Ranks | None = None,
    ) -> None:
        self.runner, self.program, self.device = runner, runner.program, runner.device
        self.progress, self.what = progress, what
        self.blocks: list[Block] = find_blocks(self.program)
        most = tokens_at_once or TOKENS_AT_ONCE.on(self.device)
        rows = max(1, most // windows.shape[1])
        sorts = windows[: len(windows) - held_out], windows[len(windows) - held_out :]
        self.ranks = sharing(*map(len, sorts)) if ranks is None else ranks
        own = [self.ranks.part(sort) for sort in sorts]
        self.first_window = self.ranks.share(len(sorts[0])).start
        cut = len(own[0])
        learnt, held = (part.split(rows) for part in own)
        self.ids = [ids.to(self.device) for ids in (*learnt, *held) if len(ids)]
        self.held_out = [number >= -(-cut // rows) for number in range(len(self.ids))]
        self.fits_at_once = sum(part.numel() for part in own) <= most
        self.index, self.block_calls = 0, 0
        self._types = infer_program(self.program)[1]
        first = self.program.calls[self.blocks[0].position].args[self.blocks[0].stream]
        shape = self._types[first].shape
        self.batch_axis = shape.index(B) if B in shape else 0
        self._repeated: dict[tuple[int, int], dict[str, Any]] = {}
        self._place: torch.device | None = None
        self.environments: list[dict[str, Any]] = []
        self.hidden: list[Tensor] = []
        for ids in self.ids:
            environment = self._in_front_of_blocks(ids)
            self.hidden.append(self.offload(environment.pop(first)))
            self.environments.append(environment)

    def __iter__(self) -> Iterator[BlockStep]:
        self.progress(self.what, self.index, len(self.blocks))
        while self.index < len(self.blocks):
            block = self.current()
            yield block
            if self.index == block.index:
                block.advance()
            del block  # and its weights with it
            self.progress(self.what, self.index, len(self.blocks))

    def current(self) -> BlockStep:
        """Return the current block."""
        return BlockStep(self, self.index)

    def name_of(self, index: int) -> str:
        """Return what a block is called in messages."""
        return block_name(self.program, self.blocks[index])

    def index_of(self, name: str) -> int:
        """Return the index of the block that is called so."""
        return [self.name_of(index) for index in range(len(self.blocks))].index(name)

    def skip_to(self, index: int, hidden: Sequence[Tensor]) -> None:
        """Go on in front of a block with given hidden states, without running any block."""
        self.index, self.hidden = index, [self.offload(states) for states in hidden]

    def run_to(self, index: int) -> None:
        """Move the stream in front of a block, running those before it."""
        while self.index < index:
            self.current().advance()

    def offload(self, tensor: Tensor) -> Tensor:
        """Return hidden states where those of all windows have room: on the device or the host."""
        if self._place is None:
            windows = sum(map(len, self.ids))
            size = tensor.nbytes // self.windows_of(tensor) * windows * STREAMS_KEPT
            self._place = room_for(size, self.device) or torch.device("cpu")
        return tensor.to(self._place)

    def output(self, batch: int, hidden: Tensor) -> Tensor:
        """Return the program's first output, its logits, of a batch's states behind the blocks."""
        values, behind = self.behind_blocks(batch, hidden)
        with torch.no_grad():
            for _ in self.runner.run_calls([values], behind, len(self.program.calls)):
                pass
        logits: Tensor = values[self.program.outputs[0]]
        return logits

    def behind_blocks(self, batch: int, hidden: Tensor) -> tuple[dict[str, Any], int]:
        """Return the program's values behind the last block, and the position of the next call.

        Args:
            hidden: A batch's hidden states there.
        """
        last = self.blocks[-1].position
        states = {self.program.calls[last].results[0]: hidden.to(self.device)}
        return {**self.environments[batch], **states}, last + 1

    def windows_of(self, hidden: Tensor) -> int:
        """Return how many windows hidden states are of: not all have the batch as first axis."""
        return hidden.shape[self.batch_axis]

    def _in_front_of_blocks(self, ids: Tensor) -> dict[str, Any]:
        """Return the program's inputs for windows, and what the calls before the blocks make."""
        environment = self.runner.window_inputs(ids)
        with torch.no_grad():
            for _ in self.runner.run_calls([environment], 0, self.blocks[0].position):
                pass
        return environment

    def argument(self, name: str, batch: int, times: int) -> Tensor | None:
        """Return a value made before the blocks, for a batch's windows several times over.

        Most values have a row a window, or none. But a size may be any function of the batch's
        (a mixture of experts counts the tokens it routes, 2*B*S), and those are computed.
        """
        value: Tensor | None = self.environments[batch][name]
        if times == 1 or value is None:
            return value
        first, *rest = (*self._types[name].shape, 1)
        if not any(_depends_on_batch(size) for size in (first, *rest)):
            return value
        if first == B and not any(map(_depends_on_batch, rest)):
            return value.repeat(times, *[1] * (value.dim() - 1))
        if (batch, times) not in self._repeated:
            environment = self._in_front_of_blocks(self.ids[batch].repeat(times, 1))
            self._repeated = {(batch, times): environment}
        repeated: Tensor = self._repeated[batch, times][name]
        return repeated


class BlockStep:
    """One block of a program, and the stream of hidden states in front of it.

    It stays what it was when the stream came to it, also where the program's call is rewritten:
    `replace` says that the stream is to go on with the rewritten block.

    Attributes:
        index: The index of the block among those of the program.
        name: What the block is called in messages.
        block, call, function: The block, its call and that one's function.
        hidden: Hidden states of every batch in front of the block.
    """

    def __init__(self, stream: HiddenStateStream, index: int) -> None:
        self.stream, self.index = stream, index
        self.block = stream.blocks[index]
        self.call: Call = copy.copy(stream.program.calls[self.block.position])
        self.name = stream.name_of(index)
        self.function: Function = stream.program.functions[self.call.function]
        self.hidden: Sequence[Tensor] = stream.hidden
        self._weights: Mapping[str, Tensor] | None = None
        self._known: list[dict[Value, Tensor]] = [{} for _ in stream.ids]
        self._rewritten: BlockStep | None = None

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The block's weights by slot, read when they are first needed."""
        if self._weights is None:
            self._weights = self.stream.runner.call_weights(self.call)
        return self._weights

    @torch.no_grad()
    def run(
        self,
        batch: int,
        hidden: Tensor | None = None,
        *,
        function: Function | None = None,
        changed: Mapping[str, Tensor] | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Return a batch's hidden states behind the block, without moving the stream.

        Args:
            hidden: Those in front of it, by default the stream's own. They may be of the batch's
                windows several times over.
            function: A variant of the block's function to run in its place.
            changed: Weights, by slot, in the place of the block's own.
            observe: Called with every value inside the block as it is made.
        """
        hidden = self.hidden[batch] if hidden is None else hidden
        rows, length = self.stream.ids[batch].shape
        windows = self.stream.windows_of(hidden)
        self.stream.block_calls += windows // rows
        (behind,), _ = self.stream.runner.run_call(
            self.call,
            self._arguments(batch, hidden, windows // rows),
            (windows, length),
            {**self.weights, **(changed or {})},
            function=function or self.function,
            observe=observe,
        )
        return behind

    @torch.no_grad()
    def values(
        self,
        batch: int,
        wanted: Sequence[Value],
        given: Mapping[Value, Tensor] | None = None,
    ) -> list[Tensor]:
        """Return values inside the block on a batch; only what they depend on is run.

        Args:
            given: Values to compute them from in the place of the batch's own.
        """
        device, (rows, length) = self.stream.device, self.stream.ids[batch].shape
        known = {value: states.to(device) for value, states in self._known[batch].items()}
        known.update(given or {})
        return self.stream.runner.call_values(
            self.call,
            self._arguments(batch, self.hidden[batch], 1),
            (rows, length),
            self.weights,
            wanted,
            function=self.function,
            known=known,
        )

    def values_per_batch(self, wanted: Sequence[Value]) -> PerBatch[list[Tensor]]:
        """Return values inside the block, for every batch."""

        batches = range(len(self.stream.ids))
        return PerBatch.of(
            batches, lambda batch: self.values(batch, wanted), self.stream.fits_at_once
        )

    def keep(self, value: Value, hidden: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Keep the residual stream at a place inside the block: `values` begins there.

        Args:
            value: The residual stream at that place.
            hidden: The stream of every batch there; computed by default.

        Returns:
            The stream of every batch there, as it is kept.
        """
        for batch, known in enumerate(self._known):
            states = self.values(batch, [value])[0] if hidden is None else hidden[batch]
            known.clear()  # what lies in front of it is not needed any more
            known[value] = self.stream.offload(states)
        return [known[value] for known in self._known]

    def replace(self) -> BlockStep:
        """Return the block as it has been rewritten in the program; `advance` goes on with it."""
        self._rewritten = BlockStep(self.stream, self.index)
        self._rewritten.hidden = self.hidden
        return self._rewritten

    def advance(
        self,
        hidden: Sequence[Tensor] | None = None,
        *,
        observers: Mapping[Value, Callable[[int, Tensor], None]] | None = None,
    ) -> list[Tensor]:
        """Move the stream behind the block; return the hidden states of every batch there.

        Args:
            hidden: Those states, where they are known already.
            observers: For values of the function that is run what is called with the number of
                the batch and the value's tensor.
        """
        stream, block = self.stream, self._rewritten or self
        if hidden is None:
            hidden = [
                stream.offload(block.run(batch, observe=_by_value(observers or {}, batch)))
                for batch in range(len(stream.ids))
            ]
        stream.skip_to(self.index + 1, hidden)
        return stream.hidden

    def _arguments(self, batch: int, hidden: Tensor, times: int) -> list[Tensor | None]:
        return [
            hidden.to(self.stream.device)
            if place == self.block.stream
            else self.stream.argument(name, batch, times)
            for place, name in enumerate(self.call.args)
        ]


def _by_value(
    observers: Mapping[Value, Callable[[int, Tensor], None]], batch: int
) -> Observer | None:
    """Return one observer that hands a batch's values to those that ask for them."""
    if not observers:
        return None

    def observe(value: Value, tensor: Tensor) -> None:
        if value in observers:
            observers[value](batch, tensor)

    return observe


def _depends_on_batch(size: Dim) -> bool:
    return not isinstance(size, int) and B in size.free_symbols
