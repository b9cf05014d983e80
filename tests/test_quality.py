from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_models import byte_tokenizer, save_tiny, tiny_model
from transformers import AutoModelForCausalLM

from graphopt.capture import capture
from graphopt.errors import SourceError
from graphopt.evaluate.perplexity import perplexity
from graphopt.execute.language_model import ProgramModel, load_tokenizer
from graphopt.inspection import diff_models
from graphopt.ir.weights import Array, Weight
from graphopt.pass_manager.contract import Pass, PassResult
from graphopt.pass_manager.pipeline import Pipeline
from graphopt.pass_manager.quality import (
    BUILT_IN,
    CONTINUED,
    built_in_text,
    counted_perplexity,
    greedy,
    measure_quality,
    relative_error,
    token_losses,
)
from graphopt.pass_manager.run_options import RunOptions
from graphopt.report.quality import LOST, SLIGHT, UNCHANGED, MeasuredText, Quality, judge
from graphopt.report.records import ArtifactEntry, FormSize, PassEntry, Report

CPU = torch.device("cpu")
TEXT = MeasuredText("a.txt", "ab" * 32, 2048, 512, [1], 7, "The")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def shrunk(program, factor):
    """Return a copy whose final norm is multiplied, which makes every distribution flatter."""
    copy = program.copy()
    weight = next(w for w in copy.weights if w.name.endswith("model.norm.weight"))
    copy.weights.replace(Weight(weight.name, Array(weight.load(torch.float32) * factor)))
    return copy


def test_losses_are_those_of_transformers(tiny):
    program = capture(str(tiny))
    windows = torch.randint(0, 250, (3, 20), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(windows).logits.double()
    expected = torch.nn.functional.cross_entropy(
        logits[:, 1:-1].flatten(0, 1), windows[:, 2:].flatten(), reduction="none"
    )
    losses = token_losses(program, windows, 2, CPU)
    # Sums of 32 products in fp32, whose logits are below 10: 1e-5 of them at most.
    assert torch.allclose(losses.flatten(), expected, atol=1e-4)


@pytest.mark.slow
def test_figures_are_those_of_eval(tiny):
    """The windows are those that `eval` takes from the beginning of a text."""
    program = capture(str(tiny))
    told = set()
    quality = measure_quality(
        program, shrunk(program, 0.5), progress=lambda what, done, total: told.add(what)
    )
    assert {"measuring the source", "measuring the result"} <= told
    model = ProgramModel(program)
    measured = perplexity(model, load_tokenizer(model), built_in_text(), windows=16, seqlen=128)
    assert (quality.text.tokens, quality.text.window) == (measured.tokens, 128) == (2048, 128)
    assert quality.perplexity_before == pytest.approx(measured.perplexity, rel=1e-6)
    assert quality.text.name == BUILT_IN and quality.text.first_text == "T"
    assert quality.text.sha256 == hashlib.sha256(built_in_text().encode()).hexdigest()
    same = measure_quality(program, program)
    assert same.times == 1 and same.relative_error == 0


@pytest.mark.slow
def test_figures_of_prompts_are_not_taken_for_those_of_steps_with_a_policy(tiny):
    policy = "kind=sink-local,budget=32,page=8,sink=8,local=16,verdict=ignore"
    program = capture(str(tiny))
    pipeline = Pipeline.parse(f"insert-kv-cache,attach-kv-policy{{{policy}}}")
    attached, _ = pipeline.run(program, RunOptions(verify=False))
    quality = measure_quality(program, attached)
    assert "Not measured here: steps of one token" in quality.unmeasured
    assert "--kv-policy 'sink-local{budget=32,page=8}'" in quality.unmeasured
    known = dataclasses.replace(quality, perplexity_before=9.0, perplexity_after=9.0, counted=99.0)
    said = judge(known).sentence
    assert said.startswith("Unchanged for prompts: ") and said.endswith(quality.unmeasured)
    assert not measure_quality(program, program).unmeasured


@pytest.mark.slow
def test_a_beginning_is_run_and_not_predicted(tiny, tmp_path):
    folder = save_tiny(tmp_path / "begun")
    byte_tokenizer(begin=["<end>"]).save_pretrained(folder)
    program = capture(str(folder))
    quality = measure_quality(program, program)
    assert len(quality.text.begin) == 1
    assert not quality.text.same_as(measure_quality(capture(str(tiny)), program).text)


def test_counts_and_errors_by_hand():
    # Any of 10; 5 again, 1 of 1 + 1; one of the 9 others, 1/(2 + 1); one of 8, 2/(3 + 2).
    odds = 1 / 10 * 1 / 2 * (1 / 3 / 9) * (2 / 5 / 8)
    assert counted_perplexity(torch.tensor([[5, 5], [6, 7]]), 10) == pytest.approx(odds**-0.25)
    assert relative_error(torch.zeros(1, 32 * 7).double()) is None
    alternating = torch.tensor([0.0, 1.0]).double().repeat_interleave(32).repeat(4)[None]
    # Means of eight groups are 0 and 1 in turns: variance 2/7.
    assert relative_error(alternating) == pytest.approx(math.sqrt(2 / 7 / 8))


def test_samples_are_greedy(tiny):
    program = capture(str(tiny))
    prompts = torch.randint(0, 250, (2, 6), generator=torch.Generator().manual_seed(1))
    model = tiny_model()
    expected = prompts
    with torch.no_grad():
        for _ in range(CONTINUED):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy(program, prompts, CPU), expected[:, 6:])
    quality = measure_quality(program, program)
    assert len(quality.samples) == 2 and quality.not_sampled == ""
    assert all(sample.before == sample.after for sample in quality.samples)
    assert all(built_in_text().count(sample.prompt) >= 1 for sample in quality.samples)


