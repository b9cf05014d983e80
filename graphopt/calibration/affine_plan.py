"""What every site of a program is transformed by: the sizes, the parts and their matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt.calibration.affine_factors import FactorMaker, Sizes, site_sizes, wanted_values
from graphopt.calibration.second_moments import SecondMoments, block_moments
from graphopt.ir.affine import (
    Factors,
    add_weights,
    insert_key_transform,
    insert_transform,
    key_weights,
)
from graphopt.ir.affine_sites import InputSite, KeySite, Sites, find_sites
from graphopt.ir.blocks import NO_BLOCK, find_blocks, layer_calls
from graphopt.ir.graph import Call, Function, Program, Value
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import Type
from graphopt.support.progress import Progress, silent


@dataclass(frozen=True)
class PlannedInput:
    """An input site of a function, and what its transform is made of.

    Attributes:
        sizes: How its features are divided, as the first call has them.
        roles: The parts of the transform.
    """

    site: InputSite
    sizes: Sizes
    roles: tuple[str, ...]


@dataclass
class FunctionPlan:
    """The transforms of one function.

    Attributes:
        calls: The layers that call it, by position.
        inputs, keys: What is transformed.
        factors: For every call, in order of `inputs`, the factors.
        key_matrices: For every call, in order of `keys`, the matrices.
        slots: Slots of each of `inputs`, then of each of `keys`, once they are inserted.
    """

    function: Function
    calls: list[Call]
    inputs: list[PlannedInput]
    keys: list[KeySite]
    factors: list[list[Factors]] = field(default_factory=list)
    key_matrices: list[list[Tensor]] = field(default_factory=list)
    slots: list[dict[str, str]] = field(default_factory=list)


@dataclass
class AffinePlan:
    """The transforms of a program.

    Attributes:
        functions: In order of execution.
        left: What is left alone, with the reason.
    """

    functions: list[FunctionPlan] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)


def plan_transforms(
    program: Program,
    maker: FactorMaker,
    *,
    heads: bool = True,
    keys: bool = True,
    blocks_alone: bool = False,
    windows: Tensor | None = None,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> AffinePlan:
    """Find a program's sites and make the factors of each; nothing is changed.

    Args:
        heads: Whether values are mapped feature by feature, and merged heads across heads.
        keys: Whether queries and keys are transformed.
        blocks_alone: Whether layers stay as they are that are no blocks, such as those that give
            keys to later ones; so they do in any case where text is walked.
        windows: Text for a maker that needs some, int64 [N, S].

    Raises:
        PassError: A transform is singular, or activations are not finite.
    """
    plan, kinds = AffinePlan(), infer_program(program)[0]
    found = find_sites(program)
    blocks = {block.position for block in find_blocks(program)}
    by_function: dict[str, list[int]] = {}
    for position in layer_calls(program):
        by_function.setdefault(program.calls[position].function, []).append(position)
    planned: dict[int, FunctionPlan] = {}
    for name, sites in found.items():
        positions = by_function[name]
        where = program.calls[positions[0]].path or name
        plan.left += [(f"{where}.{what}", reason) for what, reason in sites.left]
        if (maker.needs_text or blocks_alone) and not set(positions) <= blocks:
            plan.left += [(program.calls[at].path or name, NO_BLOCK) for at in positions]
            continue
        part = _plan_function(program, name, sites, maker, kinds[positions[0]], heads, keys)
        part.calls = [program.calls[position] for position in positions]
        for site in part.inputs:
            if site.sizes.form in ("dense", "block-diagonal", "none") and site.sizes.right > 1:
                width = kinds[positions[0]][site.site.x].shape[-1]
                plan.left.append(
                    (f"{where}.{site.site.stem}", f"{width} features have no two useful factors: "
                     f"its transform is {site.sizes.form}")
                )  # fmt: skip
        plan.functions.append(part)
        planned |= dict.fromkeys(positions, part)
    layers: Iterator[tuple[int, Mapping[Value, SecondMoments]]]
    if maker.needs_text:
        assert windows is not None
        wanted = {part.function.name: wanted_values(_kept(part)) for part in plan.functions}
        walk = block_moments(
            program, windows, lambda block: wanted.get(block.function.name, ()),
            device=device or torch.device("cpu"), progress=progress,
        )  # fmt: skip
        layers = ((block.block.position, moments) for block, moments in walk)
    else:
        layers = ((position, {}) for position in planned)
    for position, moments in layers:
        if position in planned:
            _make(planned[position], program.calls[position], kinds[position], maker, moments,
                  heads)  # fmt: skip
    return plan


def _kept(part: FunctionPlan) -> Sites:
    return Sites([item.site for item in part.inputs], part.keys)


def _plan_function(
    program: Program,
    name: str,
    sites: Sites,
    maker: FactorMaker,
    types: Mapping[Value, Type],
    heads: bool,
    keys: bool,
) -> FunctionPlan:
    inputs: list[PlannedInput] = []
    for site in sites.inputs:
        sizes = site_sizes(site, types, heads)
        roles = maker.roles(site, sizes)
        if roles:
            inputs.append(PlannedInput(site, sizes, tuple(roles)))
    transformed = maker.kind not in ("scale", "none")
    return FunctionPlan(
        program.functions[name], [], inputs, sites.keys if keys and transformed else []
    )


def _make(
    part: FunctionPlan,
    call: Call,
    types: Mapping[Value, Type],
    maker: FactorMaker,
    moments: Mapping[Value, SecondMoments],
    heads: bool,
) -> None:
    made: list[Factors] = []
    for item in part.inputs:
        sizes = site_sizes(item.site, types, heads)
        made.append(
            maker.factors(part.function, call, item.site, types, sizes, item.roles, moments)
        )
    part.factors.append(made)
    part.key_matrices.append([maker.key_matrix(call, key, types, moments) for key in part.keys])


def insert_transforms(program: Program, plan: AffinePlan) -> None:
    """Put the transforms of a plan, each with its inverse, into the program it was made of."""
    for part in plan.functions:
        part.slots = [
            insert_transform(part.function, item.site, item.roles) for item in part.inputs
        ]
        part.slots += [insert_key_transform(part.function, key) for key in part.keys]
        for call, factors, matrices in zip(
            part.calls, part.factors, part.key_matrices, strict=True
        ):
            tensors = [item.weights() for item in factors] + [key_weights(m) for m in matrices]
            names = [call.weights[slot] for slot in part.function.weights if slot in call.weights]
            dtypes = {program.weights[name].dtype for name in names}
            wide = torch.float64 if torch.float64 in dtypes else torch.float32
            for slots, values in zip(part.slots, tensors, strict=True):
                add_weights(program, call, slots, values, wide)
