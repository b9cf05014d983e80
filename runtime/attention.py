"""Launching the tiled attention kernels of `graphopt.runtime.kernels`.

A kernel takes its sizes and switches as constants; which, an attention's plan says. Layout
letters: B batch, S query tokens, T key tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graphopt.runtime.fitting_tiles import Constants, first_that_fits

OPTIONS = ("num_warps", "num_stages", "launch_pdl")
MOST_BLOCKS = 65535
"""Blocks along the second and the third axis of a grid."""


@dataclass(frozen=True)
class Keys:
    """Keys and values, and where in their memory each row's keys lie.

    Attributes:
        k: [B, G, T, D], or for pages [pages, G, page, D].
        v: [B, G, T, Dv], or for pages [pages, G, page, Dv].
        kv_lens: int32 [B]: keys of each row, where the memory holds more.
        ring_start: int32 [B]: slot of a ring in which a row's first key lies.
        block_table: int32 [B, N]: the page of the pool that holds page n of a row.
        selected_blocks: int32 or int64 [B, G, M]: the pages of a row that a key head reads, each
            at most once; a negative number stands for none.
        cu_seqlens: int32 [B + 1]: where each sequence begins among the keys, and the end of the
            last; for sequences one behind the other.
        bits: 16, or those of the codes where `k` and `v` hold rows of `kv_codes`, uint8.
        value_dim: Features of a value, where `v` holds rows.
    """

    k: Tensor
    v: Tensor
    kv_lens: Tensor | None = None
    ring_start: Tensor | None = None
    block_table: Tensor | None = None
    selected_blocks: Tensor | None = None
    cu_seqlens: Tensor | None = None
    bits: int = 16
    value_dim: int | None = None

    @property
    def values(self) -> int:
        """Features of a value."""
        return int(self.v.shape[-1]) if self.value_dim is None else self.value_dim

    def capacity(self) -> int:
        """Return how many keys a row may have."""
        if self.block_table is not None:
            return int(self.block_table.shape[1]) * int(self.k.shape[2])
        return int(self.k.shape[2])


def check(q: Tensor, keys: Keys, constants: Constants) -> None:
    """Refuse operands that a kernel of these constants would read wrongly.

    Raises:
        ValueError: Naming the operand and what it should be.
    """
    wanted = (constants["HEAD_DIM"], constants["VALUE_DIM"])
    packed = keys.bits < 16
    found = (q.shape[-1], q.shape[-1] if packed else keys.k.shape[-1], keys.values)
    if keys.bits != constants["KV_BITS"]:
        raise ValueError(
            f"keys of {keys.bits} bits: this kernel was made for {constants['KV_BITS']}; plan one "
            "for the cache at hand"
        )
    if found != (wanted[0], *wanted):
        raise ValueError(
            f"head sizes of q, k, v are {found}: this kernel was made for {wanted[0]}, "
            f"{wanted[0]}, {wanted[1]}; plan one for these sizes"
        )
    if q.shape[1] != keys.k.shape[1] * constants["GROUP"]:
        raise ValueError(
            f"{q.shape[1]} query heads over {keys.k.shape[1]} key heads: this kernel was made "
            f"for {constants['GROUP']} query heads a key head"
        )
    if 0 in q.shape or 0 in keys.k.shape:
        raise ValueError(
            f"nothing to attend: q is {tuple(q.shape)}, k is {tuple(keys.k.shape)}; "
            "leave out empty batches and lengths"
        )
    for name, tensor in (("k", keys.k), ("v", keys.v)):
        if tensor.dtype != (torch.uint8 if packed else q.dtype):
            raise ValueError(f"{name} is {tensor.dtype} and q is {q.dtype}: give one dtype")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}'s last axis is not contiguous: call .contiguous()")
    if q.stride(-1) != 1:
        raise ValueError("q's last axis is not contiguous: call .contiguous()")
    for switch, name in (
        ("KV_LENS", "kv_lens"), ("RING", "ring_start"), ("PAGE", "block_table"),
        ("SELECTED", "selected_blocks"), ("VARLEN", "cu_seqlens"),
    ):  # fmt: skip
        if bool(constants[switch]) != (getattr(keys, name) is not None):
            state = "needs" if constants[switch] else "does not take"
            raise ValueError(f"this kernel {state} {name!r}: plan one for the cache at hand")
    if keys.selected_blocks is not None:
        rows = (q.shape[0], keys.k.shape[1])
        if keys.selected_blocks.shape[:2] != rows:
            raise ValueError(
                f"selected_blocks is {tuple(keys.selected_blocks.shape)}: a list for each of "
                f"{rows[0]} rows and {rows[1]} key heads is needed"
            )
    if constants["RING"] and constants["RING"] != keys.k.shape[2]:
        raise ValueError(f"a ring of {keys.k.shape[2]} slots: made for {constants['RING']}")
    if constants["PAGE"] and constants["PAGE"] != keys.k.shape[2]:
        raise ValueError(f"pages of {keys.k.shape[2]} tokens: made for {constants['PAGE']}")


@dataclass(frozen=True)
class Extras:
    """What is added to the scores, or masks them.

    Attributes:
        mask: int8 [B, T], nonzero at real keys.
        bias: Additive, broadcastable to [B, H, S, T].
        slopes: fp32 [H], ALiBi.
        positions: int32 [B, T], the position of each key that a slope is times; by default its
            index, or its index among the real keys.
        sinks: fp32 [H].
    """

    mask: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    positions: Tensor | None = None
    sinks: Tensor | None = None


def extra_arguments(
    extras: Extras, constants: Constants, shape: tuple[int, int, int, int]
) -> dict[str, Any]:
    """Return the kernel's arguments for `extras`; `shape` is (B, H, S, T)."""
    batch, heads, _, keys = shape
    for switch, name in (
        ("PADDING_MASK", "mask"), ("BIAS", "bias"), ("ALIBI", "slopes"), ("SINKS", "sinks"),
    ):  # fmt: skip
        given = getattr(extras, name) is not None
        if switch in constants and bool(constants[switch]) != given:
            state = "needs" if constants[switch] else "does not take"
            raise ValueError(f"this kernel {state} {name!r}: plan one for the attention at hand")
    found: dict[str, Any] = {}
    if extras.mask is not None:
        if extras.mask.shape != (batch, keys):
            raise ValueError(f"mask is {tuple(extras.mask.shape)}: it should be {(batch, keys)}")
        found["mask_ptr"] = extras.mask.to(torch.int8).contiguous()
    if extras.bias is not None:
        wide = extras.bias.expand(shape)
        found["bias_ptr"] = wide
        found |= {f"bias_stride_{axis}": wide.stride(i) for i, axis in enumerate("bhst")}
    for name in ("slopes", "sinks"):
        values = getattr(extras, name)
        if values is not None:
            if values.shape != (heads,):
                raise ValueError(f"{name} is {tuple(values.shape)}: it should be {(heads,)}")
            found[f"{name}_ptr"] = values.float().contiguous()
    if extras.slopes is not None:
        found["positions_ptr"] = _positions(extras, batch, keys)
    return found


