"""Log-probabilities of the tokens of a text, without the logits of all of it at once.

Logits are what is largest in a forward pass: of 2,048 tokens and a vocabulary of 262,144 they take
2 GB. Where what stands behind the blocks treats each token by itself, it is run over a few hundred
tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.execute.interpreter import Runner
from graphopt.ir.graph import Program, Value, resolve_attrs
from graphopt.ir.shapes import infer_program
from graphopt.ir.token_mixing import mixes_tokens
from graphopt.ir.types import S, Type
from graphopt.support.progress import Progress, silent

ROWS_AT_ONCE = 256
"""Rows of logits whose log-softmax is in memory at once."""

NUMBERS_AT_ONCE = 2**25
"""Logits that are in memory at once, where they can be computed for a part of the tokens."""

TOKENS_TOGETHER = 2**16
"""Tokens whose hidden states are in memory at once, so that weights are read once for them."""


def token_log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of each target under softmax(logits), in fp32.

    What has no logit, as the tokens of pictures in a text, is not predicted, and gets 0; see
    `predicted`.

    Args:
        logits: [..., vocab].
        targets: int64 [...].

    Returns:
        fp32 [...]. Temporary memory is that of a few hundred rows.
    """
    rows, wanted = logits.flatten(0, -2), targets.flatten()
    parts = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE].float()
        index = wanted[start : start + ROWS_AT_ONCE, None]
        known = predicted(index, part.shape[-1])
        own = part.gather(-1, torch.where(known, index, 0))[:, 0] - part.logsumexp(-1)
        parts.append(torch.where(known[:, 0], own, 0.0))
    return torch.cat(parts).view(targets.shape)


def predicted(targets: Tensor, vocabulary: int) -> Tensor:
    """Return which ids are among a vocabulary's, bool; those beyond stand for pictures."""
    return targets < vocabulary


