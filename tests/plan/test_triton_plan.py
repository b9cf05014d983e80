"""Plans of the Triton kernels: for all that is promised, and as Triton compiles them."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from attention_sweep import HEAD_SIZES, KERNELS, draw
from compiling import compile_alone
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import LoweringError
from graphopt.lowering.kernels import plan_attention
from graphopt.plan import AttentionSpec
from graphopt.plan.triton import takes_wgmma
from graphopt.runtime.fitting_tiles import smaller, without_wgmma
from graphopt.targets import all_targets, get_target

TRITON = tuple(target.name for target in all_targets().values() if "triton" in target.kernels)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(KERNELS))
def test_every_description_that_is_promised_is_planned(seed, kind):
    plan = draw(random.Random(seed), *kind).plan()
    assert plan.kernel == kind[1]
    assert all(inequality.holds for inequality in plan.inequalities)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("target", TRITON)
def test_every_pair_of_head_sizes_is_planned(target, phase):
    machine = dataclasses.replace(get_target(target), kernels=("triton",))
    for head_dim in HEAD_SIZES:
        for value_dim in HEAD_SIZES[::3]:
            spec = AttentionSpec(
                head_dim=head_dim, value_dim=value_dim, heads=16, kv_heads=1, phase=phase,
                bias=True, alibi=True, padding_mask=True, kv_lens=True, softcap=20.0,
                kv="paged", page=64, selected_blocks=True, page_max=True,
            )  # fmt: skip
            assert plan_attention(spec, machine).kernel == "triton"


@pytest.mark.parametrize("size", [8, 24, 36, 260, 264])
@pytest.mark.parametrize("target", [t.name for t in all_targets().values() if t.kernels])
def test_other_head_sizes_are_refused_by_a_sentence(target, size):
    for spec in (
        AttentionSpec(head_dim=size, heads=2, kv_heads=1),
        AttentionSpec(head_dim=64, value_dim=size, heads=2, kv_heads=1),
    ):
        with pytest.raises(LoweringError, match=r"only multiples of 8 from 32 to 256"):
            plan_attention(spec, get_target(target))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_no_tile_on_hopper_has_the_products_that_are_compiled_wrongly(seed):
    plan = draw(random.Random(seed), "hopper", "triton").plan()
    for tiles in smaller(plan.tiles):
        assert not takes_wgmma(tiles["BLOCK_M"], tiles["num_warps"])
    # And a model emitted for Ampere that runs on Hopper.
    foreign = draw(random.Random(seed), "ampere", "triton").plan().tiles
    tiles = without_wgmma(foreign)
    assert not takes_wgmma(tiles["BLOCK_M"], tiles["num_warps"])
    assert tiles == foreign or tiles["BLOCK_M"] / 2 <= foreign["BLOCK_M"] / foreign["num_warps"]


def test_smaller_tiles_end_at_the_smallest():
    tiles = list(smaller({"BLOCK_M": 128, "BLOCK_N": 64, "num_stages": 3, "PAGE": 16}))
    assert [tuple(t.values())[:3] for t in tiles] == [
        (128, 64, 3), (128, 64, 2), (128, 64, 1), (128, 32, 1), (128, 16, 1), (64, 16, 1),
        (32, 16, 1), (16, 16, 1),
    ]  # fmt: skip
    assert all(t["PAGE"] == 16 for t in tiles)


# What it takes to compile a plan as a launch does: operands of aligned rows, an aligned bias.
COMPILE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from graphopt.lowering.kernels import plan_attention
from graphopt.lowering.kernels.triton import kernel_constants
from graphopt.plan import AttentionSpec
from graphopt.runtime.kernels.decode import attention_decode
from graphopt.runtime.kernels.prefill import attention_prefill
from graphopt.targets import get_target
import dataclasses

FLOATS = ("lse_ptr", "page_max_ptr", "slopes_ptr", "sinks_ptr", "part_ptr", "part_lse_ptr")
HALVES = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "bias_ptr")
GIVEN = {"mask_ptr": "padding_mask", "bias_ptr": "bias", "slopes_ptr": "alibi",
         "positions_ptr": "alibi", "sinks_ptr": "sinks", "cu_seqlens_q_ptr": "varlen",
         "cu_seqlens_k_ptr": "varlen", "kv_lens_ptr": "kv_lens", "block_table_ptr": "page",
         "selected_blocks_ptr": "selected_blocks", "lse_ptr": "lse", "page_max_ptr": "page_max"}

def kind(name, half):
    if name.endswith("_ptr"):
        special = "*i8" if name == "mask_ptr" else "*i32"
        return "*" + half if name in HALVES else "*fp32" if name in FLOATS else special
    return "fp32" if name == "scale" else "i32"

def compiled(spec, target):
    machine = dataclasses.replace(get_target(target), kernels=("triton",))
    plan = plan_attention(spec, machine)
    kernel = attention_decode if spec.phase == "decode" else attention_prefill
    ring = 1000 if spec.kv == "ring" else 0
    every = {**kernel_constants(plan, ring=ring), "bias_stride_t": 1}
    given = {name: getattr(spec, field) for name, field in GIVEN.items()}
    given["ring_start_ptr"] = spec.kv == "ring"
    half = {"f16": "fp16", "bf16": "bf16"}[spec.dtype]
    constants = {name: every[name] for name in kernel.arg_names if name in every}
    constants |= {n: None for n, use in given.items() if not use and n in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else kind(name, half) for name in kernel.arg_names
    }
    strides = {"k_stride_t": spec.head_dim, "q_stride_s": spec.head_dim, "v_stride_t": spec.values}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names)
        if name not in constants
        and (name.endswith("_ptr") or "_stride_" in name and strides.get(name, 0) % 16 == 0)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {name: every[name] for name in ("num_warps", "num_stages")}
    arch = int(machine.isa.removeprefix("sm_"))
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    planned = next(i.value for i in plan.inequalities if i.name == "shared memory")
    assert made.metadata.shared <= planned, (spec, plan.tiles, made.metadata.shared, planned)
    assert "wgmma" not in made.asm["ptx"], (spec, plan.tiles)
    return made, plan.tiles

for target, fields in json.loads('''FIELDS'''):
    compiled(AttentionSpec(**fields), target)
"""


