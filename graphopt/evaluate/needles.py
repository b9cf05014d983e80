"""Needle retrieval: a number that stands somewhere in a long text is to be told at its end.

A text of the user's own is the hay. In each task the passkey, five digits, is stated once at a
depth of its own, and the text ends with the question for it and the answer. The answer is given to
the model (teacher forcing), and is right where each of its tokens is the likeliest: then greedy
decoding writes it. All in front of the question is the prompt; the question and the answer are
steps, so that a policy is not told in the prompt what will be asked.

Source of the task: Mohtashami and Jaggi, arXiv 2305.16300, section 4.2.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import SourceError, UsageError
from graphopt.evaluate.kv_policy import policy_layers, rows_at_once, walk_policy
from graphopt.execute.hidden_states import HiddenStateStream
from graphopt.execute.interpreter import Runner
from graphopt.execute.likelihoods import ProgramLikelihoods
from graphopt.ir.kv_policies import KVPolicy
from graphopt.sources.tokenizer import encode
from graphopt.sources.windows import TokenText
from graphopt.support.progress import Progress, silent

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where in the text passkeys stand: 0 at its beginning, 1 before the question."""

_NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
_QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class NeedleTasks:
    """Texts that each hold a passkey and end with it.

    Attributes:
        ids: int64 [tasks, S].
        answers: How many tokens at the end of each are the answer.
        depths: Where its passkey stands, from 0 to 1.
        prompt: Tokens in front of every question, at most as many as are in front of one.
    """

    ids: Tensor
    answers: list[int]
    depths: list[float]
    prompt: int


@dataclass(frozen=True)
class NeedleResult:
    """How many passkeys were told rightly.

    Attributes:
        right: Of each task.
        depths: Of each task.
        tokens: Tokens of a task.
        seconds: Time it took.
    """

    right: list[bool]
    depths: list[float]
    tokens: int
    seconds: float

    @property
    def count(self) -> int:
        """How many were right."""
        return sum(self.right)

    def by_depth(self) -> dict[float, tuple[int, int]]:
        """Return how many were right, and of how many, for each depth."""
        counts: dict[float, tuple[int, int]] = {}
        for right, depth in zip(self.right, self.depths, strict=True):
            before = counts.get(depth, (0, 0))
            counts[depth] = (before[0] + right, before[1] + 1)
        return dict(sorted(counts.items()))


def needle_tasks(
    tokenizer: Any,
    text: str,
    tokens: int,
    count: int,
    *,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> NeedleTasks:
    """Return tasks with passkeys at several depths.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The hay; each task begins at a place of its own in it.
        tokens: Tokens of a task, with what the tokenizer puts before a text.
        count: How many tasks; the depths take turns.
        seed: Of passkeys and places.

    Raises:
        SourceError: The text is shorter than a task.
        UsageError: A task has no room for a needle, or there is none.
    """
    if count < 1:
        raise UsageError(f"{count} needles.", "Give 1 or more.")
    hay, draw = TokenText.of(tokenizer, text), random.Random(seed)
    begin = hay.begin.tolist()
    rows: list[list[int]] = []
    answers: list[int] = []
    behind = 0
    for number in range(count):
        key = f"{draw.randrange(10_000, 100_000)}"
        needle = encode(tokenizer, _NEEDLE.format(key=key), special=False)
        end, answer = _question(tokenizer, key)
        room = tokens - len(begin) - len(needle) - len(end)
        if room < 2:
            least = tokens - room + 2
            raise UsageError(
                f"A text of {tokens} tokens has no room for a needle and its question.",
                f"Give texts of {least} tokens or more.",
            )
        if len(hay.ids) < room:
            raise SourceError(
                f"The text is too short to hide a needle in: {len(hay.ids)} tokens, where "
                f"{room} are to stand around it.",
                "Give a longer text, or a shorter context.",
            )
        start = draw.randrange(len(hay.ids) - room + 1)
        around = hay.ids[start : start + room].tolist()
        place = round(depths[number % len(depths)] * room)
        rows.append([*begin, *around[:place], *needle, *around[place:], *end])
        answers.append(answer)
        behind = max(behind, len(end))
    return NeedleTasks(
        torch.tensor(rows),
        answers,
        [depths[number % len(depths)] for number in range(count)],
        tokens - behind,
    )


def _question(tokenizer: Any, key: str) -> tuple[list[int], int]:
    """Return the ids of the question with its answer, and how many of them are the answer."""
    whole = encode(tokenizer, f"{_QUESTION} {key}", special=False)
    question = encode(tokenizer, _QUESTION, special=False)
    shared = 0
    while shared < len(question) and question[shared] == whole[shared]:
        shared += 1
    return whole, len(whole) - shared


def retrieval(
    runner: Runner,
    tasks: NeedleTasks,
    policy: KVPolicy | None,
    *,
    dense_layers: int = 0,
    dense: Sequence[str] = (),
    progress: Progress = silent,
) -> NeedleResult:
    """Return which passkeys a model tells with a policy in the steps of its attentions.

    Ranks share the texts.

    Args:
        runner: Runs the program.
        policy: None for the model as it is.
        dense_layers, dense: Which attentions are left alone; see `policy_layers`.

    Raises:
        SourceError: No attention of the program can follow a policy.
    """
    started, tokens = time.perf_counter(), tasks.ids.shape[1]
    likelihoods = ProgramLikelihoods(runner)
    stream = HiddenStateStream(
        runner,
        tasks.ids,
        tokens_at_once=rows_at_once(runner, tokens) * tokens,
        progress=progress,
        what="needles",
    )
    if policy is None:
        stream.run_to(len(stream.blocks))
    else:
        layers, _ = policy_layers(runner.program, dense_layers, dense)
        walk_policy(stream, policy, tasks.prompt, layers)
    longest = max(tasks.answers)
    own = stream.ranks.share(len(tasks.answers))
    own_answers = tasks.answers[own.start : own.stop]
    right: list[bool] = []
    for batch, ids in enumerate(stream.ids):
        parts = likelihoods.logits_in_parts(
            ids,
            *stream.behind_blocks(batch, stream.hidden[batch]),
            start=tokens - longest - 1,
            stop=tokens - 1,
        )
        likeliest = torch.cat([logits.argmax(-1) for _, logits in parts], 1)
        agrees = (likeliest == ids[:, tokens - longest :]).cpu()
        answers = own_answers[len(right) : len(right) + len(ids)]
        right += [
            bool(row[longest - answer :].all()) for row, answer in zip(agrees, answers, strict=True)
        ]
    right = stream.ranks.gathered(torch.tensor(right)).tolist()
    return NeedleResult(right, tasks.depths, tokens, time.perf_counter() - started)
