"""How long an operator takes on a GPU by its bytes and FLOPs: the clock where nothing runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from graphopt.targets import newest_gpu


@dataclass(frozen=True)
class Roofline:
    """A GPU as a roofline: an operator takes its launch, and what its bytes or FLOPs take.

    Instances are a `Cost` of `graphopt.memory.recorder`.

    Attributes:
        bandwidth: Bytes a second.
        flops: Operations a second of matrix products in 16 bits.
        flops_32: The same in fp32.
        launch: Nanoseconds of an operator that has next to nothing to do.
        name: Of the GPU, for reports.
    """

    bandwidth: float
    flops: float
    flops_32: float
    launch: float
    name: str

    def __call__(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, moved: int
    ) -> float:
        """Return the nanoseconds of an operator that reads and writes `moved` bytes."""
        flops = _flops(function, args, kwargs, out)
        dtype = next((x.dtype for x in args if isinstance(x, Tensor)), torch.float32)
        rate = self.flops if dtype.itemsize <= 2 else self.flops_32
        return self.launch + max(moved / self.bandwidth, flops / rate) * 1e9


def _flops(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """Return the floating-point operations of an operator, 0 where it has no matrix product."""
    name = str(function)
    if "_scaled_dot_product_" in name:
        # torch's own count of an attention asks for as many heads of keys as of queries.
        backward = "_backward" in name
        q, k, v = args[1:4] if backward else args[:3]
        batch, heads, rows, width = q.shape
        products = 2 * batch * heads * rows * k.shape[2] * (width + v.shape[3])
        # Two products forward; backward five: the scores again, and gradients of all four operands.
        return 2.5 * products if backward else products
    count = flop_registry.get(getattr(function, "overloadpacket", function))
    return count(*args, **kwargs, out_val=out) if count is not None else 0


def newest_roofline() -> Roofline:
    """Return the newest GPU's: bandwidth and launch as measured for it, products by data sheet."""
    gpu = newest_gpu("flops")
    assert gpu.decode is not None
    return Roofline(
        gpu.decode.bandwidth, gpu.flops["bf16"], gpu.flops["f32"], gpu.decode.launch * 1e9,
        f"{gpu.title} as a roofline",
    )  # fmt: skip