def compile_all(rows):
    return compile_alone(COMPILE.replace("FIELDS", json.dumps(rows)))


def drawn_rows(seeds):
    rng = random.Random(14)
    kinds = [(target, "triton") for target in TRITON]
    return [(target, draw(rng, target, kernel).fields) for target, kernel in kinds * seeds]


FULL = {"head_dim": 192, "heads": 7, "kv_heads": 1, "dtype": "f16", "causal": False,
        "alibi": True, "softcap": 20.0}  # fmt: skip
ROOMY = [
    ("hopper", FULL),
    ("ampere", {"head_dim": 256, "heads": 8, "kv_heads": 4, "dtype": "bf16"}),
    ("ampere", FULL | {"bias": True}),
    ("hopper", {"head_dim": 72, "heads": 2, "kv_heads": 1, "dtype": "bf16"}),
]
"""Heads of two parts, and of one, the widest; the same with a bias; a part that 16 divides not."""


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(ROOMY[:2], marks=pytest.mark.slow),
        pytest.param(ROOMY[2:], marks=pytest.mark.exhaustive),
    ],
    ids=["two", "others"],
)
def test_planned_shared_memory_is_enough_for_what_triton_allocates(rows):
    assert compile_all(rows) == ""


AHEAD = """
for page in PAGES:
    spec = AttentionSpec(head_dim=128, heads=32, kv_heads=8, dtype="bf16", phase="decode",
                         kv="paged", page=page, kv_lens=True, selected_blocks=True, lse=True,
                         page_max=True)
    made, tiles = compiled(spec, "hopper")
    ahead = (tiles["num_stages"] - 1) * tiles["BLOCK_N"] * 2 * 128 * 2
    assert made.metadata.shared >= ahead, (page, made.metadata.shared, ahead)
"""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(16, marks=pytest.mark.slow),
        pytest.param(128, marks=pytest.mark.exhaustive),
    ],
)
def test_blocks_of_selected_pages_are_on_their_way_ahead(page):
    """Triton keeps a buffer for each; keys that wait for page numbers would have one in all."""
    script = COMPILE.replace("FIELDS", "[]") + AHEAD.replace("PAGES", f"({page},)")
    assert compile_alone(script) == ""


@pytest.mark.exhaustive
def test_planned_shared_memory_is_enough_for_many():
    assert compile_all(drawn_rows(60)) == ""
