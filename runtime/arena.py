"""One arena for what a step of a model computes on the way: views of one buffer.

A step runs once as it is and is written down: which operation made which block of memory, and how
long the block was needed. Blocks then get offsets in one buffer, so that no two that are needed at
once overlap, and later steps put their results there: an operation is given its block by the form
that torch has of it for that, `out=` in most cases (`out_forms.py`). The operations are the same,
and so are the results.

Keys and values grow in rooms: what `torch.cat` would copy into a longer tensor is written behind
the tokens that are there.

What torch has no such form of makes its result as before; `Arena.report` names it. What an
operation allocates for itself inside is not seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.runtime.arena_offsets import Block, most_at_once, place_blocks
from graphopt.runtime.out_forms import Writer, decomposition, out_form

Result = TypeVar("Result")

MOST_CHANGES = 8
"""How often in a row a step is planned anew before it is left as it is."""

_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Changed(Exception):
    """A step did something else than what was written down, or needs more room."""


@dataclass
class Operation:
    """One operation of a step.

    Attributes:
        op: The overload that is called.
        blocks: What it makes.
        write: Calls it so that it fills given memory; None if it makes nothing, or cannot.
        memory: For each block a tensor without elements, with its part of the buffer behind it.
        appends: It puts new tokens behind a cache in its room.
    """

    op: Any
    blocks: list[Block] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    write: Writer | None = None
    memory: list[Tensor] = field(default_factory=list)
    appends: bool = False


@dataclass
class Step:
    """A step as it was written down.

    Attributes:
        height: Bytes of the buffer that its blocks need.
        live: The most bytes that they take at once, which no plan can do without.
        left_out: By operation that makes its results itself: how often it runs, and their bytes.
        unplanned: Why the step has no plan and runs as it is, if it does.
    """

    operations: list[Operation] = field(default_factory=list)
    height: int = 0
    live: int = 0
    left_out: dict[str, tuple[int, int]] = field(default_factory=dict)
    unplanned: str = ""

    def planned(self) -> list[Block]:
        """Return the blocks that lie in the buffer."""
        return [block for made in self.operations if made.write for block in made.blocks]


class Arena:
    """A buffer in which the results of steps lie; one step runs after the other.

    What a step returns lies in the buffer too, until the next step: copy what is to stay.

    Args:
        device: Where the steps compute.

    Attributes:
        steps: By key.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.empty(0, device=device).device
        self.buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self.steps: dict[Hashable, Step] = {}
        self._changes: dict[Hashable, int] = {}
        self._rooms: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    @property
    def bytes(self) -> int:
        """Size of the buffer: what the largest step needs."""
        return self.buffer.numel()

    def room(self, like: Tensor, tokens: int) -> Tensor:
        """Return zeros [B, heads, tokens, size] in which a cache `like` [B, heads, .., size] grows.

        A cache is a part of it along tokens, `room[:, :, :P]`. In a step of this arena,
        `torch.cat((cache, new), 2)` writes behind it and gives a longer part.
        """
        made = like.new_zeros(like.shape[0], like.shape[1], tokens, like.shape[3])
        self._rooms[made.untyped_storage().data_ptr()] = made
        return made

    def run(
        self, key: Hashable, step: Callable[[int], Result], tokens: int = 0, most: int = 0
    ) -> Result:
        """Run a step, in the buffer if one of the same key ran before.

        A step may run twice here, with the same result: it must not read what it changes.

        Args:
            key: What tells steps apart: the sizes of all that a step is given, but for `tokens`.
            step: Takes the number of tokens in its caches.
            tokens: That number.
            most: The most tokens that there will be. The first step also runs for one token more,
                to see which blocks grow by how much, and its result is left.
        """
        with torch.no_grad():
            known = self.steps.get(key)
            if known is None:
                return self._first(key, step, tokens, most)
            if known.unplanned:
                return self._plainly(step, tokens)
            try:
                with _Replay(self, known) as replay:
                    result = step(tokens)
                replay.end()
                self._changes.pop(key, None)
                return result
            except _Changed:
                self._changes[key] = self._changes.get(key, 0) + 1
                return self._first(key, step, tokens, most)

    def _first(
        self, key: Hashable, step: Callable[[int], Result], tokens: int, most: int
    ) -> Result:
        """Run a step as it is, and plan the next ones of its key."""
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                # A buffer made now would be the recording's own.
                return self._plainly(step, tokens)
            # What kernels make once, such as counters, is no part of later steps.
            self._plainly(step, tokens)
        longer = self._written(step, tokens + 1)[0] if most > tokens else None
        recorded, result = self._written(step, tokens)
        if longer is not None:
            _grow(recorded, longer, most - tokens)
        self.steps[key] = recorded
        if self._changes.get(key, 0) > MOST_CHANGES:
            recorded.unplanned = "its operations or their sizes change from run to run"
        if recorded.unplanned:
            recorded.operations, recorded.left_out = [], {}
        else:
            self._plan(recorded)
        return result

    def _plainly(self, step: Callable[[int], Result], tokens: int) -> Result:
        """Run a step without a plan; caches grow in their rooms all the same."""
        with _Appending(self):
            return step(tokens)

    def _written(self, step: Callable[[int], Result], tokens: int) -> tuple[Step, Result]:
        with _Recorder(self) as recorder:
            result = step(tokens)
        recorder.end()
        return recorder.step, result

    def _plan(self, step: Step) -> None:
        """Give the blocks of a step their places; the buffer grows where it has to."""
        blocks = step.planned()
        step.height, step.live = place_blocks(blocks), most_at_once(blocks)
        if step.height > self.bytes:
            for other in self.steps.values():
                for made in other.operations:
                    made.memory = []
            self.buffer = self.buffer.new_empty(0)  # the smaller one is free before this:
            self.buffer = self.buffer.new_empty(step.height)
        for other in self.steps.values():
            for made in other.operations:
                if made.write and not made.memory:
                    pairs = zip(made.blocks, made.dtypes, strict=True)
                    made.memory = [self._memory(block, dtype) for block, dtype in pairs]

    def _memory(self, block: Block, dtype: torch.dtype) -> Tensor:
        """Return a tensor without elements on a block's part of the buffer.

        Its storage is that part and cannot grow: what does not fit raises an error unwritten.
        """
        part = self.buffer.untyped_storage()[block.offset : block.offset + block.size]
        return torch.empty(0, dtype=dtype, device=self.device).set_(part, 0, (0,))  # type: ignore[call-overload]

    def appended(self, op: Any, args: Sequence[Any]) -> Tensor | None:
        """Return a cache in a room and the tokens behind it, where `op` puts such together."""
        if op is not torch.ops.aten.cat.default or len(args) < 2 or args[1] != 2:
            return None
        if len(args[0]) != 2:
            return None
        past, new = args[0]
        room = self._rooms.get(past.untyped_storage().data_ptr())
        if room is None or past.dtype != new.dtype:
            return None
        # A ring's newest tokens may begin anywhere in the room.
        start = past.storage_offset() // room.stride(2)
        end = start + past.shape[2]
        stop = end + new.shape[2]
        if stop > room.shape[2]:
            raise ValueError(f"{stop} tokens in a cache with room for {room.shape[2]}")
        room[:, :, end:stop].copy_(new)
        return room[:, :, start:stop]

    def report(self) -> list[str]:
        """Return lines for people: the size of the buffer, and what is not in it."""
        lines = [f"arena: one buffer of {self.bytes} bytes"]
        for key, step in self.steps.items():
            name = " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
            if step.unplanned:
                lines.append(f"  {name}: not planned, since {step.unplanned}")
                continue
            lines.append(f"  {name}: {step.height} bytes planned, {step.live} needed at once")
            for op, (times, size) in sorted(step.left_out.items()):
                lines.append(
                    f"    not in it: {op}, {times} times, {size} bytes in all; torch has no form "
                    "of it that writes to given memory"
                )
        return lines


