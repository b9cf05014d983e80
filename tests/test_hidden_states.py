"""The stream of hidden states: values of blocks, rewritten blocks, and what is in memory."""

from __future__ import annotations

import pytest
import torch
from live_bytes import LiveBytes
from programs import tiny_program

from graphopt.calibration.reconstruction import reconstruct_behind_cuts
from graphopt.execute import hidden_states
from graphopt.execute.hidden_states import HiddenStateStream, PerBatch
from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import find_blocks, remove_blocks, sub_blocks
from graphopt.ir.weights import Array
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.support.per_device import PerDevice

IDS = torch.randint(0, 97, (7, 12), generator=torch.Generator().manual_seed(5))


def at_once(monkeypatch, tokens):
    for module in ("graphopt.execute.hidden_states", "graphopt.passes.carve_moe.text"):
        monkeypatch.setattr(f"{module}.TOKENS_AT_ONCE", PerDevice(cpu=tokens, gpu=tokens))


def stream_of(program, **options):
    return HiddenStateStream(Runner(program, keep_weights=False), IDS, **options)


@pytest.mark.parametrize("cache", [False, True])
def test_batches_together_give_what_the_program_gives(cache):
    program = tiny_program(layers=3, cache=cache)
    stream = stream_of(program, held_out=3, tokens_at_once=24)
    assert [len(ids) for ids in stream.ids] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(stream.ids), IDS)
    assert stream.held_out == [False, False, True, True]
    assert [block.index for block in stream] == [0, 1, 2]
    found = torch.cat([stream.output(*batch) for batch in enumerate(stream.hidden)])
    assert torch.allclose(found, Runner(program).logits({"input_ids": IDS}), atol=1e-5)
    assert stream.block_calls == 3 * 4


def test_a_value_is_what_the_whole_block_makes_also_from_the_middle_on():
    program = tiny_program(layers=2)
    stream = stream_of(program, tokens_at_once=36)
    for block in stream:
        seen = [{} for _ in stream.ids]
        for batch, values in enumerate(seen):
            block.run(batch, observe=values.__setitem__)
        attention, ffn = sub_blocks(block.function, block.block.stream)
        wanted = [ffn.term, attention.behind, block.function.results[0]]
        for start in (None, attention.behind):
            if start is not None:
                block.keep(start)
            for batch, values in enumerate(seen):
                for value, tensor in zip(wanted, block.values(batch, wanted), strict=True):
                    assert torch.equal(tensor, values[value])


def test_only_what_a_value_depends_on_is_run():
    program = tiny_program(layers=1)
    block = stream_of(program).current()
    attention, ffn = sub_blocks(block.function, block.block.stream)

    def ran(wanted):
        with LiveBytes() as counted:
            block.values(0, [wanted])
        return counted.peak

    block.weights  # noqa: B018, read once
    whole, half = ran(ffn.behind), ran(attention.behind)
    block.keep(attention.behind)
    assert ran(attention.behind) == 0 < ran(ffn.behind) < whole and half < whole


def test_the_stream_goes_on_with_the_rewritten_block_and_values_stay_those_of_the_old_one():
    program = tiny_program(layers=3)
    stream = stream_of(program)
    for block in stream:
        if block.index != 1:
            continue
        ffn = sub_blocks(block.function, block.block.stream)[-1]
        (before,) = block.values(0, [ffn.term])
        name = next(name for slot, name in block.call.weights.items() if "down" in slot)
        weight = program.weights[name]
        program.weights.replace(weight.with_producer(Array(3 * weight.load())))
        observed = []
        block.replace()
        block.advance(observers={ffn.term: lambda batch, tensor: observed.append(tensor)})  # noqa: B023
        assert torch.equal(block.values(0, [ffn.term])[0], before)
        assert torch.allclose(observed[0], 3 * before, atol=1e-6)
    expected = Runner(program).logits({"input_ids": IDS})
    assert torch.allclose(
        torch.cat([stream.output(*batch) for batch in enumerate(stream.hidden)]),
        expected,
        atol=1e-5,
    )


