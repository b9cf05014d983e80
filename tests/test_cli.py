from __future__ import annotations

import errno
import importlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from command_line import runner
from programs import tiny_program
from tiny_models import save_tiny

from graphopt import lowering
from graphopt.cli import console
from graphopt.cli.commands import app
from graphopt.cli.compile import CompileFlags
from graphopt.cli.pass_table import print_passes
from graphopt.compiler import CompileOptions
from graphopt.errors import LoweringError
from graphopt.ir.blocks import remove_blocks
from graphopt.lowering.base import Emitted, Emitter
from graphopt.pass_manager.contract import PassResult, get_pass
from graphopt.passes.canonicalise import AppliedRules
from graphopt.passes.fuse_blocks.record import FusedBlocks
from graphopt.passes.prune_blocks.record import PrunedBlocks
from graphopt.report.record import Step
from graphopt.report.records import PassEntry
from graphopt.targets import all_targets
from graphopt.training.record import TrainingRecord

CAPTURE = importlib.import_module("graphopt.capture")


class FakeEmitter(Emitter):
    """Writes a text file; what it does on the way is up to the test."""

    name: ClassVar[str] = "fake"
    meanwhile: ClassVar[object] = None

    def check(self, program, target):
        if not program.states:
            raise LoweringError("fake needs a KV cache.", "Add insert-kv-cache.")

    def emit(self, program, root, target, progress, stored):
        (root / "fake.txt").write_text("half")
        if FakeEmitter.meanwhile is not None:
            FakeEmitter.meanwhile()
        (root / "fake.txt").write_text(str(program))
        return Emitted([root / "fake.txt"], usage=["graphopt generate {out} --prompt 'Hi'"])


@pytest.fixture(autouse=True)
def _fake(monkeypatch, tmp_path):
    monkeypatch.setitem(lowering._EMITTERS, "fake", (__name__, "FakeEmitter"))
    monkeypatch.setattr(FakeEmitter, "meanwhile", None)
    monkeypatch.chdir(tmp_path)
    real = CAPTURE.capture
    made = {"tiny": {}, "windowed": {"window": 3}}

    def capture(source, **options):
        if source not in made:
            return real(source, **options)
        program = tiny_program(**made[source])
        program.source = source
        return program

    monkeypatch.setattr(CAPTURE, "capture", capture)


def graphopt(*args):
    """Run the command line; return (exit code, stdout, stderr)."""
    result = runner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def compile_tiny(*args, out="out"):
    return graphopt("compile", "tiny", "-o", out, "--emit", "fake", *args)


def leftovers():
    return sorted(path.name for path in Path().iterdir())


def test_compile_makes_the_folder_and_says_what_it_did():
    code, out, _ = compile_tiny()
    assert code == 0, out
    for text in (
        "18.6K parameters, 2 attention blocks, f32",
        "target   cpu",
        "recipe   canonicalise,common-subexpression-elimination,fold-constants,"
        "dead-code-elimination,insert-kv-cache",
        "|Δlogit|",
        "verified 1 within tolerance, 4 changed nothing",
        "quality  Unchanged: every pass is exact, and was verified.",
        "artifact out",
        "graphopt generate out --prompt 'Hi'",
    ):
        assert text in out
    written = {p.name for p in Path("out").iterdir()}
    assert {"fake.txt", "manifest.json", "program.json", "program.txt", "recipe.yaml",
            "report.html", "report.json"} <= written  # fmt: skip
    assert leftovers() == ["out"]  # neither a half-made folder nor snapshots
    report = json.loads(Path("out/report.json").read_text())
    assert report["target"] == "cpu" and report["source"] == "tiny"
    assert report["artifact"]["path"] == "out" and report["artifact"]["emit"] == ["fake"]
    assert set(report["stages"]) == {"capture", "passes", "verify", "emit"}
    assert report["total_seconds"] >= sum(report["stages"].values()) - 0.01
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["files"]["fake.txt"] == Path("out/fake.txt").stat().st_size


def test_the_report_has_the_command_without_defaults():
    compile_tiny("--passes", "canonicalise,insert-kv-cache", "--seed", "0", "--no-verify")
    report = json.loads(Path("out/report.json").read_text())
    assert report["command"] == (
        "graphopt compile tiny --out out --emit fake --passes canonicalise,insert-kv-cache "
        "--no-verify"
    )
    assert "canonicalise,insert-kv-cache --no-verify" in Path("out/report.html").read_text()