def _positions(extras: Extras, batch: int, keys: int) -> Tensor:
    """Return the ALiBi position of every key, int32 [B, T]."""
    if extras.positions is not None:
        return extras.positions.to(torch.int32).expand(batch, keys).contiguous()
    if extras.mask is None:
        assert extras.slopes is not None
        positions = torch.arange(keys, dtype=torch.int32, device=extras.slopes.device)
        return positions.expand(batch, keys).contiguous()
    real = extras.mask.ne(0).to(torch.int32)
    return ((real.cumsum(-1) - 1) * real).to(torch.int32)


def key_arguments(keys: Keys) -> dict[str, Any]:
    found: dict[str, Any] = {"k_ptr": keys.k, "v_ptr": keys.v}
    for name, tensor in (("k", keys.k), ("v", keys.v)):
        found |= {f"{name}_stride_{axis}": tensor.stride(i) for i, axis in enumerate("bht")}
    for name, index in (
        ("kv_lens", keys.kv_lens), ("ring_start", keys.ring_start),
        ("block_table", keys.block_table), ("cu_seqlens_k", keys.cu_seqlens),
    ):  # fmt: skip
        if index is not None:
            found[f"{name}_ptr"] = index.to(torch.int32).contiguous()
    if keys.selected_blocks is not None:
        # Of either width: a step that selects pages would else have one more kernel.
        found["selected_blocks_ptr"] = keys.selected_blocks.contiguous()
    found["block_table_width"] = 0 if keys.block_table is None else keys.block_table.shape[1]
    found["selected_width"] = 0 if keys.selected_blocks is None else keys.selected_blocks.shape[2]
    return found


