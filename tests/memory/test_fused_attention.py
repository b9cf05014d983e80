"""Which attention kernel torch is said to take on a GPU, and that each gives the right shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.memory.fused_attention import attend, chosen_kernel
from graphopt.memory.recording import record
from graphopt.memory.stand_in import StandIn
from graphopt.memory.workspaces import kernel_workspace

HALF = torch.bfloat16


def heads(count: int = 4, tokens: int = 32, width: int = 64, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(2, count, tokens, width, dtype=dtype, device="meta")


def mask(tokens: int = 32, keys: int = 32) -> Tensor:
    return torch.empty(2, 1, tokens, keys, dtype=torch.bool, device="meta")


@pytest.mark.parametrize(
    ("q", "kv", "added", "causal", "capability", "kernel"),
    [
        (heads(), heads(), None, True, (9, 0), "cudnn"),
        (heads(), heads(), mask(), False, (9, 0), "cudnn"),
        (heads(), heads(2), None, True, (9, 0), "cudnn"),
        (heads(width=264), heads(width=264), None, True, (9, 0), "efficient"),
        (heads(), heads(), None, True, (8, 0), "flash"),
        (heads(), heads(2), None, True, (8, 0), "flash"),
        (heads(), heads(), mask(), False, (8, 0), "efficient"),
        (heads(), heads(2), mask(), False, (8, 0), "math"),
        (heads(tokens=1), heads(), None, True, (8, 0), "efficient"),
        (heads(), heads(), None, True, (7, 0), "math"),
        (heads(dtype=torch.float16), heads(dtype=torch.float16), None, True, (7, 0), "efficient"),
        (heads(dtype=torch.float32), heads(dtype=torch.float32), None, True, (9, 0), "efficient"),
        (heads(dtype=torch.float64), heads(dtype=torch.float64), None, True, (9, 0), "math"),
        (heads(width=66), heads(width=66), mask(), False, (9, 0), "math"),
        (heads(3), heads(2), None, True, (9, 0), "math"),
        (heads()[0], heads()[0], None, True, (9, 0), "math"),
    ],
)
def test_the_kernel_is_chosen_by_what_each_can_do(
    q: Tensor, kv: Tensor, added: Tensor | None, causal: bool, capability: tuple[int, int],
    kernel: str,
) -> None:  # fmt: skip
    chosen = chosen_kernel(
        q, kv, kv, added, is_causal=causal, grouped=True, capability=capability
    )  # fmt: skip
    assert chosen == kernel


@pytest.mark.parametrize("capability", [(7, 0), (8, 0), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_every_kernel_gives_the_result_and_gradients_of_its_shape(
    capability: tuple[int, int], dtype: torch.dtype, masked: bool
) -> None:
    q, k, v = (heads(4, 24, 40, dtype).requires_grad_() for _ in range(3))
    out = attend(
        q, k, v, mask(24, 24) if masked else None, 0.0, not masked, capability=capability
    )  # fmt: skip
    assert out.shape == q.shape
    assert out.dtype == dtype
    out.sum().backward()
    assert [x.grad.shape for x in (q, k, v)] == [q.shape] * 3


@pytest.mark.parametrize("keys", [24, 25])
def test_a_mask_is_padded_where_its_rows_do_not_begin_at_multiples_of_eight(keys: int) -> None:
    def work() -> Tensor:
        q = torch.zeros(2, 4, 24, 40, device="cuda")
        k = torch.zeros(2, 4, keys, 40, device="cuda")
        added = torch.zeros(2, 1, 24, keys, device="cuda")
        return F.scaled_dot_product_attention(q, k, k, added)

    with StandIn():
        trace = record(work)
    padded = [i.size for i in trace.instances if "constant_pad" in i.producer]
    assert padded == ([] if keys == 24 else [4 * 2 * 24 * 32])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_runs_the_operators_that_are_said(masked: bool, dtype: torch.dtype) -> None:
    def make(device: str) -> Callable[[], Tensor]:
        q, k, v = (
            torch.zeros(2, 4, 24, 64, dtype=dtype, device=device, requires_grad=True)
            for _ in range(3)
        )
        seen = torch.ones(2, 1, 24, 24, dtype=torch.bool, device=device) if masked else None
        return lambda: F.scaled_dot_product_attention(q, k, v, seen, is_causal=not masked)

    gpu = record(make("cuda"), device="cuda")
    with StandIn(torch.cuda.get_device_capability()):
        said = record(make("cuda"))
    assert set(gpu.op_names) == set(said.op_names)
    assert [i.size for i in gpu.instances] == [i.size for i in said.instances]


def test_flash_attention_sums_gradients_of_queries_in_fp32() -> None:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    q, k = heads(4, 100, 64), heads(4, 100, 64)
    # 100 rows become 128; beside each row's 64 features is the sum of its gradient times result.
    assert kernel_workspace(backward, (q, q, k, k), {}, None) == 4 * 2 * 4 * 128 * (64 + 1)
    grouped = heads(2, 100, 64)
    more = 2 * 2 * 2 * 4 * 100 * 64  # keys and values of every head of queries, two bytes each
    assert (
        kernel_workspace(backward, (q, q, grouped, grouped), {}, None)
        == 4 * 2 * 4 * 128 * 65 + more
    )
    assert kernel_workspace(torch.ops.aten.mm.default, (q, k), {}, None) == 0
