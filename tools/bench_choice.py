"""Compare ways to choose the blocks that go: by divergence on a text that none of them has seen.

    python tools/bench_choice.py --calib FILE --text FILE [--device cuda] MODEL[=COUNT,COUNT] ...

Every way is `prune-blocks` with other options. Beside them stand random sets, greedy removal by the
perplexity of much text, and the best set that exchanges of single blocks lead to. Results are
kept in benchmarks/choice.json beside what other devices gave.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import keep

from graphopt.calibration.scores import PruningUnit, Removal, score_removals, units_of
from graphopt.calibration.text import calibration_windows, pick, text_windows, window_length
from graphopt.capture import capture
from graphopt.evaluate.perplexity import read_text
from graphopt.execute.interpreter import resident
from graphopt.ir.dtypes import scoring_dtype
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.passes.prune_blocks.chooser import Chooser
from graphopt.passes.prune_blocks.prune_blocks import PruneBlocks
from graphopt.support.per_device import on_device

ROOT = Path(__file__).resolve().parent.parent
SCORES = ("kl", "mi", "ppl", "bi", "angular")
MUCH = 8
"""How many times the usual text greedy removal by perplexity sees."""


def ways() -> list[tuple[str, int, dict[str, Any]]]:
    """Return the ways to choose: a name, how many times the usual windows, and options."""
    found: list[tuple[str, int, dict[str, Any]]] = [
        ("default", 1, {}),
        ("greedy ppl, much text", MUCH, {"score": "ppl", "look_back": False}),
    ]
    for times in (1, 4):
        for score in SCORES:
            found.append((f"greedy {score}", times, {"score": score, "look_back": False}))
            if score in ("kl", "mi", "ppl"):
                found.append((f"look-back {score}", times, {"score": score, "look_back": True}))
            if score == "kl":
                found.append(("exchange kl", times, {}))
        for score in SCORES if times == 1 else ():
            found.append((f"one-shot {score}", times, {"score": score, "iterative": False}))
    return found


@dataclass
class Subject:
    """A model, in memory, with its texts.

    Attributes:
        calibration: int64 [N, S], windows that ways may see.
        judging: int64 [M, S], windows that none of them sees.
    """

    name: str
    program: Program
    units: list[PruningUnit]
    calibration: Tensor
    judging: Tensor
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def opened(cls, name: str, options: argparse.Namespace) -> Subject:
        device = torch.device(options.device)
        program = capture(name)
        context = Context(device=device, text=read_text(options.calib))
        usual = make_pass("prune-blocks", {"blocks": 1})
        assert isinstance(usual, PruneBlocks)
        length = window_length(program, options.seqlen or usual.seqlen, device)
        judging = text_windows(program, read_text(options.text), length)
        dtype = scoring_dtype(program, device)
        return cls(
            name=Path(name).name,
            program=resident(program, dtype, device),
            units=units_of(program, ("block",)),
            calibration=calibration_windows(program, context, length),
            judging=pick(judging, options.windows, 0),
            device=device,
            dtype=dtype,
        )

    def score(
        self, removals: Sequence[Removal], metric: str, windows: Tensor
    ) -> dict[Removal, float]:
        return score_removals(
            self.program, removals, windows, metric, device=self.device, dtype=self.dtype
        )

    def random_sets(self, count: int, sets: int, seed: int) -> list[Removal]:
        """Return different sets of `count` units; all where there are no more."""
        most = min(sets, math.comb(len(self.units), count))
        generator = random.Random(seed)
        found: dict[Removal, None] = {}
        while len(found) < most:
            found[frozenset(generator.sample(self.units, count))] = None
        return list(found)

    def choose(self, count: int, times: int, options: Mapping[str, Any]) -> tuple[Removal, int]:
        """Return what prune-blocks removes, and how often it did not believe a score.

        Args:
            times: How many times the usual windows it sees.
        """
        usual = make_pass("prune-blocks", {"blocks": 1})
        assert isinstance(usual, PruneBlocks)
        windows = times * on_device(usual.windows, self.device)
        chosen = make_pass("prune-blocks", {"blocks": count, "windows": windows, **options})
        assert isinstance(chosen, PruneBlocks)
        context = Context(device=self.device)
        choice = Chooser(chosen, self.program, self.calibration, context).all()
        return frozenset(choice.order), len(choice.skipped)

    def exchanged(self, start: Removal, times: int, seconds: float) -> Removal:
        """Return where exchanges of one unit lead, each the best by divergence.

        Args:
            seconds: No exchange begins after so many.
        """
        begun = time.perf_counter()
        usual = make_pass("prune-blocks", {"blocks": 1})
        assert isinstance(usual, PruneBlocks)
        windows = pick(self.calibration[:-2], times * on_device(usual.windows, self.device), 0)
        best, value = start, math.inf
        while time.perf_counter() - begun < seconds:
            near = [
                best - {gone} | {unit} for gone in best for unit in self.units if unit not in best
            ]
            found = self.score([best, *near], "kl", windows)
            value = found[best]
            lowest = min(found, key=lambda removal: found[removal])
            if not found[lowest] < value:
                break
            best = lowest
        return best


def compare(
    subject: Subject,
    count: int,
    options: argparse.Namespace,
    left: Callable[[], float],
    save: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Choose `count` blocks in every way while there is time; judge each set.

    Args:
        left: Returns how many seconds are left.
        save: Called with the rows so far.
    """
    rows: list[dict[str, Any]] = []
    judged: dict[Removal, dict[str, float]] = {}
    dense = subject.score([frozenset()], "ppl", subject.judging)[frozenset()]

    def judge(removal: Removal) -> dict[str, float]:
        if removal not in judged:
            kl, ppl = (
                subject.score([removal], metric, subject.judging)[removal]
                for metric in ("kl", "ppl")
            )
            judged[removal] = {"kl": kl, "times_dense": ppl / dense}
        return judged[removal]

    def add(name: str, removal: Removal, **more: Any) -> None:
        blocks = sorted(unit.block for unit in removal)
        row = {"way": name, **judge(removal), **more, "blocks": blocks}
        rows.append(row)
        print(
            f"{subject.name} {count} of {len(subject.units)}: {name}: {row}",
            file=sys.stderr,
            flush=True,
        )
        save(rows)

    started = time.perf_counter()
    sets = subject.random_sets(count, options.random, options.seed)
    by_kl = subject.score(sets, "kl", subject.judging)
    ranked = sorted(by_kl, key=lambda removal: by_kl[removal])
    if ranked:
        seconds = time.perf_counter() - started
        add(f"best of {len(sets)} random", ranked[0], seconds=seconds)
        add(f"median of {len(sets)} random", ranked[len(ranked) // 2])
    starts: dict[int, Removal] = {}
    for name, times, given in ways():
        if left() <= 0:
            break
        if options.only and not any(name.startswith(only) for only in options.only):
            continue
        started, doubted = time.perf_counter(), 0
        if name.startswith("exchange"):
            removal = subject.exchanged(starts[times], times, min(left(), options.exchange))
        else:
            removal, doubted = subject.choose(count, times, given)
        seconds = time.perf_counter() - started
        if name in ("default", "look-back kl"):
            starts[times] = removal
        add(name, removal, times=times, seconds=seconds, doubted=doubted)


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the results as a table, a row a way."""
    lines = []
    for title, rows in found.items():
        best = min(row["kl"] for row in rows)
        lines.append(
            f"{title}\n{'way':26} {'text':>4} {'s':>6} {'KL':>8} {'/best':>6} {'x ppl':>7}"
        )
        for row in rows:
            lines.append(
                f"{row['way']:26} {row.get('times', ''):>4} {row.get('seconds', math.nan):6.1f} "
                f"{row['kl']:8.4f} {row['kl'] / best:6.3f} {row['times_dense']:7.3f} "
                f"{row.get('doubted') or '':>2} {','.join(map(str, row['blocks']))}"
            )
    return "\n".join(lines)


def main() -> None:
    assert __doc__ is not None
    begun = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="MODEL, or MODEL=COUNT,COUNT of blocks to remove")
    parser.add_argument("--calib", type=Path, required=True, help="text for choosing")
    parser.add_argument("--text", type=Path, required=True, help="text for judging")
    parser.add_argument("--windows", type=int, default=8, help="of the judging text")
    parser.add_argument("--seqlen", type=int, help="tokens of a window; as by default")
    parser.add_argument("--random", type=int, default=200, help="random sets")
    parser.add_argument("--only", action="append", help="ways whose names begin so")
    parser.add_argument("--exchange", type=float, default=math.inf, help="seconds for exchanges")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all of it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "choice.json")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}

    def save(title: str, rows: list[dict[str, Any]]) -> None:
        found[title] = rows
        command = ["python tools/bench_choice.py", *(Path(name).name for name in options.models)]
        command += [f"--{name} {getattr(options, name).name}" for name in ("calib", "text")]
        command += [f"--windows {options.windows} --random {options.random} --device {device}"]
        keep(options.out, "choice", command, device, {"compared": found})

    device = torch.device(options.device)
    jobs = [(name, counts) for name, _, counts in (m.partition("=") for m in options.models)]
    for number, (name, counts) in enumerate(jobs):
        subject = Subject.opened(name, options)
        total = len(subject.units)
        wanted = [int(count) for count in counts.split(",")] if counts else [-(-total // 4)]
        for turn, count in enumerate(wanted):
            # Time is divided evenly among what is still to do.
            rest = options.seconds - (time.perf_counter() - begun)
            shares = (
                len(wanted)
                - turn
                + sum(max(1, len(counts.split(","))) for _, counts in jobs[number + 1 :])
            )
            until = time.perf_counter() + rest / shares
            title = f"{subject.name}: {count} of {total} blocks"
            compare(
                subject, count, options,
                lambda until=until: until - time.perf_counter(),  # type: ignore[misc]
                lambda rows, title=title: save(title, rows),  # type: ignore[misc]
            )  # fmt: skip
    print(table(found))


if __name__ == "__main__":
    main()
