"""Commands shared by several ranks, as torchrun starts them: what they give, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import runner
from rank_commands import FAILING_PASS, command, succeeding, tool
from ranks import ended_ranks, run_ranks
from tiny_models import save_tiny

from graphopt.cli.commands import app
from graphopt.errors import UsageError
from graphopt.support.launched import Launched, launched

SENTENCE = "the quick brown fox jumps over the lazy dog, then the other one. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a text of seven windows of 128 tokens, and seven questions."""
    root = tmp_path_factory.mktemp("ranks")
    save_tiny(root / "tiny")
    (root / "text.txt").write_text(SENTENCE * 17, encoding="utf-8")
    questions = [
        {"goal": f"do {n}", "sol1": "by hand " * (n % 3 + 1), "sol2": "by eye", "label": n % 2}
        for n in range(7)
    ]
    lines = "\n".join(map(json.dumps, questions))
    (root / "piqa.jsonl").write_text(lines, encoding="utf-8")
    return root


def evaluation(folder: Path, *more: str) -> list[str]:
    text, model = folder / "text.txt", folder / "tiny"
    return ["eval", str(model), "--text", str(text), "--seqlen", "128", "--device", "cpu", *more]


@pytest.mark.slow
def test_eval_gives_the_figures_of_one_process(folder: Path) -> None:
    more = ["--piqa", str(folder / "piqa.jsonl"), "--json", "--needles", "3"]
    more += ["--kv-policy", "quest{budget=32,page=8,sink=8,local=8}"]
    arguments = evaluation(folder, *more)
    alone = runner().invoke(app, arguments)
    assert alone.exit_code == 0, alone.stderr
    first, second = run_ranks(command, arguments, group=False)
    assert first.code == second.code == 0
    assert second.stdout == second.stderr == ""  # the first rank speaks for all
    figures, theirs = json.loads(alone.stdout), json.loads(first.stdout)
    assert figures["windows"] == 7 and figures["piqa_rows"] == 7
    for found in (figures, theirs):
        found.pop("seconds")
    # Batches are the same, and are added up in one order: bit for bit.
    policies, their_policies = figures.pop("kv_policies"), theirs.pop("kv_policies")
    assert theirs == figures
    for ours, other in zip(policies, their_policies, strict=True):
        # Of half as many texts at once, products differ in their last bits.
        assert other["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-5)
        assert other["needles"] == ours["needles"]
        assert other["recall"] == (ours["recall"] and pytest.approx(ours["recall"], rel=1e-5))


@pytest.mark.exhaustive
def test_more_ranks_than_windows_give_the_same(folder: Path) -> None:
    arguments = evaluation(folder, "--windows", "2", "--json")
    alone = json.loads(runner().invoke(app, arguments).stdout)
    first, *_ = run_ranks(command, arguments, group=False, ranks=3)
    assert json.loads(first.stdout)["perplexity"] == alone["perplexity"]


@pytest.mark.slow
def test_compile_writes_once_and_the_same(folder: Path, tmp_path: Path) -> None:
    recipe = "quantize{w=8,method=rtn}"
    arguments = ["compile", str(folder / "tiny"), "--passes", recipe, "--emit", "hf", "-o"]
    alone = runner().invoke(app, [*arguments, str(tmp_path / "alone")])
    assert alone.exit_code == 0, alone.stderr
    out = str(tmp_path / "shared")
    first, second = run_ranks(command, [*arguments, out], group=False)
    assert first.code == second.code == 0 and second.stdout == second.stderr == ""
    for name in ("hf/model.safetensors", "hf/config.json", "recipe.yaml"):
        files = [(tmp_path / side / name).read_bytes() for side in ("alone", "shared")]
        assert files[0] == files[1], name
    # What was made along the way is gone.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "shared"]


@pytest.mark.exhaustive
def test_an_error_of_all_ranks_is_said_once(folder: Path) -> None:
    arguments = [*evaluation(folder), "--seqlen", "4000"]
    first, second = run_ranks(command, arguments, group=False)
    assert (first.code, second.code) == (2, 2)
    assert "exceeds the 128 that" in first.stderr
    assert first.stderr.count("error:") == 1 and second.stderr == ""


def failing(folder: Path, out: Path, how: str, rank: int = 1) -> list[str]:
    plugin = folder / "fail.py"
    plugin.write_text(FAILING_PASS, encoding="utf-8")
    recipe = f"fail{{how={how},rank={rank}}}"
    return ["compile", str(folder / "tiny"), "--plugin", str(plugin), "--passes", recipe,
            "-o", str(out), "--device", "cpu"]  # fmt: skip


@pytest.mark.slow
def test_the_reason_of_one_rank_ends_all(folder: Path, tmp_path: Path) -> None:
    arguments = failing(folder, tmp_path / "out", "error")
    first, second = run_ranks(command, arguments, group=False)
    assert (first.code, second.code) == (1, 1)
    assert "error: Rank 1: The lamp is out." in first.stderr and "Light it." in first.stderr
    assert second.stderr == ""
    assert not list(tmp_path.glob("out")) and not list(tmp_path.glob(".out.*.part"))


@pytest.mark.exhaustive
def test_the_reason_of_the_first_rank_ends_all(folder: Path, tmp_path: Path) -> None:
    arguments = failing(folder, tmp_path / "out", "error", 0)
    first, second = run_ranks(command, arguments, group=False)
    assert (first.code, second.code) == (1, 1)
    assert "error: The lamp is out." in first.stderr and second.stderr == ""


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_other_with_a_word(folder: Path, tmp_path: Path) -> None:
    arguments = failing(folder, tmp_path / "out", "kill")
    first, second = ended_ranks(command, arguments, group=False)
    assert second.exitcode == -9
    assert first.value.code == 1
    assert "error: Rank 1 has ended without a word" in first.value.stderr


@pytest.mark.exhaustive
def test_a_rank_that_hangs_ends_the_other(folder: Path, tmp_path: Path) -> None:
    arguments = failing(folder, tmp_path / "out", "hang")
    first, second = ended_ranks(succeeding, arguments, group=False, patience=0)
    assert second.exitcode is None  # stopped, until the helper killed it
    assert "Rank 1 has given no sign of life for 4 seconds" in first.error


@pytest.mark.exhaustive
def test_ctrl_c_ends_all_ranks(folder: Path, tmp_path: Path) -> None:
    first, second = run_ranks(command, failing(folder, tmp_path / "out", "interrupt"), group=False)
    assert (first.code, second.code) == (130, 130)
    assert "Rank 1: Interrupted" in first.stderr and second.stderr == ""


@pytest.mark.slow
def test_ranks_starts_torchrun(folder: Path) -> None:
    arguments = evaluation(folder, "--windows", "4", "--json")
    alone = json.loads(runner().invoke(app, arguments).stdout)
    begun = [sys.executable, "-m", "graphopt", *arguments, "--ranks", "2"]
    done = subprocess.run(begun, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["perplexity"] == alone["perplexity"]


@pytest.mark.exhaustive
def test_the_exit_code_is_that_of_the_failing_rank(folder: Path) -> None:
    begun = [sys.executable, "-m", "graphopt", *evaluation(folder, "--ranks", "2")]
    begun += ["--seqlen", "4000"]
    wrong = subprocess.run(begun, capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2
    assert "error: A window of 4000 tokens exceeds the 128" in wrong.stderr
    assert "Traceback" not in wrong.stderr and wrong.stderr.count("error") == 1


@pytest.mark.exhaustive
def test_ranks_go_on_with_what_was_interrupted(folder: Path, tmp_path: Path) -> None:
    arguments = failing(folder, tmp_path / "out", "error")
    place = arguments.index("--passes") + 1
    arguments[place] = f"quantize{{w=8,method=rtn}},{arguments[place]}"
    first, _ = run_ranks(command, arguments, group=False)
    assert "The lamp is out" in first.stderr
    arguments[place] = "quantize{w=8,method=rtn}"
    first, second = run_ranks(command, [*arguments, "--resume", "--json"], group=False)
    assert first.code == second.code == 0, first.stderr
    resumed = {one["name"]: one["resumed"] for one in json.loads(first.stdout)["passes"]}
    assert resumed["quantize"] and not resumed["insert-kv-cache"]


@pytest.mark.exhaustive
def test_the_bench_measures_in_turns(folder: Path, tmp_path: Path) -> None:
    text = str(folder / "text.txt")
    arguments = ["--model", str(folder / "tiny"), "--text", text, "--calib", text, "--windows", "4"]
    arguments += ["--seqlen", "64", "--steps", "3", "--batch", "2", "--rounds", "1"]
    out = tmp_path / "found.json"
    run_ranks(tool, "bench_data_parallel", [*arguments, "--device", "cpu", "--out", str(out)],
              group=False)  # fmt: skip
    found = json.loads(out.read_text())
    assert found["ranks"] == 2 and set(found["summary"]) == {"eval", "fuse-blocks"}
    assert found["summary"]["eval"]["apart"]["perplexity"] < 1e-6
    assert found["summary"]["fuse-blocks"]["apart"]["weights"] < 1e-2


# ---- what the environment states ----

STATED = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


def state(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    for name, value in (STATED | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def test_the_environment_says_which_rank_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    state(monkeypatch)
    assert launched() == Launched(1, 2, 1, 2, "127.0.0.1:29500")
    state(monkeypatch, WORLD_SIZE="1", RANK="0")
    assert launched() is None
    state(monkeypatch, RANK=None)
    assert launched() is None
    for wrong in ({"RANK": "2"}, {"RANK": "x"}, {"LOCAL_RANK": "-1"}, {"LOCAL_RANK": "2"}):
        state(monkeypatch, **wrong)
        with pytest.raises(UsageError, match="no rank of any run"):
            launched()
    state(monkeypatch, MASTER_PORT=None)
    with pytest.raises(UsageError, match="and not MASTER_PORT"):
        launched()


def test_other_commands_run_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    state(monkeypatch, RANK="0", LOCAL_RANK="0")
    told = runner().invoke(app, ["passes"])
    assert told.exit_code == 2 and "runs in one process, and this is one of 2 ranks" in told.stderr
    state(monkeypatch)
    told = runner().invoke(app, ["passes"])
    assert told.exit_code == 2 and told.stderr == ""  # the first rank says it


def test_ranks_are_not_started_by_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    state(monkeypatch, RANK="0", LOCAL_RANK="0")
    for option in (["--ranks", "2"], ["--launcher", "torchrun"]):
        told = runner().invoke(app, ["eval", "x", "--text", "y", *option])
        assert told.exit_code == 2
        assert "This is rank 0 of 2 already" in told.stderr and option[0] in told.stderr


def test_wrong_launchers_are_refused() -> None:
    told = runner().invoke(app, ["eval", "x", "--text", "y", "--launcher", "slurm"])
    assert told.exit_code == 2 and "Unknown launcher 'slurm'" in told.stderr
    told = runner().invoke(
        app, ["eval", "x", "--text", "y", "--launcher", "torchrun", "--device", "cpu"]
    )
    assert told.exit_code == 2 and "Give --ranks N." in told.stderr
