"""Whether kernels that trainings have beside torch's take tensors."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from graphopt.errors import first_line
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
        and (StandIn.active is not None or _launches())
    )


@functools.cache
def _launches() -> bool:
    """Return whether Triton launches kernels here; say why it does not.

    What launches them is compiled at first use, by a C compiler that may not be installed. They
    were not tried on GPUs of AMD.
    """
    if torch.version.hip is not None or not has_triton():
        return False
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:
        # A compiler fails in its own ways, and torch does the same without it.
        warnings.warn(
            f"Triton launches nothing here ({first_line(error)}): trainings run norms, rotary "
            "positions and divergences of logits in plain torch",
            stacklevel=2,
        )
        return False
    return True
