"""The plan of the Ascend kernel, and its mask by windows of one table."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import LoweringError
from graphopt.plan import PLANNERS, AttentionSpec, plan_attention
from graphopt.plan.ascend import ascend_constants, rounds, unified_buffer
from graphopt.runtime import ascend
from graphopt.runtime.tiling_mask import Band, corner, lookup, table, table_bytes
from graphopt.targets import get_target

TARGET = get_target("ascend910b")
PLANNER = PLANNERS["ascend-triton"]
SIDES = st.sampled_from([2, 4, 8, 16])
LENGTHS = st.integers(1, 70)


def spec(**fields):
    return AttentionSpec(**{"head_dim": 128, "heads": 32, "kv_heads": 8, **fields})


def memory(name):
    return next(memory.bytes for memory in TARGET.memories if memory.name == name)


def with_memory(name, size):
    memories = tuple(
        dataclasses.replace(memory, bytes=size) if memory.name == name else memory
        for memory in TARGET.memories
    )
    return dataclasses.replace(TARGET, name="small", memories=memories)


# --- The plan ---


@settings(deadline=None)
@given(
    st.integers(4, 32).map(lambda eighths: 8 * eighths),
    st.integers(4, 32).map(lambda eighths: 8 * eighths),
    st.sampled_from(["f16", "bf16"]),
    st.booleans(),
    st.sampled_from([None, 512]),
    st.sampled_from([None, 30.0]),
)
def test_every_head_size_has_tiles_that_satisfy_all(head, value, dtype, causal, window, softcap):
    found = plan_attention(
        spec(head_dim=head, value_dim=value, dtype=dtype, causal=causal, window=window,
             softcap=softcap),
        TARGET,
    )  # fmt: skip
    assert found.kernel == "ascend-triton"
    assert found.inequalities and all(inequality.holds for inequality in found.inequalities)
    tiles = found.tiles
    assert tiles["HEAD_TILE"] >= head and tiles["VALUE_TILE"] >= value
    assert tiles["BLOCK_KV"] // tiles["BLOCK_N"] in (1, 2, 4)  # what the kernel unrolls
    assert max(tiles["BLOCK_M"], tiles["BLOCK_N"]) <= tiles["M"]


def test_the_common_head_has_the_two_levels():
    tiles = plan_attention(spec(), TARGET).tiles
    assert tiles["BLOCK_KV"] > tiles["BLOCK_N"]
    for keys in (1, 1024, 65536):
        single = {**tiles, "BLOCK_KV": tiles["BLOCK_N"]}
        if keys >= tiles["BLOCK_KV"]:
            fewer = rounds(keys, single) / rounds(keys, tiles)
            assert fewer == tiles["BLOCK_KV"] / tiles["BLOCK_N"]


def test_the_memories_bound_what_they_should():
    tiles = PLANNER.complete(spec(), {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_KV": 512})
    assert all(i.holds for i in PLANNER.inequalities(spec(), TARGET, tiles))
    for changes, broken in (
        # 128 rows of 256 sums each, three times over, are 192 KB for each vector core.
        ({"VALUE_TILE": 256}, "unified buffer"),
        ({"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_KV": 256}, "L0C"),
        ({"BLOCK_N": 1024, "HEAD_TILE": 256, "BLOCK_M": 32}, "L1"),
        ({"BLOCK_M": 2048}, "L0A"),
        ({"BLOCK_N": 2048}, "L0B"),
        ({"BLOCK_N": 8}, "alignment"),
        ({"M": 64}, "mask table"),
    ):
        found = PLANNER.inequalities(spec(), TARGET, {**tiles, **changes})
        assert broken in [i.name for i in found if not i.holds], broken


@pytest.mark.parametrize("name", ["UB", "L0C", "L1"])
def test_a_smaller_memory_gets_smaller_tiles_or_a_reason(name):
    sizes = []
    for part in (1, 4, 16):
        try:
            tiles = plan_attention(spec(), with_memory(name, memory(name) // part)).tiles
        except LoweringError:
            sizes.append(0)
        else:
            sizes.append(tiles["BLOCK_M"] * tiles["BLOCK_KV"])
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    with pytest.raises(LoweringError, match="no tiles fit"):
        plan_attention(spec(), with_memory(name, 1024))


def test_more_forms_never_take_less_of_the_unified_buffer():
    tiles = PLANNER.complete(spec(), {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_KV": 256})
    plain = unified_buffer(spec(causal=False), tiles)
    for fields in ({}, {"window": 64}, {"softcap": 30.0}, {"window": 64, "softcap": 30.0}):
        found = unified_buffer(spec(**fields), tiles)
        assert found.live >= plain.live and found.spread >= plain.spread
        assert found.live <= found.spread
        assert found.reported(1 << 40) == found.spread
        assert found.reported(16) == found.live


# Of what bishengir-compile (ascendnpu-ir 1.2.0) says, by tools/check_ascend.py.
@pytest.mark.parametrize(
    ("fields", "tiles", "needs"),
    [
        ({"value_dim": 256}, (128, 32, 64), 1601536 // 8),
        ({}, (256, 64, 64), 1593344 // 8),
        ({}, (256, 128, 128), 1851392 // 8),
        ({"head_dim": 64}, (128, 256, 1024), 2506752 // 8),
        ({"head_dim": 256}, (64, 512, 512), 1576960 // 8),
    ],
)
def test_what_the_compiler_says_overflows(fields, tiles, needs):
    shape = spec(**fields)
    sizes = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_KV"), tiles, strict=True))
    found = unified_buffer(shape, PLANNER.complete(shape, sizes))
    assert found.live > memory("UB")
    assert found.live == pytest.approx(needs, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"phase": "decode"}, "many query rows"),
        ({"chunk": 64}, "does not do chunk"),
        ({"alibi": True}, "does not do alibi"),
        ({"bias": True}, "does not do bias"),
        ({"varlen": True}, "does not do varlen"),
        ({"kv": "ring"}, "not from a ring cache"),
        ({"kv": "paged", "page": 64}, "not from a paged cache"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"value_dim": 512}, "value_dim is 512"),
        ({"dtype": "f32"}, "convert the model to f16 or bf16"),
        ({"kv_bits": 8}, "a cache of 8 bits"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(fields, reason):
    with pytest.raises(LoweringError, match=reason):
        plan_attention(spec(**fields), TARGET)


# --- The launch ---


def run(constants, **changes):
    """Launch a kernel that only keeps its grid and arguments."""
    seen = {}

    class Kernel:
        arg_names = ("q_ptr", "table_ptr", "mask_ptr", "T", "k_stride_t", "BLOCK_M")

        def __getitem__(self, grid):
            seen["grid"] = grid
            return lambda **given: seen.update(given)

    q, k = torch.zeros(2, 4, 100, 32).half(), torch.zeros(2, 2, 300, 32).half()
    given = {"scale": 1.0, "programs": 20, **changes}
    ascend.prefill(Kernel(), q, ascend.Keys(k, k), constants, **given)
    return seen


def constants_of(**fields):
    return ascend_constants(
        plan_attention(spec(head_dim=32, heads=4, kv_heads=2, **fields), TARGET)
    )


def test_the_grid_is_the_cores_and_never_more_than_tasks_or_a_launch_may_have(monkeypatch):
    constants = {**constants_of(), "BLOCK_M": 32}
    tasks = 2 * 4 * 4
    assert run(constants)["grid"] == (20,)
    assert run(constants, programs=10**6)["grid"] == (tasks,)
    assert run({**constants, "BLOCK_M": 1}, programs=10**6)["grid"] == (800,)
    monkeypatch.setattr(ascend, "MOST_PROGRAMS", 7)
    assert run(constants)["grid"] == (7,)
    assert TARGET.limits["programs"] == 65535


def test_the_number_of_cores_is_asked_of_the_device(monkeypatch):
    asked = SimpleNamespace(get_device_properties=lambda index: {"num_aicore": 3 + index})
    driver = SimpleNamespace(active=SimpleNamespace(utils=asked))
    fake = SimpleNamespace(runtime=SimpleNamespace(driver=driver))
    monkeypatch.setitem(sys.modules, "triton", fake)
    assert ascend.cube_cores(torch.device("cpu")) == 3
    assert run(constants_of(), programs=None)["grid"] == (3,)
    driver.active.utils = SimpleNamespace(get_device_properties=lambda index: {})
    with pytest.raises(RuntimeError, match="install triton-ascend and torch-npu"):
        ascend.cube_cores(torch.device("cpu"))


@pytest.mark.parametrize(
    ("fields", "changes", "reason"),
    [
        ({"key_mask": True}, {}, "needs 'mask'"),
        ({}, {"mask": torch.ones(2, 300)}, "does not take 'mask'"),
        ({"key_mask": True}, {"mask": torch.ones(2, 299)}, r"should be \(2, 300\)"),
        ({"sinks": True}, {"sinks": torch.ones(5)}, r"should be \(4,\)"),
        ({}, {"bias": torch.ones(1)}, "does not take 'bias'"),
    ],
)
def test_operands_of_another_attention_are_refused(fields, changes, reason):
    with pytest.raises(ValueError, match=reason):
        run(constants_of(**fields), extras=ascend.Extras(**changes))


# --- The mask ---


@settings(deadline=None, max_examples=60)
@given(
    LENGTHS, LENGTHS, st.tuples(SIDES, SIDES), st.booleans(),
    st.one_of(st.none(), st.integers(1, 80)), st.booleans(), st.integers(0, 3),
)  # fmt: skip
def test_blocks_of_the_table_are_the_dense_mask(queries, keys, block, causal, window, left, more):
    band = Band(queries, keys, causal, window, top_left=left)
    dense = band.dense()
    whole = table(max(block) + more)
    found = {"skip": 0, "full": 0, "masked": 0}
    for q0 in range(0, queries, block[0]):
        for k0 in range(0, keys, block[1]):
            want = dense[q0 : q0 + block[0], k0 : k0 + block[1]]
            kind = band.classify(q0, k0, block)
            found[kind] += 1
            if kind == "skip":
                assert not want.any()
                continue
            got = band.block_mask(whole, q0, k0, block)
            # Beyond the last key nothing is seen; rows beyond the last query are not stored.
            assert not got[:, want.shape[1] :].any()
            assert torch.equal(got[: want.shape[0], : want.shape[1]], want)
            if kind == "full":
                assert got.all() and want.all()
    assert found == band.counts(block)


@given(st.integers(-200, 200), st.tuples(SIDES, SIDES))
def test_a_window_lies_inside_the_table_whatever_the_shift(delta, block):
    row, column = corner(delta, block)
    half = max(block)
    assert 0 <= row <= 2 * half - block[0] and 0 <= column <= 2 * half - block[1]
    i, j = torch.arange(block[0])[:, None], torch.arange(block[1])[None, :]
    assert torch.equal(lookup(table(half), delta, block).bool(), j > i + delta)


def test_bytes_hang_on_the_blocks_alone():
    tiles = plan_attention(spec(), TARGET).tiles
    whole = table(tiles["M"])
    size = whole.numel() * whole.element_size()
    assert size == table_bytes(tiles["M"]) == (2 * tiles["M"]) ** 2 * 2
    assert table_bytes(512) == 2 * 2**20  # a whole mask of 64K by 64K takes 8 GiB
    # The same table serves every length.
    for length in (1000, 65536):
        band = Band(length, length)
        last = (length - 1) // tiles["BLOCK_M"] * tiles["BLOCK_M"]
        block = (tiles["BLOCK_M"], tiles["BLOCK_N"])
        key = band.stretches(last, block)[2]
        assert band.block_mask(whole, last, key, block).shape == block


def test_counts_of_a_long_causal_mask():
    assert Band(4096, 4096).counts((128, 128)) == {"skip": 496, "full": 496, "masked": 32}
    assert Band(4096, 4096, causal=False).counts((128, 128)) == {
        "skip": 0, "full": 1024, "masked": 0,
    }  # fmt: skip


def test_a_table_too_small_is_refused():
    with pytest.raises(ValueError, match="a table of at least 32 rows"):
        lookup(table(8), 0, (16, 4))
    with pytest.raises(ValueError, match="from 1 up"):
        table(0)
