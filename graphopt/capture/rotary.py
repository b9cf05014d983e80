"""Rotary modules whose tables depend on how long the sequence is.

LongRoPE and dynamic NTK decide by the positions of a step which frequencies to take, on values
that no trace can follow and, in some versions of transformers, by changing their own buffers.
Such a module stays one opaque call while the model is traced. What its tables are made of is found
out afterwards by running the module itself, on lengths on both sides of where it switches.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from graphopt.errors import CaptureError
from graphopt.ir.graph import Node

ROTARY = "graphopt_capture.rotary.default"
"""The node of an opaque call: (positions) -> the tensors that the module returns."""

LONGEST = 1 << 24
"""Tokens of the longest text tried: up to here fp32 holds every position."""

_LIBRARY = torch.library.Library("graphopt_capture", "FRAGMENT")
_LIBRARY.define("rotary(Tensor positions, int record) -> Tensor[]")
_NUMBERS = itertools.count()
_KNOWN: weakref.WeakValueDictionary[int, Rotary] = weakref.WeakValueDictionary()


@torch.library.impl(_LIBRARY, "rotary", "Meta")
def _on_meta(positions: Tensor, record: int) -> list[Tensor]:
    shapes = _KNOWN[record].shapes
    return [
        torch.empty([*positions.shape, *tail], dtype=dtype, device="meta") for tail, dtype in shapes
    ]


@dataclass(eq=False)
class Rotary:
    """One way in which a rotary module is called.

    Attributes:
        path: Qualified name of the module.
        module: A copy of it, as it was built.
        leaves: The flattened arguments; tensors are replaced by None.
        spec: How they flatten.
        place: Which leaf holds the positions.
        dtypes: dtype of the other tensors, by leaf. Only that, and their device, may matter.
        shapes: For every tensor it returns, the sizes behind [B, S], and the dtype.
        switch: Tokens of the longest text that gets the first tables; None where all get them.
    """

    path: str
    module: nn.Module
    leaves: list[Any]
    spec: Any
    place: int
    dtypes: dict[int, torch.dtype]
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = field(default_factory=list)
    out_spec: Any = None
    out_leaves: list[Any] = field(default_factory=list)
    switch: int | None = None
    number: int = field(default_factory=lambda: next(_NUMBERS))

    def tables(self, positions: Tensor) -> list[Tensor]:
        """Return what the module returns for positions [B, S], its tensors alone."""
        return [x for x in pytree.tree_leaves(self._run(positions)[0]) if isinstance(x, Tensor)]

    def tensors(self, length: int, pairs: int) -> list[Tensor]:
        """Return the float tensors [pairs] that the module holds after a text of `length`."""
        _, module = self._run(torch.tensor([[length - 1]]))
        held = [*module._buffers.values(), *vars(module).values()]
        return [
            x.detach().float().reshape(pairs)
            for x in held
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel() == pairs
        ]

    def parameters(self) -> dict[str, Any]:
        """Return the config's rotary parameters, of the layer type this call names."""
        stated = getattr(getattr(self.module, "config", None), "rope_parameters", None)
        stated = stated if isinstance(stated, dict) else {}
        kinds = [x for x in self.leaves if isinstance(x, str) and isinstance(stated.get(x), dict)]
        return stated[kinds[0]] if kinds else stated

    def _run(self, positions: Tensor) -> tuple[Any, nn.Module]:
        module = _copy(self.module)
        with _untraced():
            # What a longer text may have left behind goes with the shortest one.
            self._call(module, torch.zeros(1, 1, dtype=torch.long))
            return self._call(module, positions), module

    def _call(self, module: nn.Module, positions: Tensor) -> Any:
        leaves = list(self.leaves)
        leaves[self.place] = positions
        for place, dtype in self.dtypes.items():
            leaves[place] = torch.zeros(*positions.shape, 1, dtype=dtype)
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return type(module).forward(module, *args, **kwargs)

    def measure(self) -> bool:
        """Learn what the module returns and where it switches; return whether it is a table.

        A table has one row for every position.
        """
        positions = torch.zeros(3, 11, dtype=torch.long)
        leaves, self.out_spec = pytree.tree_flatten(self._run(positions)[0])
        self.out_leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        made = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not made or any(x.shape[:2] != positions.shape for x in made):
            return False
        self.shapes = [(tuple(x.shape[2:]), x.dtype) for x in made]
        self.switch = self._switch()
        return True

    def _switch(self) -> int | None:
        def first_rows(length: int) -> list[Tensor]:
            return [x[:, :2] for x in self.tables(torch.tensor([[0, 1, length - 1]]))]

        reference = first_rows(2)

        def same(length: int) -> bool:
            return all(map(torch.equal, first_rows(length), reference))

        if same(LONGEST):
            return None
        low, high = 2, LONGEST
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if same(middle) else (low, middle)
        return low

    def states_dependence(self) -> bool:
        """Whether its config names a kind that transformers computes anew at every step."""
        stated = getattr(self.module, "rope_type", None)
        kinds = stated.values() if isinstance(stated, dict) else [stated]
        return any(kind in ("dynamic", "longrope") for kind in kinds)


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """Inside, tensors are computed for real, and a trace that is going on sees nothing of it."""
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
        yield


