"""Scores: one walk against a run of the model without each candidate."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from families import captured
from programs import tiny_program
from sampling import exhaustive_but
from torch import nn

from graphopt.calibration import scores as scores_module
from graphopt.calibration.scores import (
    METRICS,
    PruningUnit,
    Scores,
    final_hidden,
    score_removals,
    score_units,
    units_of,
)
from graphopt.capture import capture
from graphopt.errors import SourceError
from graphopt.execute import hidden_states
from graphopt.execute.block_runner import BlockRunner
from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import find_blocks, remove_sub_blocks
from graphopt.ir.weights import Array, Weight
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.support.per_device import PerDevice

CPU = torch.device("cpu")
IDS = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(5))


def at_once(monkeypatch, tokens):
    for module in (hidden_states, scores_module):
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", PerDevice(cpu=tokens, gpu=tokens))


def stream(program, count=None):
    """Return the stream behind a program's first `count` blocks, by default all, in fp64."""
    blocks = find_blocks(program)
    student = BlockRunner(program, blocks[0].position, blocks[-1].position + 1, {}, CPU)
    values = student.window_inputs(IDS)
    call = program.calls[blocks[0].position]
    stop, name = blocks[0].position, call.args[blocks[0].stream]
    if count != 0:
        stop = blocks[-1 if count is None else count - 1].position + 1
        name = program.calls[stop - 1].results[0]
    with torch.no_grad():
        student.run_range(values, 0, stop)
    return values[name].double()


def without(program, *units):
    pruned = program.copy()
    remove_sub_blocks(pruned, [(unit.block, unit.kind) for unit in units])
    return pruned


class Definition:
    """Scores candidates the way definitions say; what several scores look at is run once."""

    def __init__(self, program):
        def model(removed):
            units = [removed] if isinstance(removed, PruningUnit) else removed or ()
            return without(program, *units) if units else program

        self.model = functools.cache(model)
        self.stream = functools.cache(lambda unit, count=None: stream(self.model(unit), count))
        self.logits = functools.cache(
            lambda unit: Runner(self.model(unit)).logits({"input_ids": IDS}).double()
        )

    def score(self, unit, metric):
        if metric in ("bi", "angular"):
            index = unit.block
            left = index if unit.kind == "block" else index + 1
            cosine = F.cosine_similarity(
                self.stream(None, index + 1), self.stream(unit, left), dim=-1
            )
        elif metric == "mi":
            cosine = F.cosine_similarity(self.stream(None), self.stream(unit), dim=-1)
        else:
            ours = self.logits(unit).log_softmax(-1)
            if metric == "ppl":
                return math.exp(-float(ours[:, :-1].gather(-1, IDS[:, 1:, None]).mean()))
            theirs = self.logits(None).log_softmax(-1)
            return float((theirs.exp() * (theirs - ours)).sum(-1).mean())
        if metric == "angular":
            return float((cosine.clamp(-1, 1).arccos() / math.pi).mean())
        return float((1 - cosine).mean())


