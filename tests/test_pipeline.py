from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from programs import tiny_program

from graphopt.errors import PassError, SourceError, UsageError, VerifyError
from graphopt.execute.interpreter import Runner
from graphopt.ir import Array, Missing, Producer, Weight
from graphopt.pass_manager.contract import (
    Context,
    Pass,
    PassResult,
    Skip,
    make_pass,
    register_pass,
)
from graphopt.pass_manager.pipeline import DEFAULT_RECIPE, Pipeline
from graphopt.pass_manager.run_options import RunOptions
from graphopt.pass_manager.verification import compare, make_probe, measure
from graphopt.training.kept_files import kept_file
from graphopt.training.options import TrainingOptions


class _Test(Pass):
    """Base of the passes below."""

    ran: ClassVar[list[str]] = []

    def run(self, program, context: Context) -> PassResult:
        _Test.ran.append(self.name)
        return self.change(program, context)

    def change(self, program, context):
        return PassResult(program)


def scale_weight(program, name, factor):
    weight = program.weights[name]
    program.weights.replace(Weight(name, Array(weight.load() * factor), weight.checkpoint))


@register_pass
@dataclass
class Shrink(_Test):
    """Lossy: makes a projection smaller."""

    by: float = 0.5

    name: ClassVar[str] = "test-shrink"
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True

    def change(self, program, context):
        scale_weight(program, "layers.0.mlp.down_proj.weight", self.by)
        return PassResult(program, 2, 1, [Skip("layers.1", "it is the last")])


@register_pass
@dataclass
class Wrong(_Test):
    """Claims to be exact and is not."""

    by: float = 1.5

    name: ClassVar[str] = "test-wrong"
    reads_weights: ClassVar[bool] = True

    def change(self, program, context):
        scale_weight(program, "layers.0.mlp.down_proj.weight", self.by)
        return PassResult(program, 1, 1)


@register_pass
@dataclass
class Malformed(_Test):
    """Leaves a call with a slot too many."""

    name: ClassVar[str] = "test-malformed"
    reads_weights: ClassVar[bool] = True

    def change(self, program, context):
        program.calls[0].weights["more"] = "embed.weight"
        return PassResult(program, 1, 1)


@register_pass
@dataclass
class Picky(_Test):
    """Wants another pass before it and no cache, and refuses wide models."""

    name: ClassVar[str] = "test-picky"
    requires: ClassVar[tuple[str, ...]] = ("test-shrink", "!kv-cache")

    def check(self, program):
        if program.weights["embed.weight"].shape[1] > 64:
            raise PassError("too wide.")


@register_pass
@dataclass
class Crash(_Test):
    """Raises while `armed`."""

    name: ClassVar[str] = "test-crash"
    reads_weights: ClassVar[bool] = True
    armed: ClassVar[bool] = True

    def change(self, program, context):
        if Crash.armed:
            raise KeyboardInterrupt
        return PassResult(program)


@dataclass(frozen=True)
class Unreadable(Producer):
    """A weight that must not be read."""

    shape: tuple[int, ...]  # type: ignore[misc]
    dtype: torch.dtype = torch.float32  # type: ignore[misc]

    def load(self):
        raise AssertionError("a weight was read")


def unreadable_program():
    program = tiny_program()
    for weight in list(program.weights):
        if not weight.constant:
            program.weights.replace(Weight(weight.name, Unreadable(weight.shape)))
    return program


@pytest.fixture(autouse=True)
def _fresh():
    _Test.ran.clear()
    Crash.armed = True


def test_the_default_recipe_is_exact_and_says_so():
    program = tiny_program(softcap=2.0, window=3)
    text = str(program)
    seen = []
    result, report = Pipeline.default().run(program, on_pass=lambda e: seen.append(e.name))
    assert str(program) == text  # the program given is left as it is
    assert seen == DEFAULT_RECIPE.split(",") == [entry.name for entry in report.passes]
    assert len(result.states) == 2
    by_name = {entry.name: entry for entry in report.passes}
    assert by_name["dead-code-elimination"].verification == "unchanged"
    assert by_name["dead-code-elimination"].max_abs_logit_delta is None
    inserted = by_name["insert-kv-cache"]
    assert inserted.verification == "passed" and (inserted.matched, inserted.changed) == (2, 2)
    # Two steps with a cache against one without: fp32 rounding, and the stated tolerance.
    assert 0 < inserted.max_abs_logit_delta < 1e-5 < inserted.tolerance
    assert inserted.kl < 1e-9
    assert inserted.perplexity_before is inserted.perplexity_after is None  # random tokens
    assert report.probe == {
        "tokens": 111,
        "is_text": False,
        "note": "random tokens: the model has no tokenizer",
    }
    assert all(entry.peak_bytes > 10**7 and entry.seconds >= 0 for entry in report.passes)
    assert report.recipe == DEFAULT_RECIPE and report.peak_bytes >= inserted.peak_bytes
    json.dumps(report.to_json(), allow_nan=False)