def _grow(step: Step, longer: Step, tokens: int) -> None:
    """Make the blocks of a step as large as they are after so many more tokens.

    Their sizes are linear in tokens: what grows by the token has it as one dimension. If a step of
    one token more does other operations, sizes stay; the next step is then written down anew.
    """
    if [made.op for made in step.operations] != [made.op for made in longer.operations]:
        return
    for now, then in zip(step.operations, longer.operations, strict=True):
        if len(now.blocks) == len(then.blocks):
            for block, larger in zip(now.blocks, then.blocks, strict=True):
                block.grow(max(larger.bytes - block.bytes, 0) * tokens)


def _by_value(op: Any, args: Sequence[Any]) -> bool:
    """Return whether values decide what an operation gives, or how much of it."""
    if op is torch.ops.aten.index.Tensor:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return not _BY_VALUE.isdisjoint(op.tags)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [x for item in value for x in _tensors(item)]
    return []


class _Appending(TorchDispatchMode):
    """Runs a step as it is, but for caches, which grow in their rooms."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.arena = arena

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        appended = self.arena.appended(op, args)
        return op(*args, **(kwargs or {})) if appended is None else appended


class _Recorder(TorchDispatchMode):
    """Runs a step as it is, and writes it down."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.arena, self.step = arena, Step()
        self.needed: dict[int, tuple[StorageWeakRef, Block]] = {}

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        parts = decomposition(op)
        if parts is not None:
            # In inference mode, operations that are made of others come as they are.
            with self:
                return parts(*args, **kwargs)
        appended = self.arena.appended(op, args)
        if appended is not None:
            self.step.operations.append(Operation(op, appends=True))
            return appended
        if not self.step.unplanned and _by_value(op, args):
            self.step.unplanned = f"what {op} gives depends on values"
        number = len(self.step.operations)
        self._release(number)
        made = Operation(op)
        self.step.operations.append(made)
        # Of arguments that no operation of the step made, such as weights.
        given = {x.untyped_storage()._cdata for x in _tensors([*args, *kwargs.values()])}
        result = op(*args, **kwargs)
        for x in _tensors(result):
            storage = x.untyped_storage()
            if x.device != self.arena.device or storage._cdata in given:
                continue
            if storage._cdata not in self.needed:
                block = Block(number, storage.nbytes())
                made.blocks.append(block)
                made.dtypes.append(x.dtype)
                self.needed[storage._cdata] = StorageWeakRef(storage), block
        if made.blocks:
            made.write = out_form(op, len(made.blocks), self.arena.device.type)
            if made.write is None:
                times, size = self.step.left_out.get(str(op), (0, 0))
                more = sum(block.bytes for block in made.blocks)
                self.step.left_out[str(op)] = times + 1, size + more
        return result

    def _release(self, number: int) -> None:
        """Note which blocks nothing refers to any more."""
        for place in [k for k, (ref, _) in self.needed.items() if ref.expired()]:
            self.needed.pop(place)[1].upper = number

    def end(self) -> None:
        """Let what is still needed be so to the end: the results."""
        number = len(self.step.operations)
        self._release(number)
        for _, block in self.needed.values():
            block.upper = number + 1


class _Replay(TorchDispatchMode):
    """Runs a step whose operations write where the plan says."""

    def __init__(self, arena: Arena, step: Step) -> None:
        super().__init__()
        self.arena, self.left = arena, iter(step.operations)

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        parts = decomposition(op)
        if parts is not None:
            with self:
                return parts(*args, **(kwargs or {}))
        made = next(self.left, None)
        if made is None or made.op is not op:
            raise _Changed
        if made.write is not None:
            try:
                return made.write(args, kwargs or {}, [_fresh(x) for x in made.memory])
            except RuntimeError as problem:
                if "not resizable" in str(problem):
                    raise _Changed from problem
                raise
        if made.appends:
            appended = self.arena.appended(op, args)
            if appended is None:
                raise _Changed
            return appended
        return op(*args, **kwargs) if kwargs else op(*args)

    def end(self) -> None:
        """Refuse a step that ended early: the plan is for another one."""
        if next(self.left, None) is not None:
            raise _Changed


_fresh = torch.ops.aten.alias.default
"""Returns a tensor without elements on the same memory, which an operation resizes and returns."""