def quality_of(before, after, counted=400.0, **values):
    return Quality(TEXT, before, after, counted, **values)


@pytest.mark.parametrize(
    ("after", "grade"),
    [
        (19.0, "better"),
        (20.0, "unchanged"),
        (20 * UNCHANGED - 1e-6, "unchanged"),
        (20 * UNCHANGED + 1e-6, "slightly worse"),
        (20 * SLIGHT + 1e-6, "clearly worse"),
        # Half of what is known, in nats: the geometric mean of 20 and 400.
        (20 * (400 / 20) ** LOST - 1e-6, "clearly worse"),
        (20 * (400 / 20) ** LOST + 1e-6, "destroyed"),
        (None, "destroyed"),
    ],
)
def test_grades(after, grade):
    quality = quality_of(20.0, after, advice=["take fewer blocks", "add fuse-blocks"])
    assert quality.grade == grade == judge(quality).grade
    sentence = judge(quality).sentence
    assert sentence.startswith(f"{grade.capitalize()}: perplexity")
    named = "ake fewer blocks, or add fuse-blocks" in sentence
    assert named == (grade in ("slightly worse", "clearly worse", "destroyed"))
    json.dumps(quality.to_json(), allow_nan=False)


def test_the_verdict_says_by_how_much_and_how_surely():
    sentence = judge(
        quality_of(20.0, 62.0, relative_error=0.02, advice=["take fewer blocks"])
    ).sentence
    assert sentence == (
        "Clearly worse: perplexity is 3.1 times the source's (±4%), 20.00 → 62.00. "
        "Take fewer blocks."
    )


def test_a_source_that_does_not_know_the_text_gets_no_grade():
    for before in (500.0, None):
        verdict = judge(quality_of(before, 20.0))
        assert verdict.grade == "not measured" and "--text" in verdict.sentence


@pytest.mark.parametrize(
    "changed", ["sha256", "tokens", "window", "begin", "first_token", "first_text"]
)
def test_texts_are_equal_in_all_but_their_names(changed):
    other = dataclasses.replace(TEXT, name="b.txt")
    assert TEXT.same_as(other)
    value = getattr(other, changed)
    unequal = [2] if changed == "begin" else value + type(value)(1)
    assert not TEXT.same_as(dataclasses.replace(other, **{changed: unequal}))


@dataclass
class Flatten(Pass):
    """A lossy pass: multiplies the last norm."""

    name: ClassVar[str] = "flatten"
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True

    def milder(self, recipe):
        return f"flatten less, after {recipe[0]}"

    def run(self, program, context):
        return PassResult(shrunk(program, 0.25), 1, 1)


@pytest.mark.slow
def test_a_pipeline_measures_where_a_lossy_pass_changed_something(tiny, tmp_path):
    program = capture(str(tiny))
    result, report = Pipeline(["canonicalise", Flatten()]).run(program)
    losses = [token_losses(p, torch.arange(40)[None], 1, CPU).mean() for p in (program, result)]
    assert losses[0] != losses[1]
    assert report.quality.advice == ["flatten less, after canonicalise"]
    assert report.quality.times != 1 and report.stages["quality"] > 0
    assert report.to_json()["verdict"]["grade"] == report.quality.grade
    exact = Pipeline(["canonicalise"]).run(program)[1]
    assert exact.quality is None and "quality" not in exact.stages
    assert exact.verdict().grade == "unchanged"
    off = Pipeline([Flatten()]).run(program, RunOptions(verify=False))[1]
    assert off.quality is None and "--no-verify" in off.verdict().sentence
    text = tmp_path / "own.txt"
    text.write_text("One two three four five six seven. " * 40)
    given = Pipeline(["canonicalise"]).run(program, RunOptions(text=text))[1]
    assert given.quality.times == pytest.approx(1, abs=1e-6)
    assert given.quality.text.name == str(text)
    bare = program.copy()
    bare.tokenizer = None
    assert "no tokenizer" in Pipeline([Flatten()]).run(bare)[1].verdict().sentence
    with pytest.raises(SourceError, match="no tokenizer"):
        Pipeline([Flatten()]).run(bare, RunOptions(text=text))