def test_the_saved_recipe_replays_the_run():
    compile_tiny("--passes", "canonicalise,fold-constants{max_bytes=64},insert-kv-cache")
    assert yaml.safe_load(Path("out/recipe.yaml").read_text())["passes"] == [
        "canonicalise",
        {"fold-constants": {"max_bytes": 64}},
        "insert-kv-cache",
    ]
    code, _, _ = compile_tiny("--recipe", "out/recipe.yaml", out="again")
    assert code == 0
    recipes = [json.loads(Path(f"{o}/report.json").read_text())["recipe"] for o in ("out", "again")]
    assert recipes[0] == recipes[1]


DEFAULT = [
    "canonicalise",
    "common-subexpression-elimination",
    "fold-constants",
    "dead-code-elimination",
    "insert-kv-cache",
]


@pytest.fixture
def _first_block_goes(monkeypatch):
    """Let prune-blocks take out block 0 without a text, and say what it would have measured."""

    def run(self, program, context):
        remove_blocks(program, [0])
        steps = [Step(after="the whole model", value=20.0), Step(after="removing 0", value=41.25)]
        record = PrunedBlocks(
            order=["0"], removed=["layers.0"], scores=[{"0": 0.1, "1": 0.2}], perplexity=steps
        )
        return PassResult(program, 2, 1, record=record)

    monkeypatch.setattr(get_pass("prune-blocks"), "run", run)


@pytest.mark.usefixtures("_first_block_goes")
def test_passes_that_name_no_default_one_run_between_those():
    code, out, _ = compile_tiny("--passes", "prune-blocks{blocks=1}")
    assert code == 0, out  # the emitter refuses a model without a KV cache
    whole = (
        "canonicalise,common-subexpression-elimination,fold-constants,dead-code-elimination,"
        "prune-blocks{blocks=1},"
    )
    assert f"recipe   {whole}insert-kv-cache" in out
    assert "  prune-blocks removed 0; perplexity 20 → 41.25" in out
    assert yaml.safe_load(Path("out/recipe.yaml").read_text())["passes"] == [
        *DEFAULT[:-1], {"prune-blocks": {"blocks": 1}}, DEFAULT[-1],
    ]  # fmt: skip
    report = json.loads(Path("out/report.json").read_text())
    assert report["recipe"] == f"{whole}insert-kv-cache"
    assert report["passes"][4]["details"]["perplexity"] == [
        {"after": "the whole model", "value": 20.0}, {"after": "removing 0", "value": 41.25},
    ]  # fmt: skip
    assert "Removed, in this order: 0." in Path("out/report.html").read_text()


def test_a_program_for_several_devices_says_what_each_holds():
    code, out, _ = compile_tiny("--dry-run", "--passes", "shard{tp=4}", "--emit", "torch")
    assert code == 0 and "insert-kv-cache,shard{tp=4}\n" in out
    assert "  shard 4 ranks, each 21.3 kB of 74.5 kB of weights" in out
    code, _, error = compile_tiny("--dry-run", "--passes", "shard", "--emit", "onnx")
    assert code == 1 and "placed(cuda:0, cuda:1" in error and "leave shard out" in error
    code, _, error = compile_tiny("--dry-run", "--passes", "shard{tp=1}", "--emit", "torch")
    assert code == 2 and "it takes two or more" in error


@pytest.mark.slow
@pytest.mark.usefixtures("_first_block_goes")
def test_recipes_that_name_a_default_pass_run_as_written():
    code, out, _ = compile_tiny(
        "--dry-run", "--passes", "prune-blocks{blocks=1},dead-code-elimination"
    )
    assert code == 0 and "recipe   prune-blocks{blocks=1},dead-code-elimination\n" in out
    code, _, error = compile_tiny("--passes", "prune-blocks{blocks=1},dead-code-elimination")
    assert code == 1 and "fake needs a KV cache" in error
    Path("recipe.yaml").write_text("passes:\n- prune-blocks: {blocks: 1}\n")
    code, out, _ = compile_tiny("--dry-run", "--recipe", "recipe.yaml")
    assert code == 0 and "recipe   prune-blocks{blocks=1}\n" in out
    code, out, error = compile_tiny("--passes", "")
    assert code == 1 and "recipe   (no passes)" in out and "fake needs a KV cache" in error


