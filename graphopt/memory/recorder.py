"""Recording what operators do with memory, at the level at which torch dispatches them.

A storage is followed by a weak reference, from the operator that gave it to the moment at which
its last owner lets go of it: a variable, a view, or autograd, which keeps what a backward pass
needs. So an instance lives as long as the allocator keeps its memory, and an address that is used
again is another instance. What is in this module runs for every operator, and is kept short.
"""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from graphopt.memory.event_log import OUTSIDE, EventLog, Row
from graphopt.memory.known_results import KnownResults
from graphopt.memory.operators import Operator, results
from graphopt.memory.trace import (
    FREE,
    MALLOC,
    MAX_EVENTS,
    READ,
    WRITE,
    Category,
    Clock,
    Trace,
)

Workspaces = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], int]
"""From an operator, its arguments and what it gives to the bytes that its kernel uses meanwhile."""

Cost = Callable[[Any, tuple[Any, ...], dict[str, Any], Any, int], float]
"""The same, with the bytes that it reads and writes, to the nanoseconds that it takes."""


class _Followed(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage, with the instance that it is now."""

    __slots__ = ("index", "key", "size")
    index: int
    key: int
    size: int


def _storages() -> set[int]:
    """Return the addresses of the storages of all tensors, and of their gradients."""
    found: set[int] = set()
    for tensor in gc.get_objects():
        if not issubclass(type(tensor), Tensor):
            continue
        # A subclass, or a tensor without memory of its own, may have none.
        with contextlib.suppress(Exception):
            found.add(tensor.untyped_storage()._cdata)
            if tensor.is_leaf and tensor.grad is not None:
                found.add(tensor.grad.untyped_storage()._cdata)
    return found


class Recorder(TorchDispatchMode):
    """Records every operator that runs inside it.

    What happens in the thread that entered it is seen, and in backward passes that it starts. An
    operator's events have the order malloc, read, write.

    Args:
        clock: What times are to be: "host", with the recorder's own time taken out, "cuda events"
            of the current stream, or, where operators don't run, "operation index" or "cost model".
        workspaces: What kernels use inside, where it is known: an instance of category "workspace"
            that lives during the operator.
        cost: How long an operator takes, for the clock "cost model".
        as_fake: From a tensor with values to the one that stands for it, where operators run on
            fake tensors.
        meta_place: Where what a storage of device "meta" stands for lies; it is told whether an
            operator has just made it.
        most: How many events are kept. What comes later is left out, and a note says so.

    Attributes:
        log: What was recorded.
        notes: Becomes `Trace.notes`.
        complete: Becomes `Trace.complete`.
        addresses: With the clock "cuda events", the address of each instance when it was seen
            first, and the Unix time of that in nanoseconds.
    """

    # Operators that run others, such as `torch.cond`, are recorded as one.
    supports_higher_order_operators = True

    def __init__(
        self,
        clock: Clock = "host",
        *,
        workspaces: Workspaces | None = None,
        cost: Cost | None = None,
        as_fake: Callable[[Tensor], Tensor] | None = None,
        meta_place: Callable[[torch.UntypedStorage, bool], torch.device] | None = None,
        most: int = MAX_EVENTS,
    ) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.complete = True
        self.log, self._clock = EventLog(clock), clock
        self._workspaces, self._cost = workspaces, cost
        self._as_fake, self._meta_place, self._most = as_fake, meta_place, most
        self.addresses: list[tuple[int, int]] = []
        self._operators: dict[Any, Operator] = {}
        self._plain: dict[tuple[type, ...], bool] = {(): True}
        self._followed: dict[int, _Followed] = {}
        self._results = KnownResults()
        self._in_optimizer = self._closed = False
        self._own = 0  # nanoseconds spent in here
        self._hooks: list[Any] = []
        self._resize: Any = None
        self._before: set[int] | None = None  # storages that there were, where that is known

    def __enter__(self) -> Recorder:
        self._hooks = [
            register_optimizer_step_pre_hook(lambda *_: self._enter_optimizer(True)),
            register_optimizer_step_post_hook(lambda *_: self._enter_optimizer(False)),
        ]
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            if not self._closed:
                self._resized(storage)
            return out

        # What resizes a storage by hand, as sharded training does, is no operator.
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        if self._as_fake is None:
            self._before = _storages()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        for hook in self._hooks:
            hook.remove()

    def _enter_optimizer(self, inside: bool) -> None:
        self._in_optimizer = inside

    def mark_iteration(self) -> None:
        """Say that an iteration begins here."""
        if not self._closed:
            self.log.marks.append(len(self.log.codes))

    def tag(self, tensors: Mapping[str, Tensor], category: Category) -> None:
        """Say what tensors hold, and their names; one that was not seen yet existed before."""
        for name, tensor in tensors.items():
            if not self._closed and (index := self._index(tensor, existed=True)) >= 0:
                self.log.rows[index].category, self.log.rows[index].name = category, name

    def __torch_dispatch__(
        self,
        function: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        types = tuple(types)  # a list, for an operator that runs others
        plain = self._plain.get(types)
        if plain is None:
            plain = not any(map(is_traceable_wrapper_subclass_type, types))
            self._plain[types] = plain
        if not plain:
            # What has memory is the tensors inside; the subclass will call with those.
            return NotImplemented
        kwargs = kwargs or {}
        op = self._operators.get(function)
        if op is None:
            op = self._operators[function] = Operator(len(self._operators), function)
            if op.unknown:
                self.notes.append(f"What {op.name} runs inside is not seen.")
        if op.view or self._closed:
            return function(*args, **kwargs)
        if op.draws(args, kwargs):
            op = self._drawing(function)
        if self._clock == "cuda events":
            return self._timed_on_gpu(op, function, args, kwargs)
        begun = time.perf_counter_ns()
        if self._meta_place is None or op.writes or op.hidden or op.unknown:
            out = function(*args, **kwargs)
        else:
            out = self._results.run(function, args, kwargs)
        ended = time.perf_counter_ns()
        self._log(op, function, args, kwargs, out, begun - self._own, ended - self._own)
        self._own += time.perf_counter_ns() - ended
        return out

    def _drawing(self, function: Any) -> Operator:
        """Return an operator that draws random numbers in some calls, for one of those."""
        key = function, "draws"
        if key not in self._operators:
            op = self._operators[key] = Operator(len(self._operators), function)
            op.name += ", with dropout"
        return self._operators[key]

    def _timed_on_gpu(self, op: Operator, function: Any, args: Any, kwargs: Any) -> Any:
        span = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun = time.time_ns()
        span[0].record()
        out = function(*args, **kwargs)
        span[1].record()
        calls = len(self.log.call_ops)
        self._log(op, function, args, kwargs, out, begun, time.time_ns())
        if len(self.log.call_ops) > calls:
            self.log.spans.append(span)
        return out

    def _log(
        self, op: Operator, function: Any, args: Any, kwargs: Any, out: Any, begun: int, ended: int
    ) -> None:
        """Append the events of an operator that has run."""
        log, index_of = self.log, self._index
        codes, times, rows = log.codes, log.times, log.rows
        read = [index_of(tensor) for tensor in op.read(args, kwargs)]
        written = [index_of(tensor) for tensor in op.written(args, kwargs)]
        fresh, given = [], False
        for tensor in results(out):
            given = True
            if (storage := self._storage(tensor)) is not None:
                if id(storage) not in self._followed:
                    fresh.append(self._follow(tensor, storage, op.index))
        if given and not fresh and not written:
            return  # a view, of which the schema does not tell
        log.call_starts.append(len(codes))
        log.call_ops.append(op.index)
        if op.resizes:
            for tensor in op.written(args, kwargs):
                self._resized(tensor.untyped_storage(), begun)
            written = [index_of(tensor) for tensor in op.written(args, kwargs)]
        size = self._workspaces(function, args, kwargs, out) if self._workspaces else 0
        if size:
            device = rows[(*fresh, *read)[0]].device
            fresh.append(len(rows))
            rows.append(Row(size, torch.uint8, (size,), device, "workspace", op.index))
        for index in fresh:
            codes.append(index << 2 | MALLOC)
            times.append(begun)
        backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        for index in read:
            if index >= 0:
                codes.append(index << 2 | READ)
                times.append(begun)
                if backward and rows[index].category != "gradient":
                    rows[index].saved = True
        for index in (*written, *fresh):
            if index >= 0:
                codes.append(index << 2 | WRITE)
                times.append(ended)
        if size:
            codes.append(fresh[-1] << 2 | FREE)
            times.append(ended)
        log.written.update(written)
        if self._cost is not None:
            tensors = (
                *op.read(args, kwargs),
                *op.written(args, kwargs),
                *(results(out) if not written else ()),
            )
            moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            log.spans.append(self._cost_of(op, function, args, kwargs, out, moved))
        if len(codes) >= self._most:
            self.stop(f"The trace ends after {len(codes)} events, as many as are kept.")

    def _cost_of(
        self, op: Operator, function: Any, args: Any, kwargs: Any, out: Any, moved: int
    ) -> float:
        """Return an operator's nanoseconds by the cost model; 0, and a note, where that fails.

        Formulas of FLOPs are torch's, and some of its versions have none for grouped heads, say.
        """
        assert self._cost is not None
        try:
            return self._cost(function, args, kwargs, out, moved)
        except Exception as error:
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            note = f"What {op.name} costs is not known ({said}): it counts as 0 ns."
            if note not in self.notes:
                self.notes.append(note)
            return 0.0

    def stop(self, why: str) -> None:
        """Record nothing more: what follows is not seen, and a note says why."""
        self.notes.append(why)
        self.complete, self._closed = False, True

    def _storage(self, tensor: Tensor) -> torch.UntypedStorage | None:
        """Return a tensor's storage; None, and a note, where it has none of its own."""
        if self._as_fake is not None:
            tensor = self._as_fake(tensor)
        if tensor.is_nested:
            self._say_not_followed("that are nested have no sizes")
            return None
        try:
            return tensor.untyped_storage()
        except NotImplementedError:
            self._say_not_followed(f"of layout {tensor.layout} have no storage")
            return None

    def _say_not_followed(self, why: str) -> None:
        note = f"Tensors {why}, and are not followed."
        if note not in self.notes:
            self.notes.append(note)

    def _index(self, tensor: Tensor, existed: bool = False) -> int:
        """Return the instance of a tensor that an operator is given; -1 where there is none.

        Args:
            existed: Whether one that was not seen yet existed before, which is looked up otherwise.
        """
        storage = self._storage(tensor)
        if storage is None:
            return -1
        known = self._followed.get(id(storage))
        if known is None:
            index = self._follow(tensor, storage, OUTSIDE)
            if not (existed or self._before is None or storage._cdata in self._before):
                # What reads files, or another process, made it meanwhile: it counts from here.
                self.log.codes.append(index << 2 | MALLOC)
                self.log.times.append(self._host_time())
            return index
        if type(tensor) is not Tensor and isinstance(tensor, torch.nn.Parameter):
            self.log.rows[known.index].category = "weight"  # also where it was made just now
        return known.index

    def _follow(self, tensor: Tensor, storage: torch.UntypedStorage, producer: int) -> int:
        """Follow a storage from now on; return its instance."""
        if producer == OUTSIDE:
            base = tensor._base
            tensor = tensor if base is None else base
            trained = isinstance(tensor, torch.nn.Parameter)
            trained |= tensor.requires_grad and tensor.is_leaf
            category: Category = "weight" if trained else "input"
        elif self._in_optimizer:
            category = "optimizer"
        elif torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():
            # With gradients enabled, a backward pass computes activations again.
            category = "gradient"
        else:
            category = "activation"
        device = getattr(tensor, "fake_device", None) or tensor.device
        if self._meta_place is not None and device.type == "meta":
            device = self._meta_place(storage, producer != OUTSIDE)
        size, index = storage.nbytes(), len(self.log.rows)
        self.log.rows.append(
            Row(size, tensor.dtype, tuple(tensor.shape), device, category, producer)
        )
        if self._clock == "cuda events":
            self.addresses.append((storage.data_ptr(), time.time_ns()))
        followed = _Followed(storage, self._released)
        followed.index, followed.size, followed.key = index, size, id(storage)
        self._followed[followed.key] = followed
        return index

    def _released(self, followed: weakref.ref[torch.UntypedStorage]) -> None:
        """Append that a storage's last owner has let go of it."""
        assert isinstance(followed, _Followed)
        del self._followed[followed.key]
        if not self._closed:
            self.log.codes.append(followed.index << 2 | FREE)
            self.log.times.append(self._host_time())

    def _host_time(self) -> int:
        """Return the time by which events are kept: Unix time where a GPU has its own clock."""
        if self._clock == "cuda events":
            return time.time_ns()
        return time.perf_counter_ns() - self._own

    def _resized(self, storage: torch.UntypedStorage, now: int | None = None) -> None:
        """Go on with another instance, where a storage has another size than before.

        An allocator gives it new memory, copies what fits, and releases the old.
        """
        followed = self._followed.get(id(storage))
        if followed is None or storage.nbytes() == followed.size:
            return
        old, row = followed.index, self.log.rows[followed.index]
        producer = self.log.call_ops[-1] if self.log.call_ops else OUTSIDE
        followed.index, followed.size = len(self.log.rows), storage.nbytes()
        items = followed.size // row.dtype.itemsize
        self.log.rows.append(
            Row(followed.size, row.dtype, (items,), row.device, row.category, producer, False,
                 row.name)
        )  # fmt: skip
        codes = [followed.index << 2 | MALLOC]
        if row.size and followed.size:
            codes += [old << 2 | READ, followed.index << 2 | WRITE]
        codes.append(old << 2 | FREE)
        self.log.codes += codes
        self.log.times += [self._host_time() if now is None else now] * len(codes)
        if self._clock == "cuda events":
            self.addresses.append((storage.data_ptr(), time.time_ns()))

    def finish(self) -> Trace:
        """Return what was recorded; nothing is, from now on."""
        self._closed = True
        names = [op.name for op in self._operators.values()]
        return self.log.trace(names, self.notes, self.complete)

    def mark_saved(self, outputs: Iterable[Tensor]) -> None:
        """Mark what autograd keeps for a backward pass from some tensors, if there will be one."""
        left = [tensor.grad_fn for tensor in outputs]
        seen: set[Any] = set()
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            for name in dir(node):
                if name.startswith("_saved_") or name == "saved_tensors":
                    try:
                        kept = getattr(node, name)
                    except RuntimeError:
                        continue  # a backward pass has released it
                    for tensor in results(kept):
                        if (index := self._index(tensor)) >= 0:
                            self.log.rows[index].saved = True