@pytest.mark.parametrize("kinds", [("block",), ("attention", "ffn")])
@pytest.mark.parametrize("metric", METRICS)
def test_one_walk_gives_the_scores_of_the_definition(metric, kinds):
    program = tiny_program(layers=5)
    units = units_of(program, kinds)
    scores, definition = score_units(program, units, IDS, metric), Definition(program)
    for unit in units:
        assert scores.values[unit] == pytest.approx(
            definition.score(unit, metric), abs=1e-6, rel=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", exhaustive_but(["mixtral", "gpt_oss", "deepseek_v3"], "gpt_oss"))
def test_mixtures_of_experts_score_as_defined(family, monkeypatch):
    # They count the tokens they route, so that some sizes are multiples of the batch's.
    _, program = captured(family)
    units = units_of(program, ("block", "attention", "ffn"))
    definition = Definition(program)
    for rows in (1, 3):
        at_once(monkeypatch, rows * IDS.shape[1])
        for metric in METRICS:
            scores = score_units(program, units, IDS, metric)
            for unit in units:
                assert scores.values[unit] == pytest.approx(
                    definition.score(unit, metric), abs=1e-6, rel=1e-4
                ), (metric, unit, rows)


@pytest.mark.parametrize("metric", ["mi", "kl", "ppl"])
def test_sets_in_one_walk_score_as_the_models_without_them(metric, monkeypatch):
    program = tiny_program(layers=4)
    removals = [
        frozenset({PruningUnit(3), PruningUnit(0)}),
        frozenset(),
        frozenset({PruningUnit(0)}),
        frozenset({PruningUnit(1, "attention"), PruningUnit(1, "ffn"), PruningUnit(3)}),
        frozenset({PruningUnit(0), PruningUnit(2, "ffn"), PruningUnit(3, "attention")}),
    ]
    definition = Definition(program)
    expected = [definition.score(removal, metric) for removal in removals]
    for free in (1 << 40, 1):  # all of them at once, and one after the other
        monkeypatch.setattr(scores_module, "free_bytes", lambda device, free=free: free)
        found = score_removals(program, removals, IDS, metric)
        assert list(found) == removals
        assert list(found.values()) == pytest.approx(expected, abs=1e-6, rel=1e-5)


def test_batches_are_so_small_that_their_logits_fit_half_of_what_is_free(monkeypatch):
    program = tiny_program(layers=2)
    monkeypatch.setattr(scores_module, "free_bytes", lambda device: 1 << 40)
    assert len(scores_module.scoring_stream(program, IDS).ids) == 1
    vocabulary = int(program.weights["embed.weight"].shape[0])
    windows = 2
    # Two windows' logits, of the candidate and of the whole model, and what a divergence makes.
    free = 2 * 12 * vocabulary * windows * IDS.shape[1]
    monkeypatch.setattr(scores_module, "free_bytes", lambda device: free)
    batches = scores_module.scoring_stream(program, IDS).ids
    assert {len(ids) for ids in batches} <= {1, windows}
    assert sum(len(ids) for ids in batches) == len(IDS)


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_missing_already_is_missing_in_what_is_compared_with(metric):
    program, removed = tiny_program(layers=4), PruningUnit(1)
    units = [PruningUnit(0), PruningUnit(2), PruningUnit(3, "ffn")]
    shorter = without(program, removed)
    renamed = [PruningUnit(0), PruningUnit(1), PruningUnit(2, "ffn")]
    found = score_units(program, units, IDS, metric, removed=[removed]).values
    expected = score_units(shorter, renamed, IDS, metric).values
    assert list(found) == units
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-6, rel=1e-5)


