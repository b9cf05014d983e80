"""The pass that puts keys into the host's memory: what it places, says and refuses."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from families import captured
from programs import tiny_program

import graphopt as go
from graphopt.errors import PassError, UsageError
from graphopt.ir.kv_host import HostShare, prefill_chunk
from graphopt.ir.printer import print_program
from graphopt.pass_manager.contract import Context
from graphopt.pass_manager.pipeline import Pipeline
from graphopt.passes.place_kv.place_kv import PlaceKV
from graphopt.passes.place_kv.record import PlacedKV
from graphopt.passes.place_kv.room import RESERVE
from graphopt.targets import get_target

CONTEXT = 20_000
LAYER = 2 * 2 * 8 * 2 * CONTEXT
"""Bytes of a layer's keys of the tiny program, in 16 bits."""


def run(program, **options):
    item = PlaceKV(**{"gpu": "9GB", "context": CONTEXT, **options})
    item.check(program)
    return item.run(program.copy(), Context())


def gpu_with(room, program, **options):
    """A GPU on which so many bytes are left to keys."""
    record = run(program, **options).record
    return str(record.gpu - record.room + room)


def test_a_gpu_with_room_for_all_keeps_all():
    program = tiny_program(cache=True)
    result = run(program)
    assert (result.matched, result.changed, result.skipped) == (2, 0, [])
    assert result.record.line() == ("all keys of one text of 20,000 tokens fit the GPU: 2.6 MB")
    assert print_program(result.program) == print_program(program)


def test_what_has_no_room_is_placed_and_printed():
    program = tiny_program(cache=True, layers=4)
    before = print_program(program)
    result = run(program, gpu=gpu_with(int(2.6 * LAYER), program))
    assert (result.matched, result.changed) == (4, 2)
    states = result.program.states
    assert [state.host is None for state in states.values()] == [True, True, False, False]
    front, rest = states["kv.2"].host, states["kv.3"].host
    # Of what is left a part is for reading prompts.
    tokens = int(0.6 * CONTEXT) - prefill_chunk(1)
    assert front.resident == tokens // 64 * 64 and rest.resident == 0
    assert print_program(program) == before
    after = print_program(result.program).splitlines()
    changed = [line for line in after if line not in before.splitlines()]
    assert [line.strip() for line in changed if "placed(cpu)" in line] == [
        f"kv.{number}: f32 heads=2 k_dim=8 v_dim=8 contiguous placed(cpu) {share}"
        for number, share in ((2, front), (3, rest))
    ]
    record = result.record
    assert record.device + record.host >= 4 * LAYER and record.device <= record.room
    assert record.gpu - record.room == (
        RESERVE + record.weights + record.activations + record.other + record.buffers
    )
    assert record.moved + record.read == LAYER + 64 * (CONTEXT - front.resident)


def test_the_pipeline_verifies_it_and_the_report_says_it():
    program = tiny_program()
    cached = Pipeline.parse("insert-kv-cache").run(program)[0]
    gpu = gpu_with(LAYER, cached)
    recipe = f"insert-kv-cache,place-kv{{gpu={gpu},context={CONTEXT}}}"
    placed, report = Pipeline.parse(recipe).run(program)
    entry = report.passes[-1]
    assert entry.verification == "passed" and entry.max_abs_logit_delta < 1e-5
    assert placed.states["kv.1"].host == HostShare(
        CONTEXT, 1, 0, placed.states["kv.1"].host.streamed
    )
    assert isinstance(entry.record, PlacedKV)
    line = entry.record.line()
    assert "1 of 2 layers have keys on the host, 1." in line and "tokens/s predicted" in line
    card = entry.record.card()
    for words in (
        "room for keys",
        "kv.0",
        "on the GPU",
        f"By the figures of {entry.record.target}",
    ):
        assert words in card
    assert json.loads(json.dumps(asdict(entry.record.layers[0])))["way"] == "device"


def test_another_gpu_takes_places_back():
    program = tiny_program(cache=True)
    placed = run(program, gpu=gpu_with(0, program)).program
    assert all(state.host for state in placed.states.values())
    result = run(placed)
    assert result.changed and print_program(result.program) == print_program(program)


def test_layers_with_a_window_stay():
    program = tiny_program(cache=True, window=5, layers=4)
    result = run(program, gpu=gpu_with(0, program))
    assert [skip.where for skip in result.skipped] == ["layers.0", "layers.2"]
    assert all(
        "it has a window of 5 tokens: a step reads so few" in s.reason for s in result.skipped
    )
    assert result.record.other == 2 * LAYER
    placed = [name for name, state in result.program.states.items() if state.host]
    assert placed == ["kv.1", "kv.3"]


