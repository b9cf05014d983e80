"""Attention of few query tokens on a CPU, by a kernel in C++ that reads keys and values once.

The kernel is compiled with the system's compiler when it is first needed
(`graphopt.support.native_library`): it needs no header of Python or torch, so that one library
serves every version of both. It keeps threads of its own, as many as there are processors for this
process, each on a processor of its own; torch's are not asked, and may sleep meanwhile.

Layout letters: B batch, S query tokens, T slots, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.support.native_library import NoLibrary, native_library

FILES = ("host_attention.cpp", "host_vectors.h", "host_block.h")
OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w")
LEVELS = ("any", "plain", "avx2", "avx512", "avx512_bf16")
"""Instruction sets of the kernel, in its order; `any` is the best that the machine has."""

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CODES = 3
MOST_QUERIES = 16
"""Query tokens up to which the kernel is worth its while: each is a row of every key head."""


class NoHostKernel(RuntimeError):
    """The kernel cannot be had on this machine; the text says why, and what to do."""


class Job(ctypes.Structure):
    """What one attention needs; see the struct of the same name in host_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "q", "new_k", "new_v", "k", "v", "lens", "sinks", "out", "lse",
        )),
        *((name, ctypes.c_int64) for name in (
            "k_head", "v_head", "k_row", "v_row", "k_piece", "v_piece",
        )),
        *((name, ctypes.c_int32) for name in (
            "batch", "heads", "key_heads", "queries", "dim", "width", "first", "slots", "piece",
            "begin", "own", "window", "q_type", "kv_type",
        )),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("level", "append_only", "failed")),
    )  # fmt: skip