def test_the_console_says_what_lossy_passes_did_on_the_way(capsys):
    def steps(*values):
        return [Step(after=what, value=value) for what, value in values]

    removals = steps(("the whole model", 22.271), ("removing 4", 30.0), ("removing 2", 1234.5))
    trained = steps(("plain removal", 101.83), ("warm start", 61.14), ("trained", math.inf))
    long = steps(*((f"fusing {i}", 20.0 + i) for i in range(9)))
    records = [
        PrunedBlocks(order=["4", "2"], removed=["x", "y"], perplexity=removals),
        TrainingRecord(perplexity=trained),
        FusedBlocks(order=[1], perplexity=long),
        FusedBlocks(),
        AppliedRules(rules={"swap": 3}),
    ]
    entries = [
        PassEntry(name, {}, False, record=record)
        for name, record in zip("abcde", records, strict=True)
    ]
    print_passes(console.stdout(), entries)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[lines.index("verified none of 5") + 1 :] == [
        "  a removed 4, 2; perplexity 22.27 → 30 → 1234",
        "  b perplexity 101.8 (plain removal) → 61.14 (warm start) → - (trained)",
        "  c removed 1; perplexity 20 (fusing 0) → … → 28 (fusing 8)",
    ]


def test_json_is_all_of_stdout():
    code, out, _ = compile_tiny("--json")
    assert code == 0
    assert json.loads(out) == json.loads(Path("out/report.json").read_text())


def test_a_dry_run_reads_and_writes_nothing():
    code, out, _ = compile_tiny("--dry-run")
    assert code == 0 and leftovers() == []
    assert "nothing was run on weights" in out and "Dry run: no weight was read" in out
    code, out, _ = compile_tiny("--dry-run", "--json")
    data = json.loads(out)
    assert data["dry_run"] and data["artifact"] is None
    assert data["passes"][-1]["changed"] == 2


def test_stop_after_dump_and_no_verify():
    code, _, error = compile_tiny("--stop-after", "dead-code-elimination")
    assert code == 1 and "fake needs a KV cache" in error and leftovers() == []
    code, out, _ = compile_tiny("--dump-ir", "ir", "--no-verify")
    assert code == 0 and "verified 4 changed nothing, 1 not verified" in out
    assert len(list(Path("ir").iterdir())) == 6
    report = json.loads(Path("out/report.json").read_text())
    assert report["passes"][-1]["verification"] == "off" and report["probe"] is None


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["compile"], 2, "Give MODEL, or --config FILE"),
        (["compile", "tiny", "--target", "volt"], 2, "Did you mean 'volta'?"),
        (["compile", "tiny", "--emit", "onxx"], 2, "Did you mean 'onnx'?"),
        (["compile", "tiny", "--emit", ","], 2, "Nothing to emit."),
        (["compile", "tiny", "--emit", "torch", "--onnx-moe"], 2, "is for the ONNX form"),
        (["compile", "tiny", "--emit", "torch", "--gguf-type", "f16"], 2, "is for the GGUF form"),
        (["compile", "tiny", "--passes", "canonicalize"], 2, "Did you mean 'canonicalise'?"),
        (["compile", "tiny", "--passes", "dead-code-elimination{x=1}"], 2, "has no option 'x'"),
        (["compile", "tiny", "--passes", "a", "--recipe", "b"], 2, "Both --passes and --recipe"),
        (["compile", "tiny", "--recipe", "absent.yaml"], 2, "absent.yaml cannot be read"),
        (["compile", "tiny", "--stop-after", "nothing"], 2, "Unknown pass 'nothing'"),
        (["compile", "tiny", "--emit", "fake", "--calib", "absent.txt"], 1, "cannot be read"),
        (["compile", "./absent"], 1, "There is no file or folder"),
        (["compile", "tiny", "--bogus"], 2, "No such option"),
        (["bogus"], 2, "No such command"),
        (["inspect"], 2, "Name one model."),
        (["inspect", "tiny", "--batch", "0"], 2, "Invalid value"),
        (["passes", "dead"], 2, "Did you mean 'dead-code-elimination'?"),
        (["targets", "cpuu"], 2, "Did you mean 'cpu'?"),
        (["eval", "tiny"], 2, "Nothing to evaluate on."),
        (["eval", "tiny", "--text", "absent.txt"], 1, "absent.txt cannot be read"),
        (["generate", "tiny", "--prompt", "x", "--backend", "onn"], 2, "Did you mean 'onnx'?"),
        (["generate", "tiny", "--prompt", "x", "--top-p", "0"], 2, "a top-p above 0"),
        (["generate", "tiny", "--prompt", "x", "--top-k", "-1"], 2, "a top-k of 0 or more"),
        (["generate", "tiny", "--prompt", "x", "--greedy", "--top-k", "3"], 2, "draws nothing"),
        (["eval", "tiny", "--text", "x", "--bos", "all"], 2, "Known: every, first."),
        (["generate", "tiny", "--prompt", ""], 2, "The prompt is empty."),
        (["eval", "tiny", "--text", "t", "--seqlen", "0"], 2, "Invalid value"),
        (["eval", "tiny", "--text", "t", "--windows", "0"], 2, "Invalid value"),
        (["compile", "tiny", "--device", "cudda"], 2, "Unknown device 'cudda'"),
        (["compile", "tiny", "--device", "cuda:63"], 1, "The device 'cuda:63' cannot be used here"),
        (["compile", "tiny", "-o", __file__ + "/x"], 2, "test_cli.py' is a file"),
        (["compile", "tiny", "--dump-ir", __file__], 2, "Name a folder for the dumps."),
    ],
)
def test_bad_arguments_get_a_sentence_and_leave_nothing(args, code, message):
    found, out, error = graphopt(*args)
    assert (found, out) == (code, "")
    assert message in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error
    assert leftovers() == []


