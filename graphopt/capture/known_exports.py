"""What was exported in this process, by what it calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from graphopt.capture.fx_conversion import Exported
from graphopt.capture.hoist import held_constant
from graphopt.capture.layer_calls import LAYER, LayerCall
from graphopt.ir.graph import Function, Node, Value
from graphopt.ir.types import Type

_MOST = 512
"""How many exports are remembered: a few tens of kilobytes each."""


@dataclass(frozen=True)
class _Known:
    """An exported function without anything of the module that it was exported from.

    Attributes:
        constants: Of every constant slot; None where the module holds the tensor.
        calls: Of the layer calls by their number: what was told apart, and its plain arguments.
    """

    function: Function
    types: Mapping[Value, Type]
    constants: Mapping[str, Tensor | None]
    calls: Mapping[int, tuple[Any, list[str]]]


class KnownExports:
    """Exported functions by the digest of what they call; what was unused longest goes first."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def add(self, key: str | None, exported: Exported, module: nn.Module) -> None:
        """Remember what `module` was exported to; a key of None is that of nothing."""
        if key is None:
            return
        function, types = _copy(exported.function, exported.types)
        constants = {
            slot: None if held_constant(module, slot) is not None else constant.clone()
            for slot, constant in exported.constants.items()
        }
        calls = {
            _number(node): (call.key, _arguments(call))
            for node, call in exported.layer_calls.items()
        }
        self._known[key] = _Known(function, types, constants, calls)
        while len(self._known) > _MOST:
            del self._known[next(iter(self._known))]

    def get(
        self, key: str | None, module: nn.Module, calls: Sequence[LayerCall] = ()
    ) -> Exported | None:
        """Return what a module of this digest is exported to, with its own constants and layers.

        Args:
            calls: Of its layers, by number, with sizes that are plain numbers.
        """
        if key is None or key not in self._known:
            return None
        known = self._known[key]
        constants: dict[str, Tensor] = {}
        for slot, made in known.constants.items():
            constant = held_constant(module, slot) if made is None else made
            if constant is None:
                return None
            constants[slot] = constant.detach().clone()
        # An argument that is a size is one number here, and an expression in a trace.
        if any(_arguments(calls[number]) != plain for number, (_, plain) in known.calls.items()):
            return None
        self._known[key] = self._known.pop(key)  # to the end: it is the last to go
        exported = Exported(*_copy(known.function, known.types), constants)
        for node in exported.function.nodes:
            if node.op == LAYER:
                number = _number(node)
                call = calls[number]
                exported.layer_calls[node] = replace(call, key=(known.calls[number][0], call.key))
        return exported


KNOWN = KnownExports()


def _copy(function: Function, types: Mapping[Value, Type]) -> tuple[Function, dict[Value, Type]]:
    clone = function.clone()
    pairs = zip(function.values(), clone.values(), strict=True)
    return clone, {new: types[old] for old, new in pairs}


def _number(node: Node) -> int:
    return int(node.attrs["args"][1])


def _arguments(call: LayerCall) -> list[str]:
    return [repr(leaf) for leaf in call.leaves]