def test_room_is_asked_for_the_hidden_states_of_all_windows(monkeypatch):
    sizes = []
    monkeypatch.setattr(hidden_states, "room_for", lambda size, _: sizes.append(size))
    stream = stream_of(tiny_program(hidden=32), tokens_at_once=24)
    assert sizes == [IDS.numel() * 32 * 4 * hidden_states.STREAMS_KEPT]
    assert all(hidden.device.type == "cpu" for hidden in stream.hidden)


def test_what_is_made_of_a_batch_is_held_only_where_there_is_one():
    made = []

    def make(number):
        made.append(number)
        return number

    for count, times in ((1, 1), (3, 2)):
        made.clear()
        batches = PerBatch.of(range(count), make)
        doubled = batches.map(lambda number: 2 * number)
        for _ in range(2):
            assert list(doubled) == [2 * n for n in range(count)]
        assert made == list(range(count)) * times
    assert list(PerBatch.of(range(5), make)[2:4]) == [2, 3]


# ---- memory ----

D, N, E = 16, 512, 8


def carve(windows, monkeypatch):
    from graphopt.passes.carve_moe import text

    monkeypatch.setattr(text, "calibration_windows", lambda *_: windows)
    options = {"shared": 2, "active": 2, "experts": E, "windows": len(windows), "rounds": 2}
    program = tiny_program(layers=2, hidden=D, ffn=N, heads=2, kv_heads=1)
    return make_pass("carve-moe", options).run(program, Context()).program


def reconstruct(windows, monkeypatch):
    dense = tiny_program(layers=3, hidden=D, ffn=N, heads=2, kv_heads=1)
    program = dense.copy()
    remove_blocks(program, [1])
    reconstruct_behind_cuts(program, dense, windows)
    return program


def peak(run, count, monkeypatch):
    # How many factors are held depends on which strength is the best, and not on tokens.
    monkeypatch.setattr("graphopt.solvers.least_squares.FACTORS_BYTES", 0)
    windows = torch.randint(0, 97, (count, 32), generator=torch.Generator().manual_seed(0))
    with LiveBytes() as counted:
        run(windows, monkeypatch)
    return counted.peak


@pytest.mark.slow
@pytest.mark.parametrize("run", [carve, reconstruct])
def test_more_windows_need_more_memory_for_the_residual_stream_alone(run, monkeypatch):
    at_once(monkeypatch, 64)
    few, many = 8, 40
    tokens = 32 * (many - few)
    growth = (peak(run, many, monkeypatch) - peak(run, few, monkeypatch)) / tokens
    # Of every token the hidden states, in fp32, and what it has of experts: scores, gates, their
    # energy, in up to twelve places; never what it has of neurons.
    assert growth <= 4 * (hidden_states.STREAMS_KEPT * D + 12 * (E + 1)) < 4 * N
    # What holds the activations of all windows is seen.
    at_once(monkeypatch, 10**6)
    assert (peak(run, many, monkeypatch) - peak(run, few, monkeypatch)) / tokens > 4 * N


@pytest.mark.parametrize("run", [carve, reconstruct])
def test_activations_made_batch_by_batch_give_the_weights_of_all_at_once(run, monkeypatch):
    windows = torch.randint(0, 97, (10, 32), generator=torch.Generator().manual_seed(0))
    at_once(monkeypatch, 10**6)
    whole = run(windows, monkeypatch)
    at_once(monkeypatch, 64)
    parts = run(windows, monkeypatch)
    assert str(whole) == str(parts) and find_blocks(whole)
    for weight in whole.used_weights():
        other = parts.weights[weight.name].load()
        value = weight.load()
        if value.is_floating_point():
            # Sums in fp32 over 320 tokens in another order, through a solve.
            assert torch.allclose(value, other, atol=1e-3 * float(value.abs().max()))
