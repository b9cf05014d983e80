"""Plans: which tiles fit, and what is refused for which reason."""

from __future__ import annotations

import dataclasses
import json

import pytest
from command_line import runner
from hypothesis import given
from hypothesis import strategies as st

from graphopt.cli.commands import app
from graphopt.errors import LoweringError, UsageError
from graphopt.lowering.kernels import get_family, plan_attention
from graphopt.lowering.kernels.triton import kernel_constants
from graphopt.plan import AttentionSpec
from graphopt.plan.base import split_size
from graphopt.plan.hopper import consumer_registers, loader_registers
from graphopt.targets import MeasuredTiles, all_targets, get_target

GPUS = tuple(target.name for target in all_targets().values() if "triton" in target.kernels)
SIZES = st.integers(4, 32).map(lambda eighths: 8 * eighths)


def spec(**fields):
    return AttentionSpec(**{"head_dim": 128, "heads": 32, "kv_heads": 8, **fields})


@given(SIZES, SIZES, st.sampled_from(["prefill", "decode"]), st.sampled_from(GPUS),
       st.sampled_from(["f16", "bf16"]), st.sampled_from([1, 2, 8, 32]))  # fmt: skip
def test_every_head_size_has_tiles_that_satisfy_all(head, value, phase, target, dtype, kv_heads):
    found = plan_attention(
        spec(head_dim=head, value_dim=value, phase=phase, dtype=dtype, kv_heads=kv_heads),
        get_target(target),
    )
    assert found.inequalities and all(inequality.holds for inequality in found.inequalities)
    planner = get_family(found.kernel).planner
    assert planner.inequalities(found.spec, get_target(target), found.tiles) == list(
        found.inequalities
    )


@given(SIZES)
def test_a_head_size_is_split_into_powers_of_two_that_hold_it(size):
    first, rest = split_size(size)
    assert first & (first - 1) == 0 and rest & (rest - 1) == 0
    assert size <= first + rest < 2 * size
    assert first <= size


@pytest.mark.parametrize(
    ("target", "kernel"), [("ampere", "triton"), ("hopper", "triton"), ("hopper", "hopper-cuda")]
)
def test_a_smaller_machine_gets_smaller_tiles_or_a_reason(target, kernel):
    whole = dataclasses.replace(get_target(target), kernels=(kernel,))
    sizes = []
    for shared in (whole.limits["shared_bytes_per_block"], 98304, 36864):
        small = dataclasses.replace(
            whole, name="small", limits={**whole.limits, "shared_bytes_per_block": shared}
        )
        tiles = plan_attention(spec(), small).tiles
        stages = tiles.get("num_stages", tiles.get("STAGES"))
        sizes.append(tiles["BLOCK_M"] * tiles["BLOCK_N"] * stages)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    tiny = dataclasses.replace(
        whole, name="tiny", limits={**whole.limits, "shared_bytes_per_block": 1024}
    )
    with pytest.raises(LoweringError, match=r"no tiles fit: shared memory.*1,024 bytes"):
        plan_attention(spec(), tiny)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"head_dim": 16}, "head_dim is 16: only multiples of 8 from 32 to 256"),
        ({"head_dim": 320}, "head_dim is 320"),
        ({"head_dim": 100}, "head_dim is 100"),
        ({"value_dim": 512}, "value_dim is 512"),
        ({"dtype": "f32"}, "convert the model to f16 or bf16"),
        ({"kv_bits": 8, "head_dim": 96}, "a cache of 8 bits with heads of 96: no power of two"),
        ({"kv": "paged", "page": 48, "page_max": True}, "must be a power of two"),
        (
            {"kv": "paged", "page": 48, "page_max": True, "phase": "decode"},
            "must be a power of two",
        ),
    ],
)
def test_what_a_gpu_cannot_do_is_refused_with_the_reason(fields, reason):
    for target in GPUS:
        with pytest.raises(LoweringError, match=reason):
            plan_attention(spec(**fields), get_target(target))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_page_maxima_are_planned_for_triton(phase):
    fields = {"kv": "paged", "page": 64, "page_max": True, "selected_blocks": True}
    for target in GPUS:
        found = plan_attention(spec(phase=phase, **fields), get_target(target))
        assert found.kernel == "triton" and kernel_constants(found)["PAGE_MAX"]


