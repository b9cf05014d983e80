"""Feed-forward parts with experts on a GPU, in Triton: of many tokens, and of few.

Functions named as one of `graphopt.ir.functional` stand in for it, as those of
`graphopt.runtime.fused` do. Many tokens are sorted by expert and take part in one product an
expert; a few tokens read the weights of their own experts, row by row.

Layout letters: T tokens, E experts, D features, N neurons of an expert.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.runtime.expert_tiles import ExpertTiles, power
from graphopt.runtime.fused import act_mul, runs_by_kernel

AT_ONCE = 16384
"""Tokens whose experts' outputs are in memory at once."""
MOST_EXPERTS = 64
"""More are compared with each other in torch."""


DESCRIBED = 2048
"""Rows of all experts together from which descriptors, which the host makes, are worth its time."""


@functools.cache
def _copies_tiles() -> bool:
    """Return whether the GPU copies tiles of a tensor by itself (Hopper and later)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@functools.cache
def _shared_bytes() -> int | None:
    """Return the shared memory that a program may have; None where nothing is compiled."""
    if not torch.cuda.is_available():
        return None
    import triton

    index = torch.cuda.current_device()
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return int(properties["max_shared_mem"])


def _described(weight: Tensor | None, rows: int, columns: int, routes: int) -> Any:
    """Return the tensor descriptor of tiles of a matrix, None where there is none for it.

    Args:
        routes: Rows of all experts together.
    """
    if weight is None or routes < DESCRIBED or not weight.is_cuda or not _copies_tiles():
        return None
    # Such copies start and step at multiples of 16 bytes, and a tile is no larger than the matrix.
    if weight.data_ptr() % 16 or weight.stride(0) * weight.element_size() % 16:
        return None
    if weight.shape[0] < rows or weight.shape[1] < columns:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(weight, [rows, columns])


def launch_top_k_gating(
    router_logits: Tensor,
    selection_bias: Tensor | None,
    gate_scale: Tensor | None,
    top_k: int,
    mean_active_experts: int = 0,
) -> Tensor:
    """Return the gates, of the router logits' dtype and shape.

    Args:
        router_logits: [..., E].
        selection_bias, gate_scale: [E].
        top_k, mean_active_experts: As in `functional.top_k_gating`.
    """
    from graphopt.runtime.kernels.experts import top_k_gating as kernel

    experts = router_logits.shape[-1]
    flat = router_logits.reshape(-1, experts)
    gates = torch.empty(router_logits.shape, dtype=router_logits.dtype, device=router_logits.device)
    wide = power(experts)
    rows = max(1, min(64, 4096 // (wide * wide)))
    kernel[(-(-len(flat) // rows),)](
        flat, selection_bias, gate_scale, gates, len(flat), flat.stride(0),
        E=experts, TOP_K=top_k, BY_THRESHOLD=mean_active_experts > 0,
        BLOCK_T=rows, BLOCK_E=wide, num_warps=4,
    )  # fmt: skip
    return gates


def launch_route(
    x: Tensor,
    weight: Tensor,
    router_bias: Tensor | None,
    selection_bias: Tensor | None,
    gate_scale: Tensor | None,
    top_k: int,
    mean_active_experts: int = 0,
) -> Tensor:
    """Return the gates [T, E] of the router logits x weight^T + router_bias.

    Args:
        x: [T, D], the last axis contiguous.
        weight: [E, D], contiguous.
        router_bias, selection_bias, gate_scale: [E].
        top_k, mean_active_experts: As in `functional.top_k_gating`.
    """
    from graphopt.runtime.kernels.experts import route as kernel

    tokens, width = x.shape
    experts = weight.shape[0]
    gates = torch.empty(tokens, experts, dtype=x.dtype, device=x.device)
    # One program reads all features of its tokens.
    wide = power(experts)
    rows, wide, depth, warps = (
        (1, wide, 32768 // wide, 16)
        if tokens <= 64
        else (16, max(16, wide), 256 if wide <= 16 else 128, 4)
    )
    kernel[(-(-tokens // rows),)](
        x, weight, router_bias, selection_bias, gate_scale, gates, tokens, x.stride(0),
        D=width, E=experts, TOP_K=top_k, BY_THRESHOLD=mean_active_experts > 0,
        BLOCK_T=rows, BLOCK_E=wide,
        BLOCK_D=min(depth, max(16, power(width))), num_warps=warps, num_stages=4,
    )  # fmt: skip
    return gates


def launch_many(
    x: Tensor,
    gates: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    act: str,
    active: int,
    tiles: ExpertTiles,
) -> Tensor:
    """Return what a token's experts add to it, [T, active, D']; tokens are sorted by expert.

    Args:
        x: [T, D], the last axis contiguous.
        gates: [T, E], contiguous; at most `active` of a token are not 0. Behind the rows of the
            experts that it runs a token's rows are left as they were allocated.
        up, gate: [E N, D].
        down: [D', E N].
    """
    from graphopt.runtime.kernels.experts import expand, list_tokens, reduce

    tokens, width = x.shape
    experts, out = gates.shape[1], down.shape[0]
    size = up.shape[0] // experts
    wide = power(experts)
    routes = tokens * active
    # Rows that begin anywhere come one number at a time, and the assembler gets Hopper's products
    # of them wrong, which have 64 rows (see `graphopt.plan.triton`).
    anywhere = width % 8 or size % 8 or x.stride(0) % 8
    chosen = tiles.sorted_tokens(routes // experts, 32 if anywhere else None)
    tiles_up, tiles_down, rows = chosen.expand, chosen.reduce, chosen.expand.rows
    room = -(-size // tiles_down.depth) * tiles_down.depth
    order = torch.empty(experts, tokens, dtype=torch.int32, device=x.device)
    counts = torch.empty(experts, dtype=torch.int32, device=x.device)
    block = min(power(tokens), max(16, 16384 // wide))
    list_tokens[(experts,)](
        gates, order, counts, tokens,
        E=experts, COUNT=active, BLOCK_T=block, BLOCK_E=wide, num_warps=16,
    )  # fmt: skip
    # Each expert may leave its last tile unfilled.
    count = routes // rows + experts
    hidden = torch.empty(count * rows, room, dtype=x.dtype, device=x.device)
    columns = -(-room // tiles_up.columns)
    expand[(count * columns,)](
        x, up, gate,
        _described(up, tiles_up.columns, tiles_up.depth, routes),
        _described(gate, tiles_up.columns, tiles_up.depth, routes),
        up_bias, gate_bias, gates, order, counts, hidden, tokens, count, x.stride(0),
        D=width, E=experts, SIZE=size, ROOM=room, COUNT=active, ACT=act,
        **tiles_up.options(experts, 1 if gate is None else 2, _shared_bytes()),
    )  # fmt: skip
    parts = torch.empty(tokens, active, out, dtype=x.dtype, device=x.device)
    columns = -(-out // tiles_down.columns)
    # Such a copy starts at a multiple of 16 bytes: here at each expert's first column.
    described = None if size % 8 else _described(down, tiles_down.columns, tiles_down.depth, routes)
    reduce[(count * columns,)](
        hidden,
        None if described is None else _described(hidden, rows, tiles_down.depth, routes),
        down, described, order, counts, parts, tokens, count,
        OUT=out, E=experts, SIZE=size, ROOM=room,
        **tiles_down.options(experts, 1, _shared_bytes()),
    )  # fmt: skip
    return parts


def launch_combine(
    parts: Tensor, gates: Tensor, shared: Tensor | None, bias: Tensor | None, y: Tensor
) -> None:
    """Write to y [T, D'] what a token's experts add to it, `shared` [T, D'] and a bias [D'].

    Args:
        parts: [T, active, D'], as `launch_many` gives.
        gates: [T, E], contiguous.
    """
    from graphopt.runtime.kernels.experts import combine

    tokens, active, out = parts.shape
    experts = gates.shape[1]
    block = min(1024, power(out))
    combine[(tokens, -(-out // block))](
        parts, gates, bias, shared, y,
        OUT=out, E=experts, COUNT=active, BLOCK_E=power(experts), BLOCK=block, num_warps=4,
    )  # fmt: skip


def launch_few(
    x: Tensor,
    gates: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    shared_up: Tensor | None,
    shared_down: Tensor | None,
    shared_gate: Tensor | None,
    shared_up_bias: Tensor | None,
    shared_gate_bias: Tensor | None,
    shared_down_bias: Tensor | None,
    act: str,
    active: int,
    tiles: ExpertTiles,
) -> Tensor:
    """Return the sum of the experts and the shared neurons, every token by itself.

    Args:
        x: [T, D], the last axis contiguous.
        gates: [T, E], contiguous; at most `active` of a token are not 0.
    """
    from graphopt.runtime.kernels.experts import expand_few, reduce_few

    tokens, width = x.shape
    experts, out = gates.shape[1], down.shape[0]
    size = up.shape[0] // experts
    common = 0 if shared_up is None else shared_up.shape[0]
    sizes = {"E": experts, "SIZE": size, "SHARED": common, "COUNT": active}
    sizes["BLOCK_E"] = power(experts)
    hidden = torch.empty(tokens, common + active * size, dtype=x.dtype, device=x.device)
    rows, depth, warps = dataclasses.astuple(tiles.expand_few)
    blocks = -(-common // rows) + active * -(-size // rows)
    expand_few[(blocks, tokens)](
        x, up, gate, up_bias, gate_bias, shared_up, shared_gate, shared_up_bias, shared_gate_bias,
        gates, hidden, x.stride(0),
        D=width, ACT=act, BLOCK_N=rows, BLOCK_D=min(depth, power(width)), num_warps=warps,
        **sizes,
    )  # fmt: skip
    y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    rows, depth, warps = dataclasses.astuple(tiles.reduce_few)
    reduce_few[(-(-out // rows), tokens)](
        hidden, down, shared_down, shared_down_bias, gates, y,
        OUT=out, BLOCK_N=rows, BLOCK_D=min(depth, power(max(common, size))), num_warps=warps,
        **sizes,
    )  # fmt: skip
    return y


# In place of `functional` -------------------------------------------------------------------------


def top_k_gating(
    router_logits: Tensor,
    selection_bias: Tensor | None = None,
    gate_scale: Tensor | None = None,
    *,
    top_k: int,
    mean_active_experts: int = 0,
) -> Tensor:
    """As `functional.top_k_gating`."""
    if runs_by_kernel(router_logits) and router_logits.shape[-1] <= MOST_EXPERTS:
        return launch_top_k_gating(
            router_logits, selection_bias, gate_scale, top_k, mean_active_experts
        )
    return functional.top_k_gating(
        router_logits,
        selection_bias,
        gate_scale,
        top_k=top_k,
        mean_active_experts=mean_active_experts,
    )


def route(
    x: Tensor,
    weight: Tensor,
    router_bias: Tensor | None = None,
    selection_bias: Tensor | None = None,
    gate_scale: Tensor | None = None,
    *,
    top_k: int,
    mean_active_experts: int = 0,
) -> Tensor:
    """As `functional.route`."""
    given = [t for t in (router_bias, selection_bias, gate_scale) if t is not None]
    if (
        not runs_by_kernel(x, weight, *given)
        or not weight.is_contiguous()
        or len(weight) > MOST_EXPERTS
    ):
        return functional.route(
            x, weight, router_bias, selection_bias, gate_scale,
            top_k=top_k, mean_active_experts=mean_active_experts,
        )  # fmt: skip
    gates = launch_route(
        x.reshape(-1, x.shape[-1]), weight, router_bias, selection_bias, gate_scale,
        top_k, mean_active_experts,
    )  # fmt: skip
    return gates.view(*x.shape[:-1], len(weight))


class ExpertKernels:
    """`moe` with the tiles of a target.

    Args:
        tiles: Those of the target that the model was emitted for.
    """

    def __init__(self, tiles: ExpertTiles) -> None:
        self._tiles = tiles

    def moe(
        self,
        x: Tensor,
        gates: Tensor,
        up: Tensor,
        down: Tensor,
        gate: Tensor | None = None,
        up_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
        shared_up: Tensor | None = None,
        shared_down: Tensor | None = None,
        shared_gate: Tensor | None = None,
        shared_up_bias: Tensor | None = None,
        shared_gate_bias: Tensor | None = None,
        shared_down_bias: Tensor | None = None,
        *,
        act: str,
        active: int,
    ) -> Tensor:
        """As `functional.moe`."""
        routed = (up, down, gate, up_bias, gate_bias)
        common = (
            shared_up, shared_down, shared_gate, shared_up_bias, shared_gate_bias, shared_down_bias
        )  # fmt: skip
        weights = [weight for weight in (*routed, *common) if weight is not None]
        if not runs_by_kernel(x, *weights) or not all(weight.is_contiguous() for weight in weights):
            return functional.moe(x, gates, *routed, *common, act=act, active=active)
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        gates = gates.reshape(-1, gates.shape[-1]).contiguous()
        if len(x) == 1 or 2 * len(x) * active <= gates.shape[1]:
            # Hardly two tokens share an expert: each reads the weights of its own.
            y = launch_few(x, gates, *routed, *common, act, active, self._tiles)
            return y.view(*shape, y.shape[-1])
        y = torch.empty(len(x), len(down), dtype=x.dtype, device=x.device)
        shared: Tensor | None = None
        if shared_up is not None and shared_down is not None:
            # Neither part fills the GPU to its end, so they run beside each other.
            main = torch.cuda.current_stream(x.device)
            side = _side_stream(main)
            side.wait_stream(main)
            with torch.cuda.stream(side):
                hidden = functional.linear(x, shared_up, shared_up_bias)
                if shared_gate is None:
                    hidden = functional.ACTIVATIONS[act](hidden)
                else:
                    hidden = act_mul(
                        functional.linear(x, shared_gate, shared_gate_bias), hidden, act
                    )
                shared = functional.linear(hidden, shared_down)
        for start in range(0, len(x), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            parts = launch_many(x[rows], gates[rows], *routed, act, active, self._tiles)
            ours: Tensor | None = None
            if shared is not None:
                main.wait_stream(side)
                ours = shared[rows]
            launch_combine(parts, gates[rows], ours, shared_down_bias, y[rows])
        return y.view(*shape, y.shape[-1])


@functools.cache
def _side_stream(main: torch.cuda.Stream) -> torch.cuda.Stream:
    # One for each stream: what it allocates it uses again only after it has waited for that one.
    return torch.cuda.Stream(main.device)
