"""The matrices that sites are transformed by: drawn, fixed, or solved for from second moments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from graphopt.calibration.second_moments import SecondMoments
from graphopt.errors import PassError
from graphopt.ir.affine import Factors
from graphopt.ir.affine_sites import InputSite, KeySite, Sites
from graphopt.ir.graph import Call, Function, Program, Value
from graphopt.ir.ops.attention import KEY, QUERY
from graphopt.ir.types import Type
from graphopt.solvers.alignment import aligned, aligned_factors, aligned_scale, square_root
from graphopt.solvers.orthogonal import factor_pair, random_orthogonal, spreading

Transform: TypeAlias = Literal[
    "kronecker", "hadamard", "random", "closed", "identity", "scale", "none"
]

LARGEST_FACTOR = 512
"""The largest factor of a Kronecker product: a product with a larger one costs as much as what it
stands in front of."""
LARGEST_DENSE = 1024
"""The largest width that is transformed by one matrix where it has no two useful factors."""
LARGEST_BLOCK = 256
"""The largest block of a block-diagonal transform."""

MOST_CONDITION = 1e6
"""The condition number beyond which a transform counts as singular: in fp32 its inverse has no
right digit left."""

SPREAD = 0.3
"""Standard deviation of the logarithms of what `kronecker` begins with: singular values and
scales."""


@dataclass(frozen=True)
class Sizes:
    """How the features of a site are divided.

    Attributes:
        left, right: Sizes of the two factors; 1 for none.
        form: What that is called.
    """

    left: int
    right: int
    form: Literal["kronecker", "dense", "block-diagonal", "heads", "none"]


def choose_sizes(width: int) -> Sizes:
    """Return the factors of a width: n1 <= n2 of the least n1 + n2 where both are useful.

    A width without such factors (a prime, twice one) is transformed whole where it is small, else
    block by block with one matrix for all blocks; a large prime not at all.
    """
    left, right = factor_pair(width)
    if left > 1 and right <= LARGEST_FACTOR:
        return Sizes(left, right, "kronecker")
    if width <= LARGEST_DENSE:
        return Sizes(1, width, "dense")
    block = max(n for n in range(1, LARGEST_BLOCK + 1) if width % n == 0)
    return Sizes(1, block, "block-diagonal" if block > 1 else "none")


def site_sizes(site: InputSite, types: Mapping[Value, Type], heads: bool = True) -> Sizes:
    """Return how the features of a site are divided.

    Args:
        types: Of its function's values.
        heads: Whether merged heads whose values can be mapped are transformed across heads alone.
    """
    if site.heads is not None:
        _, count, _, size = types[site.heads.outputs[0]].shape
        if site.values is not None and heads:
            return Sizes(int(count), 1, "heads")
        return Sizes(int(count), int(size), "kronecker" if count != 1 else "dense")
    return choose_sizes(int(types[site.x].shape[-1]))


def wanted_values(sites: Sites) -> list[Value]:
    """Return the values whose second moments `FactorMaker` reads for its closed form."""
    found = [site.x for site in sites.inputs]
    paths = [site.values for site in sites.inputs if site.values is not None]
    found += [path.split.output for path in paths]
    for key in sites.keys:
        found += [v for v in (key.attention.inputs[QUERY], key.attention.inputs[KEY]) if v]
    return list(dict.fromkeys(found))


@dataclass
class FactorMaker:
    """Makes the factors of every site of a program.

    Attributes:
        kind: `kronecker` draws what training begins with: invertible factors and scales.
            `hadamard` and `random` are orthogonal, `closed` is solved for
            (`graphopt.solvers.alignment`), `scale` is that with a diagonal alone.
        program: The program before it is transformed.
        generator: Draws what is random.
        scaled: Whether features are scaled where the scale can be folded; scales are ones where
            the kind does not say them.
        inputs: Whether what matrices read is transformed; without it keys and values alone are, for
            a cache of few bits.
        experts: Whether stacks of experts' matrices have transforms; without it `linear`s alone do.
    """

    kind: Transform
    program: Program
    generator: torch.Generator
    scaled: bool = True
    inputs: bool = True
    experts: bool = True

    @property
    def needs_text(self) -> bool:
        return self.kind in ("closed", "scale")

    def roles(self, site: InputSite, sizes: Sizes) -> list[str]:
        """Return which parts the transform of a site has; [] for none."""
        roles: list[str] = []
        if not self.experts and all(reader.node.op != "linear" for reader in site.readers):
            return []
        if not self.inputs:
            mapped = sizes.form == "heads" and self.kind not in ("scale", "none")
            return ["values"] if mapped else []
        if self.scaled and site.scaled is not None:
            roles.append("scale")
        if self.kind in ("scale", "none"):
            return roles if self.kind == "scale" else []
        roles += ["left"] if sizes.left > 1 else []
        roles += ["right"] if sizes.right > 1 else []
        return [*roles, "values"] if sizes.form == "heads" else roles

    def factors(
        self,
        function: Function,
        call: Call,
        site: InputSite,
        types: Mapping[Value, Type],
        sizes: Sizes,
        roles: Sequence[str],
        moments: Mapping[Value, SecondMoments],
    ) -> Factors:
        """Return the factors of a site of one layer, in fp64 on the CPU.

        Args:
            roles: The parts that it is to have, such as `roles` names.
        """
        count, head = sizes.left, 1
        if site.heads is not None:
            head = int(types[site.heads.outputs[0]].shape[-1])
        made: dict[str, Tensor] = {}
        if self.needs_text:
            c = moments[site.x].mean(f"{call.path}.{site.stem}")
            g = self._gram(function, call, site, c.device)
            own = None
            if not self.inputs and site.values is not None:
                # In a cache it is the values themselves that are rounded.
                own = moments[site.values.split.output].mean(f"{call.path}.{site.stem}")
            made = self._solved(roles, c, g, count, head, own)
        else:
            width = int(types[site.x].shape[-1])
            square = {"left": sizes.left, "right": sizes.right, "values": head}
            for role in roles:
                made[role] = (
                    self._drawn_scale(width) if role == "scale" else self._drawn(square[role])
                )
        return checked(Factors(**{role: made[role] for role in roles}), f"{call.path}.{site.stem}")

    def key_matrix(
        self,
        call: Call,
        site: KeySite,
        types: Mapping[Value, Type],
        moments: Mapping[Value, SecondMoments],
    ) -> Tensor:
        """Return what keys are multiplied by, fp64 on the CPU."""
        query, key = site.attention.inputs[QUERY], site.attention.inputs[KEY]
        assert query is not None and key is not None
        where = f"{call.path}.{site.key_stem}"
        if self.kind == "closed":
            c, g = (moments[value].mean(where).cpu() for value in (key, query))
            matrix = square_root(aligned(c, g)) @ self._spread(len(c))
        else:
            matrix = self._drawn(int(types[key].shape[-1]))
        check_condition(matrix, where)
        return matrix

    def _gram(
        self, function: Function, call: Call, site: InputSite, device: torch.device
    ) -> Tensor:
        """Return the sum of W^T W over the matrices that read a site."""
        slots = function.slots_by_value()
        total: Tensor | None = None
        for reader in site.readers:
            weight = self.program.weights[call.weights[slots[reader.weight]]].load(torch.float64)
            rows = weight.to(device).movedim(reader.axis, -1).flatten(0, -2)
            gram = rows.T @ rows
            total = gram if total is None else total + gram
        assert total is not None
        return total

    def _solved(
        self,
        roles: Sequence[str],
        c: Tensor,
        g: Tensor,
        count: int,
        head: int,
        values: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return what rounding costs least behind, by role.

        Args:
            c, g: Second moments and Gram matrix, on any device; what is returned is on the CPU.
            count, head: How many heads there are, and the features of each.
            values: Second moments of an attention's values, [head, head]; by default those of its
                output, which are rounded as well.
        """
        made: dict[str, Tensor] = {}
        if "scale" in roles:
            scale = aligned_scale(c, g)
            made["scale"] = scale.cpu()
            c, g = c * scale * scale[:, None], g / scale / scale[:, None]
        shape = (count, len(c) // count) * 2
        if "values" in roles:
            inner = [torch.einsum("aiaj->ij", m.reshape(shape)).cpu() for m in (c, g)]
            if values is not None:
                inner[0] = values.cpu()
            made["values"] = square_root(aligned(*inner)) @ self._spread(head)
            if "left" in roles:
                # In the features that values are mapped to.
                forward = made["values"] @ made["values"].T
                outer = [
                    torch.einsum("aibj,ij->ab", m.reshape(shape), turned.to(m.device)).cpu()
                    for m, turned in ((c, forward), (g, torch.linalg.inv(forward)))
                ]
                made["left"] = square_root(aligned(*outer)) @ self._spread(count)
        elif "left" in roles:
            first, second = aligned_factors(c, g, count)
            made["left"] = square_root(first) @ self._spread(len(first))
            made["right"] = square_root(second) @ self._spread(len(second))
        elif "right" in roles:
            made |= self._blocks(c, g)
        return made

    def _blocks(self, c: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Return one matrix for all blocks of features; for one block, that is all of them."""
        sizes = choose_sizes(len(c))
        shape = (len(c) // sizes.right, sizes.right) * 2
        inner = [torch.einsum("aiaj->ij", m.reshape(shape)).cpu() for m in (c, g)]
        return {"right": square_root(aligned(*inner)) @ self._spread(sizes.right)}

    def _spread(self, size: int) -> Tensor:
        signs = torch.randint(0, 2, (size, 1), generator=self.generator).double() * 2 - 1
        return signs * spreading(size)

    def _drawn_scale(self, width: int) -> Tensor:
        if self.kind != "kronecker":
            return torch.ones(width, dtype=torch.float64)
        return (SPREAD * torch.randn(width, generator=self.generator, dtype=torch.float64)).exp()

    def _drawn(self, size: int) -> Tensor:
        if self.kind == "identity":
            return torch.eye(size, dtype=torch.float64)
        if self.kind == "hadamard":
            return self._spread(size)
        matrix = random_orthogonal(size, self.generator)
        if self.kind == "kronecker":
            other = random_orthogonal(size, self.generator)
            matrix = (matrix * self._drawn_scale(size)) @ other
        return matrix


def conditions(factors: Factors) -> dict[str, float]:
    """Return the condition number of each part of a transform, by its role."""
    found: dict[str, float] = {}
    for role in ("scale", "left", "right", "values"):
        value = getattr(factors, role)
        if value is not None:
            found[role] = condition(value)
    return found


def condition(part: Tensor) -> float:
    """Return the condition number of a matrix or a diagonal; infinite where it is not finite."""
    if not bool(part.isfinite().all()):
        return math.inf
    values = part.abs() if part.dim() == 1 else torch.linalg.svdvals(part.double())
    least = float(values.min())
    return float(values.max()) / least if least else math.inf


def checked(factors: Factors, where: str) -> Factors:
    """Return factors that have an inverse.

    Raises:
        PassError: One has none.
    """
    for value in (factors.left, factors.right, factors.values, factors.scale):
        if value is not None:
            check_condition(value, where)
    return factors


def check_condition(part: Tensor, where: str) -> float:
    """Return the condition number of a matrix, or of a diagonal.

    Raises:
        PassError: It is singular, or as good as that.
    """
    number = condition(part)
    if not number <= MOST_CONDITION:
        raise PassError(
            f"The transform of {where} is singular: its condition number is {number:.3g}, and "
            f"{MOST_CONDITION:.0e} is the most that can be inverted.",
            "Take kind=hadamard, a lower learning rate, or more text.",
        )
    return number
