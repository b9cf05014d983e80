"""Launching the attention kernel for Ascend, runtime/kernels/ascend_prefill.py.

Layout letters: B batch, S query tokens, T key tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphopt.runtime.attention import Constants, Extras, Keys, check, launch
from graphopt.runtime.tiling_mask import table

MOST_PROGRAMS = 65535
"""Programs a launch may have on Ascend (`coreDim`, a 16-bit field)."""


def cube_cores(device: torch.device) -> int:
    """Return how many cube cores an Ascend device has, by its driver.

    The parts sold as 910B differ in it, so it is asked of the device and written nowhere.

    Raises:
        RuntimeError: Triton's active driver is not that of an Ascend device.
    """
    import triton

    try:
        index = torch.device(device).index or 0
        properties = triton.runtime.driver.active.utils.get_device_properties(index)
        return int(properties["num_aicore"])
    except (AttributeError, KeyError, RuntimeError) as error:
        raise RuntimeError(
            f"Triton reports no cube cores for {device}: install triton-ascend and torch-npu, "
            "or give the number of programs"
        ) from error


@cache
def _table(half: int, device: torch.device) -> Tensor:
    return table(half, device)


def prefill(
    kernel: Any,
    q: Tensor,
    keys: Keys,
    constants: Constants,
    *,
    scale: float,
    extras: Extras | None = None,
    programs: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run `ascend_prefill`.

    Args:
        kernel: The kernel of kernels/ascend_prefill.py, whole or as it was emitted.
        q: [B, H, S, D], fp16 or bf16, the last axis contiguous.
        constants: The kernel's constants; see `graphopt.plan.ascend.ascend_constants`.
        programs: How many run at once, each on a core of its own; by default the device's cube
            cores, never more than there are tasks.
        out: Written to if given, [B, H, S, Dv].

    Returns:
        The output [B, H, S, Dv] and, where the constants ask for it, the log-sum-exp [B, H, S].

    Raises:
        ValueError: The operands are not those the constants were made for.
        RuntimeError: The number of cores was not given and cannot be asked for.
    """
    check(q, keys, constants)
    extras = extras or Extras()
    for name in ("bias", "slopes"):
        if getattr(extras, name) is not None:
            raise ValueError(f"this kernel does not take {name!r}")
    batch, heads, queries, _ = q.shape
    count = keys.capacity()
    if out is None:
        # As [B, S, H, Dv] in memory: the heads of a token lie side by side for what follows.
        shape = (batch, queries, heads, keys.v.shape[-1])
        out = torch.empty(shape, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = None
    if constants["LSE"]:
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    whole = _table(int(constants["M"]), q.device)
    arguments: dict[str, Any] = {
        **constants,
        "q_ptr": q,
        "k_ptr": keys.k,
        "v_ptr": keys.v,
        "out_ptr": out,
        "lse_ptr": lse,
        "table_ptr": whole,
        # Handed on to a function, which takes no None; not read where there is no mask.
        "mask_ptr": whole,
        "B": batch,
        "S": queries,
        "T": count,
        "H": heads,
        "scale": scale,
    }
    optional: tuple[tuple[str, str, Tensor | None, torch.dtype, tuple[int, ...]], ...] = (
        ("KEY_MASK", "mask", extras.mask, torch.int8, (batch, count)),
        ("SINKS", "sinks", extras.sinks, torch.float32, (heads,)),
        ("LENGTHS", "lengths", keys.lengths, torch.int32, (batch,)),
    )
    for switch, name, tensor, dtype, needed in optional:
        if bool(constants[switch]) != (tensor is not None):
            state = "needs" if constants[switch] else "does not take"
            raise ValueError(f"this kernel {state} {name!r}: plan one for the attention at hand")
        if tensor is not None:
            if tensor.shape != needed:
                raise ValueError(f"{name} is {tuple(tensor.shape)}: it should be {needed}")
            arguments[f"{name}_ptr"] = tensor.to(dtype).contiguous()
    for letter, laid, axes in (
        ("q", q, "bhs"), ("k", keys.k, "bht"), ("v", keys.v, "bht"), ("o", out, "bhs"),
    ):  # fmt: skip
        arguments |= {f"{letter}_stride_{axis}": laid.stride(i) for i, axis in enumerate(axes)}
    tasks = batch * heads * -(-queries // int(constants["BLOCK_M"]))
    cores = cube_cores(q.device) if programs is None else programs
    launch(kernel, (max(1, min(cores, tasks, MOST_PROGRAMS)),), arguments)
    return out, lse
