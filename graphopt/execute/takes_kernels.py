"""Whether kernels that trainings have beside torch's take tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.memory.stand_in import StandIn
from graphopt.runtime.fitting_tiles import has_triton

TAKEN = {torch.float16, torch.bfloat16, torch.float32}


def takes_kernels(*tensors: Tensor) -> bool:
    """Return whether kernels take tensors: on a GPU from Ampere on, with Triton, not in fp64.

    A GPU that others stand for is taken to have Triton, which PyTorch for CUDA brings along.
    """
    return (
        all(x.is_cuda and x.dtype in TAKEN for x in tensors)
        and torch.cuda.is_bf16_supported(False)
        and (has_triton() or StandIn.active is not None)
    )
