"""Volta: where fragments lie in lanes and in shared memory, and which tiles are planned."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import LoweringError
from graphopt.lowering.kernels import get_family, plan_attention
from graphopt.plan import AttentionSpec
from graphopt.plan.volta_layout import (
    a_col,
    a_row,
    b_col,
    b_row,
    c_f16,
    c_f32,
    operand_layout,
    operand_load,
    operand_swizzle,
    padded,
    position,
    quadpair_lanes,
    swizzled,
    tile_key,
    tile_row,
    value_layout,
    value_load,
    value_swizzle,
    wavefronts,
)
from graphopt.runtime.volta import row_bytes, shared_bytes, value_row_bytes
from graphopt.targets import get_target

SIZES = st.integers(4, 32).map(lambda eighths: 8 * eighths)
VOLTA = get_target("volta")


def spec(**fields):
    return AttentionSpec(**{"head_dim": 128, "heads": 32, "kv_heads": 8, **fields})


@pytest.mark.parametrize(
    ("layout", "elements", "shape"),
    [(a_row, 4, (8, 4)), (a_col, 4, (8, 4)), (b_row, 4, (4, 8)), (b_col, 4, (4, 8)),
     (c_f16, 8, (8, 8)), (c_f32, 8, (8, 8))],
)  # fmt: skip
def test_a_quadpair_holds_every_element_once(layout, elements, shape):
    for number in range(4):
        found = {layout(lane, i) for lane in quadpair_lanes(number) for i in range(elements)}
        assert found == set(itertools.product(range(shape[0]), range(shape[1])))


def product(a, b, a_of, b_of):
    """The sums of four products, by lane, from operands by lane."""
    sums = np.zeros((32, 8))
    for number in range(4):
        left, right = np.zeros((8, 4)), np.zeros((4, 8))
        for lane in quadpair_lanes(number):
            for i in range(4):
                left[a_of(lane, i)] = a[lane, i]
                right[b_of(lane, i)] = b[lane, i]
        whole = left @ right
        for lane in quadpair_lanes(number):
            for i in range(8):
                sums[lane, i] = whole[c_f32(lane, i)]
    return sums


def to_operand(sums):
    """What `to_operand` of the kernel does: two exchanges at a distance of 2, and selections."""
    upper = np.array([bool(lane & 2) for lane in range(32)])[:, None]
    partner = np.arange(32) ^ 2
    found = np.zeros((32, 8))
    for half in range(2):
        low, high = sums[:, 4 * half : 4 * half + 2], sums[:, 4 * half + 2 : 4 * half + 4]
        got = np.where(upper, low, high)[partner]
        kept = np.where(upper, high, low)
        found[:, 4 * half : 4 * half + 2] = np.where(upper, got, kept)
        found[:, 4 * half + 2 : 4 * half + 4] = np.where(upper, kept, got)
    return found


def test_sums_become_an_operand_by_two_shuffles():
    sums = np.zeros((32, 8))
    for lane in range(32):
        for i in range(8):
            row, column = c_f32(lane, i)
            sums[lane, i] = 64 * (lane >> 2 & 3) + 8 * row + column
    found = to_operand(sums)
    for lane in range(32):
        expected = 64 * (lane >> 2 & 3) + 8 * position(lane) + np.arange(8)
        assert found[lane].tolist() == expected.tolist()


@pytest.mark.parametrize("size", [32, 40, 64, 72, 80, 96, 128, 192, 256])
def test_scores_and_values_of_a_warp_through_shared_memory(size):
    """A 16 by 16 tile of scores and its product with V, lane for lane as the kernel does it."""
    random = np.random.default_rng(size)
    q, k, v = (random.integers(-8, 9, (16, size)).astype(float) for _ in range(3))
    keys, values = operand_layout(size), value_layout(size)
    memory = {"q": {}, "k": {}, "v": {}}
    for row, column in itertools.product(range(16), range(size)):
        memory["q"][keys(row, 2 * column)] = q[row, column]
        memory["k"][keys(row, 2 * column)] = k[row, column]
        memory["v"][values(row, 2 * column)] = v[row, column]
    assert len(memory["q"]) == len(memory["v"]) == 16 * size
    assert max(memory["q"]) < 16 * row_bytes(size)
    assert max(memory["v"]) < 16 * value_row_bytes(size)

    def read(name, addresses):
        return np.array([[memory[name].get(at + 2 * i, 0.0) for i in range(4)] for at in addresses])

    scores = np.zeros((32, 8))
    for start in range(0, size, 4):
        a = read("q", operand_load(keys, tile_row, 2 * start))
        b = read("k", operand_load(keys, tile_key, 2 * start))
        scores += product(a, b, a_row, b_col)
    expected = q @ k.T
    for lane in range(32):
        down, across = 8 * (lane >> 2 & 1), 8 * (lane >> 3 & 1)
        for i in range(8):
            row, column = c_f32(lane, i)
            assert scores[lane, i] == expected[down + row, across + column]

    own = to_operand(scores)
    other = own[np.arange(32) ^ 8]
    across = np.array([lane >> 3 & 1 for lane in range(32)])
    out = np.zeros((16, -(-size // 16) * 16))
    for column in range(0, size, 16):
        sums = np.zeros((32, 8))
        for half, step in itertools.product(range(2), range(2)):
            a = (own if half == 0 else other)[:, 4 * step : 4 * step + 4]
            rows = 8 * (across ^ half) + 4 * step + np.arange(32) % 4
            b = read(
                "v",
                [
                    values(int(rows[lane]), 2 * (column + 8 * int(across[lane]) + 4 * (lane >> 4)))
                    for lane in range(32)
                ],
            )
            sums += product(a, b, a_row, b_row)
        for lane in range(32):
            for i in range(8):
                row, inner = c_f32(lane, i)
                out[8 * (lane >> 2 & 1) + row, column + 8 * across[lane] + inner] = sums[lane, i]
    assert (out[:, :size] == expected @ v).all() and (out[:, size:] == 0).all()


@pytest.mark.parametrize("size", [64, 128])
def test_wavefronts_of_every_layout(size):
    """Ideal are 2 for loads of 8 bytes a lane and 4 for 16."""

    def counts(layout):
        return (
            wavefronts(operand_load(layout, tile_row, 0), 8),
            wavefronts(operand_load(layout, tile_row, 0), 16),
            wavefronts(operand_load(layout, tile_key, 0), 8),
            wavefronts(value_load(layout, 0), 8),
        )

    assert counts(padded(size)) == (16, 32, 16, 8)
    assert counts(padded(size, 4)) == (2, 8, 2, 4)
    assert counts(padded(size, 8)) == (4, 8, 4, 4)
    assert counts(swizzled(size, lambda row: row & 7)) == (4, 8, 4, 4)
    assert counts(swizzled(size, operand_swizzle)) == (2, 4, 2, 4)
    assert counts(swizzled(size, value_swizzle))[3] == 2


def test_the_kernels_loads_take_the_fewest_wavefronts_and_unpadded_ones_do_not():
    for size in range(32, 257, 8):
        keys, values = operand_layout(size), value_layout(size)
        for byte in range(0, 2 * size, 16):
            for rows in (tile_row, tile_key):
                assert wavefronts(operand_load(keys, rows, byte), 16) == 4
        for column in range(0, size, 16):
            assert wavefronts(value_load(values, column), 8) == 2
        if size % 64 == 0:
            assert wavefronts(operand_load(padded(size), tile_row, 0), 16) > 4
            assert wavefronts(value_load(padded(size), 0), 8) > 2
    for size in (16, 32, 64):  # weights: as many columns as a tile has keys
        for byte in range(0, 2 * size, 16):
            assert wavefronts(operand_load(operand_layout(size), tile_row, byte), 16) == 4


@given(SIZES, SIZES, st.sampled_from(["prefill", "decode"]), st.sampled_from([1, 2, 8, 32]))
def test_every_head_size_has_tiles_that_satisfy_all(head, value, phase, kv_heads):
    found = plan_attention(
        spec(head_dim=head, value_dim=value, phase=phase, kv_heads=kv_heads), VOLTA
    )
    assert found.kernel == "volta-cuda" and found.inequalities
    assert all(inequality.holds for inequality in found.inequalities)
    planner = get_family(found.kernel).planner
    assert planner.inequalities(found.spec, VOLTA, found.tiles) == list(found.inequalities)
    assert planner.resident_warps(found.spec, VOLTA, found.tiles) >= 4


@pytest.mark.parametrize("size", [64, 128, 192, 256])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_feature_at_once_has_tiles(size, phase):
    everything = spec(
        head_dim=size, phase=phase, window=64, chunk=128, softcap=30.0, sinks=True, alibi=True,
        padding_mask=True, bias=True, kv_lens=True, kv="paged", page=16, lse=True,
    )  # fmt: skip
    assert plan_attention(everything, VOLTA).kernel == "volta-cuda"


def test_shared_memory_is_counted_as_the_kernel_lays_it_out():
    tiles = {"BLOCK_M": 128, "BLOCK_N": 32, "WARPS": 8, "CARRY": 16, "P_PATH": 0}
    sizes = {"DECODE": False, "HEAD_DIM": 256, "VALUE_DIM": 256}
    assert shared_bytes({**sizes, **tiles}) == 98304 == VOLTA.limits["shared_bytes_per_block"]
    # The weights of 32 keys lie 5 chunks apart.
    assert shared_bytes({**sizes, **tiles, "P_PATH": 1}) == 98304 + 128 * 5 * 16
    sizes = {"DECODE": False, "HEAD_DIM": 80, "VALUE_DIM": 96}
    assert shared_bytes({**sizes, **tiles}) == 128 * 11 * 16 + 32 * 11 * 16 + 32 * 14 * 16
    decode = {**tiles, "DECODE": True, "HEAD_DIM": 64, "VALUE_DIM": 64, "BLOCK_M": 16, "WARPS": 4}
    assert shared_bytes(decode) == 16 * 128 + 4 * 2 * 32 * 128
    # Little to load: the sums that the warps lay down at the end are more.
    decode |= {"BLOCK_N": 16, "BLOCK_M": 32, "HEAD_DIM": 32, "VALUE_DIM": 128}
    assert shared_bytes(decode) == 4 * 32 * 4 * (128 + 6)


def test_a_smaller_machine_gets_smaller_tiles_or_a_reason():
    sizes = []
    for shared in (98304, 49152, 24576):
        limits = {**VOLTA.limits, "shared_bytes_per_block": shared}
        tiles = plan_attention(spec(), dataclasses.replace(VOLTA, limits=limits)).tiles
        sizes.append(tiles["BLOCK_M"] * tiles["BLOCK_N"])
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    for name, value in (("shared_bytes_per_block", 4096), ("registers_per_thread", 63)):
        limits = {**VOLTA.limits, name: value}
        with pytest.raises(LoweringError, match=f"no tiles fit.*limits.{name}"):
            plan_attention(spec(), dataclasses.replace(VOLTA, limits=limits))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": "bf16"}, "no native bf16; the model is converted to f16 with a range report"),
        ({"dtype": "f32"}, "convert the model"),
        ({"head_dim": 16}, "head_dim is 16: only multiples of 8 from 32 to 256"),
        ({"value_dim": 100}, "value_dim is 100"),
        ({"kv_bits": 8}, "a cache of 8 bits"),
        ({"kv": "paged", "page": 16, "selected_blocks": True}, "all pages of a cache, not a list"),
        ({"kv": "paged", "page": 16, "page_max": True, "phase": "decode"}, "no page maxima"),
    ],
)
def test_what_volta_cannot_do_is_refused_with_the_reason(fields, reason):
    with pytest.raises(LoweringError, match=reason):
        plan_attention(spec(**fields), VOLTA)


def test_weights_go_by_shuffles_unless_shared_memory_is_less_work():
    planner = get_family("volta-cuda").planner
    for size in (64, 128, 256):
        found = plan_attention(spec(head_dim=size), VOLTA)
        shared = {**found.tiles, "P_PATH": 1}
        assert planner.cycles(found.spec, found.tiles) <= planner.cycles(found.spec, shared)
        assert found.tiles["P_PATH"] == 0


def test_splits_of_a_decode_fill_the_machine_whatever_the_batch():
    for kv_heads in (1, 2, 8, 32):
        splits = plan_attention(spec(kv_heads=kv_heads, phase="decode"), VOLTA).tiles["SPLITS"]
        assert splits & (splits - 1) == 0 and splits <= 128
        assert splits * kv_heads >= VOLTA.cores
