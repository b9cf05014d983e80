"""The steps of capture: what is done to exported functions, in this order, until they are ops.

A step works on the function around the layers, or on that of one kind of layers. Later ones count
on earlier ones: what layers compute alike is hoisted out of them before tables and masks are looked
for, and sums are raised before rotations, and those before attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from graphopt.capture.activations import raise_activations
from graphopt.capture.attention import raise_attention
from graphopt.capture.canonical import canonicalise
from graphopt.capture.hoist import LayerKind, hoist, merge_equal_constants, stream_values
from graphopt.capture.layout_ops import raise_layout_ops
from graphopt.capture.linears import raise_linears, sink_reshape_below_linear
from graphopt.capture.mask_operands import set_masks
from graphopt.capture.masks import MaskRecogniser
from graphopt.capture.merge_layer_functions import merge_layer_functions
from graphopt.capture.norms import raise_norms
from graphopt.capture.position_embeddings import raise_position_embeddings
from graphopt.capture.rewriting import Raiser
from graphopt.capture.rotary import Rotaries
from graphopt.capture.rotation import RopeTables, raise_ropes
from graphopt.capture.slots import SlotSources
from graphopt.ir.graph import In, Node, Value
from graphopt.ir.printer import print_function
from graphopt.ir.types import B, S, Type
from graphopt.rewrite import merge_equal_nodes


@dataclass(frozen=True)
class CaptureStep:
    """What a step did.

    Attributes:
        name: What the step is called.
        where: The layer or `the model`, whose function it worked on.
        made, removed: How many nodes, of all functions; one that was changed is both.
        text: The functions behind it.
    """

    name: str
    where: str
    made: int
    removed: int
    text: str

    def __str__(self) -> str:
        return f"{self.name} in {self.where}: {self.made} nodes made, {self.removed} removed"


Watch = Callable[[CaptureStep], None]
"""Told about every step when it is done."""


@dataclass
class Capturing:
    """A model on its way from exported functions to a program.

    Attributes:
        outer: The function around the layers, with a node that stands for each call of one.
        kinds: Layers by their functions.
        slots: Derived weight slots of the outer graph.
        rotaries: The modules that make rotary tables.
        notes: What stays as ATen, and why: (where, reason).
        inputs: The outer graph's parameters by name.
        tables, masks: Which values are rotary tables and masks; there once `find-tables` ran.
        held: How many values nothing reads but the masks that are set later, for the kind of
            layers at hand.
        left: The attentions of that kind that stay as ATen, and why.
    """

    outer: Raiser
    kinds: list[LayerKind]
    slots: SlotSources
    rotaries: Rotaries
    notes: list[tuple[str, str]] = field(default_factory=list)
    inputs: dict[str, Value] = field(default_factory=dict)
    tables: RopeTables | None = None
    masks: MaskRecogniser | None = None
    held: int = 0
    left: list[tuple[str, str]] = field(default_factory=list)

    def layer_calls(self) -> set[Node]:
        """Return the nodes of the outer graph that stand for calls of layers."""
        return {layer_call for kind in self.kinds for layer_call in kind.layer_calls}

    def run(self, watch: Watch | None = None) -> None:
        """Do all steps, each for the outer graph or for one kind of layers after the other."""
        for model_steps, layer_steps in PHASES:
            for name, model_step in model_steps:
                self._do(name, lambda step=model_step: step(self), "the model", watch)  # type: ignore[misc]
            for kind in list(self.kinds) if layer_steps else []:
                for name, layer_step in layer_steps:
                    where = kind.raiser.label
                    self._do(name, lambda step=layer_step, of=kind: step(self, of), where, watch)  # type: ignore[misc]

    def _do(self, name: str, step: Callable[[], None], where: str, watch: Watch | None) -> None:
        if watch is None:
            step()
            return
        before = self._nodes()
        step()
        after = self._nodes()
        watch(CaptureStep(name, where, len(after - before), len(before - after), self._text()))

    def _text(self) -> str:
        """Return the functions as they stand."""
        layer_calls = self.layer_calls()
        # Their arguments are those of the module's own call; what layers take are the operands.
        arguments = {layer_call: layer_call.attrs for layer_call in layer_calls}
        for layer_call in layer_calls:
            layer_call.attrs = {"args": [In(index) for index in range(len(layer_call.inputs))]}
        try:
            raisers = [self.outer, *(kind.raiser for kind in self.kinds)]
            return "\n\n".join(print_function(r.function, r.types) for r in raisers)
        finally:
            for layer_call, attrs in arguments.items():
                layer_call.attrs = attrs

    def _nodes(self) -> set[tuple[Node, str, str]]:
        """Return all nodes with what they are, which a rule may also change in place."""
        functions = [self.outer.function, *(kind.raiser.function for kind in self.kinds)]
        nodes = [node for function in functions for node in function.nodes]
        return {(node, node.op, repr(node.attrs)) for node in nodes}


# Steps of the outer graph ------------------------------------------------------------------------


def _canonicalise_outer(state: Capturing) -> None:
    canonicalise(state.outer)
    state.inputs = {value.name: value for value in state.outer.function.params}


def _merge_outer_nodes(state: Capturing) -> None:
    """Masks and tables hoisted from several kinds of layers are often the same."""
    merge_equal_nodes(state.outer.function, state.layer_calls())


def _find_tables(state: Capturing) -> None:
    """Look for rotary tables and masks; a model without a position input gets one."""
    if "position_ids" not in state.inputs:
        value = Value("position_ids")
        state.outer.function.params.append(value)
        state.outer.types[value] = Type((B, S), torch.int64)
        state.inputs["position_ids"] = value
    position_ids = state.inputs["position_ids"]
    state.tables = RopeTables(state.outer, position_ids, state.rotaries)
    state.masks = MaskRecogniser(state.outer, state.inputs)


def _drop_unused(state: Capturing) -> None:
    state.notes += state.outer.notes
    for kind in state.kinds:
        kind.drop_unused_params()
    state.outer.sweep()
    functions = [state.outer.function, *(kind.raiser.function for kind in state.kinds)]
    state.rotaries.refuse_rest(node for function in functions for node in function.nodes)


def _merge_layer_functions(state: Capturing) -> None:
    state.kinds = merge_layer_functions(state.kinds)


# Steps of a kind of layers -----------------------------------------------------------------------


def _hoist(state: Capturing, kind: LayerKind) -> None:
    hoist(state.outer, kind, stream_values(state.outer, state.layer_calls()))


def _raise_ropes(state: Capturing, kind: LayerKind) -> None:
    kind.raiser.attempt(raise_ropes, kind, state.tables)


def _raise_attention(state: Capturing, kind: LayerKind) -> None:
    """Raise attention, and keep what masks are made of alive until they are set."""
    raiser = kind.raiser
    kind.raised, left = raise_attention(raiser)
    state.left = left
    hold = [term.value for item in kind.raised for term in item.terms]
    raiser.function.results += hold
    state.held = len(hold)
    raiser.sweep()
    kind.raised = [item for item in kind.raised if item.node in raiser.function.nodes]


def _raise_masks(state: Capturing, kind: LayerKind) -> None:
    raiser, held = kind.raiser, state.held
    if held:
        values = raiser.function.results[-held:]
        raiser.function.results = raiser.function.results[:-held]
        terms = [term for item in kind.raised for term in item.terms]
        for term, value in zip(terms, values, strict=True):
            term.value = value
    assert state.masks is not None
    left = state.left + set_masks(kind, state.outer, state.inputs, state.masks)
    raiser.sweep()
    state.notes += raiser.notes
    state.notes += [(f"{raiser.label} {name}", reason) for name, reason in left]


_SUMS = (
    ("raise-linears", lambda raiser, slots: raiser.attempt(raise_linears, raiser, slots)),
    ("raise-norms", lambda raiser, slots: raiser.attempt(raise_norms, raiser)),
    ("raise-activations", lambda raiser, slots: raiser.attempt(raise_activations, raiser)),
    (
        "sink-reshape-below-linear",
        lambda raiser, slots: raiser.attempt(sink_reshape_below_linear, raiser),
    ),
)
_LAYOUT_OPS = (
    "raise-layout-ops",
    lambda raiser, slots: raiser.attempt(raise_layout_ops, raiser, slots),
)

ModelStep = tuple[str, Callable[[Capturing], None]]
LayerStep = tuple[str, Callable[[Capturing, LayerKind], None]]


def _of_model(rule: tuple[str, Callable[[Raiser, SlotSources], None]]) -> ModelStep:
    name, run = rule
    return name, lambda state: run(state.outer, state.slots)


def _of_layer(rule: tuple[str, Callable[[Raiser, SlotSources], None]]) -> LayerStep:
    name, run = rule
    return name, lambda state, kind: run(kind.raiser, kind.slots)


PHASES: tuple[tuple[tuple[ModelStep, ...], tuple[LayerStep, ...]], ...] = (
    (
        (("canonicalise", _canonicalise_outer),),
        (
            (
                "merge-equal-constants",
                lambda state, kind: merge_equal_constants(kind),
            ),
            ("canonicalise", lambda state, kind: canonicalise(kind.raiser)),
            ("hoist", _hoist),
        ),
    ),
    (
        (("merge-equal-nodes", _merge_outer_nodes), ("find-tables", _find_tables)),
        (
            *map(_of_layer, _SUMS),
            ("raise-ropes", _raise_ropes),
            _of_layer(_LAYOUT_OPS),
            ("raise-attention", _raise_attention),
            _of_layer(_LAYOUT_OPS),
            ("raise-masks", _raise_masks),
        ),
    ),
    (
        (
            (
                "raise-position-embeddings",
                lambda state: state.outer.attempt(
                    raise_position_embeddings, state.outer, state.inputs
                ),
            ),
            *map(_of_model, (*_SUMS, _LAYOUT_OPS)),
            ("drop-unused", _drop_unused),
            ("merge-layer-functions", _merge_layer_functions),
        ),
        (),
    ),
)
"""Steps of the outer graph, and behind them those of every kind of layers, kind by kind."""