class _SequenceFirst(nn.Module):
    """Blocks over a stream [S, B, D], as XLNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(97, 8), nn.Linear(8, 97)
        self.layers = nn.ModuleList([_Residual() for _ in range(4)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids).transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.transpose(0, 1))


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


@pytest.mark.slow
def test_streams_may_have_the_batch_on_another_axis():
    torch.manual_seed(0)
    program = capture(_SequenceFirst().eval())
    units = units_of(program, ("block",))
    assert len(units) == 4
    definition = Definition(program)
    for metric in METRICS:
        scores = score_units(program, units, IDS, metric)
        for unit in units:
            assert scores.values[unit] == pytest.approx(
                definition.score(unit, metric), abs=1e-6, rel=1e-4
            ), (metric, unit)


@pytest.mark.parametrize("layers", [2, 5, 8])
def test_a_walk_takes_half_the_block_calls(layers):
    program = tiny_program(layers=layers)
    units = units_of(program, ("block",))
    assert score_units(program, units, IDS, "mi").calls == layers * (layers + 1) // 2
    assert score_units(program, units, IDS, "bi").calls == layers


def silenced(program, index):
    """Return the program with a block whose parts add nothing."""
    call = program.calls[find_blocks(program)[index].position]
    for slot, name in call.weights.items():
        if "o_proj" in slot or "down" in slot:
            weight = program.weights[name]
            program.weights.replace(Weight(name, Array(torch.zeros(weight.shape))))
    return program


def test_a_block_that_adds_nothing_has_no_influence_and_goes_first():
    program = silenced(tiny_program(layers=6), 3)
    scores = score_units(program, units_of(program, ("block",)), IDS, "mi")
    assert scores.values[PruningUnit(3)] <= 1e-6 and scores.lowest() == PruningUnit(3)


def scaled(program, index, factors):
    """Multiply what a block adds to each feature of the stream [D] by factors [D]."""
    call = program.calls[find_blocks(program)[index].position]
    for slot, name in call.weights.items():
        if "o_proj" in slot or "down" in slot:
            value = program.weights[name].load(torch.float32) * factors[:, None]
            program.weights.replace(Weight(name, Array(value)))


def test_the_logits_see_what_a_norm_behind_the_blocks_hides_from_the_stream():
    program = tiny_program(layers=4, tied=False)
    width = stream(program).shape[-1]
    unread = torch.arange(width) < width // 2
    (gain,) = [name for name in program.calls[-1].weights.values() if "norm" in name]
    program.weights.replace(Weight(gain, Array(torch.where(unread, 0.0, 1.0))))
    scaled(program, 3, torch.where(unread, 0.5, 0.0))
    scaled(program, 2, torch.full((width,), 0.3))
    units = units_of(program, ("block",))
    lowest = {metric: score_units(program, units, IDS, metric).lowest() for metric in METRICS}
    # Block 3 adds more to the stream, and nothing that the head reads.
    assert lowest["mi"] == lowest["bi"] == PruningUnit(2) and lowest["kl"] == PruningUnit(3)


def test_small_angles_are_exact():
    # In fp32, arccos of a cosine near 1 knows angles to about 1e-4 of pi only.
    program = tiny_program(layers=4)
    call = program.calls[find_blocks(program)[2].position]
    for slot, name in call.weights.items():
        if "o_proj" in slot or "down" in slot:
            value = program.weights[name].load(torch.float32) * 1e-4
            program.weights.replace(Weight(name, Array(value)))
    found = score_units(program, [PruningUnit(2)], IDS, "angular").values[PruningUnit(2)]
    before, behind = (F.normalize(stream(program, count), dim=-1) for count in (2, 3))
    chord = (before - behind).norm(dim=-1)
    expected = float((2 * (chord / 2).arcsin() / math.pi).mean())
    assert expected < 1e-3 and found == pytest.approx(expected, rel=1e-3)


def test_parts_that_add_nothing_have_no_influence():
    program = silenced(tiny_program(layers=4), 2)
    values = score_units(program, units_of(program, ("attention", "ffn")), IDS, "mi").values
    quiet = {PruningUnit(2, "attention"), PruningUnit(2, "ffn")}
    assert all((value <= 1e-6) == (unit in quiet) for unit, value in values.items())


def test_texts_in_several_batches_score_as_in_one(monkeypatch):
    program = tiny_program(layers=4)
    units = units_of(program, ("block",))
    together = score_units(program, units, IDS, "kl")
    at_once(monkeypatch, 20)
    apart = score_units(program, units, IDS, "kl")
    assert apart.calls == together.calls
    for unit in units:
        assert apart.values[unit] == pytest.approx(together.values[unit], rel=1e-5)


def test_a_program_with_a_cache_scores_as_without():
    units = [PruningUnit(index) for index in range(4)]
    plain, cached = (
        score_units(tiny_program(layers=4, cache=cache), units, IDS, "mi").values
        for cache in (False, True)
    )
    assert cached == pytest.approx(plain, rel=1e-5)


def test_the_influence_of_the_last_block_is_that_of_its_own_output():
    program = tiny_program(layers=4)
    units = [PruningUnit(3)]
    assert score_units(program, units, IDS, "mi").values[PruningUnit(3)] == pytest.approx(
        score_units(program, units, IDS, "bi").values[PruningUnit(3)], rel=1e-6
    )


def test_equal_scores_go_to_the_lowest_index_and_no_number_is_never_chosen():
    values = {
        PruningUnit(4): 0.1,
        PruningUnit(2): 0.1,
        PruningUnit(1): math.nan,
        PruningUnit(3): 0.5,
    }
    assert Scores(values, 0).lowest() == PruningUnit(2)
    with pytest.raises(SourceError, match="finite"):
        Scores({PruningUnit(0): math.nan}, 0).lowest()
    program = silenced(silenced(tiny_program(layers=6), 4), 2)
    assert score_units(program, units_of(program, ("block",)), IDS, "mi").lowest() == PruningUnit(2)


def test_scores_repeat_bit_for_bit():
    program = tiny_program(layers=4)
    units = units_of(program, ("block",))
    first, second = (score_units(program, units, IDS, "mi").values for _ in range(2))
    assert first == second


def test_a_score_may_be_against_another_model():
    program = tiny_program(layers=5)
    base = final_hidden(program, IDS)
    shorter = without(program, PruningUnit(1))
    units = units_of(shorter, ("block",))
    found = score_units(shorter, units, IDS, "mi", reference=base).values
    for unit in units:
        cosine = F.cosine_similarity(stream(program), stream(without(shorter, unit)), dim=-1)
        assert found[unit] == pytest.approx(float((1 - cosine).mean()), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["original", "current"])
def test_the_order_of_removal_is_that_of_brute_force(reference, monkeypatch):
    from graphopt.passes.prune_blocks import chooser

    program = tiny_program(layers=8)
    monkeypatch.setattr(chooser, "calibration_windows", lambda *_: torch.cat([IDS, IDS[:2]]))
    options = {"blocks": 4, "score": "mi", "look_back": False, "reference": reference}
    options |= {"windows": 3, "seqlen": 20}
    result = make_pass("prune-blocks", options).run(program.copy(), Context())
    left, order, current = list(range(8)), [], program
    for _ in range(4):
        target = stream(program if reference == "original" else current)
        scores = []
        for place in range(len(left)):
            cosine = F.cosine_similarity(
                target, stream(without(current, PruningUnit(place))), dim=-1
            )
            scores.append(float((1 - cosine).mean()))
        place = scores.index(min(scores))
        order.append(str(left.pop(place)))
        current = without(current, PruningUnit(place))
    assert result.record.order == order
    assert str(result.program) == str(current)
