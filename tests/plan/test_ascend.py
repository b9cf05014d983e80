"""The plans of the Ascend kernels, and their mask by windows of one table."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import LoweringError
from graphopt.lowering.kernels import get_family, plan_attention
from graphopt.lowering.kernels.ascend_triton import ascend_constants
from graphopt.plan import AttentionSpec
from graphopt.plan.ascend import merge_buffer, rounds, unified_buffer
from graphopt.runtime import ascend
from graphopt.runtime.tiling_mask import Band, corner, lookup, table, table_bytes
from graphopt.targets import get_target

TARGET = get_target("ascend910b")
PLANNER = get_family("ascend-triton").planner
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


@pytest.mark.parametrize("head", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
def test_a_decode_packs_the_heads_of_a_group_and_splits_keys(head, group):
    found = plan_attention(spec(head_dim=head, heads=2 * group, kv_heads=2, phase="decode"), TARGET)
    assert found.kernel == "ascend-triton"
    assert found.inequalities and all(inequality.holds for inequality in found.inequalities)
    tiles = found.tiles
    assert group <= tiles["BLOCK_M"] <= 16 * 16
    assert tiles["SPAN"] % tiles["BLOCK_KV"] == 0
    # The group's heads take no more rows than a step of 16 tokens fills.
    assert tiles["BLOCK_M"] < 2 * 16 * group
    # A step of fewer tokens runs in a smaller tile, which fits as well.
    for rows in (16, 32, 64, 128):
        if group <= rows < tiles["BLOCK_M"]:
            smaller = PLANNER.inequalities(found.spec, TARGET, {**tiles, "BLOCK_M": rows})
            assert all(inequality.holds for inequality in smaller)


def test_a_group_that_no_tile_holds_is_refused():
    with pytest.raises(LoweringError, match=r"group: .* = 512 > "):
        plan_attention(spec(heads=512, kv_heads=1, phase="decode"), TARGET)


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


def test_the_memories_bound_what_a_decode_should():
    shape = spec(phase="decode")
    tiles = PLANNER.complete(shape, {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_KV": 512, "SPLITS": 64})
    assert all(i.holds for i in PLANNER.inequalities(shape, TARGET, tiles))
    for changes, broken in (
        ({"BLOCK_M": 2}, "group"),
        ({"SPLITS": 256}, "unified buffer of the merge"),
        ({"M": 1024}, "mask table's bytes"),
    ):
        found = PLANNER.inequalities(shape, TARGET, {**tiles, **changes})
        assert [i.name for i in found if not i.holds] == [broken]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", ["UB", "L0C", "L1"])
def test_a_smaller_memory_gets_smaller_tiles_or_a_reason(name, phase):
    shape = spec(phase=phase)
    sizes = []
    for part in (1, 4, 16):
        try:
            tiles = plan_attention(shape, with_memory(name, memory(name) // part)).tiles
        except LoweringError:
            sizes.append(0)
        else:
            sizes.append(tiles["BLOCK_M"] * tiles["BLOCK_KV"])
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    with pytest.raises(LoweringError, match="no tiles fit"):
        plan_attention(shape, with_memory(name, 1024))


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


# The same of the merge.
@pytest.mark.parametrize(
    ("value", "splits", "says"),
    [(128, 256, 2162944 // 8), (256, 128, 2130176 // 8), (256, 256, 4260096 // 8),
     (32, 16, 9796), (128, 64, 110404), (256, 64, 141092)],
)  # fmt: skip
def test_what_the_compiler_says_of_the_merge(value, splits, says):
    found = merge_buffer({"VALUE_TILE": value, "SPLITS": splits})
    assert (found.live > memory("UB")) == (says > memory("UB"))
    assert found.reported(memory("UB")) == pytest.approx(says, rel=0.15)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"chunk": 64}, "does not do chunk"),
        ({"alibi": True}, "does not do alibi"),
        ({"bias": True}, "does not do bias"),
        ({"kv": "ring"}, "not from a ring cache"),
        ({"kv": "paged", "page": 64}, "not from a paged cache"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"value_dim": 512}, "value_dim is 512"),
        ({"dtype": "f32"}, "convert the model to f16 or bf16"),
        ({"kv_bits": 8}, "a cache of 8 bits"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(fields, reason, phase):
    with pytest.raises(LoweringError, match=reason):
        plan_attention(spec(phase=phase, **fields), TARGET)


def test_sequences_one_behind_the_other_are_refused():
    with pytest.raises(LoweringError, match="does not do varlen"):
        plan_attention(spec(varlen=True), TARGET)


# --- The launch ---


class Kept:
    """A kernel that only keeps its grid and arguments."""

    arg_names = (
        "q_ptr", "part_ptr", "out_ptr", "table_ptr", "T", "splits", "q_stride_b", "BLOCK_M",
    )  # fmt: skip

    def __getitem__(self, grid):
        self.grid = grid
        return lambda **given: vars(self).update(given)


def run(constants, **changes):
    q, k = torch.zeros(2, 4, 100, 32).half(), torch.zeros(2, 2, 300, 32).half()
    given = {"scale": 1.0, "programs": 20, **changes}
    kernel = Kept()
    ascend.prefill(kernel, q, ascend.Keys(k, k), constants, **given)
    return kernel


def step(constants, *, batch=2, tokens=1, keys=3000, **changes):
    """Launch a decode of 4 query heads over 2 key heads; return both kernels and the queries."""
    q, k = torch.zeros(batch, 4, tokens, 32).half(), torch.zeros(batch, 2, keys, 32).half()
    given = {"scale": 1.0, "programs": 10**6, **changes}
    kernel, merge = Kept(), Kept()
    ascend.decode(kernel, merge, q, ascend.Keys(k, k), constants, **given)
    return kernel, merge, q


def constants_of(**fields):
    return ascend_constants(
        plan_attention(spec(head_dim=32, heads=4, kv_heads=2, **fields), TARGET)
    )


def test_the_grid_is_the_cores_and_never_more_than_tasks_or_a_launch_may_have(monkeypatch):
    constants = {**constants_of(), "BLOCK_M": 32}
    tasks = 2 * 4 * 4
    assert run(constants).grid == (20,)
    assert run(constants, programs=10**6).grid == (tasks,)
    assert run({**constants, "BLOCK_M": 1}, programs=10**6).grid == (800,)
    monkeypatch.setattr(ascend, "MOST_PROGRAMS", 7)
    assert run(constants).grid == (7,)
    assert TARGET.limits["programs"] == 65535


def test_the_number_of_cores_is_asked_of_the_device(monkeypatch):
    properties = {"num_aicore": 3, "num_vectorcore": 6}
    asked = SimpleNamespace(get_device_properties=lambda index: properties)
    driver = SimpleNamespace(active=SimpleNamespace(utils=asked))
    fake = SimpleNamespace(runtime=SimpleNamespace(driver=driver))
    monkeypatch.setitem(sys.modules, "triton", fake)
    assert ascend.cores(torch.device("cpu"), "aicore") == 3
    assert run(constants_of(), programs=None).grid == (3,)
    # The decode's products run on the cube cores, its merge on the vector cores alone.
    kernel, merge, _ = step(constants_of(phase="decode"), programs=None)
    assert (kernel.grid, merge.grid) == ((3,), (6,))
    driver.active.utils = SimpleNamespace(get_device_properties=lambda index: {})
    with pytest.raises(RuntimeError, match="install triton-ascend and torch-npu"):
        ascend.cores(torch.device("cpu"), "aicore")


def test_a_step_reads_the_keys_of_a_key_head_once():
    constants = {**constants_of(phase="decode"), "BLOCK_M": 32, "SPAN": 512, "SPLITS": 64}
    # A task for every span of every key head, whatever the query heads; a merge for every row.
    for tokens, block in ((1, 16), (8, 16), (9, 32), (16, 32)):
        kernel, merge, _ = step(constants, tokens=tokens)
        assert block == kernel.BLOCK_M
        assert kernel.splits == 6 and kernel.grid == (2 * 2 * 6,)
        assert merge.grid == (2 * 4 * tokens,)
    assert step(constants, tokens=17)[0].grid == (2 * 2 * 6 * 2,)
    kernel, _, q = step(constants)
    assert kernel.q_ptr.data_ptr() == q.data_ptr()  # one token is packed as it lies


def test_spans_hang_on_the_keys_alone():
    constants = {**constants_of(phase="decode"), "SPAN": 512, "SPLITS": 8}
    for keys, splits in ((1, 1), (512, 1), (513, 2), (10**5, 8)):
        found = {step(constants, batch=batch, keys=keys)[0].splits for batch in (1, 2, 7)}
        assert found == {splits}
    # A window is split rather than what lies before it.
    window = {**constants_of(phase="decode", window=1024), "SPAN": 512, "SPLITS": 8}
    assert step(window, keys=10**5)[0].splits == 2
    with pytest.raises(ValueError, match="made for up to 8"):
        step(constants, splits=9)


def test_packed_rows_are_the_heads_of_each_token():
    q = torch.arange(2 * 6 * 3 * 32).reshape(2, 6, 3, 32).half()
    k = torch.zeros(2, 2, 40, 32).half()
    kernel = Kept()
    constants = ascend_constants(
        plan_attention(spec(head_dim=32, heads=6, kv_heads=2, phase="decode"), TARGET)
    )
    ascend.decode(kernel, Kept(), q, ascend.Keys(k, k), constants, scale=1.0, programs=1)
    for token, head in ((0, 0), (0, 5), (2, 1), (2, 3)):
        row = kernel.q_ptr[1, head // 3, token * 3 + head % 3]
        assert torch.equal(row, q[1, head, token])


@pytest.mark.parametrize(
    ("fields", "changes", "reason"),
    [
        ({"padding_mask": True}, {}, "needs 'mask'"),
        ({}, {"mask": torch.ones(2, 300)}, "does not take 'mask'"),
        ({"padding_mask": True}, {"mask": torch.ones(2, 299)}, r"should be \(2, 300\)"),
        ({"sinks": True}, {"sinks": torch.ones(5)}, r"should be \(4,\)"),
        ({}, {"bias": torch.ones(1)}, "does not take 'bias'"),
    ],
)
def test_operands_of_another_attention_are_refused(fields, changes, reason):
    with pytest.raises(ValueError, match=reason):
        run(constants_of(**fields), extras=ascend.Extras(**changes))


# --- The mask ---


@pytest.mark.slow
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


@given(st.integers(-200, 200), st.tuples(SIDES, SIDES), st.integers(1, 5))
def test_a_table_for_the_heads_of_each_token(delta, block, heads):
    whole = table(max(block), heads=heads)
    assert whole.numel() * whole.element_size() == table_bytes(max(block), heads=heads)
    i, j = torch.arange(block[0])[:, None], torch.arange(block[1])[None, :]
    assert torch.equal(lookup(whole, delta, block, heads).bool(), j > i // heads + delta)


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
    with pytest.raises(ValueError, match="a table of at least 32 columns"):
        lookup(table(8), 0, (16, 4))
    with pytest.raises(ValueError, match="from 1 up"):
        table(0)