class ProgramLikelihoods:
    """The log-probabilities of the tokens of texts under a program.

    The weights of a call are read once for all texts that are walked together, and those behind
    the blocks, which every part of the tokens needs, are held meanwhile.

    Args:
        runner: Runs the program. One that keeps no weights needs the memory of one layer.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        per_call, self._types = infer_program(runner.program)
        self._calls = self._first = len(runner.program.calls)
        # From the first call on behind which each token is treated by itself, parts suffice.
        while self._first and _by_token(runner.program, self._first - 1, per_call[self._first - 1]):
            self._first -= 1

    def of(
        self,
        ids: Tensor,
        *,
        at_once: int | None = None,
        progress: Progress = silent,
        what: str = "",
    ) -> Tensor:
        """Return the log-probability of each token but the first, given those before it.

        Args:
            ids: int64 [N, S], S at least 2. What a row is padded with stands behind its text, where
                no token of the text sees it.
            at_once: Rows of a batch, at most; all of them by default.
            progress: Called with `what`, the steps that are done, and how many there are.

        Returns:
            fp32 [N, S - 1] on the runner's device.
        """
        rows = at_once or len(ids)
        # Batches whose hidden states are in memory together.
        together = max(1, TOKENS_TOGETHER // (rows * ids.shape[1])) * rows
        walks = ids.split(together)
        # Each call of a walk is a step, and so is what stands behind the blocks for each batch.
        steps = sum(self._walked + -(-len(walk) // rows) for walk in walks)
        done, losses = 0, []
        progress(what, done, steps)

        def tell() -> None:
            nonlocal done
            done += 1
            progress(what, done, steps)

        for walk in walks:
            losses += self._walk(walk.split(rows), tell)
        return torch.cat(losses)

    def count_predicted(self, ids: Tensor) -> int:
        """Return how many tokens of ids [N, S] but the first of each row have a logit."""
        vocabulary = self._types[self._runner.program.outputs[0]].shape[-1]
        targets = ids[:, 1:]
        if not isinstance(vocabulary, int):
            return targets.numel()
        return int(predicted(targets, vocabulary).sum())

    @property
    def _walked(self) -> int:
        """How many calls are run for all batches; those behind are for one batch at a time."""
        return min(self._first, self._calls - 1)

    @torch.no_grad()
    def _walk(self, batches: Sequence[Tensor], tell: Callable[[], None]) -> list[Tensor]:
        """Return the log-probabilities of every batch [B, S]: fp32 [B, S - 1]."""
        runner = self._runner
        batches = [ids.to(runner.device) for ids in batches]
        environments = [runner.window_inputs(ids) for ids in batches]
        for _ in runner.run_calls(environments, 0, self._walked):
            tell()
        found = list[Tensor]()
        with runner.holding(self._walked, self._calls):
            while environments:
                found.append(self._of_hidden(batches[len(found)], environments.pop(0)))
                tell()
        return found

    def _of_hidden(self, ids: Tensor, environment: dict[str, Any]) -> Tensor:
        """Return those of ids [B, S] by what the calls that are run for all batches gave."""
        return self.of_values(ids, environment, self._walked)

    def of_values(self, ids: Tensor, environment: dict[str, Any], position: int) -> Tensor:
        """Return those of ids [B, S], fp32 [B, S - 1], by the values in front of a call.

        Args:
            environment: The program's values by name; what further calls make is added.
            position: That of the call among the program's.
        """
        parts = [
            token_log_likelihoods(logits, ids[:, start + 1 : start + 1 + logits.shape[1]])
            for start, logits in self.logits_in_parts(
                ids, environment, position, stop=ids.shape[1] - 1
            )
        ]
        return torch.cat(parts, 1)

    @torch.no_grad()
    def logits_in_parts(
        self,
        ids: Tensor,
        environment: dict[str, Any],
        position: int,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the logits of tokens, those of a few hundred at a time.

        Args:
            ids, environment, position: As for `of_values`.
            start, stop: The first token, and the one behind the last; all of them by default.

        Yields:
            The index of the first token of a part, and the part's logits [B, n, vocab].
        """
        runner, output = self._runner, self._runner.program.outputs[0]
        cut = max(position, self._first)
        for _ in runner.run_calls([environment], position, cut):
            pass
        stop = ids.shape[1] if stop is None else stop
        for begin in range(start, stop, self._tokens_at_once(ids)):
            end = min(begin + self._tokens_at_once(ids), stop)
            part = {n: self._cut(n, value, begin, end) for n, value in environment.items()}
            for _ in runner.run_calls([part], cut, self._calls):
                pass
            yield begin, part[output]

    def _tokens_at_once(self, ids: Tensor) -> int:
        """Return of how many tokens of each row logits are in memory at once."""
        vocabulary = self._types[self._runner.program.outputs[0]].shape[-1]
        if self._first == self._calls or not isinstance(vocabulary, int):
            return ids.shape[1]
        return max(1, NUMBERS_AT_ONCE // (vocabulary * len(ids)))

    def _cut(self, name: str, value: Any, start: int, stop: int) -> Any:
        """Return the tokens from `start` to `stop` of a program value, on its axis of tokens."""
        if value is None or S not in self._types[name].shape:
            return value
        return value.narrow(self._types[name].shape.index(S), start, stop - start)


_ACROSS_TOKENS = ("attention", "policy_attention", "by_length", "ntk_frequencies")
"""Ops of the IR whose result for a token depends on other tokens, or on all positions."""


def _by_token(program: Program, position: int, types: Mapping[Value, Type]) -> bool:
    """Return whether a call makes of each token what it makes of it alone."""
    call = program.calls[position]
    function = program.functions[call.function]
    values = [*function.params, *(value for node in function.nodes for value in node.outputs)]
    for value in values:
        counted = [size for size in types[value].shape if S in getattr(size, "free_symbols", ())]
        if counted not in ([], [S]):  # scores of pairs, or tokens of all rows behind one another
            return False
    return not function.caches and not any(
        node.op in _ACROSS_TOKENS or mixes_tokens(node, resolve_attrs(node, call), types)
        for node in function.nodes
    )