def test_an_existing_folder_needs_force():
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep me")
    code, _, error = compile_tiny()
    assert code == 2 and "'out' exists" in error and "--force" in error
    assert Path("out/mine.txt").exists()
    code, _, _ = compile_tiny("--force")
    assert code == 0
    assert not Path("out/mine.txt").exists() and Path("out/fake.txt").exists()
    assert leftovers() == ["out"]
    Path("file").write_text("")
    assert "is a file" in compile_tiny("--force", out="file")[2]
    assert "holds the working folder" in compile_tiny("--force", out=".")[2]


@pytest.mark.parametrize("existing", [False, True])
def test_nothing_half_written_stays(existing):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "fake.txt")

    def interrupt():
        raise KeyboardInterrupt

    if existing:
        Path("out").mkdir()
        Path("out/old.txt").write_text("old")
    for action, code, message in ((full, 1, "disk is full"), (interrupt, 130, "Interrupted")):
        FakeEmitter.meanwhile = action
        found, _, error = compile_tiny("--force")
        assert found == code and message in error
        assert [n for n in leftovers() if not n.startswith(".out.work")] == ["out"] * existing
        if existing:
            assert [path.name for path in Path("out").iterdir()] == ["old.txt"]


def test_resume_repeats_no_finished_pass(monkeypatch):
    ran = []
    for name in ("canonicalise", "insert-kv-cache"):
        cls = get_pass(name)

        def run(self, program, context, original=cls.run):
            if context.progress is not None and context.work is not None:
                ran.append(self.name)  # the plan runs passes without a work folder
            return original(self, program, context)

        monkeypatch.setattr(cls, "run", run)

    def interrupt():
        raise KeyboardInterrupt

    FakeEmitter.meanwhile = interrupt
    assert compile_tiny()[0] == 130
    assert leftovers() == [".out.work"]
    assert ran == ["canonicalise", "insert-kv-cache"]
    FakeEmitter.meanwhile = None
    code, out, _ = compile_tiny("--resume")
    assert code == 0 and "resumed" in out
    assert ran == ["canonicalise", "insert-kv-cache"]
    assert leftovers() == ["out"]


def test_inspect():
    code, out, _ = graphopt("inspect", "tiny")
    assert code == 0
    assert "a = attention(q_rope, k_rope, v_heads" in out and "kv cache" in out
    code, out, _ = graphopt("inspect", "tiny", "--json", "--batch", 2, "--seq", 5, "--past", 7)
    data = json.loads(out)
    assert data["parameters"] == tiny_program().parameter_count()
    assert data["sizes"] == {"B": 2, "S": 5, "P": 7}
    # Two layers, keys and values, two heads of 8, 4 bytes, 2 rows of 12 tokens.
    assert data["bytes"]["kv_cache"]["value"] == 2 * 2 * 2 * 8 * 4 * 2 * 12
    assert data["bytes"]["kv_cache"]["symbolic"] == "B*(256*P + 256*S)"
    assert data["flops"]["value"] == sum(part["flops"] for part in data["parts"].values())
    # The projections of a layer alone: two multiply-adds an element and token.
    layer = 2 * 32 * (32 + 16 + 16 + 32) + 3 * 2 * 32 * 48
    assert data["flops"]["value"] > 2 * layer * 10
    assert data["program"].startswith("program tiny")


def test_every_option_of_a_compile_is_on_the_command_line():
    flags = {field.name for field in fields(CompileFlags)}
    options = {field.name for field in fields(CompileOptions)}
    assert options - flags == {"verify"}
    assert flags - options == {"no_verify", "out", "config", "passes", "ranks", "launcher"}