def test_the_published_method_has_whole_layers():
    program = tiny_program(cache=True, layers=4)
    gpu = gpu_with(int(2.9 * LAYER), program)
    result = run(program, gpu=gpu, method="published")
    assert [state.host for state in result.program.states.values()] == [
        None, None, *[HostShare(CONTEXT, 1, 0, 0)] * 2
    ]  # fmt: skip
    assert result.record.seconds >= run(program, gpu=gpu).record.seconds


def test_measured_figures_decide(tmp_path):
    """Where the link is fast keys are copied, where the processors are they attend."""
    program = tiny_program(cache=True)
    gpu = gpu_with(0, program, batch=64, context=2048)
    figures = {
        "memory": 1e11, "device": "a GPU", "processor": "a processor", "threads": 8,
        "date": "2026-11-30", "call": 0.0,
    }  # fmt: skip
    for link, attention, way in ((1e12, 1e9, "streamed"), (1e9, 1e12, "host")):
        rates = {"link": link, "attention": attention}
        beside = {f"{name}_beside": 0.5 * rate for name, rate in rates.items()}
        path = tmp_path / f"{way}.json"
        path.write_text(json.dumps(figures | rates | beside), encoding="utf-8")
        # Of so few bytes a launch is most: texts at once make them more.
        record = run(program, gpu=gpu, figures=str(path), batch=64, context=2048).record
        assert {layer.way for layer in record.layers} == {way}
        assert "a processor, 8 threads" in record.card()


def test_batches_and_codes_are_counted():
    program = tiny_program(cache=True)
    alone, several = (run(program, batch=n).record for n in (1, 3))
    assert several.device == 3 * alone.device == 3 * 2 * LAYER
    recipe = "canonicalise,quantize{kv=8,method=rtn},insert-kv-cache"
    codes, _ = go.Pipeline.parse(recipe).run(
        tiny_program(hidden=64, head_dim=32), go.RunOptions(verify=False)
    )
    assert run(codes).record.device == 2 * CONTEXT * 2 * 2 * 48  # 32 codes, a scale, a zero point


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "24 apples"}, "gpu '24 apples' is no size"),
        ({"host": "much"}, "host 'much' is no size"),
        ({"target": "cpu"}, "cpu is no GPU"),
        ({"target": "volta"}, r"volta\.toml has no \[decode\]"),
        ({"figures": "none.json"}, r"none\.json"),
        ({"context": 1}, "context"),
        ({"method": "best"}, "method"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(UsageError, match=message):
        PlaceKV(**options)


def test_a_target_without_figures_of_its_host():
    assert get_target("ampere").host is None
    with pytest.raises(UsageError, match=r"ampere\.toml has no \[host\].*measure-host"):
        PlaceKV(target="ampere")


def test_without_a_gpu_its_size_is_asked_for():
    with pytest.raises(UsageError, match="there is none here"):
        PlaceKV().run(tiny_program(cache=True), Context())


def test_too_little_memory_is_said_with_what_is_needed():
    program = tiny_program(cache=True)
    with pytest.raises(PassError, match=r"gpu=1GB is too little.* bytes \(1\.0 GB\) are needed"):
        run(program, gpu="1GB")
    gpu = gpu_with(0, program)
    with pytest.raises(PassError, match=r"host=1MB is too little.* bytes \(2\.\d MB\) are needed"):
        run(program, gpu=gpu, host="1MB")
    assert run(program, gpu=gpu, host="10MB").changed == 2


def test_models_whose_keys_cannot_be_divided():
    with pytest.raises(PassError, match=r"No layer of .* slopes \(ALiBi\)"):
        run(tiny_program(cache=True, alibi=True))
    with pytest.raises(PassError, match="needs a program with kv-cache"):
        Pipeline.parse("place-kv{gpu=9GB}").run(tiny_program())


def test_what_does_not_go_together():
    program = tiny_program(cache=True)
    placed = run(program, gpu=gpu_with(0, program)).program
    policy = "attach-kv-policy{verdict=ignore,budget=16,page=4,sink=4,local=4}"
    for recipe, message in (
        ("shard{tp=2,device=cpu}", "Keys of tiny lie in the host's memory"),
        (policy, "some of its keys lie in the host's memory"),
    ):
        with pytest.raises(PassError, match=message):
            Pipeline.parse(recipe).run(placed)
    sharded, _ = Pipeline.parse("shard{tp=2,device=cpu}").run(program)
    with pytest.raises(PassError, match=r"place-kv.*split over several"):
        Pipeline.parse("place-kv{gpu=9GB}").run(sharded)
    _, report = Pipeline.parse("insert-kv-cache{page=4}").run(placed)
    assert "it should be contiguous, placed(cpu)" in report.passes[0].skipped[0].reason


@pytest.mark.slow
def test_a_table_of_positions_has_an_end():
    program, _ = go.Pipeline.default().run(captured("gpt2")[1], go.RunOptions(verify=False))
    with pytest.raises(PassError, match="has a table of 256 positions"):
        run(program, context=257)
    assert run(program, context=None).record.context == 256
