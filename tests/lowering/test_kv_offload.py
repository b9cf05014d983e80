"""Keys in host memory: what is read is there, and what is copied is the difference of two sets."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from late_copies import LateCopies
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.ir import functional
from graphopt.ir.kv_policies import (
    Ema,
    Filled,
    KVHeads,
    KVPolicy,
    PageBudget,
    Quest,
    Scoring,
    SinkLocal,
)
from graphopt.runtime import kv_offload, kv_slots
from graphopt.runtime.attention import Extras, Keys
from graphopt.runtime.copies import Copies, CopyAtOnce, CopyStream
from graphopt.runtime.dispatch import by_reference
from graphopt.runtime.kv_offload import (
    OffloadedKV,
    host_bytes,
    offloaded_step,
    page_bytes,
)
from graphopt.runtime.kv_slots import Places, fetch_plan

LAYERS, BATCH, PAGE, PROMPT, STEPS = 3, 2, 4, 45, 9
HEADS = KVHeads(key_heads=2, query_heads=4, k_dim=8, v_dim=12, dtype=torch.float64)
SCORING = Scoring(8**-0.5)
BUDGET = PageBudget(PAGE, 6, 1, 2)


class NobodyWaits(LateCopies):
    def wait(self, copied: int) -> None:
        pass


def attend(q: Tensor, keys: Keys) -> tuple[Tensor, Tensor, Tensor]:
    options = {"scale": SCORING.scale, "page": PAGE, "lse": True, "page_max": PAGE}
    out, lse, page_max = by_reference(q, keys, Extras(), options)
    assert lse is not None and page_max is not None
    return out, lse, page_max


def decode(policy: KVPolicy, copies: Copies, device: str = "cpu") -> tuple[float, int, int]:
    """Decode by offloaded keys; the largest error, and bytes moved and those of the sets.

    Compared with attention over all keys on the device of which the policy's pages are seen.
    """
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS.query_heads, HEADS.key_heads, HEADS.key_heads)
    dims = (HEADS.k_dim, HEADS.k_dim, HEADS.v_dim)
    room = PROMPT + STEPS + 1
    q_all, k_all, v_all = (
        torch.randn(LAYERS, BATCH, h, room, d, generator=generator, dtype=torch.float64).to(device)
        for h, d in zip(heads, dims, strict=True)
    )
    kv = OffloadedKV(
        LAYERS, BATCH, HEADS, room, page=PAGE, read=BUDGET.pages, device=torch.device(device),
        copies=copies,
    )  # fmt: skip
    states, sets = [], [set() for _ in range(LAYERS)]
    expected_pages, worst = 0, 0.0
    first = torch.zeros(BATCH, dtype=torch.int64, device=device)

    def lengths(last: int) -> Filled:
        return Filled(first, first + last, kv.pages * PAGE)

    def pairs(selected: Tensor) -> set[tuple[int, int, int]]:
        listed = selected.expand(BATCH, HEADS.key_heads, -1).cpu()
        return {(*at, int(n)) for at in pairs_of_rows for n in listed[at] if n >= 0}

    pairs_of_rows = [(b, g) for b in range(BATCH) for g in range(HEADS.key_heads)]
    for layer in range(LAYERS):
        q, k, v = (x[layer, :, :, :PROMPT] for x in (q_all, k_all, v_all))
        kv.fill(layer, k, v)
        last = q[:, :, PROMPT - policy.history :] if policy.history else q[:, :, :0]
        states.append(policy.init(last, k, v, None, SCORING))
        if not policy.needs_query:
            selected = policy.select(states[layer], None, None, lengths(PROMPT), SCORING)
            kv.prefetch(layer, selected)
            sets[layer] = pairs(selected)
            expected_pages += len(sets[layer])
    for t in range(PROMPT, PROMPT + STEPS):
        for layer in range(LAYERS):
            q, k, v = (x[layer, :, :, t : t + 1] for x in (q_all, k_all, v_all))
            calibrating = policy.calibrate_every is not None and (t + layer) % 4 == 0
            if calibrating:
                kv.stage(layer)
            before = states[layer]
            out, states[layer] = offloaded_step(
                kv, layer, policy, before, (q, k, v), lengths(t), SCORING, attend,
                calibrating=calibrating,
            )  # fmt: skip
            keys, values = (x[layer, :, :, : t + 1] for x in (k_all, v_all))
            read = policy.select(before, q, None, lengths(t), SCORING)
            seen = functional.selected_keys(read.expand(BATCH, 2, -1), PAGE, t + 1, 2)
            exact = functional.attention(
                q, keys, values, scale=SCORING.scale, seen=None if calibrating else seen
            )
            worst = max(worst, float((out - exact).abs().max()))
            after = read
            if not policy.needs_query:
                after = policy.select(states[layer], None, None, lengths(t + 1), SCORING)
            expected_pages += len(pairs(after) - sets[layer])
            sets[layer] = pairs(after)
    whole = int(kv.layers_moved) * host_bytes(1, BATCH, HEADS, room, PAGE)
    return worst, kv.bytes_moved, expected_pages * page_bytes(HEADS, PAGE) + whole


POLICIES = [SinkLocal(BUDGET), Ema(BUDGET, calibrate_every=4), Quest(BUDGET)]


@pytest.mark.parametrize("copies", [CopyAtOnce, LateCopies])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_a_step_reads_what_it_would_read_on_the_device(
    policy: KVPolicy, copies: type[Copies]
) -> None:
    """However late a copy takes place, its pages are there; and no page is copied in vain."""
    worst, moved, expected = decode(policy, copies())
    assert worst < 1e-12
    assert moved == expected > 0


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_who_does_not_wait_reads_something_else(policy: KVPolicy) -> None:
    """What the test in front is good for."""
    assert decode(policy, NobodyWaits())[0] > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_a_slow_copy_on_a_stream_of_its_own(policy: KVPolicy) -> None:
    class SlowStream(CopyStream):
        def start(self, copy: Callable[[], None]) -> torch.cuda.Event:
            def slow() -> None:
                torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
                copy()

            return super().start(slow)

    worst, moved, expected = decode(policy, SlowStream(torch.device("cuda")), "cuda")
    assert worst < 1e-12
    assert moved == expected > 0


@settings(deadline=None)
@given(st.data())
def test_no_slot_of_a_present_page_is_written(data: st.DataObject) -> None:
    rows, read, pages = 2, data.draw(st.integers(1, 5)), data.draw(st.integers(5, 12))
    slots = torch.full((rows, 2 * read), -1)
    current = torch.full((rows, read), -1)
    for _ in range(data.draw(st.integers(1, 5))):
        lists = [
            data.draw(st.lists(st.integers(0, pages - 1), unique=True, max_size=read))
            for _ in range(rows)
        ]
        wanted = torch.tensor([[*own, *[-1] * (read - len(own))] for own in lists])
        source, slot, after = fetch_plan(wanted, current, slots, pages)
        for r in range(rows):
            present = set(current[r].tolist()) - {-1}
            new = [int(n) for n in source[r] if n >= 0]
            assert set(new) == set(lists[r]) - present
            written = [int(s) for n, s in zip(source[r], slot[r], strict=True) if n >= 0]
            assert len(set(written)) == len(written)
            assert not {int(slots[r, s]) for s in written} & present
            for n in present | set(lists[r]):
                assert (after[r] == n).sum() == 1
        slots, current = after, wanted


def test_a_third_layer_waits_for_a_buffer() -> None:
    kv = OffloadedKV(3, 1, HEADS, 16, page=4, read=2, device=torch.device("cpu"))
    kv.stage(0)
    kv.stage(1)
    with pytest.raises(ValueError, match="two layers are staged"):
        kv.stage(2)


def test_too_little_host_memory_is_refused_with_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = KVHeads(8, 32, 128, 128, torch.bfloat16)
    needed = 32 * 8 * 65536 * 256 * 2
    assert host_bytes(32, 1, heads, 65530, 16) == needed
    monkeypatch.setattr(kv_offload, "free_bytes", lambda device: needed - 1)
    monkeypatch.setattr(torch, "zeros", lambda *sizes, **options: pytest.fail("allocated"))
    with pytest.raises(GraphoptError, match=f"{needed:,} bytes .* of host memory"):
        OffloadedKV(32, 1, heads, 65530, page=16, read=256, device=torch.device("cpu"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("heads", [1, 2])
def test_the_kernel_finds_the_same_slots(heads: int) -> None:
    """Lists of each length, of all heads or of each, in a row of steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(4)
    expected, found = (Places.nowhere(4, 12, 5, place) for place in (torch.device("cpu"), device))
    counts = [torch.zeros((), dtype=torch.int64, device=place) for place in ("cpu", device)]
    for step in range(8):
        lists = torch.stack([torch.randperm(12, generator=generator)[:5] for _ in range(2 * heads)])
        wanted = lists.view(2, heads, 5)
        wanted[:, :, 5 - step % 3 :] = -1
        wanted = wanted.expand(2, 2, 5)
        pairs = [
            kv_slots.find_slots(expected, wanted, counts[0]),
            kv_slots.find_slots_by_kernel(found, wanted.to(device), counts[1]),
        ]
        new = pairs[0][0] >= 0
        assert torch.equal(pairs[1][0].cpu(), pairs[0][0])
        assert torch.equal(pairs[1][1].cpu()[new], pairs[0][1][new])
        for name in ("selected", "slot_pages", "table", "marks"):
            assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    assert int(counts[0]) == int(counts[1]) > 0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("staged", [False, True])