def test_passes_and_targets():
    code, out, _ = graphopt("passes")
    assert code == 0 and "max_bytes: int = 1048576" in out and "exact" in out
    assert "Legality:" not in out and "Legality:" in graphopt("passes", "dead-code-elimination")[1]
    data = json.loads(graphopt("passes", "--json")[1])
    assert {"name", "summary", "exact", "options", "doc"} <= set(data[0])
    code, out, _ = graphopt("targets")
    assert code == 0 and "volta" in out and "hopper-cuda triton" in out
    data = {target["name"]: target for target in json.loads(graphopt("targets", "--json")[1])}
    assert set(data) == set(all_targets())
    assert next(iter(data)) == "cpu" and data["hopper"]["kernels"] == ["hopper-cuda", "triton"]
    assert data["volta"]["limits"]["shared_bytes_per_block"] == 96 * 1024
    for target in data.values():
        stated = set(target["sources"])
        assert "dtypes" in stated or target["matrix_units"]
        for group in ("limits", "memory", "matrix_unit", "cores", "bandwidth"):
            held = target.get(
                {"memory": "memories", "matrix_unit": "matrix_units"}.get(group, group)
            )
            assert not held or group in stated, (target["name"], group)
    assert "source of cores" in graphopt("targets", "volta")[1]
    hopper = graphopt("targets", "hopper")[1]
    assert "matrix unit: 16 x 8 x 16, f16 to f16 or f32\n" in hopper
    assert "features: wgmma, programmatic-launch\n" in hopper


def test_diff():
    code, out, _ = graphopt("diff", "tiny", "tiny")
    assert code == 0 and "same structure" in out and "21 of 21" in " ".join(out.split())
    data = json.loads(graphopt("diff", "tiny", "windowed", "--json")[1])
    assert any("window" in line for line in data["structure"])
    assert data["weights"]["changed"] == [] and data["report"] is None


def test_recipes_that_differ_at_their_ends_are_shown_to_their_ends(capsys):
    common = "canonicalise,common-subexpression-elimination,fold-constants,dead-code-elimination"
    ends = "insert-kv-cache{ring=true}", "prune-blocks{ratio=0.1}"
    report = {"recipe": [f"{common},{end}" for end in ends], "not_compared": {}}
    weights = {"only_a": [], "only_b": [], "common": 0, "changed": [], "compared": True}
    found = {"structure": [], "parameters": (1, 1), "weights": weights, "report": report}
    console.print_diff(console.stdout(), found)
    out = capsys.readouterr().out
    columns = [line[8:].split() for line in out.splitlines()]  # behind the label
    for place, end in enumerate(ends):
        assert end in "".join(row[place] for row in columns if len(row) == 2)
    assert "…" not in out


def test_colour_is_left_out_on_request(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, _ = graphopt("targets")
    assert "\x1b[3" not in out


@pytest.mark.slow
def test_generate_says_how_it_draws(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    stated = {"do_sample": True, "temperature": 0.7, "top_k": 9, "typical_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(stated))

    def run(*more: str) -> tuple[str, str]:
        code, out, err = graphopt(
            "generate", folder, "--prompt", "hi", "--max-new-tokens", "2", *more
        )
        assert code == 0, err
        return out, " ".join(err.split())

    said = "sampling: temperature 0.7, top-k 9, top-p 1, seed 0; not applied: typical_p"
    assert said in run()[1]
    assert "greedy decoding" in run("--greedy")[1]
    assert "top-k 4, top-p 1, seed 3" in run("--top-k", "4", "--seed", "3")[1]
    found = json.loads(run("--temperature", "0", "--json")[0])
    assert found["sampling"]["temperature"] == 0 and found["not_applied"] == ["typical_p"]


@pytest.mark.slow
def test_help_is_quick_and_imports_no_torch():
    program = "import sys, graphopt.cli.commands; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "graphopt.cli.commands", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - start < 5
    for command in ["compile", "inspect", "eval", "generate", "passes", "targets", "diff"]:
        assert command in done.stdout


def test_the_python_interface_is_what_the_documentation_says(tmp_path):
    import graphopt as go

    program = go.capture("tiny")
    program, report = go.Pipeline.parse("canonicalise,insert-kv-cache").run(program)
    go.emit(program, tmp_path / "py", emit=("fake",), report=report)
    assert json.loads((tmp_path / "py/report.json").read_text())["passes"][1]["changed"] == 2
    import graphopt.capture

    assert go.capture("tiny").name == "tiny"
