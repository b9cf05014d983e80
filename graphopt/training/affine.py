"""The transforms and clips of a block while they are trained, and the weights that follow them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from graphopt.execute.block_runner import WeightGroup
from graphopt.ir import functional
from graphopt.ir.affine import Factors
from graphopt.ir.encoding import group_of

CLIP_RATE = 10.0
"""Factor of the learning rate for the logits of clips: 5e-2 where it is 5e-3, as in the paper."""

CLIP_START = 4.0
"""The logit that clips of weights begin with: 0.982 of the range."""


@dataclass(frozen=True)
class TrainedSite:
    """A transform of one layer, and the weights of the folded function that follow it.

    Attributes:
        factors: What it begins with.
        slots: Of what stays online, by role: `left` and `right`.
        readers: Slots of the weights whose columns take in the inverse, each with their axis.
        gain, bias: Slots of the norm that takes in the scale; None for none.
        offset: What the norm adds to its gain.
        rows: Slots of matrices and biases whose rows take in the scale.
        values: Slots of matrices and biases whose rows take in the map of an attention's values.
    """

    factors: Factors
    slots: Mapping[str, str]
    readers: tuple[tuple[str, int], ...]
    gain: str | None = None
    bias: str | None = None
    offset: float = 0.0
    rows: tuple[str, ...] = ()
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainedKeys:
    """The transform of an attention's keys, and its inverse transpose for the queries, by slots."""

    matrix: Tensor
    keys: str
    queries: str


@dataclass(frozen=True)
class Rounding:
    """How a matrix [out, in] is rounded.

    Attributes:
        bits: Of a code; codes are symmetric.
        group: Neighbours along `in` that share a scale, of which `group_of` makes what divides a
            row; 0 for all of a row.
    """

    bits: int
    group: int = 0

    def rows(self, weight: Tensor) -> Tensor:
        """Return a matrix with what shares a scale along the last axis."""
        if not self.group:
            return weight
        return weight.unflatten(-1, (-1, group_of(self.group, weight.shape[-1])))

    def clipped(self, weight: Tensor, clip: Tensor | None) -> Tensor:
        """Return a matrix whose elements lie within a share of the range of what shares a scale.

        Args:
            clip: The share, [out, 1], or [out, groups, 1] with groups; None for all.
        """
        if clip is None:
            return weight
        rows = self.rows(weight)
        most = clip * rows.abs().amax(-1, keepdim=True)
        return torch.minimum(torch.maximum(rows, -most), most).reshape(weight.shape)

    def rounded(self, weight: Tensor) -> Tensor:
        """Return the values of the nearest codes; a rounding has the gradient of the identity."""
        rows = functional.quantise_dequantise(
            self.rows(weight), bits=self.bits, symmetric=True, straight_through=True
        )
        return rows.reshape(weight.shape)


class InvertibleFactor(nn.Module):
    """P = U diag(exp s) V^T, with U and V turned from where they begin by Cayley maps.

    A skew matrix A turns by (I + A)^-1 (I - A), which is orthogonal for every A; singular values
    stay positive by their logarithms. Source: FlatQuant, arXiv 2410.09426, appendix B.1, whose
    singular values may change their sign; Lezcano-Casado, arXiv 1901.08428, for the Cayley map.

    Args:
        start: P at the beginning, fp64 [n, n].
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        u, s, vt = torch.linalg.svd(start.double())
        self.u, self.vt = nn.Buffer(u.float()), nn.Buffer(vt.float())
        self.log_scales = nn.Parameter(s.log().float())
        self.turns = nn.Parameter(torch.zeros(2, *start.shape))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return P and its inverse transpose."""
        return matrices_of([self])[0]


def matrices_of(factors: Sequence[InvertibleFactor]) -> list[tuple[Tensor, Tensor]]:
    """Return each factor's matrix and its inverse transpose; those of one size are made at once."""
    made: list[tuple[Tensor, Tensor] | None] = [None] * len(factors)
    sizes = [len(factor.log_scales) for factor in factors]
    for size in dict.fromkeys(sizes):
        alike = [number for number, other in enumerate(sizes) if other == size]
        upper = torch.stack([factors[number].turns for number in alike]).triu(1)
        skew = upper - upper.mT
        eye = torch.eye(size, dtype=skew.dtype, device=skew.device)
        # I + A is never singular: to ask whether it is would make a GPU wait.
        turned = torch.linalg.solve_ex(eye + skew, eye - skew).result
        u = turned[:, 0] @ torch.stack([factors[number].u for number in alike])
        vt = torch.stack([factors[number].vt for number in alike]) @ turned[:, 1]
        scales = torch.stack([factors[number].log_scales for number in alike]).exp()[:, None]
        pairs = zip(((u * scales) @ vt).unbind(), ((u / scales) @ vt).unbind(), strict=True)
        for number, pair in zip(alike, pairs, strict=True):
            made[number] = pair
    return [pair for pair in made if pair is not None]