def test_the_kernels_copy_as_torch_does(staged: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(3)
    host = torch.randn(4, 5, 16, 24, generator=generator).half()
    pool = torch.zeros(4, 6, 16, 24, dtype=torch.float16)
    source = torch.tensor([[0, -1, 4], [2, 1, -1], [-1, -1, -1], [3, 2, 1]])
    slot = torch.tensor([[5, 0, 0], [1, 0, 0], [0, 0, 0], [2, 4, 5]])
    if device == "cuda":
        host = host.pin_memory()
    there = pool.to(device)
    kv_slots.fetch_by_kernel(host, there, source.to(device), slot.to(device))
    kv_slots.fetch(host, pool, source, slot)
    assert torch.equal(there.cpu(), pool) and pool.any()

    new = torch.randn(4, 24, generator=generator).half()
    table = torch.full((4, 5), -1, dtype=torch.int32)
    table[:, 3] = torch.tensor([1, 7, -1, 20])
    last = torch.tensor([50, 63])  # of two rows with two key heads each
    buffers = [host, pool.view(24, 1, 16, 24), host.reshape(20, 1, 16, 24).clone()]
    copies = [x.clone().to(device) for x in buffers]
    if device == "cuda":
        copies[0] = buffers[0].clone().pin_memory()
    for there, write in ((copies, kv_slots.write_token_by_kernel),
                         (buffers, kv_slots.write_token)):  # fmt: skip
        here = "cpu" if there is buffers else device
        write(new.to(here), *there[:2], there[2] if staged else None, table.to(here), last.to(here))
    for found, expected in zip(copies, buffers, strict=True):
        assert torch.equal(found.cpu(), expected)
    assert torch.equal(buffers[0][:2, 3, 2], new[:2])
    assert torch.equal(buffers[0][2:, 3, 15], new[2:])