def test_an_exact_pass_that_is_not_is_refused_with_the_figure():
    program = tiny_program()
    with pytest.raises(VerifyError) as caught:
        Pipeline(["canonicalise", Wrong()]).run(program)
    probe = make_probe(program, "", None)
    changed = Wrong().run(program.copy(), Context()).program
    difference = compare(*measure([program, changed], probe))
    assert f"by {difference.max_abs_logit_delta:.3g}" in str(caught.value)
    assert "'test-wrong'" in str(caught.value) and "--no-verify" in caught.value.remedy
    _, report = Pipeline([Wrong()]).run(program, RunOptions(verify=False))
    assert report.passes[0].verification == "off"
    assert report.passes[0].max_abs_logit_delta is None


def test_verification_sees_the_error_of_any_feature():
    # Two percent of one of 19 weights is far outside the tolerance, a millionth far inside.
    with pytest.raises(VerifyError):
        Pipeline([Wrong(by=1.02)]).run(tiny_program())
    Pipeline([Wrong(by=1.0 + 1e-6)]).run(tiny_program())


def test_roundings_of_fp32_do_not_refuse_a_pass_behind_rounded_activations():
    """A key that lies between two codes becomes either: in fp64 both sides take the same."""
    for seed in (0, 5):
        rounding = make_pass("quantize", {"w": 16, "a": 8, "kv": 4, "method": "rtn"})
        program = rounding.run(tiny_program(seed=seed), Context()).program
        _, report = Pipeline.parse("insert-kv-cache,shard{tp=2,device=cpu}").run(program)
        assert [entry.verification for entry in report.passes] == ["passed", "passed"]
        with pytest.raises(VerifyError, match="moved the logits"):
            Pipeline([Wrong()]).run(program)


def test_work_that_was_begun_is_told_to_be_over():
    """A display would name it through all that comes behind it."""
    begun = {}
    Pipeline([Shrink(), "insert-kv-cache"]).run(
        tiny_program(), progress=lambda what, done, total: begun.update({what: (done, total)})
    )
    assert "comparing insert-kv-cache" in begun
    assert [what for what, (done, total) in begun.items() if done < total] == []


def test_a_lossy_pass_is_measured_and_what_follows_is_held_to_it():
    program = tiny_program()
    result, report = Pipeline([Shrink(), "insert-kv-cache"]).run(program)
    shrink, insert = report.passes
    assert shrink.verification == "measured" and shrink.tolerance is None
    assert shrink.kl > 1e-4 and shrink.max_abs_logit_delta > 1e-2
    assert [(s.where, s.reason) for s in shrink.skipped] == [("layers.1", "it is the last")]
    assert insert.verification == "passed"
    ids = {"input_ids": torch.arange(12)[None]}
    assert not Runner(result).logits(ids).allclose(Runner(program).logits(ids), atol=1e-2)


def test_not_finite_logits_are_refused():
    shrink = Shrink()
    shrink.by = float("nan")  # which no option may be given as
    with pytest.raises(SourceError, match="NaN"):
        Pipeline([shrink]).run(tiny_program())
    program = tiny_program()
    scale_weight(program, "layers.1.mlp.up_proj.weight", float("inf"))
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        Pipeline.default().run(program)


def test_a_malformed_program_is_refused_even_without_verification():
    with pytest.raises(VerifyError, match="'test-malformed' made a malformed program"):
        Pipeline([Malformed()]).run(tiny_program(), RunOptions(verify=False))


