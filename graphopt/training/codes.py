"""A packed weight while it is trained: its scales, and which codes its elements become."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphopt.execute.block_runner import Parametrisation
from graphopt.ir.encoding import Packed, stored_scales

ELEMENT_RATE = 2.0
"""The factor of the learning rate for elements, beside the weight's own scale: one has to go half a
step before anything changes."""

SCALE_RATE = 0.5
"""The factor of the learning rate for the logarithms of scales: a step moves one by a share of
itself, and all elements of its group with it."""

INSIDE = 0.45
"""How far from a code's value, in steps, the element that becomes it begins at most: by half a step
it becomes another."""


class CodeParametrisation(Parametrisation):
    """Every element has a place between two codes, and becomes the nearer one.

    A rounding has the gradient of the identity (Bengio et al., arXiv 1308.3432), so that an element
    moves until it becomes another code; what lies beyond the last code has none. Scales are trained
    by their logarithms, as far as elements are off their codes (Esser et al., LSQ, arXiv
    1902.08153, section 2.1). Zero points stay.

    Args:
        encoding: How the weight is packed, with groups along its rows.
        tensors: Its tensors by suffix, on the device. Scales stay of the dtype that they have.
        source: The weight before it was rounded, [out, in]: elements begin as near to it as they
            may and still become the same codes. None to begin at the codes.
        size: How large the weight's elements are, by which rates are measured.
    """

    def __init__(
        self,
        encoding: Packed,
        tensors: dict[str, Tensor],
        source: Tensor | None,
        size: float,
    ) -> None:
        super().__init__()
        self.encoding, self.size, self.dtype = encoding, size, tensors["scales"].dtype
        scales = tensors["scales"].float()
        self.steps = nn.Buffer(scales)
        zeros = torch.full_like(scales, 2 ** (encoding.bits - 1))
        if not encoding.symmetric:
            zeros = encoding.zero_points(tensors["zeros"], scales.shape[1]).to(scales)
        self.zeros = nn.Buffer(zeros)
        codes = encoding.codes(tensors["packed"])
        value = (codes.to(scales) - zeros[..., None]) * scales[..., None]
        if source is not None:
            off = source.float().view_as(value) - value
            reach = INSIDE * scales.abs()[..., None]
            value = value + torch.minimum(torch.maximum(off, -reach), reach)
        self.elements = nn.Parameter(value)
        self.log_scales = nn.Parameter(torch.zeros_like(scales))

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        return [(ELEMENT_RATE * self.size, [self.elements]), (SCALE_RATE, [self.log_scales])]

    def _scales(self) -> Tensor:
        scales = self.steps * self.log_scales.exp()
        # They are trained as the numbers that they are stored as.
        return scales + (stored_scales(scales, self.dtype).to(scales) - scales).detach()

    def _places(self) -> Tensor:
        """Return where elements lie among the codes, [out, groups, group]."""
        places = self.elements / self._scales()[..., None] + self.zeros[..., None]
        return places.clamp(0, 2**self.encoding.bits - 1)

    def forward(self) -> Tensor:
        places = self._places()
        codes = places + (places.round() - places).detach()
        return ((codes - self.zeros[..., None]) * self._scales()[..., None]).flatten(-2)

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Return what the weight has become as the tensors of its encoding, by suffix."""
        scales = stored_scales(self._scales(), self.dtype)
        return self.encoding.pack(self._places().round().flatten(-2), scales, self.zeros)
