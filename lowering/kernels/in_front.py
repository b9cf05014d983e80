"""Whether a Kronecker transform is done by the product that reads it, or by a kernel of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphopt.runtime.packed_few import SPAN, Form, takes_factors, transform_bytes
from graphopt.runtime.quantised_tiles import QuantisedTiles, tiles_for, warps_for

_RESERVED = 1024
"""Bytes of shared memory that a block takes beside its own."""


@dataclass(frozen=True)
class FrontShape:
    """A transform of one token, and the product behind it.

    Attributes:
        n1, n2: What the token is transformed as, a matrix [n1, n2].
        left, right: Which factors there are.
        outputs: Of the product, of both halves of a gated one.
        gate: Whether a gate stands in front.
        act: The activation of a gate behind the product, or nothing.
        span: Inputs whose codes lie together.
    """

    n1: int
    n2: int
    left: bool
    right: bool
    outputs: int
    before: str = ""
    act: str = ""
    span: int = SPAN


WhyApart = Callable[[FrontShape], str | None]
"""Says why a transform is a kernel of its own; None where the product does it."""


def products_of(shape: FrontShape) -> int:
    """Return how many products of 16 x 16 by 16 x 8 a transform has."""
    strips, steps = -(-shape.n2 // 16), -(-shape.n1 // 16)
    return strips * 2 * steps * (shape.right * strips + shape.left * steps)


def why_apart(shape: FrontShape, tiles: QuantisedTiles) -> str | None:
    """Return why a product does not transform what it reads; None where it does.

    Every block reads and transforms for itself, so that of a product with many blocks a core does
    so several times, and has to have room for all of them at once. A kernel of its own does so
    once, but is one more to be waited for.
    """
    figures, few = tiles.front, tiles_for(1, tiles.few)
    if figures is None or few is None or not figures.tokens:
        return "the target has no figures of transforms in front of products"
    n1, n2, inputs = shape.n1, shape.n2, shape.n1 * shape.n2
    if shape.span != SPAN or inputs % SPAN or not takes_factors(n1, n2):
        return f"the kernel takes no transform of {inputs} features as {n1} x {n2}"
    if shape.act and shape.before not in ("", "norm", shape.act):
        return f"its gate is {shape.before}, and that behind the product {shape.act}"
    warps = warps_for(shape.outputs, inputs // SPAN, few, tiles.cores)
    form = Form(
        True, False, False, shape.before == "norm", False, shape.act, warps, few.row_tiles,
        few.ahead, 1, SPAN, "", n1, n2, shape.left, shape.right,
    )  # fmt: skip
    blocks = -(-form.blocks(shape.outputs) // tiles.cores)
    room = blocks * (form.shared_bytes(1, inputs) + _RESERVED)
    if room > tiles.shared_bytes + _RESERVED:
        factors = transform_bytes(n1, n2, shape.left, shape.right, 1)
        return f"a core has no room for {blocks} blocks with {factors} bytes of a transform each"
    seconds = figures.product * products_of(shape) + figures.feature * inputs
    here, apart = figures.start + blocks * seconds, figures.launch + figures.start + seconds
    if here >= apart:
        return (
            f"{blocks} blocks of a core would transform for {here * 1e6:.2f} us, "
            f"and a kernel of its own takes {apart * 1e6:.2f} us"
        )
    return None