def test_order_and_structure_are_checked_before_any_weight_is_read():
    program = unreadable_program()
    with pytest.raises(PassError, match="'test-picky' must come after 'test-shrink'"):
        Pipeline(["canonicalise", Picky()]).run(program)
    with pytest.raises(PassError, match="too wide"):
        Pipeline(["canonicalise", WidePicky()]).run(tiny_program(hidden=72))
    with pytest.raises(PassError, match="needs a program without kv-cache"):
        Pipeline(["insert-kv-cache", NoCache()]).run(program)
    with pytest.raises(PassError, match="needs a program with kv-cache"):
        Pipeline([NeedsCache(), "insert-kv-cache"]).run(program)
    Pipeline(["insert-kv-cache", NeedsCache()]).check(program)
    assert _Test.ran.count("test-shrink") == 0


@register_pass
@dataclass
class WidePicky(Picky):
    """Like its base, without prerequisites."""

    name: ClassVar[str] = "test-wide-picky"
    requires: ClassVar[tuple[str, ...]] = ()


@register_pass
@dataclass
class NoCache(_Test):
    """Wants no cache."""

    name: ClassVar[str] = "test-no-cache"
    requires: ClassVar[tuple[str, ...]] = ("!kv-cache",)


@register_pass
@dataclass
class NeedsCache(_Test):
    """Wants a cache."""

    name: ClassVar[str] = "test-needs-cache"
    requires: ClassVar[tuple[str, ...]] = ("kv-cache",)


def test_a_plan_reads_no_weight():
    planned, entries = Pipeline([*DEFAULT_RECIPE.split(","), Shrink()]).plan(unreadable_program())
    assert len(planned.states) == 2
    assert [entry.changed for entry in entries][-2:] == [2, 0]
    assert {entry.verification for entry in entries} == {"planned"}
    assert _Test.ran == []


def test_stop_after():
    _, report = Pipeline.default().run(tiny_program(), RunOptions(stop_after="fold-constants"))
    assert [e.name for e in report.passes] == DEFAULT_RECIPE.split(",")[:3]
    assert report.recipe == "canonicalise,common-subexpression-elimination,fold-constants"
    with pytest.raises(UsageError, match="Did you mean 'dead-code-elimination'"):
        Pipeline.default().run(tiny_program(), RunOptions(stop_after="dead-cod"))
    with pytest.raises(UsageError, match="The recipe has no pass 'dead-code-elimination'"):
        Pipeline(["canonicalise"]).run(
            tiny_program(), RunOptions(stop_after="dead-code-elimination")
        )


def test_dumps(tmp_path):
    result, _ = Pipeline(["canonicalise", "insert-kv-cache"]).run(
        tiny_program(), RunOptions(dump_ir=tmp_path / "ir")
    )
    names = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert names == ["00-capture.txt", "01-canonicalise.txt", "02-insert-kv-cache.txt"]
    assert (tmp_path / "ir" / names[-1]).read_text() == str(result) + "\n"


def test_an_interrupted_run_goes_on_without_repeating_finished_passes(tmp_path):
    program = tiny_program()
    pipeline = Pipeline([Shrink(by=0.25), "insert-kv-cache", Crash(), "dead-code-elimination"])
    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(program, work=work)
    held = sum(path.stat().st_size for path in work.rglob("model.safetensors"))
    changed = program.weights["layers.0.mlp.down_proj.weight"]
    assert held < changed.numel * 4 + 500  # the changed tensor alone
    assert _Test.ran == ["test-shrink", "test-crash"]
    Crash.armed = False
    resumed, report = pipeline.run(program, RunOptions(resume=True), work=work)
    assert _Test.ran == ["test-shrink", "test-crash", "test-crash"]
    assert [entry.resumed for entry in report.passes] == [True, True, False, False]
    assert report.passes[0].kl > 0 and report.passes[0].skipped[0].where == "layers.1"
    fresh, _ = pipeline.run(program)
    assert str(resumed) == str(fresh)
    for weight in fresh.weights:
        assert weight.load().equal(resumed.weights[weight.name].load())