def _copy(module: nn.Module) -> nn.Module:
    """Return a module without children as it is, with tensors of its own."""
    clone = copy.copy(module)
    clone.__dict__ = {k: v for k, v in vars(module).items() if k != "forward"}
    clone._buffers = {k: None if v is None else v.clone() for k, v in module._buffers.items()}
    return clone


def _may_depend(module: nn.Module) -> bool:
    """Whether a module could be rotary: positions in, and nothing but vectors inside."""
    if next(module.children(), None) is not None or next(module.parameters(), None) is not None:
        return False
    vectors = all(b is None or (b.dim() < 2 and not b.is_meta) for b in module._buffers.values())
    return vectors and "position_ids" in inspect.signature(type(module).forward).parameters


class Rotaries:
    """The opaque calls of a model.

    Attributes:
        records: Every call whose tables depend on the length.
    """

    def __init__(self, module: nn.Module) -> None:
        self.records: list[Rotary] = []
        self._parts = [(path, part) for path, part in module.named_modules() if _may_depend(part)]

    @contextlib.contextmanager
    def opaque(self) -> Iterator[None]:
        """Inside, modules whose tables depend on the length are one call each to a trace."""
        patched = [part for _, part in self._parts if "forward" not in vars(part)]
        for path, part in self._parts:
            if part in patched:
                part.forward = self._opaque_call(path, part, _copy(part))  # type: ignore[method-assign]
        try:
            yield
        finally:
            for part in patched:
                # A list of rotary modules, one a kind of layers, is traced as layers are.
                vars(part).pop("forward", None)

    def of(self, node: Node) -> Rotary:
        """Return the call that a `ROTARY` node stands for."""
        return _KNOWN[node.attrs["args"][1]]

    def _opaque_call(self, path: str, part: nn.Module, pristine: nn.Module) -> Callable[..., Any]:
        known: dict[Any, Rotary | None] = {}

        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            bound = inspect.signature(type(part).forward).bind(part, *args, **kwargs)
            positions = bound.arguments.get("position_ids")
            key = (str(spec), tuple(x.dtype if isinstance(x, Tensor) else repr(x) for x in leaves))
            if key not in known:
                known[key] = self._record(path, pristine, leaves, spec, positions)
            record = known[key]
            if record is None:
                return type(part).forward(part, *args, **kwargs)
            made = iter(torch.ops.graphopt_capture.rotary(positions, record.number))
            results = [next(made) if leaf is None else leaf for leaf in record.out_leaves]
            return pytree.tree_unflatten(results, record.out_spec)

        return forward

    def _record(
        self, path: str, pristine: nn.Module, leaves: Sequence[Any], spec: Any, positions: Any
    ) -> Rotary | None:
        """Return the call if its tables depend on the length, or may."""
        place = next((i for i, leaf in enumerate(leaves) if leaf is positions), None)
        if not isinstance(positions, Tensor) or positions.dim() != 2 or place is None:
            return None
        others = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor) and i != place}
        if not all(x.is_floating_point() for x in others.values()):
            return None
        record = Rotary(
            path,
            pristine,
            [None if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            spec,
            place,
            {i: x.dtype for i, x in others.items()},
        )
        try:
            with _untraced():
                table = record.measure()
        except Exception:  # whatever its forward raises, tracing it says the same more plainly
            return None
        if not table or (record.switch is None and not record.states_dependence()):
            return None
        _KNOWN[record.number] = record
        self.records.append(record)
        return record

    def refuse_rest(self, nodes: Iterator[Node]) -> None:
        """Refuse a call that no rotation was recognised behind.

        Raises:
            CaptureError: One of the nodes is such a call.
        """
        for node in nodes:
            if node.op == ROTARY:
                record = self.of(node)
                kind = record.parameters().get("rope_type", type(record.module).__name__)
                raise CaptureError(
                    f"{record.path}: its rotary tables depend on the length of the text "
                    f"({kind}), in a way that has no form in graphopt.",
                    "LongRoPE and dynamic NTK as transformers computes them have one, and so has "
                    "every kind of scaling that is the same for all lengths.",
                )


@dataclass(frozen=True)
class Constant:
    """Frequencies [R/2] and a factor on the tables, which hold for a range of lengths."""

    frequencies: Tensor
    scale: float


@dataclass(frozen=True)
class Ntk:
    """Dynamic NTK's numbers; see the op `ntk_frequencies`."""

    exponents: Tensor
    base: float
    factor: float
    length: int
    scale: float


Tables = tuple[Tensor, Tensor]
"""cos and sin [B, S, R/2], fp64."""


def grid(length: int) -> Tensor:
    """Return positions [2, 6] whose longest text has `length` tokens, in the first row alone."""
    positions = torch.tensor([[0, 1, 2, 3, 7, length - 1], [5, 0, 11, length // 2, length // 3, 2]])
    return positions.clamp(max=length - 1)


def recognise(
    record: Rotary, pairs: int, tables: Callable[[Tensor], Tables | None]
) -> tuple[Constant, Constant] | Ntk | None:
    """Return what makes the tables of a call: two sets of frequencies, or dynamic NTK.

    Args:
        pairs: R/2.
        tables: Gives the tables as a rotation uses them, for positions [B, S].

    Returns:
        The frequencies up to `record.switch` tokens and beyond; None for another kind.
    """
    switch = record.switch or LONGEST
    near = sorted({min(9, switch), min(4097, switch), switch})
    far = [n for n in (switch + 1, 2 * switch + 3, 8 * switch + 5) if n <= LONGEST]
    seen: dict[int, tuple[Tensor, Tables]] = {}
    for length in (*near, *far):
        made = tables(grid(length))
        if made is None:
            return None
        seen[length] = grid(length), made
    scale = {length: float(cos[0, 0, 0]) for length, (_, (cos, _)) in seen.items()}

    def fits(length: int, frequencies: Tensor) -> bool:
        positions, (cos, sin) = seen[length]
        angles = (positions[..., None].float() * frequencies).double()
        # fp32 rounds an angle, and the frequency it is made of, to about 2^-23 of itself.
        slack = 2e-5 + positions[..., None] * 2.0**-22
        wanted = (cos / scale[length], sin / scale[length])
        return all(
            bool(((x - y).abs() <= slack).all())
            for x, y in zip(wanted, (angles.cos(), angles.sin()), strict=True)
        )

    def constant(lengths: Sequence[int]) -> Constant | None:
        if len({scale[n] for n in lengths}) > 1 or not scale[lengths[0]]:
            return None
        for held in record.tensors(lengths[0], pairs):
            for frequencies in (held, -held):
                if all(fits(n, frequencies) for n in lengths):
                    return Constant(frequencies, round(scale[lengths[0]], 9))
        return None

    short = constant(near)
    if short is None:
        return None
    long = constant(far) if record.switch else short
    if long is not None:
        return short, long
    stated = record.parameters()
    base, factor = stated.get("rope_theta"), stated.get("factor")
    if not isinstance(base, int | float) or not isinstance(factor, int | float) or pairs < 2:
        return None
    exponents = torch.arange(0, 2 * pairs, 2, dtype=torch.float32) / (2 * pairs)
    from graphopt.ir.functional import ntk_frequencies

    numbers = (float(base), float(factor), switch)
    if len(set(scale.values())) == 1 and all(
        fits(n, ntk_frequencies(torch.tensor([[n - 1]]), exponents, *numbers)) for n in seen
    ):
        return Ntk(exponents, *numbers, short.scale)
    return None