class BlockTransforms(WeightGroup):
    """All that is trained of one block: transforms, scales of features, and clips.

    Args:
        names: The program's weights by the slots of the block's function.
        base: Values of weights before any transform, by slot, on the device.
        sites, keys: The transforms.
        roundings: How weights are rounded, by slot.
        clips: What the clips of activations, keys and values begin with, by slot: numbers in
            (0, 1).
        learn: Whether transforms and scales are trained.
        learn_clips: Whether clips of weights and activations are trained; without it, weights have
            none.
    """

    recordable = False  # solving for small matrices is not known to be, on every GPU

    def __init__(
        self,
        names: Mapping[str, str],
        base: Mapping[str, Tensor],
        sites: Sequence[TrainedSite],
        keys: Sequence[TrainedKeys],
        roundings: Mapping[str, Rounding],
        clips: Mapping[str, Tensor],
        *,
        learn: bool,
        learn_clips: bool,
    ) -> None:
        super().__init__()
        self._names, self.sites, self.keys = dict(names), list(sites), list(keys)
        self.roundings = dict(roundings)
        self._slots = list(base)
        for number, slot in enumerate(self._slots):
            self.register_buffer(f"base_{number}", base[slot].float(), persistent=False)
        self.factors = nn.ModuleDict()
        self.scales = nn.ParameterDict()
        for number, site in enumerate(self.sites):
            for role in ("left", "right", "values"):
                start = getattr(site.factors, role)
                if start is not None:
                    self.factors[f"{role}_{number}"] = InvertibleFactor(start)
            if site.factors.scale is not None:
                self.scales[f"{number}"] = nn.Parameter(site.factors.scale.log().float())
        for number, key in enumerate(self.keys):
            self.factors[f"keys_{number}"] = InvertibleFactor(key.matrix)
        self.clip_slots, self.weight_clip_slots = list(clips), list(roundings)
        self.clips = nn.ParameterList(
            nn.Parameter(torch.logit(clips[slot].float())) for slot in self.clip_slots
        )
        self.weight_clips = nn.ParameterList(
            nn.Parameter(torch.full(self._clip_shape(base[slot], rounding), CLIP_START))
            for slot, rounding in (roundings.items() if learn_clips else ())
        )
        self.requires_grad_(False)
        self._learnt = [*self.factors.parameters(), *self.scales.parameters()] if learn else []
        self._clips = [*self.clips, *self.weight_clips] if learn_clips else []
        for parameter in (*self._learnt, *self._clips):
            parameter.requires_grad_(True)
        online = [slot for site in self.sites for slot in site.slots.values()]
        online += [slot for key in self.keys for slot in (key.keys, key.queries)]
        made = [*self._slots, *online, *self.clip_slots]
        self.names = frozenset(self._names[slot] for slot in made)

    @staticmethod
    def _clip_shape(weight: Tensor, rounding: Rounding) -> tuple[int, ...]:
        return (*rounding.rows(weight).shape[:-1], 1)

    @torch.no_grad()
    def search_weight_clips(self, shares: Sequence[float]) -> None:
        """Let clips of weights begin with the share of the range at which each errs least."""
        if not len(self.weight_clips):
            return
        whole = self._values(rounded=False, clipped=False)
        for place, (slot, rounding) in enumerate(self.roundings.items()):
            rows = rounding.rows(whole[slot].float())
            errors: list[Tensor] = []
            for share in shares:
                clip = rows.new_full((*rows.shape[:-1], 1), share)
                made = rounding.rounded(rounding.clipped(whole[slot].float(), clip))
                errors.append((rounding.rows(made) - rows).square().sum(-1, keepdim=True))
            best = torch.stack(errors).argmin(0)
            self.weight_clips[place].copy_(torch.logit(rows.new_tensor(list(shares))[best]))

    def base(self, slot: str) -> Tensor:
        """Return a weight's value before any transform."""
        value: Tensor = getattr(self, f"base_{self._slots.index(slot)}")
        return value

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        groups = [(1.0, self._learnt), (CLIP_RATE, self._clips)]
        return [(rate, parameters) for rate, parameters in groups if parameters]

    def forward(self) -> dict[str, Tensor]:
        return {self._names[slot]: value for slot, value in self._values(True).items()}

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """Return the weights by name, computed in fp64 and not rounded; clips are in them."""
        found = self._values(False)
        return {self._names[slot]: value for slot, value in found.items()}

    @torch.no_grad()
    def trained_factors(self) -> tuple[list[Factors], list[Tensor]]:
        """Return the factors of every site and the matrices of keys, as they are now, in fp64."""
        made = self._matrices(exact=True)

        def part(role: str, number: int) -> Tensor | None:
            found = made.get(f"{role}_{number}")
            return None if found is None else found[0]

        factors = [
            Factors(
                left=part("left", n),
                right=part("right", n),
                scale=self.scales[f"{n}"].double().exp() if f"{n}" in self.scales else None,
                values=part("values", n),
            )
            for n in range(len(self.sites))
        ]
        return factors, [made[f"keys_{n}"][0] for n in range(len(self.keys))]

    def _matrices(self, exact: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each factor and its inverse transpose; in fp64 by an inverse of its own."""
        made: dict[str, tuple[Tensor, Tensor]] = {}
        pairs = matrices_of([cast(InvertibleFactor, factor) for factor in self.factors.values()])
        for name, (matrix, inverse) in zip(self.factors, pairs, strict=True):
            if exact:
                matrix = matrix.double()
                inverse = torch.linalg.inv(matrix).T
            made[name] = matrix, inverse
        return made

    def _values(self, rounded: bool, clipped: bool = True) -> dict[str, Tensor]:
        """Return the weights that follow the parameters, by slot."""
        dtype = torch.float32 if rounded else torch.float64
        made = self._matrices(exact=not rounded)
        values = {slot: self.base(slot).to(dtype) for slot in self._slots}
        for number, site in enumerate(self.sites):
            pair = {r: made.get(f"{r}_{number}") for r in ("left", "right", "values")}
            for role, slot in site.slots.items():
                part = pair[role]
                assert part is not None
                values[slot] = part[0]
            scale = None
            if f"{number}" in self.scales:
                scale = self.scales[f"{number}"].to(dtype).exp()
            self._fold_site(values, site, pair, scale)
        for number, key in enumerate(self.keys):
            values[key.keys], values[key.queries] = made[f"keys_{number}"]
        for place, (slot, rounding) in enumerate(self.roundings.items()):
            clip = None
            if clipped and len(self.weight_clips):
                clip = torch.sigmoid(self.weight_clips[place].to(dtype))
            within = rounding.clipped(values[slot], clip)
            values[slot] = rounding.rounded(within) if rounded else within
        for slot, logit in zip(self.clip_slots, self.clips, strict=True):
            values[slot] = torch.sigmoid(logit.to(dtype))
        return values

    @staticmethod
    def _fold_site(
        values: dict[str, Tensor],
        site: TrainedSite,
        pair: Mapping[str, tuple[Tensor, Tensor] | None],
        scale: Tensor | None,
    ) -> None:
        left, right = pair["left"], pair["right"] or pair["values"]
        for slot, axis in site.readers:
            rows = values[slot].movedim(axis, -1)
            if scale is not None:
                rows = rows / scale
            if left is not None or right is not None:
                turned = [None if part is None else part[1] for part in (left, right)]
                rows = functional.kronecker(rows, *turned)
            values[slot] = rows.movedim(-1, axis)
        if scale is not None:
            if site.gain is not None:
                values[site.gain] = (values[site.gain] + site.offset) * scale - site.offset
            if site.bias is not None:
                values[site.bias] = values[site.bias] * scale
            for slot in site.rows:
                rows = scale if values[slot].dim() == 1 else scale[:, None]
                values[slot] = values[slot] * rows
        if pair["values"] is not None:
            for slot in site.values:
                mapped = functional.kronecker(
                    values[slot].transpose(0, -1), None, pair["values"][0]
                )
                values[slot] = mapped.transpose(0, -1)