@pytest.mark.parametrize("other", ["recipe", "weights", "seed", "text"])
def test_a_snapshot_of_another_run_is_not_used(tmp_path, other):
    program, work = tiny_program(), tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        Pipeline([Shrink(), Crash()]).run(program, work=work)
    Crash.armed, options = False, {}
    pipeline = Pipeline([Shrink(by=0.3 if other == "recipe" else 0.5), Crash()])
    if other == "weights":
        scale_weight(program, "norm.weight", 2.0)
    if other == "seed":
        options["seed"] = 1
    if other == "text":
        (tmp_path / "text").write_text("another text")
        options["calib"] = tmp_path / "text"
    _, report = pipeline.run(program, RunOptions(resume=True, **options), work=work)
    assert not any(entry.resumed for entry in report.passes)


@pytest.mark.parametrize("other", [None, "recipe", "weights"])
def test_what_a_training_keeps_is_of_one_source_and_one_recipe_before_it(tmp_path, other):
    """Of programs that look the same, with other weights: `kept_file` is theirs alone."""
    Crash.armed = False
    program, names = tiny_program(), []

    class Trains(Crash):
        def change(self, program, context):
            names.append(kept_file("distilling", TrainingOptions(), program, context))
            return PassResult(program)

    Pipeline([Shrink(), Trains()]).run(program, work=tmp_path)
    if other == "weights":
        scale_weight(program, "norm.weight", 2.0)
    pipeline = Pipeline([Shrink(by=0.3 if other == "recipe" else 0.5), Trains()])
    pipeline.run(program, work=tmp_path)
    assert (names[0] == names[1]) == (other is None)


def test_without_resume_old_snapshots_go(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Pipeline([Shrink(), Crash()]).run(tiny_program(), work=tmp_path)
    Crash.armed = False
    _, report = Pipeline([Shrink(), Crash()]).run(tiny_program(), work=tmp_path)
    assert not report.passes[0].resumed


def test_a_program_without_weights_is_transformed_and_says_why_nothing_was_measured():
    program = tiny_program()
    for weight in list(program.weights):
        if not weight.constant:
            missing = Missing(weight.shape, weight.dtype, weight.name)
            program.weights.replace(Weight(weight.name, missing))
    result, report = Pipeline.default().run(program)
    assert len(result.states) == 2
    assert report.passes[-1].verification == "no weights to verify with"


def test_texts_that_cannot_serve(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(SourceError, match="is empty"):
        Pipeline.default().run(tiny_program(), RunOptions(calib=empty))
    with pytest.raises(SourceError, match="cannot be read"):
        Pipeline.default().run(tiny_program(), RunOptions(calib=tmp_path / "absent.txt"))


def test_perplexity_needs_text(tmp_path):
    from tiny_models import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    program = tiny_program(vocab=300)
    program.tokenizer = str(tmp_path / "tokenizer")
    _, report = Pipeline([Shrink(), "insert-kv-cache"]).run(program)
    shrink, insert = report.passes
    assert report.probe["is_text"]
    # Random weights know nothing: about as many choices as there are tokens.
    assert 100 < shrink.perplexity_before < 900
    assert shrink.perplexity_before != shrink.perplexity_after
    assert insert.perplexity_before == shrink.perplexity_after
    assert insert.perplexity_after == pytest.approx(insert.perplexity_before, rel=1e-5)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(SourceError, match="has 10 tokens, verification needs 111"):
        Pipeline.default().run(program, RunOptions(calib=short))


def test_pipelines_from_text_yaml_and_objects_are_equal(tmp_path):
    text = "canonicalise,test-shrink{by=0.25}"
    path = tmp_path / "recipe.yaml"
    path.write_text(Pipeline.parse(text).to_yaml())
    assert (
        Pipeline.parse(text) == Pipeline.from_yaml(path) == Pipeline(["canonicalise", Shrink(0.25)])
    )
    assert str(Pipeline.from_yaml(path)) == text


def test_a_recipe_without_default_passes_runs_between_them() -> None:
    names = [item.name for item in Pipeline.default().passes]
    given = Pipeline.parse("prune-blocks{blocks=1},fuse-blocks")
    between = [*names[:-1], "prune-blocks", "fuse-blocks", names[-1]]
    assert [item.name for item in given.within_default().passes] == between
    for text in ("", "dead-code-elimination", "prune-blocks{blocks=1},insert-kv-cache"):
        written = Pipeline.parse(text)
        assert str(written.within_default()) == str(written)
