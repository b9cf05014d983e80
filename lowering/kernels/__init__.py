"""Kernel families: a file each, which says all that a plan of the family becomes."""

from __future__ import annotations

from graphopt.lowering.kernels import ascend_triton, hopper_cuda, triton, volta_cuda
from graphopt.lowering.kernels.family import (
    CudaFamily,
    KernelFamily,
    LayerFamily,
    LayerKernels,
    LayerSetup,
    all_families,
    get_family,
    get_layer_family,
    register_family,
    register_layer_family,
)
from graphopt.lowering.kernels.planning import plain_gpu, plan_attention, portable_gpu

__all__ = [
    "CudaFamily",
    "KernelFamily",
    "LayerFamily",
    "LayerKernels",
    "LayerSetup",
    "all_families",
    "ascend_triton",
    "get_family",
    "get_layer_family",
    "hopper_cuda",
    "plain_gpu",
    "plan_attention",
    "portable_gpu",
    "register_family",
    "register_layer_family",
    "triton",
    "volta_cuda",
]
