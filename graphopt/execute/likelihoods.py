"""Log-probabilities of the tokens of a text, without the logits of all of it at once.

Logits are what is largest in a forward pass: of 2,048 tokens and a vocabulary of 262,144 they take
2 GB. Where what stands behind the blocks treats each token by itself, it is run over a few hundred
tokens at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.execute.interpreter import Runner
from graphopt.ir.graph import Program, Value, resolve_attrs
from graphopt.ir.shapes import infer_program
from graphopt.ir.token_mixing import mixes_tokens
from graphopt.ir.types import S, Type

ROWS_AT_ONCE = 256
"""Rows of logits whose log-softmax is in memory at once."""

NUMBERS_AT_ONCE = 2**25
"""Logits that are in memory at once, where they can be computed for a part of the tokens."""


def token_log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of each target under softmax(logits), in fp32.

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
        parts.append(part.gather(-1, index)[:, 0] - part.logsumexp(-1))
    return torch.cat(parts).view(targets.shape)


class ProgramLikelihoods:
    """The log-probabilities of the tokens of texts under a program.

    Args:
        runner: Runs the program; one that keeps weights, since it reads those behind the blocks
            for every part of the tokens.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        per_call, self._types = infer_program(runner.program)
        self._calls = self._first = len(runner.program.calls)
        # From the first call on behind which each token is treated by itself, parts suffice.
        while self._first and _by_token(runner.program, self._first - 1, per_call[self._first - 1]):
            self._first -= 1

    def of(self, ids: Tensor) -> Tensor:
        """Return fp32 [B, S - 1]: of each token but the first, given those before it in its row.

        Args:
            ids: int64 [B, S] on the runner's device, S at least 2. What a row is padded with
                stands behind its text, where no token of the text sees it.
        """
        output = self._runner.program.outputs[0]
        environment = self._runner.window_inputs(ids)
        parts = []
        with torch.no_grad():
            for _ in self._runner.run_calls([environment], 0, self._first):
                pass
            for start in range(0, ids.shape[1] - 1, self._tokens_at_once(ids)):
                targets = ids[:, start + 1 : start + 1 + self._tokens_at_once(ids)]
                stop = start + targets.shape[1]  # the last token of all predicts none
                part = {n: self._cut(n, value, start, stop) for n, value in environment.items()}
                for _ in self._runner.run_calls([part], self._first, self._calls):
                    pass
                parts.append(token_log_likelihoods(part[output], targets))
        return torch.cat(parts, 1)

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


_ACROSS_TOKENS = ("attention", "by_length", "ntk_frequencies")
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