def rows_aligned(tensor: Tensor) -> bool:
    """Return whether every row along the last axis begins at a multiple of 16 bytes.

    The kernels read and write rows by 16 bytes. Where an axis has one index its stride is not
    followed.
    """
    each = 16 // tensor.element_size()
    followed = [n for size, n in zip(tensor.shape[:-1], tensor.stride(), strict=False) if size > 1]
    return tensor.data_ptr() % 16 == 0 and all(stride % each == 0 for stride in followed)


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy whose rows are aligned; sizes of a head are multiples of 8."""
    return tensor if rows_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _written(shape: tuple[int, ...], q: Tensor, out: Tensor | None) -> Tensor:
    """Return where a kernel writes the output [B, H, S, Dv]: `out`, if it can."""
    if out is not None and rows_aligned(out):
        return out
    batch, heads, queries, width = shape
    # As [B, S, H, Dv] in memory: the heads of a token lie side by side for what follows.
    made = torch.empty((batch, queries, heads, width), dtype=q.dtype, device=q.device)
    return made.transpose(1, 2)


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Launch a Triton kernel with those of the arguments that it has; what it lacks is None.

    Raises:
        ValueError: CUDA has no grid of that size.
    """
    if any(size > MOST_BLOCKS for size in grid[1:]):
        raise ValueError(
            f"a grid of {grid}: at most {MOST_BLOCKS:,} heads times rows of a batch; "
            "give the batch in parts"
        )
    given = {name: arguments.get(name) for name in kernel.arg_names}
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    strides = {name: 0 for name in given if "_stride_" in name and given[name] is None}
    kernel[grid](**(given | strides), **options)


