"""Launching the attention kernels for Ascend: kernels/ascend_prefill.py and ascend_decode.py.

Layout letters: B batch, S query tokens, T key tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from graphopt.runtime.attention import (
    Extras,
    Keys,
    check,
    extra_arguments,
    key_arguments,
    launch,
    splits_of,
)
from graphopt.runtime.fitting_tiles import Constants
from graphopt.runtime.tiling_mask import table

MOST_PROGRAMS = 65535
"""Programs a launch may have on Ascend (`coreDim`, a 16-bit field)."""
LEAST_ROWS = 16
"""Rows of the smallest tile: the cube multiplies 16 at a time."""


def cores(device: torch.device, kind: str) -> int:
    """Return how many cores an Ascend device has, by its driver.

    The parts sold as 910B differ in it, so it is asked of the device and written nowhere.

    Args:
        kind: `aicore` for the cube cores, which run what multiplies matrices, with the vector
            cores beside them; `vectorcore` for the vector cores.

    Raises:
        RuntimeError: Triton's active driver is not that of an Ascend device.
    """
    import triton

    try:
        index = torch.device(device).index or 0
        properties = triton.runtime.driver.active.utils.get_device_properties(index)
        return int(properties[f"num_{kind}"])
    except (AttributeError, KeyError, RuntimeError) as error:
        raise RuntimeError(
            f"Triton reports no cores for {device}: install triton-ascend and torch-npu, "
            "or give the number of programs"
        ) from error


def _grid(tasks: int, programs: int | None, device: torch.device, kind: str) -> tuple[int]:
    """Return the one-dimensional grid of a kernel whose programs walk over tasks."""
    running = cores(device, kind) if programs is None else programs
    return (max(1, min(running, tasks, MOST_PROGRAMS)),)


@cache
def _table(half: int, heads: int, device: torch.device) -> Tensor:
    return table(half, device, heads=heads)


def _operands(
    q: Tensor, keys: Keys, constants: Constants, extras: Extras | None, heads: int
) -> dict[str, Any]:
    """Return the arguments that both kernels take, after a check of the operands.

    Args:
        heads: Query heads of a token among the rows of a tile.
    """
    check(q, keys, constants)
    batch, _, queries, _ = q.shape
    whole = _table(int(constants["M"]), heads, q.device)
    return {
        **constants,
        **key_arguments(keys),
        "table_ptr": whole,
        # Handed on to a function, which takes no None; not read where there is no mask.
        "mask_ptr": whole,
        **extra_arguments(
            extras or Extras(), constants, (batch, q.shape[1], queries, keys.capacity())
        ),
        "B": batch,
        "S": queries,
        "T": keys.capacity(),
        "H": q.shape[1],
    }


def _results(
    q: Tensor, keys: Keys, constants: Constants, out: Tensor | None
) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """Return the arguments of what is written, the output and the log-sum-exp."""
    batch, heads, queries, _ = q.shape
    if out is None:
        # As [B, S, H, Dv] in memory: the heads of a token lie side by side for what follows.
        shape = (batch, queries, heads, keys.v.shape[-1])
        out = torch.empty(shape, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = None
    if constants["LSE"]:
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    strides = {f"o_stride_{axis}": out.stride(i) for i, axis in enumerate("bhs")}
    return {"out_ptr": out, "lse_ptr": lse, **strides}, out, lse


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
        constants: The kernel's constants; see `graphopt.lowering.kernels.ascend_triton`.
        programs: How many run at once, each on a core of its own; by default the device's cube
            cores, never more than there are tasks.
        out: Written to if given, [B, H, S, Dv].

    Returns:
        The output [B, H, S, Dv] and, where the constants ask for it, the log-sum-exp [B, H, S].

    Raises:
        ValueError: The operands are not those the constants were made for.
        RuntimeError: The number of cores was not given and cannot be asked for.
    """
    arguments = _operands(q, keys, constants, extras, heads=1)
    written, out, lse = _results(q, keys, constants, out)
    arguments |= {**written, "q_ptr": q, "scale": scale}
    arguments |= {f"q_stride_{axis}": q.stride(i) for i, axis in enumerate("bhs")}
    batch, heads, queries, _ = q.shape
    tasks = batch * heads * -(-queries // int(constants["BLOCK_M"]))
    launch(kernel, _grid(tasks, programs, q.device, "aicore"), arguments)
    return out, lse


def decode(
    kernel: Any,
    merge: Any,
    q: Tensor,
    keys: Keys,
    constants: Constants,
    *,
    scale: float,
    extras: Extras | None = None,
    splits: int | None = None,
    programs: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run `ascend_decode` and `ascend_merge`.

    Args:
        kernel, merge: The kernels of kernels/ascend_decode.py, whole or as they were emitted.
        q: [B, H, S, D], few tokens, fp16 or bf16, the last axis contiguous.
        constants: The kernels' constants; see `graphopt.lowering.kernels.ascend_triton`. A step
            whose rows, S times the group, are fewer than BLOCK_M runs in a smaller tile.
        splits: Spans the keys are split into; by default `splits_of` the keys that are seen.
        programs: How many run at once; by default the device's cube cores, and its vector cores
            for the merge, never more than there are tasks.
        out: Written to if given, [B, H, S, Dv].

    Returns:
        As `prefill`.

    Raises:
        ValueError: The operands are not those the constants were made for, or more `splits` than
            their SPLITS.
        RuntimeError: The number of cores was not given and cannot be asked for.
    """
    group, most = int(constants["GROUP"]), int(constants["SPLITS"])
    arguments = _operands(q, keys, constants, extras, heads=group)
    written, out, lse = _results(q, keys, constants, out)
    batch, heads, queries, _ = q.shape
    groups = heads // group
    if splits is None:
        seen = keys.capacity()
        if constants["WINDOW"] and constants["CAUSAL"]:
            seen = min(seen, int(constants["WINDOW"]) + queries - 1)
        splits = splits_of(seen, constants)
    if splits > most:
        raise ValueError(f"{splits} spans of keys: these kernels were made for up to {most}")
    # A view where there is one token.
    packed = q.unflatten(1, (groups, group)).transpose(2, 3).flatten(2, 3)
    rows = queries * group
    part = torch.empty(
        (batch, groups, rows, splits, keys.v.shape[-1]), dtype=torch.float32, device=q.device
    )
    part_lse = torch.empty((batch, groups, splits, rows), dtype=torch.float32, device=q.device)
    block = min(int(constants["BLOCK_M"]), max(LEAST_ROWS, 1 << (rows - 1).bit_length()))
    arguments |= {
        "q_ptr": packed,
        "part_ptr": part,
        "part_lse_ptr": part_lse,
        "G": groups,
        "splits": splits,
        "scale": scale,
        "BLOCK_M": block,
    }
    arguments |= {f"q_stride_{axis}": packed.stride(i) for i, axis in enumerate("bgr")}
    tasks = batch * groups * splits * -(-queries // (block // group))
    launch(kernel, _grid(tasks, programs, q.device, "aicore"), arguments)
    launch(
        merge,
        _grid(batch * heads * queries, programs, q.device, "vectorcore"),
        {**arguments, **written},
    )
    return out, lse


def load(phase: str, constants: Constants, code: bytes | None) -> Callable[..., Any]:
    """Return what runs an attention of (q, keys, scale=, extras=); see `prefill` and `decode`.

    Args:
        phase: `prefill` or `decode`.
        code: None: Triton compiles the kernels where they run.
    """
    # Imported here: a CPU has no Triton, and needs none.
    if phase == "decode":
        from graphopt.runtime.kernels.ascend_decode import ascend_decode, ascend_merge

        return partial(decode, ascend_decode, ascend_merge, constants=constants)
    from graphopt.runtime.kernels.ascend_prefill import ascend_prefill

    return partial(prefill, ascend_prefill, constants=constants)
