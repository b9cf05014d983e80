"""Running programs: in one step or many, in memory that holds one layer's weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import tiny_program

from graphopt.execute.function_run import run_function
from graphopt.execute.interpreter import Runner, complete_inputs
from graphopt.ir import Array, B, P, Producer, S, Weight

LENGTH = 8
IDS = torch.randint(0, 97, (3, LENGTH), generator=torch.Generator().manual_seed(1))
VARIANTS = {
    "plain": {},
    "window, softcap": {"window": 3, "softcap": 2.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True, "rotary_dim": 4, "kv_heads": 1},
}
PROGRAMS = {name: tiny_program(**options) for name, options in VARIANTS.items()}
CACHED = {name: tiny_program(cache=True, **options) for name, options in VARIANTS.items()}


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(VARIANTS)),
    st.lists(st.integers(1, LENGTH - 1), unique=True).map(sorted),
    st.lists(st.integers(0, LENGTH - 1), min_size=3, max_size=3),
)
def test_any_split_into_steps_equals_one_step(name, cuts, pads):
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    inputs = complete_inputs({"input_ids": IDS, "attention_mask": mask})
    plain = Runner(PROGRAMS[name], dtype=torch.float64, mode="reference").logits(inputs)
    runner = Runner(CACHED[name], dtype=torch.float64)
    pieces, past = [], None
    for start, stop in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        # Positions are left to be derived from the mask.
        step = {"input_ids": IDS[:, start:stop], "attention_mask": mask[:, :stop]}
        (logits,), past = runner.run(step, past)
        pieces.append(logits)
        assert all(k.shape[2] == v.shape[2] == stop for k, v in past.values())
    # fp64 rounding of a few thousand additions, logits of order 1.
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], plain[real], rtol=0, atol=1e-10)


def test_the_past_given_is_left_as_it_is():
    runner = Runner(CACHED["plain"])
    _, past = runner.run({"input_ids": IDS[:, :4]})
    kept = {name: (k.clone(), v.clone()) for name, (k, v) in past.items()}
    (one,), _ = runner.run({"input_ids": IDS[:, 4:]}, past)
    (two,), longer = runner.run({"input_ids": IDS[:, 4:]}, past)
    assert one.equal(two) and longer["kv.0"][0].shape[2] == LENGTH
    for name, (k, v) in past.items():
        assert k.equal(kept[name][0]) and v.equal(kept[name][1])


def test_padding_does_not_change_a_row():
    program = PROGRAMS["window, softcap"]
    runner = Runner(program, dtype=torch.float64)
    alone = runner.logits({"input_ids": IDS[:1, 3:]})
    ids, mask = IDS.clone(), torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    ids[0, :3] = 96  # whatever stands there
    batch = runner.logits({"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(batch[:1, 3:], alone, rtol=0, atol=1e-10)


def test_missing_inputs_are_derived_from_the_mask():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    step = complete_inputs({"input_ids": IDS[:2, :2], "attention_mask": mask}, past=3)
    assert step["position_ids"].tolist() == [[1, 2], [3, 4]]
    whole = complete_inputs({"input_ids": IDS[:2, :5], "attention_mask": mask})
    assert whole["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    alone = complete_inputs({"input_ids": IDS[:, :2]}, past=3)
    assert alone["attention_mask"].shape == (3, 5)
    assert alone["position_ids"].tolist() == [[3, 4]] * 3
    given = {"input_ids": IDS, "position_ids": torch.zeros_like(IDS)}
    assert complete_inputs(given)["position_ids"] is given["position_ids"]


@dataclass(frozen=True, eq=False)
class Counted(Producer):
    """Remembers what it gave, and tells `on_load` when it is read."""

    value: torch.Tensor
    on_load: Callable[[], None]
    given: list = field(default_factory=list)

    @property
    def shape(self):
        return tuple(self.value.shape)

    @property
    def dtype(self):
        return self.value.dtype

    def load(self):
        self.on_load()
        made = self.value.clone()
        self.given.append(weakref.ref(made))
        return made


def counted_program(on_load=lambda producers: None, **options):
    program = tiny_program(**options)
    producers = {}
    for weight in list(program.weights):
        made = Counted(weight.load(), lambda: on_load(producers))
        producers[weight.name] = made
        program.weights.replace(Weight(weight.name, made))
    return program, producers


def test_a_stream_reads_each_weight_once_for_all_batches_and_holds_one_layer():
    moments = []

    def note(producers):
        alive = {n for n, p in producers.items() if any(ref() is not None for ref in p.given)}
        moments.append(alive)

    program, producers = counted_program(note, layers=4, cache=True, tied=False)
    runner = Runner(program, keep_weights=False)
    batches = [complete_inputs({"input_ids": IDS[:, :n]}) for n in (3, 5)]
    with torch.no_grad():
        for _ in runner.stream(batches):
            note(producers)
    assert {name: len(p.given) for name, p in producers.items()} == dict.fromkeys(producers, 1)
    layers = [set(call.weights.values()) for call in program.calls]
    assert all(any(alive <= layer for layer in layers) for alive in moments)
    assert max(map(len, moments)) == len(layers[1]) - 1  # all but the one about to be read


def test_weights_that_are_kept_are_read_once_for_many_runs():
    program, producers = counted_program(layers=2)
    runner = Runner(program)
    for _ in range(3):
        runner.logits({"input_ids": IDS})
    assert all(len(p.given) == 1 for p in producers.values())


def test_batches_may_continue_each_other():
    """Two steps of one text in one walk over the layers, beside another text."""
    program = CACHED["plain"]
    runner = Runner(program, dtype=torch.float64, keep_weights=False)
    shared, own = runner.empty_cache(1), runner.empty_cache(1)
    whole = complete_inputs({"input_ids": IDS[:1]})
    steps = [
        {
            "input_ids": IDS[:1, start:stop],
            "attention_mask": whole["attention_mask"][:, :stop],
            "position_ids": whole["position_ids"][:, start:stop],
        }
        for start, stop in ((0, 5), (5, LENGTH))
    ]
    outputs = []
    with torch.no_grad():
        for _, environments in runner.stream([*steps, whole], [shared, shared, own]):
            outputs = [environment.get("logits") for environment in environments]
    torch.testing.assert_close(torch.cat(outputs[:2], 1), outputs[2], rtol=0, atol=1e-10)
    for name in shared:
        torch.testing.assert_close(shared[name], own[name], rtol=0, atol=1e-10)


def test_values_nobody_needs_any_more_are_dropped():
    program = tiny_program(layers=2)
    batch = complete_inputs({"input_ids": IDS})
    live = []
    with torch.no_grad():
        for _, (environment,) in Runner(program).stream([batch]):
            live.append(set(environment))
    tables = {"attention_mask", "cos", "sin"}
    assert live == [
        {"input_ids", "position_ids", "x"} | tables,
        {"input_ids", "x"} | tables,
        {"input_ids", "x"} | tables,
        {"input_ids", "x", "logits"},
    ]
    assert set(batch) == {"input_ids", "attention_mask", "position_ids"}  # the caller's own


def test_watch_sees_every_node_output():
    program = tiny_program(layers=1)
    runner, call = Runner(program), program.calls[0]
    function = program.functions["embed"]
    seen = []
    args = [IDS, torch.arange(LENGTH).expand(3, -1)]
    sizes = {B: 3, S: LENGTH, P: 0}
    run_function(
        function, call, args, runner.call_weights(call), sizes,
        observe=lambda value, tensor: seen.append((value.name, tuple(tensor.shape))),
    )  # fmt: skip
    assert seen == [("x", (3, 8, 32)), ("cos", (3, 8, 4)), ("sin", (3, 8, 4))]


@pytest.mark.parametrize("mode", ["torch", "reference"])
def test_half_and_double_precision(mode):
    program = PROGRAMS["plain"]
    exact = Runner(program, dtype=torch.float64, mode="reference").logits({"input_ids": IDS})
    half = Runner(program, dtype=torch.bfloat16, mode=mode).logits({"input_ids": IDS})
    assert exact.dtype == torch.float64 and half.dtype == torch.bfloat16
    # bf16 has 8 bits; a few tens of roundings of values of order 1.
    assert 0 < float((half.double() - exact).abs().max()) < 40 * 2**-8


def test_constants_of_integer_type_keep_it():
    program = tiny_program()
    program.weights.add(Weight("index", Array(torch.tensor([1, 2]))))
    assert Runner(program, dtype=torch.float64).weight("index").dtype == torch.int64