def _divide(a: int, b: int) -> int:
    return -(-a // b)


def prefill(
    kernel: Any,
    q: Tensor,
    keys: Keys,
    constants: Constants,
    *,
    scale: float,
    extras: Extras = Extras(),
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run `attention_prefill`.

    Args:
        kernel: The kernel of kernels/prefill.py, whole or as it was emitted.
        q: [B, H, S, D]; [1, H, all, D] where sequences lie one behind the other.
        constants: The kernel's constants and `num_warps`, `num_stages`.
        cu_seqlens_q: int32 [B + 1]: where each sequence begins among the queries, and the end.
        max_seqlen_q: Queries of the longest sequence, with `cu_seqlens_q`.
        out: Written to if given, [B, H, S, Dv].

    Returns:
        The output [B, H, S, Dv]; where the constants ask for them the log-sum-exp [B, H, S] and
        the largest score of every page read, [B, H, S, pages], -inf where nothing was seen.

    Raises:
        ValueError: The operands are not those the constants were made for.
    """
    check(q, keys, constants)
    q, keys = _aligned(q), replace(keys, k=_aligned(keys.k), v=_aligned(keys.v))
    batch, heads, queries, _ = q.shape
    written = _written((*q.shape[:3], keys.values), q, out)
    rows = queries
    if cu_seqlens_q is not None:
        batch = len(cu_seqlens_q) - 1
        rows = queries if max_seqlen_q is None else max_seqlen_q
    count = keys.capacity()
    lse = None
    if constants["LSE"]:
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    page_max = _page_maxima(q, keys, constants)
    arguments = {
        **key_arguments(keys),
        **extra_arguments(extras, constants, (batch, heads, queries, count)),
        "q_ptr": q,
        "out_ptr": written,
        "lse_ptr": lse,
        "page_max_ptr": page_max,
        "page_slots": 0 if page_max is None else page_max.shape[3],
        "cu_seqlens_q_ptr": None if cu_seqlens_q is None else cu_seqlens_q.to(torch.int32),
        "S": queries,
        "T": count,
        "H": heads,
        "scale": scale,
        "WORDS": q.is_cuda,
    }
    for name, tensor in (("q", q), ("o", written)):
        arguments |= {f"{name}_stride_{axis}": tensor.stride(i) for i, axis in enumerate("bhs")}

    def start(constants: Constants) -> None:
        if page_max is not None:
            page_max.fill_(float("-inf"))
        blocks = _divide(rows, int(constants["BLOCK_M"]))
        launch(kernel, (blocks, batch * heads), {**arguments, **constants})

    first_that_fits(constants, q.device, start)
    return _returned(written, out), lse, page_max


def _returned(written: Tensor, out: Tensor | None) -> Tensor:
    """Return the output where the caller wants it."""
    return written if out is None or out is written else out.copy_(written)


def _walked(keys: Keys, constants: Constants) -> int:
    """Return how many slots of keys a kernel walks: of the pages that are read, or of all."""
    if keys.selected_blocks is None:
        return keys.capacity()
    return int(keys.selected_blocks.shape[2]) * int(constants["PAGE"])


def _page_maxima(q: Tensor, keys: Keys, constants: Constants) -> Tensor | None:
    """Return fp32 [B, H, S, pages] for a kernel to fill, where the constants ask for it."""
    if not constants["PAGE_MAX"]:
        return None
    pages = _walked(keys, constants) // int(constants["PAGE"])
    return torch.empty((*q.shape[:3], pages), dtype=torch.float32, device=q.device)


def writes_page_maxima(constants: Constants) -> bool:
    """Return whether `attention_decode` writes every page's maximum, and does not raise it."""
    return bool(constants["SELECTED"]) and int(constants["PAGE"]) <= int(constants["BLOCK_N"])


def splits_of(keys: int, constants: Constants) -> int:
    """Return into how many spans `keys` are split: by their number alone, not by the batch."""
    return max(1, min(int(constants["SPLITS"]), _divide(keys, int(constants["SPAN"]))))


def decode(
    kernel: Any,
    merge: Any,
    q: Tensor,
    keys: Keys,
    constants: Constants,
    *,
    scale: float,
    extras: Extras = Extras(),
    splits: int | None = None,
    out: Tensor | None = None,
    rounds: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run `attention_decode` and `attention_merge`; of one span the first alone, where it can be.

    Args:
        kernel, merge: The kernels of kernels/decode.py, whole or as they were emitted.
        q: [B, H, S, D], few tokens.
        constants: The kernel's constants, `num_warps`, `num_stages`, `SPLITS` and `SPAN`.
        splits: Spans the keys are split into; by default `splits_of` the cache's capacity.
        rounds: Whether `kernel` writes its results in the dtype of where they go, as Triton's do.

    Returns:
        The output [B, H, S, Dv]; where the constants ask for them the log-sum-exp [B, H, S] and
        the largest score of every page read, [B, H, S, pages], -inf where nothing was seen.

    Raises:
        ValueError: The operands are not those the constants were made for.
    """
    check(q, keys, constants)
    q, keys = _aligned(q), replace(keys, k=_aligned(keys.k), v=_aligned(keys.v))
    batch, heads, queries, _ = q.shape
    count, width = keys.capacity(), keys.values
    if splits is None:
        splits = splits_of(_walked(keys, constants), constants)
    group = int(constants["GROUP"])
    lead = (batch, heads, queries)
    written = _written((*lead, width), q, out)
    # A merge of one span's results would round them, and change nothing else. They lie as
    # [B, H, S, 1, Dv]: as the output does, of one token.
    merges = splits > 1 or bool(constants["SINKS"]) or bool(constants["LSE"])
    alone = rounds and not merges and queries == 1 and written.transpose(1, 2).is_contiguous()
    part = written
    if not alone:
        part = torch.empty((*lead, splits, width), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((*lead, splits), dtype=torch.float32, device=q.device)
    lse = torch.empty(lead, dtype=torch.float32, device=q.device) if constants["LSE"] else None
    page_max = _page_maxima(q, keys, constants)
    arguments = {
        **key_arguments(keys),
        **extra_arguments(extras, constants, (batch, heads, queries, count)),
        "q_ptr": q,
        "part_ptr": part,
        "part_lse_ptr": part_lse,
        "page_max_ptr": page_max,
        "page_slots": 0 if page_max is None else page_max.shape[3],
        "S": queries,
        "T": count,
        "H": heads,
        "scale": scale,
        "WORDS": q.is_cuda,
    }
    arguments |= {f"q_stride_{axis}": q.stride(i) for i, axis in enumerate("bhs")}
    early = {"launch_pdl": True} if constants["OVERLAP"] else {}

    def start(constants: Constants) -> None:
        if page_max is not None and not writes_page_maxima(constants):
            page_max.fill_(float("-inf"))
        blocks = _divide(queries * group, int(constants["BLOCK_M"]))
        grid = (splits, batch * (heads // group), blocks)
        launch(kernel, grid, {**arguments, **constants, **early})

    first_that_fits(constants, q.device, start)
    if alone:
        return _returned(written, out), None, page_max
    columns = min(64, 1 << (width - 1).bit_length())
    merging = {
        **constants,
        "part_ptr": part,
        "part_lse_ptr": part_lse,
        "sinks_ptr": arguments.get("sinks_ptr"),
        "out_ptr": written,
        "lse_ptr": lse,
        "S": queries,
        "H": heads,
        "splits": splits,
        "SLOTS": 1 << (splits - 1).bit_length(),
        "BLOCK_V": columns,
        "num_warps": 4,
        "num_stages": 1,
        **early,
    }
    merging |= {f"o_stride_{axis}": written.stride(i) for i, axis in enumerate("bhs")}
    launch(merge, (batch * heads * queries, _divide(width, columns)), merging)
    return _returned(written, out), lse, page_max