@functools.cache
def host_kernel() -> ctypes.CDLL:
    """Return the library of the kernel, compiled now or before.

    Raises:
        NoHostKernel: There is no compiler, or it refuses the source.
    """
    folder = Path(__file__).parent
    # Under kernels/ here; beside this file in an emitted model.
    places = {name: folder / "kernels" / name for name in FILES}
    sources = {
        name: (place if place.is_file() else folder / name).read_text(encoding="utf-8")
        for name, place in places.items()
    }
    try:
        library = native_library(sources, FILES[0], OPTIONS)
    except NoLibrary as problem:
        raise NoHostKernel(
            f"attention on the host needs a C++ compiler, once: {problem}. Install one (Debian: "
            "apt install g++; conda: conda install cxx-compiler), or name it in CXX"
        ) from problem
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("graphopt_set_threads", None, [ctypes.c_int]),
        ("graphopt_threads", ctypes.c_int, []),
        ("graphopt_level", ctypes.c_int, []),
        ("graphopt_host_step", None, [pointer]),
        ("graphopt_host_allocate", pointer, [i64, i64]),
        ("graphopt_host_free", None, [pointer, i64]),
        ("graphopt_host_sum", ctypes.c_uint64, [pointer, i64]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def levels_here() -> tuple[str, ...]:
    """Return the instruction sets of the kernel that this machine has, the plainest first."""
    return LEVELS[1 : host_kernel().graphopt_level() + 1]


def fill_job(
    job: Job,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lens: Tensor,
    out: Tensor,
    lse: Tensor,
    **options: Any,
) -> None:
    """Describe an attention to the kernel; the tensors have to live as long as the job.

    Args:
        q: [B, H, S, D], contiguous.
        k, v: [pieces, B, G, T, D] and [pieces, B, G, T, Dv], or rows of codes of 8 bits, uint8
            (`pack_rows`); the key heads of all rows at equal distances. A token's slot is its
            number less `first`, counted on from piece to piece.
        lens: int32 [B], tokens before the step.
        out: fp32 [B, H, S, Dv], contiguous, written.
        lse: fp32 [B, H, S], contiguous, written.
        options: Other fields of `Job`, by name; `width` where `v` holds rows of codes.

    Raises:
        ValueError: A dtype or a layout that the kernel does not read.
    """
    codes = k.dtype == torch.uint8
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out), ("lse", lse), ("lens", lens)):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}: the kernel reads host memory")
    for name, tensor in (("q", q), ("out", out), ("lse", lse)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: call .contiguous()")
    if q.dtype not in _TYPES or (not codes and k.dtype not in _TYPES) or k.dtype != v.dtype:
        raise ValueError(
            f"queries of {q.dtype} with keys of {k.dtype} and values of {v.dtype}: the kernel "
            "reads float32, bfloat16, float16, and rows of codes of 8 bits"
        )
    if (out.dtype, lse.dtype, lens.dtype) != (torch.float32, torch.float32, torch.int32):
        raise ValueError("out and lse are float32, lens are int32")
    batch, heads, queries, dim = q.shape
    for name, tensor in (("k", k), ("v", v)):
        piece, _, head, row, _ = tensor.stride()
        spaced = tensor.shape[1] == 1 or tensor.stride(1) == tensor.shape[2] * head
        if tensor.stride(4) != 1 or not spaced:
            raise ValueError(f"{name} has strides {tensor.stride()}: heads at equal distances")
        for what, stride in (("piece", piece), ("head", head), ("row", row)):
            setattr(job, f"{name}_{what}", stride * tensor.element_size())
    job.q, job.k, job.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
    job.lens, job.out, job.lse = lens.data_ptr(), out.data_ptr(), lse.data_ptr()
    job.batch, job.heads, job.key_heads = batch, heads, k.shape[2]
    job.queries, job.dim, job.width = queries, dim, v.shape[4]
    job.piece, job.slots, job.q_type = k.shape[3], k.shape[0] * k.shape[3], _TYPES[q.dtype]
    job.kv_type = _CODES if codes else _TYPES[k.dtype]
    for name, value in options.items():
        setattr(job, name, value)


def host_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lens: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    value_dim: int | None = None,
    level: str = "any",
) -> tuple[Tensor, Tensor]:
    """Return the attention of few query tokens, and its log-sum-exp.

    Args:
        q: [B, H, S, D], of float32, bfloat16 or float16.
        k, v: [B, G, T, D] and [B, G, T, Dv], of those too, or rows of codes of 8 bits.
        kv_lens: int [B], keys of each row; with `causal` the queries' own are the last S.
        sinks: [H], one more logit per head that carries no value.
        window: Keys that a query sees, its own included, with `causal`.
        value_dim: Dv, where `v` holds rows of codes.
        level: One of `LEVELS`.

    Returns:
        fp32 [B, H, S, Dv] and [B, H, S]; 0 and -inf where nothing is seen and there is no sink.

    Raises:
        ValueError: What the kernel does not read: see `fill_job`.
        NoHostKernel: There is no compiler.
        MemoryError: There is too little memory for what the spans of keys give.
    """
    queries = q.shape[2]
    if window is not None and not causal:
        raise ValueError("a window without causal: it ends at the query's own key")
    q = q.contiguous()
    width = v.shape[3] if value_dim is None else value_dim
    out = torch.empty(*q.shape[:3], width)
    lse = torch.empty(q.shape[:3])
    lens = (kv_lens - (queries if causal else 0)).to(torch.int32).contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    job = Job()
    fill_job(
        job, q, k[None], v[None], lens, out, lse, width=width, own=int(causal), scale=scale,
        window=window or 0, softcap=softcap or 0.0, level=LEVELS.index(level),
        sinks=None if sinks is None else sinks.data_ptr(),
    )  # fmt: skip
    host_kernel().graphopt_host_step(ctypes.byref(job))
    if job.failed:
        raise MemoryError("attention on the host has too little memory for its parts")
    return out, lse


def host_memory(bytes_: int, part: int) -> Tensor:
    """Return uint8 memory of zeros, each part of it touched first by the threads that read it.

    Args:
        part: Bytes of what one attention reads, such as the keys of a layer.

    Raises:
        MemoryError: There is not so much.
    """
    library = host_kernel()
    address = library.graphopt_host_allocate(bytes_, part)
    if not address:
        raise MemoryError(f"{bytes_:,} bytes of host memory cannot be had")
    buffer = (ctypes.c_uint8 * bytes_).from_address(address)
    memory = torch.frombuffer(buffer, dtype=torch.uint8)
    weakref.finalize(buffer, library.graphopt_host_free, address, bytes_).atexit = False
    return memory


def host_sum(memory: Tensor) -> int:
    """Read a contiguous tensor of host memory by all threads, and return a sum of its words."""
    return int(host_kernel().graphopt_host_sum(memory.data_ptr(), memory.nbytes))
