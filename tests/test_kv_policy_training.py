"""Training of the learned KV policy: what it learns from, what it tells, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import safetensors.torch
import torch
from command_line import runner as command_runner
from programs import tiny_program

from graphopt.cli.commands import app
from graphopt.errors import SourceError, UsageError
from graphopt.execute.interpreter import Runner
from graphopt.ir.kv_policies import (
    Ema,
    KVHeads,
    LastRow,
    PageBudget,
    Predictor,
    SinkLocal,
)
from graphopt.ir.kv_policies.attention_cnn import new_weights, predict
from graphopt.ir.kv_policies.checkpoint import PredictorCheckpoint, read_checkpoint
from graphopt.training import kv_policy, kv_samples
from graphopt.training.kv_policy import budgets, train_on_traces
from graphopt.training.kv_policy_file import file_predictor
from graphopt.training.kv_replay import pages_read, recall
from graphopt.training.kv_traces import PageTraces, record_traces

PAGE, FIRST, STEPS = 4, 60, 60


def traces(texts=3, seed=0, *, layers=2, groups=2, hot=6, drift=0):
    """Attention that comes back to the same few pages, or moves on by a page now and then."""
    draw = torch.Generator().manual_seed(seed)
    pages = (FIRST + STEPS) // PAGE
    mass = torch.rand(layers, texts, groups, STEPS, pages, generator=draw) * 0.1
    strong = torch.rand(layers, texts, groups, 1, pages, generator=draw)
    strong = (strong >= strong.sort(-1, descending=True).values[..., hot - 1 : hot]).float()
    for step in range(STEPS):
        mass[:, :, :, step] += strong[:, :, :, 0].roll(step // 8 * drift, -1)
    present = (torch.arange(FIRST, FIRST + STEPS) // PAGE)[:, None] >= torch.arange(pages)
    mass = mass * present
    mass = mass / mass.sum(-1, keepdim=True)
    return PageTraces(FIRST, PAGE, 2, mass.half(), mass.half())


SEVERAL = [PageBudget(PAGE, pages, 1, 1) for pages in (8, 6, 5)]
POLICY = Predictor(SEVERAL[0], history=8)


def train(of, most_steps, seed=0):
    return train_on_traces(
        of, POLICY, SEVERAL, held_out=1, seed=seed, seconds=1e6, most_steps=most_steps
    )


def test_training_starts_as_the_moving_average():
    weights = kv_policy.starting_weights(POLICY, seed=0)
    x = torch.rand(3, 2, 8, 9, generator=torch.Generator().manual_seed(0))
    inside = torch.ones(3, 9, dtype=torch.bool)
    # Sums of eight numbers below 1 in fp32.
    assert (predict(x, inside, weights) - x[:, 0, -1]).abs().max() < 8 * 2**-23
    of, own = traces(texts=2), dataclasses.replace(POLICY, budget=SEVERAL[2])
    # After 40 dense steps both have forgotten their prompts, which are of different lengths.
    ema, read = (
        pages_read(policy, of, 40) for policy in (Ema(own.budget, 5), own.with_weights(weights))
    )
    assert torch.equal(ema, read)


def test_a_soft_choice_takes_as_many_pages_as_there_are_to_take(monkeypatch):
    """And the gradient of its mass is that of the sum, by differences, in fp64."""
    monkeypatch.setattr(kv_samples, "BISECTIONS", 60)
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 30, generator=draw, dtype=torch.float64, requires_grad=True)
    inside = torch.rand(4, 30, generator=draw) < 0.8
    count = torch.tensor([[1], [3], [7], [12]])
    equal = torch.zeros(4, 30, dtype=torch.float64)
    for one in (scores.detach() * 5, scores.detach(), equal):
        chosen = kv_samples.softly_chosen(one, inside, count)
        assert (chosen.sum(-1, keepdim=True) - count).abs().max() < 1e-6
        assert (chosen[~inside] == 0).all()
    mass = torch.rand(4, 30, generator=draw, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: (kv_samples.softly_chosen(x, inside, count) * mass).sum(-1), scores
    )


@pytest.mark.slow
def test_training_raises_the_recall_and_is_the_same_for_the_same_seed(monkeypatch):
    """From weights that are noise alone."""
    monkeypatch.setattr(kv_policy, "starting_weights", lambda _, seed: new_weights(2, seed))
    monkeypatch.setattr(kv_policy, "RATE", 3e-3)
    of = traces(layers=1, groups=1)
    trained, again = train(of, 60), train(of, 60)
    assert trained.checks[-1][1] > trained.checks[0][1] + 0.1
    assert trained.checks == again.checks and trained.recalls == again.recalls
    assert all(torch.equal(trained.weights[n], again.weights[n]) for n in trained.weights)
    other = train(of, 1, seed=1)
    assert not torch.equal(other.weights["conv1.weight"], trained.weights["conv1.weight"])
    means = {kind: sum(by.values()) for kind, by in trained.recalls.items()}
    assert trained.gain == pytest.approx((means["predictor"] - means["ema"]) / 3)


@pytest.mark.slow
def test_a_training_that_gains_nothing_says_so():
    result = train(traces(layers=1, groups=1), 1)
    assert abs(result.gain) < kv_policy.LEAST_GAIN
    assert "DOES NOT BEAT EMA" in result.shortcoming
    assert result.stopped == "all 1 steps were made"
    better = {"ema": {16: 0.5}, "predictor": {16: 0.6}}
    assert dataclasses.replace(result, recalls=better).shortcoming is None


def test_traces_are_the_attention_of_the_model():
    """Recorded through the walk, beside softmax of the queries and keys of every layer."""
    program = tiny_program(window=None)
    ids = torch.randint(5, 90, (2, 26), generator=torch.Generator().manual_seed(3))
    runner = Runner(program, torch.float64)
    recorded = record_traces(runner, ids, PAGE, 7)
    _, texts, _, steps, pages = recorded.mass_LBGSN.shape
    assert (texts, steps, pages, recorded.first) == (2, 7, 7, 19)
    # Masses are kept as fp16, whose unit roundoff is 2^-11, and sum up over 7 pages.
    assert (recorded.mass_LBGSN.float().sum(-1) - 1).abs().max() < 7 * 2**-11
    assert (recorded.probs_LBGSN <= recorded.mass_LBGSN * recorded.group * (1 + 2**-9)).all()
    last = recorded.lengths(6, 2).last_B
    assert last.tolist() == [25, 25]
    future = torch.arange(pages) > (torch.arange(19, 26) // PAGE)[:, None]
    assert (recorded.mass_LBGSN * future == 0).all()


def test_a_replay_is_the_policy_run_step_by_step():
    of, budget = traces(texts=2, layers=3), SEVERAL[1]
    policy = LastRow(budget, calibrate_every=4)
    read = pages_read(policy, of, 8)
    assert bool((read[:, :, :, :8].sum(-1) == torch.arange(60, 68) // 4 + 1).all())
    known = of.probs_LBGSN[1, 0, 0, 7].float()
    for step in range(8, STEPS):
        row, last = of.probs_LBGSN[1, 0, 0, step].float(), (FIRST + step) // PAGE
        if (step + 1 + 1) % 4 == 0:
            expected = set(range(last + 1))
        else:
            others = sorted(range(1, last), key=lambda n: (-float(known[n]), n))
            expected = {0, last, *others[: budget.selectable]}
        assert set(read[1, 0, 0, step].nonzero().flatten().tolist()) == expected
        for page in expected:
            known[page] = row[page]
    mass = of.mass_LBGSN.float()
    share = (mass * read).sum(-1) / mass.sum(-1)
    counted = [
        float(share[layer, :, :, step].mean())
        for layer in range(3)
        for step in range(8, STEPS)
        if (step + 1 + layer) % 4
    ]
    assert recall(read, of, 8, 4) == pytest.approx(sum(counted) / len(counted), abs=1e-6)
    assert recall(pages_read(SinkLocal(budget), of, 8), of, 8, None) < recall(
        pages_read(Ema(budget, 4), of, 8), of, 8, None
    )


def test_budgets_of_texts_that_are_too_short_are_refused():
    assert [b.tokens for b in budgets(4096, 16)] == [1024, 512, 256]
    with pytest.raises(UsageError, match=r"--seqlen 768 or more"):
        budgets(256, 16)


def checkpoint(**values):
    numbers = {"page": 16, "group": 3, "history": 64, "channels": 2} | values
    return PredictorCheckpoint(new_weights(numbers["channels"], 0), **numbers, about={"a": 1})


@pytest.mark.parametrize("channels", (1, 2))
def test_a_checkpoint_survives_its_file(tmp_path, channels):
    written = checkpoint(channels=channels)
    written.write(tmp_path / "p.safetensors")
    again = read_checkpoint(str(tmp_path / "p.safetensors"))
    assert (again.page, again.group, again.about) == (16, 3, {"a": 1})
    assert all(torch.equal(again.weights[name], x) for name, x in written.weights.items())
    assert (tmp_path / "p.safetensors").stat().st_size < 30_000


@pytest.mark.parametrize(
    ("policy", "heads", "words"),
    [
        ({"page": 32}, (3, 9), "trained for pages of 16 tokens, and here there are pages of 32"),
        ({}, (2, 8), "trained for 3 query heads a KV head, and here there are 4"),
        ({"history": 32}, (3, 9), "trained for 64 rows of history"),
        ({"channels": 1}, (3, 9), "trained for 2 channels, and here there are 1"),
    ],
)
def test_a_checkpoint_for_another_page_or_head_layout_is_refused(policy, heads, words):
    values = dict(policy)
    budget = PageBudget(values.pop("page", 16), 8, 1, 1)
    with pytest.raises(UsageError, match=words):
        checkpoint().policy(Predictor(budget, **values), KVHeads(*heads, 64, 64), "p")
    fitting = checkpoint().policy(Predictor(PageBudget(16, 8, 1, 1)), KVHeads(3, 9, 64, 64), "p")
    assert fitting.weights is not None


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    with pytest.raises(SourceError, match="There is no KV policy checkpoint"):
        read_checkpoint(str(path))
    weights = new_weights(2, 0)
    metadata = checkpoint().metadata
    bad = [
        b"not safetensors",
        bytes(2**21),
        safetensors.torch.save(weights),
        safetensors.torch.save(weights, metadata | {"format": "x"}),
        safetensors.torch.save(weights, metadata | {"predictor": '{"page": "16"}'}),
        safetensors.torch.save(weights, metadata | {"predictor": "[" * 5000}),
        safetensors.torch.save(new_weights(1, 0), metadata),
        safetensors.torch.save(weights | {"conv3.bias": torch.tensor([float("nan")])}, metadata),
    ]
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(SourceError, match="is no KV policy checkpoint"):
            read_checkpoint(str(path))


def test_what_has_nothing_to_train_for_is_refused(tmp_path):
    options = {"page": 4, "seqlen": 64, "windows": 2, "seconds": 1.0, "steps": 1, "seed": 0}
    with pytest.raises(UsageError, match="No attention of tiny can follow a KV policy"):
        file_predictor(tiny_program(alibi=True), "text", tmp_path / "p", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_trains_and_writes(tmp_path):
    from tiny_models import save_tiny

    model = save_tiny(tmp_path / "tiny", max_position_embeddings=256)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 60)
    out = tmp_path / "p.safetensors"
    arguments = ["train-kv-policy", str(model), "--calib", str(text), "--out", str(out)]
    small = ["--page", "1", "--seqlen", "128", "--windows", "2", "--steps", "1", "--json"]
    done = command_runner().invoke(app, [*arguments, *small])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["windows"] == 2 and set(told["recall"]["predictor"]) == {"1/4", "1/8", "1/16"}
    written = read_checkpoint(str(out))
    assert written.page == 1 and written.about["recall"] == told["recall"]
    refused = command_runner().invoke(app, [*arguments, "--seqlen", "4000"])
    assert refused.exit_code == 1 and "tokens" in refused.output
    nowhere = [*arguments[:-1], str(tmp_path / "no" / "p")]
    refused = command_runner().invoke(app, nowhere)
    assert refused.exit_code == 2 and "which is no folder" in refused.output
