"""Gradients of a step: passed through roundings, and summed in a few flat buffers by ranks."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from graphopt.ir.graph import Program
from graphopt.pass_manager.rounding_statements import ROUNDED
from graphopt.support.ranks import Ranks

BUFFER = 2**26
"""Elements of a buffer, about: 256 MB."""


def pass_gradients(program: Program, *, passes: bool = True) -> None:
    """Give the roundings in a program the gradient of the identity while it is trained, in place.

    Args:
        passes: Whether they are to have it; a program that is not trained is without.
    """
    for function in program.functions.values():
        for node in function.nodes:
            if node.op == ROUNDED and passes:
                node.attrs["straight_through"] = True
            elif node.op == ROUNDED:
                node.attrs.pop("straight_through", None)


class SharedGradients:
    """The gradients of parameters, each a part of a flat buffer in which they are accumulated.

    A rank has those of the mean loss of its own windows. The mean of the ranks', each weighted by
    its share of the windows, is the gradient of the whole batch's mean loss.

    Args:
        parameters: Whose gradients they are; their `grad` is set, and stays.
        counted: Those among them whose gradients are counts over tokens, which are added up as
            they are.
        ranks: Who shares a step's windows.
        device: Where parameters are.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        counted: Collection[nn.Parameter],
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self._ranks = ranks
        self._loss = torch.zeros(1, device=device)
        alone = {id(parameter) for parameter in counted}
        groups: list[tuple[bool, list[nn.Parameter]]] = []
        for parameter in parameters:
            mean = id(parameter) not in alone
            group = groups[-1][1] if groups and groups[-1][0] == mean else None
            if group is None or sum(p.numel() for p in group) >= BUFFER:
                groups.append((mean, group := []))
            group.append(parameter)
        self._buffers: list[tuple[bool, Tensor]] = []
        for mean, group in groups:
            flat = torch.zeros(sum(p.numel() for p in group), device=device)
            for parameter, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
                parameter.grad = part.view_as(parameter)
            self._buffers.append((mean, flat))

    def clear(self) -> None:
        """Set all to zero, in front of a step."""
        for _, flat in self._buffers:
            flat.zero_()

    def reduce(self, loss: Tensor, share: float) -> Tensor:
        """Make them those of the whole batch; return its loss.

        Args:
            loss: The mean loss of this rank's windows, a scalar.
            share: This rank's share of the batch's windows.
        """
        for mean, flat in self._buffers:
            self._into(flat.mul_(share) if mean else flat)
        self._loss.copy_(loss.reshape(1)).mul_(share)
        return self._into(self._loss)[0]

    def _into(self, flat: Tensor) -> Tensor:
        """Sum a buffer over ranks, where it lies."""
        total = self._ranks.total(flat)
        if total.data_ptr() != flat.data_ptr():
            flat.copy_(total)
        return flat
