"""Which keys lie on the host: the planner against every division, and the published split."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import runner
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.cli.commands import app
from graphopt.errors import UsageError
from graphopt.ir.kv_host import piece_tokens, prefill_chunk
from graphopt.plan.host_kv import (
    FRONT_TOKENS,
    HostedLayer,
    KVPlan,
    Machine,
    fastest,
    host_seconds,
    layer_plan,
    published,
    published_layers,
    streamed,
    whole_layer,
)
from graphopt.plan.measure_host import measure_host, read_measured_host, write_measured_host
from graphopt.runtime.host_attention import host_kernel
from graphopt.targets import HostFigures, get_target

FIGURES = HostFigures(55e9, 80e9, 50e9, 55e9, 60e-6)


def figures_drawn():
    rate = st.floats(1e9, 4e11)
    share = st.floats(0.2, 1.0)
    return st.builds(
        lambda link, own, a, b, call: HostFigures(link, own, a * link, b * own, call),
        rate, rate, share, share, st.floats(0, 1e-3),
    )  # fmt: skip


def by_parts(streamed_bytes, computed_bytes, figures, steps=200_000):
    """The time of both kinds of bytes, followed through small steps of time."""
    left_s, left_c, time = streamed_bytes, computed_bytes, 0.0
    total = streamed_bytes / figures.link_beside + computed_bytes / figures.attention_beside
    step = total / steps
    while left_s > 0 or left_c > 0:
        both = left_s > 0 and left_c > 0
        left_s -= step * (figures.link_beside if both else figures.link) * (left_s > 0)
        left_c -= step * (figures.attention_beside if both else figures.attention) * (left_c > 0)
        time += step
    return time, step


@settings(max_examples=10, deadline=None)
@given(figures_drawn(), st.floats(1e6, 1e9), st.floats(1e6, 1e9))
def test_two_rates_at_once_and_one_alone(figures, copied, read):
    figures = replace(figures, call=0.0)
    found, step = by_parts(copied, read, figures)
    assert host_seconds(copied, read, figures) == pytest.approx(found, abs=3 * step)
    assert host_seconds(copied, 0, figures) == pytest.approx(copied / figures.link)
    assert host_seconds(0, read, figures) == pytest.approx(read / figures.attention)


@settings(max_examples=40, deadline=None)
@given(
    figures_drawn(),
    st.integers(1, 400),
    st.integers(1, 4),
    st.sampled_from([512, 4096]),
    st.booleans(),
)
def test_a_layer_is_divided_as_is_fastest(figures, context, batch, token, computes):
    """No other number of pieces is faster, and what is not computable is copied."""
    context *= 100
    machine = Machine(figures, 3e12, 3e-6)
    layer = HostedLayer("kv", token, computes)
    plan = layer_plan(layer, 0, context, batch, machine)
    assert plan.resident == 0 and plan.streamed + plan.computed == context
    assert computes or plan.way == "streamed"
    piece = piece_tokens(context, batch)
    assert plan.streamed in (*range(0, context, piece), context)
    each = token * batch
    for count in range(-(-context // piece) + 1):
        copied = min(count * piece, context)
        if copied < context and not computes:
            continue
        taken = host_seconds(copied * each, (context - copied) * each, figures)
        assert plan.seconds <= 1.02 * (taken + 20 * machine.launch)


def by_force(layers, context, batch, room, machine) -> float:
    """The least time over every layer on the device, or with a front of it there, or none."""
    chunk = min(prefill_chunk(batch), context)
    best = float("inf")
    options = []
    for layer in layers:
        token = layer.token_bytes * batch
        own = [(0, 0), (context, token * context)]
        own += [
            (front, token * (front + chunk)) for front in range(FRONT_TOKENS, context, FRONT_TOKENS)
        ]
        options.append(
            [
                (bytes_, layer_plan(layer, front, context, batch, machine).seconds)
                for front, bytes_ in own
            ]
        )
    for choice in itertools.product(*options):
        if sum(bytes_ for bytes_, _ in choice) <= room:
            best = min(best, sum(seconds for _, seconds in choice))
    return best


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([(512, True), (2048, True), (2048, False)]), min_size=1, max_size=3),
    st.sampled_from([640, 1280, 2048]),
    st.floats(0, 1.2),
    figures_drawn(),
)
def test_the_plan_is_as_fast_as_any(kinds, context, share, figures):
    layers = [HostedLayer(f"kv.{n}", token, computes) for n, (token, computes) in enumerate(kinds)]
    machine = Machine(figures, 3e12, 3e-6)
    whole = sum(layer.token_bytes for layer in layers) * context
    room = int(share * whole)
    plan = fastest(layers, context, 1, room, machine)
    assert [p.layer for p in plan.layers] == layers
    assert plan.device_bytes() <= room
    # A front is tried of one layer alone, and two may round better: by a piece of each at most.
    slowest = min(figures.link_beside, figures.attention_beside)
    largest = max(layer.token_bytes for layer in layers) * (256 + FRONT_TOKENS)
    rounding = len(layers) * (2 * machine.launch + largest / slowest + figures.call)
    assert plan.seconds <= by_force(layers, context, 1, room, machine) + rounding


def test_equal_layers_fill_the_device_one_after_the_other():
    layers = [HostedLayer(f"kv.{n}", 4096) for n in range(8)]
    machine = Machine(FIGURES, 3e12, 3e-6)
    context, size = 65536, 4096 * 65536
    for room in (0, size // 3, size, int(3.4 * size), 8 * size):
        plan = fastest(layers, context, 1, room, machine)
        whole = [p.way == "device" for p in plan.layers]
        assert whole == sorted(whole, reverse=True) and sum(whole) == room // size
        fronts = [p.resident for p in plan.layers if 0 < p.resident < context]
        assert len(fronts) <= 1 and all(front % FRONT_TOKENS == 0 for front in fronts)
        assert (len(fronts) == 1) == (room % size > 2048 * 4096)
    # The next kind of layer is tried too: one that cannot be computed gains most by the device.
    layers[5] = HostedLayer("kv.5", 4096, computes=False)
    plan = fastest(layers, context, 1, size, machine)
    assert [p.layer.name for p in plan.layers if p.way == "device"] == ["kv.5"]


def test_more_layers_and_less_room_take_longer():
    machine = Machine(FIGURES, 3e12, 3e-6)
    layers = [HostedLayer(f"kv.{n}", 4096) for n in range(4)]
    times = [
        fastest(layers, 32768, 2, room, machine).seconds for room in range(0, 2**31, 2**27)
    ]  # fmt: skip
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(times))
    assert times[0] < streamed(layers, 32768, 2, machine).seconds


@given(
    st.integers(1, 8), st.integers(0, 10**11), st.integers(0, 10**10), st.integers(0, 10**11),
    st.integers(0, 10**10), st.integers(1, 10**10), st.integers(0, 100),
)  # fmt: skip
def test_the_published_number_of_layers(n, memory, reserve, weights, activations, layer, layers):
    found = published_layers(n, memory, reserve, weights, activations, layer, layers)
    left = n * (memory - reserve) - weights - activations
    assert 0 <= found <= layers
    assert found == 0 or found * layer <= left
    assert found == layers or (found + 1) * layer > left


def test_the_published_example():
    """Hidden 5120, multi-head, fp16, 256K tokens: 5 GiB a layer, 40 layers, a 38B model in fp16."""
    layer = 2 * 262144 * 5120 * 2
    assert layer == 5 * 2**30
    assert published_layers(8, 32 * 2**30, 0, 76 * 10**9, 0, layer, 40) == 37


def test_the_published_split_is_of_whole_layers_by_the_faster_way():
    layers = [HostedLayer(f"kv.{n}", 4096) for n in range(4)]
    machine = Machine(FIGURES, 3e12, 3e-6)
    size = 4096 * 65536
    plan = published(layers, 65536, 1, int(2.9 * size), machine)
    assert [p.way for p in plan.layers] == ["device", "device", "host", "host"]
    assert plan.seconds >= fastest(layers, 65536, 1, int(2.9 * size), machine).seconds
    slow = Machine(replace(FIGURES, attention=20e9), 3e12, 3e-6)
    assert [p.way for p in published(layers, 65536, 1, 0, slow).layers] == ["streamed"] * 4
    copied = whole_layer(layers[0], 65536, 1, slow, True).seconds
    assert copied == pytest.approx(size / 55e9, abs=9 * slow.launch)


def test_bytes_are_counted():
    layers = [HostedLayer(f"kv.{n}", 4096) for n in range(2)]
    machine = Machine(FIGURES, 3e12, 3e-6)
    plans = (
        layer_plan(layers[0], 65536, 65536, 1, machine),
        layer_plan(layers[1], 1024, 65536, 1, machine),
    )
    plan = KVPlan(plans, 65536, 1, 0)
    assert plan.device_bytes() == 4096 * (65536 + 1024 + prefill_chunk(1))
    piece = piece_tokens(65536 - 1024, 1)
    assert plan.host_bytes() == 4096 * -(-(65536 - 1024) // piece) * piece
    assert plan.moved_bytes() + plan.read_bytes() == 4096 * (65536 - 1024)


# Figures ------------------------------------------------------------------------------------------


def test_what_is_measured_is_read_again(tmp_path: Path):
    measured = measure_host(torch.device("cpu"), keys=512, layers=2)
    path = tmp_path / "host.json"
    write_measured_host(path, measured)
    assert read_measured_host(path) == measured
    figures = read_measured_host(path).figures()
    assert min(figures.link, figures.attention, figures.link_beside, figures.attention_beside) > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "host.json"),
        ("{", "host.json"),
        (json.dumps({"link": 1.0}), "attention"),
        (json.dumps({"link": -1.0, "attention": 1.0}), "link"),
    ],
)
def test_files_that_are_none_are_refused(text: str, message: str, tmp_path: Path):
    path = tmp_path / "host.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        read_measured_host(path)
    with pytest.raises(UsageError, match=r"none\.json"):
        read_measured_host(tmp_path / "none.json")


def test_targets_state_hosts_with_their_sources():
    assert get_target("hopper").host is not None
    assert "host" in get_target("hopper").sources


def test_the_command_writes_what_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "graphopt.plan.measure_host.measure_host",
        functools.partial(measure_host, keys=512, layers=2),
    )
    path = tmp_path / "host.json"
    found = runner().invoke(app, ["measure-host", "-o", str(path), "--device", "cpu"])
    assert found.exit_code == 0 and "attention by the processors" in found.stdout
    assert read_measured_host(path).device == "CPU"
    found = runner().invoke(app, ["measure-host", "-o", str(path), "--device", "cpu", "--json"])
    assert json.loads(found.stdout) == json.loads(path.read_text(encoding="utf-8"))
    found = runner().invoke(app, ["measure-host", "-o", str(tmp_path)])
    assert found.exit_code == 2 and "is a folder" in found.stderr


def test_the_command_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    host_kernel.cache_clear()
    try:
        arguments = ["measure-host", "-o", str(tmp_path / "host.json"), "--device", "cpu"]
        found = runner().invoke(app, arguments)
        assert found.exit_code == 1 and "needs a C++ compiler" in found.stderr
    finally:
        host_kernel.cache_clear()