def test_verdicts_without_a_measurement():
    def verdict(**values):
        entry = PassEntry("x", {}, True, changed=1, **values)
        return Report(source="", name="", recipe="", passes=[entry]).verdict()

    proved = verdict(verification="proved")
    assert proved.grade == "unchanged" and "proved" in proved.sentence
    passed = verdict(verification="passed", max_abs_logit_delta=1e-5, tolerance=3e-3)
    assert passed.grade == "unchanged"
    assert "1e-05" in passed.sentence and "0.003" in passed.sentence
    off = verdict(verification="off")
    assert off.grade == "not measured" and off.sentence.endswith("before and after x.")
    assert Report(source="", name="", recipe="", dry_run=True).verdict() is None


def write_report(folder, quality):
    report = Report(source="s", name="s", recipe="", machine={"system": "", "processor": "",
                    "cores": 1}, quality=quality)  # fmt: skip
    report.write(folder)


@pytest.mark.parametrize(
    ("texts", "befores", "compared", "reason"),
    [
        ((TEXT, TEXT), (20.0, 20.0), {"perplexity_after", "times"}, None),
        ((TEXT, TEXT), (20.0, 21.0), {"perplexity_after"}, "their sources differ"),
        ((TEXT, dataclasses.replace(TEXT, tokens=512)), (20.0, 20.0), set(), "different texts"),
        ((TEXT, None), (20.0, 20.0), set(), "none was measured of b"),
    ],
)
def test_diff_compares_figures_of_one_text_alone(
    tiny, tmp_path, monkeypatch, texts, befores, compared, reason
):
    program = capture(str(tiny))
    monkeypatch.setattr("graphopt.capture.capture", lambda *args, **options: program)
    folders = [tmp_path / name for name in "ab"]
    for folder, text, before in zip(folders, texts, befores, strict=True):
        folder.mkdir()
        quality = None if text is None else Quality(text, before, 30.0, 400.0)
        write_report(folder, quality)
    found = diff_models(*map(str, folders))["report"]
    assert {"perplexity_after", "times"} & set(found) == compared
    refused = found["not_compared"]
    assert set(refused) == {"perplexity_after", "times"} - compared
    assert all(reason in said for said in refused.values())


def test_a_report_from_before_quality_was_measured_is_compared_without_it(
    tmp_path, tiny, monkeypatch
):
    program = capture(str(tiny))
    monkeypatch.setattr("graphopt.capture.capture", lambda *args, **options: program)
    write_report(tmp_path, Quality(TEXT, 20.0, 30.0, 400.0))
    path = tmp_path / "report.json"
    data = json.loads(path.read_text())
    del data["quality"]
    path.write_text(json.dumps(data))
    found = diff_models(str(tmp_path), str(tmp_path))["report"]
    assert "a and b" in found["not_compared"]["times"]


def test_eval_writes_its_figures_into_a_report(tiny, tmp_path):
    from command_line import runner

    from graphopt.cli.commands import app

    write_report(tmp_path, Quality(TEXT, 20.0, 30.0, 400.0))
    text = tmp_path / "text.txt"
    text.write_text(built_in_text())
    command = ["eval", str(tiny), "--text", str(text), "--seqlen", "64", "--windows", "2"]
    done = runner().invoke(app, [*command, "--report", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.stderr
    (kept,) = json.loads((tmp_path / "report.json").read_text())["evaluations"]
    assert kept["perplexity"] == json.loads(done.stdout)["perplexity"] and kept["tokens"] == 128
    assert kept["tokens_per_second"] > 0 and kept["form"] == "program"
    assert f"{kept['perplexity']:.3f} (128 tokens of" in (tmp_path / "report.html").read_text()
    done = runner().invoke(app, [*command, "--report", str(tmp_path / "nowhere")])
    assert done.exit_code == 1 and "nowhere" in done.stderr


@pytest.mark.parametrize(("stored", "rounds"), [("f32", False), ("bf16", True)])
def test_rounding_by_a_form_is_said(stored, rounds):
    forms = [FormSize("onnx", 8, "f32"), FormSize("torch", 4, stored)]
    artifact = ArtifactEntry("out", 12, ["onnx", "torch"], [], forms=forms)
    report = Report(source="", name="", recipe="", dtype="f32", artifact=artifact)
    assert ("Weights are rounded to bf16 in torch" in report.verdict().sentence) == rounds
    assert report.verdict().grade == "unchanged"
    forms[0].dtype = stored
    assert ("rounded to bf16 in onnx and torch, which" in report.verdict().sentence) == rounds
