"""From a program whose states are rings and pages to the kernels that read them there."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from attention_reference import Case
from programs import tiny_program

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from graphopt.execute.function_run import run_function
from graphopt.execute.interpreter import Runner
from graphopt.ir import B, KVLayout, P, Program, S, Value
from graphopt.ir.kv_memory import PagedKV
from graphopt.ir.ops import get_op
from graphopt.ir.relayout import with_layouts
from graphopt.lowering.kernels.plan_kernels import PlanKernels, planned_attentions
from graphopt.lowering.kernels.triton import kernel_constants
from graphopt.pass_manager.contract import Context
from graphopt.runtime.attention import Keys, decode
from graphopt.runtime.kernels.decode import attention_decode, attention_merge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(5))
SIZES = {"head_dim": 32, "hidden": 64, "heads": 4, "kv_heads": 2}


def planned(program: Program):
    """The description and the plan of each distinct attention when a mask is not needed."""
    made = PlanKernels(target="ampere").run(program, Context()).program
    for plans in planned_attentions(made):
        decoding = [plan.spec.phase == "decode" and plan.spec.kv == plans.spec.kv
                    for plan in plans.plans]  # fmt: skip
        own = [plan for plan, fits in zip(plans.plans, decoding, strict=True) if fits]
        (plan,) = (p for p in own if p.spec.kv_lens and not p.spec.padding_mask)
        yield plans.spec, plan


def last_step(program: Program):
    """The operands of the first layer's attention for the last token, and its state before."""
    runner = Runner(program, torch.float64)
    _, past = runner.run({"input_ids": IDS[:, :-1]})
    mask = torch.ones(2, 30, dtype=torch.long)
    inputs = {"input_ids": IDS[:, -1:], "attention_mask": mask}
    inputs["position_ids"] = torch.full((2, 1), 29)
    values = {}
    for call in program.calls[:2]:
        function = program.functions[call.function]
        args = [inputs[name] for name in call.args]
        weights, sizes = runner.call_weights(call), {B: 2, S: 1, P: 29}
        results, _ = run_function(
            function, call, args, weights, sizes, past, observe=values.__setitem__
        )
        inputs |= dict(zip(call.results, results, strict=True))
    (node,) = (n for n in program.functions["block"].nodes if n.op == "attention")
    return [values[value].half() for value in node.inputs[:3]], past["kv.0"]


def ring_keys(k: torch.Tensor, v: torch.Tensor, slots: int, tokens: int) -> Keys:
    """Keys of the newest tokens in a ring: token number t lies in slot t mod `slots`."""
    count = k.shape[2]
    places = torch.arange(tokens - count, tokens) % slots
    found = []
    for ordered in (k, v):
        memory = torch.zeros(*ordered.shape[:2], slots, ordered.shape[3], dtype=ordered.dtype)
        memory[:, :, places] = ordered
        found.append(memory)
    lengths = torch.full((2,), count, dtype=torch.int32)
    return Keys(*found, kv_lens=lengths, ring_start=torch.full((2,), (tokens - count) % slots))


@pytest.mark.parametrize("layout", [KVLayout("ring", 24), KVLayout("paged", 16)], ids=str)
def test_the_planned_kernel_reads_what_the_interpreter_keeps(layout):
    """The state is that of a real step; the result that of the op's reference, in fp64."""
    program = tiny_program(layers=1, window=20, cache=True, **SIZES)
    plain, program = program, with_layouts(program, {"kv.0": layout})
    ((spec, plan),) = planned(program)
    assert spec.kv == layout.kind and (spec.slots or spec.page) == layout.size
    ((other, _),) = planned(plain)
    assert other == spec.replace(kv="contiguous", slots=None, page=None)

    (q, k, v), state = last_step(program)
    if isinstance(state, PagedKV):
        half = dataclasses.replace(state, k=state.k.half(), v=state.v.half())
        held_k, held_v = half
        after = half.extended(k, v)
        keys = Keys(after.k, after.v, kv_lens=after.lens, block_table=after.block_table)
        all_k, all_v = after
    else:
        held_k, held_v = (part.half() for part in state)
        assert held_k.shape[2] == layout.size
        all_k, all_v = (torch.cat(pair, 2) for pair in ((held_k, k), (held_v, v)))
        assert layout.size is not None
        newest = [part[:, :, -layout.size :] for part in (all_k, all_v)]
        keys = ring_keys(*newest, layout.size, tokens=30)

    scale = 32**-0.5
    case = Case(q, all_k, all_v, {"window": 20}, scale)
    exact, bound = case.bound()
    attrs = {"scale": scale, "causal": True, "window": 20, "ring": layout.ring}
    operands = [part.double() for part in (q, k, v)]
    pasts = [part.double() for part in (held_k, held_v)]
    reference = get_op("attention").reference([*operands, *[None] * 4, *pasts], attrs)[0]
    torch.testing.assert_close(reference, exact, rtol=1e-12, atol=1e-12)

    constants = {**kernel_constants(plan), "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    moved = {f.name: getattr(keys, f.name) for f in dataclasses.fields(keys)}
    keys = Keys(**{n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in moved.items()})
    out, _, _ = decode(
        attention_decode, attention_merge, q.to(DEVICE), keys, constants, scale=scale
    )
    assert (out.cpu().double() - exact).abs().max().item() <= bound


def test_statistics_are_part_of_the_description():
    program = tiny_program(layers=1, cache=True, **SIZES)
    program = with_layouts(program, {"kv.0": KVLayout("paged", 16)})
    function = program.functions["block"]
    (node,) = (n for n in function.nodes if n.op == "attention")
    node.attrs |= {"lse": True, "page_max": 16}
    for name in ("lse", "top"):
        node.outputs.append(Value(name, node, len(node.outputs)))
    ((spec, plan),) = planned(program)
    assert spec.lse and spec.page_max and spec.page == 16
    constants = kernel_constants(plan)
    assert (constants["LSE"], constants["PAGE_MAX"], constants["PAGE"]) == (True, True, 16)
