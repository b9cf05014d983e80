"""How a decoder takes pictures, found by running a model around its layers.

The layers are left out and embeddings are given, so that nothing is read of any weight: what
reaches the layers are the tables and the masks that the model itself makes of positions and of the
kinds of tokens.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphopt.capture.layer_calls import repeated_layers
from graphopt.errors import CaptureError, first_line
from graphopt.ir import functional
from graphopt.ir.graph import Program, resolve_attrs
from graphopt.ir.ops.pictures import AXES
from graphopt.ir.vision import Sections
from graphopt.support.boundary import out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REMEDY = (
    "graphopt takes decoders that read pictures as embeddings among those of the text, once, in "
    "front of the first layer."
)

_KINDS = ("token_type_ids", "mm_token_type_ids")
"""What forward passes call the kinds of tokens: 1 for a picture's, 0 for text."""

_LONGEST = 4096
"""Tokens of the longest text on which masks are compared."""


class _Seen(Exception):
    """All layers were reached."""


@dataclass
class _Probe:
    """What each layer was called with, but for the stream."""

    layers: list[dict[str, Any]] = field(default_factory=list)

    def tables(self) -> tuple[Tensor, Tensor] | None:
        """Return cos and sin as the first layer gets them."""
        for value in self.layers[0].values() if self.layers else ():
            if isinstance(value, tuple) and len(value) == 2:
                if all(isinstance(x, Tensor) and x.is_floating_point() for x in value):
                    return value
        return None


@contextlib.contextmanager
def _without_layers(decoder: nn.Module, probe: _Probe) -> Iterator[None]:
    layers = list(repeated_layers(decoder).values())

    def stub(last: bool) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            named = {f"{place}": value for place, value in enumerate(args)}
            probe.layers.append(named | kwargs)
            if last:
                raise _Seen
            return x

        return forward

    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = stub(layer is layers[-1])  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            del layer.__dict__["forward"]
            if before is not None:
                layer.__dict__["forward"] = before


def _width(module: PreTrainedModel) -> int:
    embedding: Any = module.get_input_embeddings()
    return int(embedding.weight.shape[1])


def _probe(module: PreTrainedModel, decoder: nn.Module, **inputs: Tensor) -> _Probe:
    """Return what a model calls its layers with for one text of embeddings that are all 0."""
    probe = _Probe()
    length = inputs["attention_mask"].shape[1]
    embeddings = torch.zeros(1, length, _width(module))
    with torch.no_grad(), _without_layers(decoder, probe), contextlib.suppress(_Seen):
        module(inputs_embeds=embeddings, use_cache=False, **inputs)
    return probe


def axis_sections(module: PreTrainedModel, decoder: nn.Module, program: Program) -> Sections | None:
    """Return which frequencies turn with which axis; None where positions have one axis.

    Raises:
        CaptureError: The axes do not have one run of frequencies each.
    """
    length = 7
    mask = torch.ones(1, length, dtype=torch.long)
    still = torch.zeros(AXES, 1, length, dtype=torch.long)

    def tables(positions: Tensor) -> tuple[Tensor, Tensor] | None:
        try:
            made = _probe(module, decoder, attention_mask=mask, position_ids=positions).tables()
        except Exception as error:  # a model that knows no such positions fails in any way
            if out_of_memory(error):
                raise
            return None
        fits = made is not None and all(x.shape[:-1] == (1, length) for x in made)
        return made if fits else None

    before = tables(still)
    if before is None:
        return None
    turned = []
    for axis in range(AXES):
        positions = still.clone()
        positions[axis] = torch.arange(length)
        after = tables(positions)
        assert after is not None
        turned.append((after[1] != before[1]).any(1)[0])
    if not torch.stack(turned).any():  # positions are not what the tables are made of
        return None
    kinds = [node for f in program.functions.values() for node in f.nodes]
    if any(node.op in ("by_length", "ntk_frequencies") for node in kinds):
        raise CaptureError(
            "Positions of three axes whose frequencies depend on the length of the text have no "
            "form in graphopt.",
            "Choose a config with one set of frequencies (rope_parameters).",
        )
    pairs = [node.attrs.get("interleaved", False) for node in kinds if node.op == "rope"]
    return _runs(turned, neighbours=bool(pairs and pairs[0]))


def _runs(turned: list[Tensor], *, neighbours: bool) -> Sections:
    """Return how many frequencies each axis turns, from which entries of a table it changes."""
    own = torch.stack(turned)
    width = own.shape[1] // 2
    first, second = (own[:, 0::2], own[:, 1::2]) if neighbours else (own[:, :width], own[:, width:])
    halves = torch.equal(first, second)
    own = first if halves else own
    axis_of = own.int().argmax(0)
    counts = [int((axis_of == axis).sum()) for axis in range(AXES)]
    if not bool((own.sum(0) == 1).all()) or not bool((axis_of.diff() >= 0).all()):
        raise CaptureError(
            "The rotary frequencies of three axes are interleaved, which has no form in graphopt.",
            REMEDY,
        )
    return counts[0], counts[1], counts[2]


def _windows(program: Program) -> list[int | None]:
    """Return the window of every attention, in the order of the calls."""
    return [
        resolve_attrs(node, call).get("window")
        for call in program.calls
        for node in program.function_of(call).nodes
        if node.op == "attention"
    ]


def _masks(probe: _Probe) -> list[Tensor | None]:
    return [layer.get("attention_mask") for layer in probe.layers]


def sees_both_ways(module: PreTrainedModel, decoder: nn.Module, program: Program) -> bool:
    """Return whether tokens of one picture see each other both ways.

    Raises:
        CaptureError: The kinds of tokens change the masks in another way.
    """
    accepted = inspect.signature(module.forward).parameters
    names = [name for name in _KINDS if name in accepted]
    windows = _windows(program)
    if not names:
        return False
    longest = max((w for w in windows if w is not None), default=0)
    length = min(longest, _LONGEST) + 12
    kinds = torch.zeros(1, length, dtype=torch.long)
    # Two pictures side by side with a word between, and words around them.
    kinds[0, -9:-6] = kinds[0, -5:-1] = 1
    mask = torch.ones(1, length, dtype=torch.long)

    def seen(kinds: Tensor) -> list[Tensor | None]:
        try:
            given: Mapping[str, Tensor] = dict.fromkeys(names, kinds)
            probe = _probe(module, decoder, attention_mask=mask, **given)
        except Exception as error:
            if out_of_memory(error):
                raise
            raise CaptureError(
                f"{type(module).__name__} cannot be run on kinds of tokens ({', '.join(names)}): "
                f"{first_line(error)}.",
                REMEDY,
            ) from error
        return _masks(probe)

    plain, sighted = seen(torch.zeros_like(kinds)), seen(kinds)
    if all(_same(a, b) for a, b in zip(plain, sighted, strict=True)):
        return False
    numbers = functional.picture_numbers(kinds[0].bool())[None]
    for window, made in zip(windows, sighted, strict=True):
        wanted = functional.picture_mask(numbers, kinds, window) == 0
        if (
            made is None
            or made.shape[-2:] != wanted.shape[-2:]
            or not torch.equal(_allowed(made), wanted)
        ):
            raise CaptureError(
                f"{type(module).__name__}: how tokens of pictures see others is neither causal "
                "nor both ways within a picture, and has no form in graphopt.",
                REMEDY,
            )
    return True


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _allowed(mask: Tensor) -> Tensor:
    """Return a mask of the model, bool or additive, as bool [1, 1, S, T]."""
    return mask[:, :1] if mask.dtype == torch.bool else mask[:, :1] == 0