def test_a_target_without_kernels_or_without_the_dtype():
    with pytest.raises(LoweringError, match="no attention kernels"):
        plan_attention(spec(), get_target("cpu"))
    no_bf16 = dataclasses.replace(get_target("ampere"), dtypes=("f16",))
    with pytest.raises(LoweringError, match="has no bf16"):
        plan_attention(spec(dtype="bf16"), no_bf16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_heads": 5}, "cannot share"),
        ({"heads": 0}, "heads is 0"),
        ({"window": 0}, "window is 0"),
        ({"softcap": -1.0}, "softcap"),
        ({"dtype": "f8"}, "dtype"),
        ({"kv_bits": 3}, "kv_bits"),
        ({"kv": "paged"}, "page size"),
        ({"page": 16}, "page size"),
        ({"selected_blocks": True}, "of a paged cache"),
        ({"varlen": True, "phase": "decode"}, "no cache of their own"),
        ({"varlen": True, "bias": True}, "by row of a batch"),
    ],
)
def test_a_description_that_contradicts_itself(fields, message):
    with pytest.raises(UsageError, match=message):
        spec(**fields)


def test_what_hopper_does_not_do_goes_to_triton_with_the_reason():
    hopper = get_target("hopper")
    assert (
        plan_attention(spec(window=512, softcap=30.0, sinks=True), hopper).kernel == "hopper-cuda"
    )
    for fields, reason in (
        ({"alibi": True}, "alibi"),
        ({"bias": True}, "bias"),
        ({"kv": "ring"}, "not a ring cache"),
        ({"phase": "decode"}, "64 rows"),
        ({"head_dim": 40}, "16 elements"),
    ):
        found = plan_attention(spec(**fields), hopper)
        assert found.kernel == "triton"
        ((kernel, why),) = found.passed_over
        assert kernel == "hopper-cuda" and reason in why


def test_registers_of_warpgroups_add_up_to_no_more_than_a_core_has():
    for consumers in (1, 2, 3):
        hopper = get_target("hopper")
        used = 128 * (
            loader_registers(consumers) + consumers * consumer_registers(hopper, consumers)
        )
        assert used <= 65536
        assert consumer_registers(hopper, consumers) % 8 == 0  # what setmaxnreg takes


def test_measured_tiles_come_first_where_they_fit(monkeypatch):
    import graphopt.targets as targets

    def row(**tiles):
        tiles = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2, **tiles}
        return MeasuredTiles(
            "triton", {"phase": "prefill", "head_dim": 128}, tiles, "a card", "a day"
        )

    rows = (row(BLOCK_M=256, BLOCK_N=256), row())
    monkeypatch.setattr(targets, "_tuned", lambda name: rows if name == "ampere" else ())
    found = plan_attention(spec(), get_target("ampere"))
    assert (found.tiles["BLOCK_M"], found.choice) == (64, "measured on a card, a day")
    assert plan_attention(spec(head_dim=64), get_target("ampere")).choice == "by the model"


def test_splits_of_a_decode_fill_the_machine_whatever_the_batch():
    for kv_heads in (1, 2, 8, 32):
        found = plan_attention(spec(kv_heads=kv_heads, phase="decode"), get_target("hopper"))
        splits, cores = found.tiles["SPLITS"], get_target("hopper").cores
        assert splits == 128 or cores - kv_heads < splits * kv_heads <= cores


def test_command():
    command = runner()
    arguments = ["plan-attention", "--target", "ampere", "--head-dim", "128", "--kv-heads", "8"]
    shown = command.invoke(app, arguments)
    assert shown.exit_code == 0
    assert "kernel     triton" in shown.output and "limits.shared_bytes_per_block" in shown.output
    data = json.loads(command.invoke(app, [*arguments, "--json", "--with", "sinks,lse"]).output)
    assert data["spec"]["sinks"] and data["spec"]["lse"] and data["tiles"]["BLOCK_M"] > 0


@pytest.mark.parametrize("name", [t.name for t in all_targets().values() if t.kernels])
def test_every_target_in_the_folder_is_planned_for(name):
    target = get_target(name)
    for phase in ("prefill", "decode"):
        for dtype in sorted({"f16", "bf16"} & set(target.dtypes)):
            found = plan_attention(spec(phase=phase, dtype=dtype), target)
            assert found.inequalities and all(each.holds for each in found.inequalities)
    for kernel in target.kernels:  # none is named in vain
        alone = dataclasses.replace(target, kernels=(kernel,))
        assert plan_attention(spec(), alone).kernel == kernel
