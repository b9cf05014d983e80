"""Commands shared by several ranks, as torchrun starts them: what they give, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import runner
from rank_processes import ended, run_ranks, started
from tiny_models import save_tiny

from graphopt.cli.commands import app

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
    command = evaluation(folder, *more)
    alone = runner().invoke(app, command)
    assert alone.exit_code == 0, alone.stderr
    first, second = run_ranks(["-m", "graphopt", *command])
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


@pytest.mark.slow
def test_an_error_of_all_ranks_is_said_once(folder: Path) -> None:
    command = [*evaluation(folder), "--seqlen", "4000"]
    first, second = ended(started(["-m", "graphopt", *command]), 60)
    assert (first.code, second.code) == (2, 2)
    assert "exceeds the 128 that" in first.stderr
    assert first.stderr.count("error:") == 1 and second.stderr == ""
