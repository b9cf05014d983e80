"""What a decoding step has beside its linears: transforms behind norms and gates, and its cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from bits_transform import DEVICE, DTYPE, rotation
from turns import ON_GPU, Result, Rows, median, microseconds, recorded

from graphopt.ir import functional
from graphopt.ir.kv_memory import pack_rows
from graphopt.lowering.kernels import get_family, plan_attention
from graphopt.plan import AttentionSpec
from graphopt.runtime.attention import Extras, Keys
from graphopt.runtime.fused import launch_act_mul, launch_norm
from graphopt.runtime.kv_cache import dense
from graphopt.runtime.transforms import launch_transform
from graphopt.targets import Target

SIZES = {4096: (64, 64), 11008: (86, 128)} if ON_GPU else {576: (24, 24)}
TIMES = 50 if ON_GPU else 1
"""Runs of a recorded graph: of one alone the launch is longer."""
HEADS, GROUPS, HEAD_DIM = (32, 8, 128) if ON_GPU else (4, 2, 32)
LENGTHS = (2048, 8192, 32768) if ON_GPU else (48,)


def steps_part(rows: Rows) -> None:
    """Time the norm, or the gate, of one token alone and with a transform behind it."""
    for width, (n1, n2) in SIZES.items():
        x, y, gain = (torch.randn(1, width, device=DEVICE).to(DTYPE) for _ in range(3))
        left, right = rotation(n1), rotation(n2)
        norm = width != 11008
        before = "norm" if norm else "silu"

        def front(x: Any = x, y: Any = y, gain: Any = gain, norm: bool = norm) -> Any:
            return launch_norm(x, y, gain, 1e-5, 0.0) if norm else launch_act_mul(x, y, "silu")

        def whole(
            bits: int, x: Any = x, y: Any = y, gain: Any = gain, norm: bool = norm,
            left: Any = left, right: Any = right, before: str = before,
        ) -> Any:  # fmt: skip
            return launch_transform(
                x, left, right, before=before, y=y, weight=gain if norm else None, eps=1e-5,
                bits=bits,
            )  # fmt: skip

        def repeated(run: Callable[[], Any]) -> Callable[[], Any]:
            return recorded(lambda: [run() for _ in range(TIMES)])

        def make(front: Any = front, whole: Any = whole) -> tuple[Result, str]:
            runs = {
                "alone": repeated(front),
                "transformed": repeated(lambda: whole(0)),
                "codes": repeated(lambda: whole(4)),
            }
            times = microseconds(runs, per=TIMES)
            shown = ", ".join(f"{name} {value:.2f} us" for name, value in median(times).items())
            return {"microseconds": times}, shown

        rows.add(f"one token of {width}, {before}", make)


def cache_part(rows: Rows, target: Target) -> None:
    """Time the attention of one token over caches of 16, 8 and 4 bits, beside torch's."""
    triton = replace(target, kernels=("triton",))
    scale = HEAD_DIM**-0.5
    for length in LENGTHS:
        shape = 1, GROUPS, length, HEAD_DIM
        k, v = (torch.randn(shape, device=DEVICE).to(DTYPE) for _ in range(2))
        q = torch.randn(1, HEADS, 1, HEAD_DIM, device=DEVICE).to(DTYPE)
        lens = torch.tensor([length], dtype=torch.int32, device=DEVICE)
        runs: dict[str, Callable[[], Any]] = {
            "torch": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        }
        for bits in (16, 8, 4):
            packed = (k, v) if bits == 16 else (pack_rows(k, bits), pack_rows(v, bits))
            keys = Keys(*packed, kv_lens=lens, bits=bits, value_dim=HEAD_DIM)

            def made(
                bits: int = bits, keys: Keys = keys, q: Any = q, runs: Any = runs
            ) -> tuple[Result, str]:
                spec = AttentionSpec(
                    head_dim=HEAD_DIM, heads=HEADS, kv_heads=GROUPS, phase="decode",
                    dtype="bf16" if ON_GPU else "f16", kv_lens=True, kv_bits=bits,
                )  # fmt: skip
                run = get_family("triton").load(plan_attention(spec, triton))

                def attend() -> Any:
                    return run(q, keys, scale=scale, extras=Extras())[0]

                read = dense(keys, HEAD_DIM, torch.float32)
                exact = functional.attention(q.float(), read.k.float(), read.v.float(), scale=scale)
                error = float((attend().float() - exact).abs().max() / exact.abs().max())
                assert error < 2e-2, error
                runs[f"{bits} bits"] = attend
                return {"error": error}, f"error {error:.1e}"

            rows.add(f"attention over {length} keys of {bits} bits", made)

        def make(runs: dict[str, Callable[[], Any]] = runs) -> tuple[Result, str]:
            times = microseconds({name: recorded(run) for name, run in runs.items()})
            shown = ", ".join(f"{name} {value:.1f} us" for name, value in median(times).items())
            return {"microseconds": times}, shown

        rows.add(f"attention over {length} keys", make)
