"""What a torch operator does with its arguments by its schema: read, write, or look at shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def words(text: str) -> frozenset[str]:
    """Return the words of a text, as names of operators are written down here."""
    return frozenset(text.split())


OVERWRITES = words(
    "copy_ zero_ fill_ normal_ uniform_ random_ bernoulli_ exponential_ geometric_ log_normal_ "
    "cauchy_ set_ set_data resize_ resize_as_"
)
"""In-place operators that don't read what they write."""

SHAPE_ONLY = words(
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty "
    "new_empty_strided new_zeros new_ones new_full resize_as_"
)
"""Operators that take a tensor for its shape and dtype, and don't read it."""

READS_VALUES = words("_local_scalar_dense equal is_nonzero allclose item _is_all_true _is_any_true")
"""Operators without a tensor as result that read what a tensor holds; others look at its shape."""

Place = int | str
"""Where an argument is: by position or by keyword."""

_HIDDEN_WRITES: dict[str, tuple[tuple[Place, ...], int]] = {
    "native_batch_norm": ((3, 4), 5),
    "cudnn_batch_norm": ((3, 4), 5),
    "miopen_batch_norm": ((3, 4), 5),
}
"""Running means are written in training, which these old schemas don't say."""

_RESIZES = words("resize_ resize_as_ set_ set_data")


class Operator:
    """How an operator touches its arguments.

    Attributes:
        index: The operator's place in the trace's names.
        name: Its name, such as "aten.add_.Tensor".
        view: It makes views alone, or looks at shapes alone: no memory is touched.
        reads: Where the arguments are that are read.
        writes: Where the arguments are that are written in place.
        written_if: The flag, by position, without which the arguments in `hidden` are not written.
        hidden: Arguments that are written though the schema says nothing of it.
        resizes: It may give a storage that it writes another size.
        dropout: Where the probability is by which it drops what it computes; None for nowhere.
        unknown: It has no schema: every tensor argument is read, and every result is fresh.
    """

    __slots__ = (
        "dropout", "hidden", "index", "name", "reads", "resizes", "unknown", "view", "writes",
        "written_if",
    )  # fmt: skip

    def __init__(self, index: int, function: Any) -> None:
        self.index, self.name = index, str(function)
        self.reads: list[Place] = []
        self.writes: list[Place] = []
        self.view = self.resizes = False
        self.hidden: tuple[Place, ...] = ()
        self.dropout: Place | None = None
        self.written_if = 0
        schema = getattr(function, "_schema", None)
        self.unknown = schema is None
        if schema is None:
            return
        short = schema.name.split("::")[-1].removeprefix("_foreach_")
        self.resizes = short in _RESIZES
        self.hidden, self.written_if = _HIDDEN_WRITES.get(short, ((), 0))
        for position, argument in enumerate(schema.arguments):
            place = argument.name if argument.kwarg_only else position
            if argument.name == "dropout_p":
                self.dropout = place
            if "Tensor" not in str(argument.type):
                continue
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written:
                self.writes.append(place)
                self.resizes |= argument.is_out
            if short in SHAPE_ONLY or (written and (short in OVERWRITES or argument.is_out)):
                continue
            self.reads.append(place)
        makes_tensors = any("Tensor" in str(result.type) for result in schema.returns)
        aliases = [r.alias_info is not None for r in schema.returns if "Tensor" in str(r.type)]
        looks = not makes_tensors and not self.writes and short not in READS_VALUES
        self.view = not self.writes and (looks or (makes_tensors and all(aliases)))
        if short == "lift_fresh":
            # What `torch.tensor` makes of values enters by it, though the schema calls it a view.
            self.view, self.reads = False, []

    def draws(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Return whether a call drops what it computes at random, as attention does in training."""
        place = self.dropout
        if place is None:
            return False
        if isinstance(place, int) and place < len(args):
            return bool(args[place])
        return bool(kwargs.get("dropout_p"))

    def written(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
        """Yield the tensors that a call writes in place."""
        yield from self.arguments(self.writes, args, kwargs)
        if self.hidden and args[self.written_if]:
            yield from self.arguments(self.hidden, args, kwargs)

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
        """Yield the tensors that a call reads."""
        return self.arguments(self.reads, args, kwargs)

    def arguments(
        self, places: Sequence[Place], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[Tensor]:
        """Yield the tensors at some places of a call's arguments; those left out have none."""
        if self.unknown and places is self.reads:
            yield from (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            return
        for place in places:
            if isinstance(place, str):
                value = kwargs.get(place)
            else:
                value = args[place] if place < len(args) else None
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from (item for item in value if isinstance(item, Tensor))


def results(out: Any) -> Iterator[Tensor]:
    """Yield the tensors in what an operator gives."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (list, tuple)):
        for item in out:
            if isinstance(item, Tensor):
                yield item
            elif isinstance(item, (list, tuple)):
                yield from results(item)


def data_dependence(error: BaseException) -> str | None:
    """Return why a run on tensors without values had to stop; None where that was not the reason.

    Args:
        error: What was raised, while tensors without values were computed with.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
    )
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    if isinstance(error, DataDependentOutputException):
        return f"{error.func} asks for a value"
    if isinstance(error, DynamicOutputShapeException):
        return f"the size of what {error.func} gives depends on values"
    if isinstance(error, GuardOnDataDependentSymNode):
        return "a condition depends on a value"
    text = str(error)
    known = (NotImplementedError, RuntimeError, TypeError)
    if "same device" in text:
        return None  # the run would fail with values, too
    if isinstance(error, known) and re.search(r"(?<![a-z])meta(?![a-z])", text, re.IGNORECASE):
        # Tensors of device "meta" refuse in many words; an operator's name says most.
        found = re.search(r"aten::(\w+)|torch\.(\w+)\(\)|cannot (\w+) a meta", text)
        if found is None:
            return "a value is asked for"
        name = next(filter(None, found.groups()))
        return f"{name} asks for a value, or the size of what it gives depends on values"
    return None
