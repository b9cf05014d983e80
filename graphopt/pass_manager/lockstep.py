"""What an exact pass changed, run before and after it in fp64 on the same inputs.

What is the same expression of the same things before and after is not run: see
`graphopt.pass_manager.numbering`. Of the calls that changed, one of each kind is: see
`graphopt.pass_manager.pairing`. In fp64 rounding explains so little that an error of 1e-4 in one
head of one block stands out.

Blocks that did not change hand the stream on as it came, so that changed ones are fed by the
embedding. Where results differ, both programs are run to their end and their outputs compared: a
pass may move work from one call into another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from graphopt.execute.interpreter import complete_inputs
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Function, Program
from graphopt.ir.parts import Zeros, whole_of
from graphopt.ir.types import B, S
from graphopt.pass_manager.comparison import Comparison, Differs, Unable, relative_difference
from graphopt.pass_manager.lengths import (
    compared_numbers,
    key_lengths,
    make_texts,
    one_regime,
    short_lengths,
)
from graphopt.pass_manager.numbering import ValueNumbers
from graphopt.pass_manager.pairing import Pair, plan_pairs, wrong_states
from graphopt.pass_manager.stepping import Side, Step, Undivided, is_look_up, places

FP64_TOLERANCE = 1e-9
"""Tolerance relative to a result's largest number: some 1e5 roundings of fp64, one on another."""

ROUNDINGS = 32
"""Roundings of a weight that a pass computed that may add up."""

MOST = 1e-4
"""The largest tolerance, however coarse the weights are that a pass computed."""

REACH = 512
"""Tokens that are run because an ATen operator compares with so many, at most."""

CHUNK, NUMBERS = 4096, 1 << 30
"""Tokens that are looked up at once, and numbers of their rows over all."""

_FAILURES = (RuntimeError, IndexError, ValueError, KeyError, AssertionError)


def compare_calls(
    before: Program, after: Program, *, device: torch.device | None = None, seed: int = 0
) -> Comparison:
    """Compare two programs call by call in fp64.

    Raises:
        SourceError: A weight holds NaN or Inf, or cannot be read.
    """
    wrong = wrong_states(before, after)
    if wrong is not None:
        return Comparison(error=wrong)
    return _Lockstep(before, after, device or torch.device("cpu"), seed).run()


class _Lockstep:
    def __init__(self, before: Program, after: Program, device: torch.device, seed: int) -> None:
        self.device = device
        self.plan = plan_pairs(before, after)
        self.result = Comparison(self.plan.changed, self.plan.kinds)
        short = short_lengths(key_lengths(before) | key_lengths(after))
        self.sides = Side(before, short, device), Side(after, short, device)
        compared = compared_numbers(self._functions_to_run())
        reach = [number for _, number in compared if number <= REACH]
        self.texts = make_texts(before, after, [*short.values(), *reach], seed)
        self.at_all_positions = self.texts
        if self.sides[0].has_states != self.sides[1].has_states:
            self.texts = one_regime(self.texts, before, after)
        length = self.texts.batches[0]["input_ids"].shape[1]
        self.result.not_run += [
            f"{where} compares with {number}, and texts of {length} tokens were run"
            for where, number in compared
            if number >= length
        ]
        self.blocks = {block.position: block.stream for block in find_blocks(before)}
        self.read = {*after.outputs, *(name for call in after.calls for name in call.args)}
        numbers = ValueNumbers()
        old = {numbers.weight(weight) for weight in before.weights}
        self.computed = {
            weight.name
            for weight in after.weights
            if not isinstance(weight.producer, Zeros)
            and numbers.weight(replace(weight, producer=whole_of(weight.producer)[0])) not in old
        }

    def _functions_to_run(self) -> list[Function]:
        found: dict[tuple[int, str], Function] = {}
        for pair in self.plan.pairs:
            for number, index in enumerate((pair.before, pair.after)):
                if index is not None and (pair.run or not self.plan.complete):
                    function = self.sides[number].function(index)
                    found[number, function.name] = function
        return list(found.values())

    def run(self) -> Comparison:
        result, batches = self.result, list(self.texts.batches)
        if not self.plan.complete:
            result.error = self._outputs_differ(batches)
            return result
        last = max((n for n, pair in enumerate(self.plan.pairs) if pair.run), default=-1)
        self._begin(batches)
        for pair in self.plan.pairs[: last + 1]:
            try:
                self._advance(pair)
            except Differs as difference:
                result.error = str(difference)
                if not difference.is_choice:
                    shown_by = difference.batches or batches
                    result.error = self._outputs_differ(shown_by, result.error)
                break
            except Unable as reason:
                result.not_run.append(str(reason))
                break
        return result

    def _note(self, what: str) -> None:
        if what not in self.result.not_run:
            self.result.not_run.append(what)

    def _begin(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        for side in self.sides:
            side.begin(batches)

    def _advance(self, pair: Pair) -> None:
        """Go on behind a pair.

        Raises:
            Differs: It runs both calls, and their results differ.
        """
        first, second = self.sides
        i, j = pair.before, pair.after
        if i is None or j is None:
            for side, index in zip(self.sides, (i, j), strict=True):
                if index is not None:
                    side.advance(index)
            return
        call = first.program.calls[i]
        if pair.run:
            self._compare(i, j, pair.equal)
        elif i in self.blocks:
            for values in first.values:
                values[call.results[0]] = values[call.args[self.blocks[i]]]
        else:
            first.advance(i)
        more = not pair.equal.keys() >= set(second.program.calls[j].results)
        if not pair.run and (more or (second.has_states and not second.is_divided(j))):
            second.advance(j)
        for ours, theirs in zip(first.values, second.values, strict=True):
            # What has no value for a whole text is each side's own, step by step.
            known = {name: ours[other] for name, other in pair.equal.items() if other in ours}
            theirs.update(known)

    # Comparing two calls

    def _compare(self, i: int, j: int, equal: Mapping[str, str]) -> None:
        first, second = self.sides
        weights = first.weights(i), second.weights(j)
        observed = set(first.observed(i)) & set(second.observed(j))
        equal = {**equal, **{name: name for name in observed}}
        for number, (ours, theirs) in enumerate(zip(first.values, second.values, strict=True)):
            steps = first.steps(number), second.steps(number)
            results = self._one(i, j, equal, weights, ours, theirs, steps)
            ours.update(results[0])
            theirs.update(results[1])
        self._every_row(i, j, equal, weights)

    def _one(
        self,
        i: int,
        j: int,
        equal: Mapping[str, str],
        weights: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        ours: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor],
        steps: tuple[list[Step], list[Step]],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run both calls on one batch and compare the results.

        Raises:
            Differs: By more than rounding explains.
            Unable: The call before cannot be run on its own.
        """
        first, second = self.sides
        where = first.program.calls[i].path or first.program.calls[i].function
        try:
            expected = first.run(i, weights[0], ours, steps[0])
        except (Undivided, *_FAILURES) as reason:
            raise Unable(f"{where} cannot be run on its own: {reason}") from reason
        try:
            results = second.run(j, weights[1], theirs, steps[1])
        except Undivided as reason:
            self._note(f"{where} in steps: {reason}")
            return expected, {name: expected[other] for name, other in equal.items()}
        except _FAILURES as reason:
            raise Differs(f"{where} cannot be run any more: {reason}") from reason
        largest, name = self._largest(
            i, j, equal, expected, results, ours["attention_mask"], max(steps, key=len)
        )
        tolerance = self._tolerance(
            second.program.calls[j].weights.values(),
            first.is_approximate(i) or second.is_approximate(j),
        )
        if largest > tolerance:
            moved = self._moved_by_rounding(j, weights[1], theirs, results, steps[1])
            tolerance += 4 * moved
        if not largest <= tolerance:
            of = "" if name in first.observed(i) else f" of {where}"
            raise Differs(
                f"{name}{of} differs in fp64 by {largest:.1e} of its largest number, where "
                f"rounding explains {tolerance:.0e}",
                is_choice=not of,
            )
        self.result.largest = max(self.result.largest, largest)
        return expected, results

    def _largest(
        self,
        i: int,
        j: int,
        equal: Mapping[str, str],
        expected: Mapping[str, Tensor],
        results: Mapping[str, Tensor],
        mask: Tensor,
        steps: list[Step],
    ) -> tuple[float, str]:
        """Return the largest difference of results that are to be equal, and whose it is."""
        first, second = self.sides
        stepping = second if second.has_states else first
        index = j if second.has_states else i
        found = (0.0, "")
        for name, other in equal.items():
            kind = stepping.type_of(index, name if second.has_states else other)
            if name not in results:
                if name in self.read:
                    where = second.program.calls[j].path or second.program.calls[j].function
                    self._note(f"{name} of {where} in steps: {kind} cannot be divided")
                continue
            old, new = expected[other], results[name]
            if old.shape != new.shape:
                raise Differs(f"{name} became {list(new.shape)} from {list(old.shape)}")
            length = mask.shape[1]
            for start, stop in steps:
                part = places(kind, start, stop, length)
                real = mask[:, start:stop].bool() if kind.shape[:2] == (B, S) else None
                found = max(found, (relative_difference(old[part], new[part], real), name))
        return found

    def _tolerance(self, read: Iterable[str], approximate: bool = False) -> float:
        """Return what rounding explains of results, relative to the largest number.

        A weight that the pass computed is off by some roundings of its own dtype.

        Args:
            read: Names of weights after the pass.
            approximate: Whether a table was not in fp64.
        """
        dtypes = {self.sides[1].program.weights[name].dtype for name in self.computed & set(read)}
        dtypes |= {torch.float32} if approximate else set()
        steps = [torch.finfo(dtype).eps / 2 for dtype in dtypes if dtype.is_floating_point]
        return max([FP64_TOLERANCE, *(min(ROUNDINGS * step, MOST) for step in steps)])

    def _moved_by_rounding(
        self,
        j: int,
        weights: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        results: Mapping[str, Tensor],
        steps: list[Step],
    ) -> float:
        """Return by how much results move if the last bit of computed weights is another one.

        A frequency's last bit counts for as much as the position that it is multiplied by.
        """
        after = self.sides[1]
        call = after.program.calls[j]
        nudged = dict(weights)
        for slot, name in call.weights.items():
            kind = after.program.weights[name].dtype
            if name in self.computed and kind.is_floating_point:
                sign = torch.arange(weights[slot].numel(), device=self.device) % 2 * 2 - 1
                step = sign.reshape(weights[slot].shape) * (torch.finfo(kind).eps / 2)
                nudged[slot] = weights[slot] * (1 + step)
        if not any(name in self.computed for name in call.weights.values()):
            return 0.0
        moved = after.run(j, nudged, values, steps)
        return max(
            (relative_difference(results[name], moved[name], None) for name in results), default=0.0
        )

    def _every_row(
        self,
        i: int,
        j: int,
        equal: Mapping[str, str],
        weights: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    ) -> None:
        """Compare look-ups for every token and every position."""
        first, second = self.sides
        calls = first.program.calls[i], second.program.calls[j]
        names = {*calls[0].args, *calls[1].args}
        where = calls[0].path or calls[0].function
        if not names & {"input_ids", "position_ids"}:
            return
        rows = max(
            self.texts.rows if "input_ids" in names else 0,
            self.texts.positions if "position_ids" in names else 0,
        )
        light = is_look_up(first.program, calls[0]) and is_look_up(second.program, calls[1])
        if not light or not names <= set(first.program.inputs):
            self.result.not_run.append(
                f"{where} does more than to look up rows: of {rows}, those of the texts were run"
            )
            return
        # Positions that a call counts itself go no further than their table.
        size = min(CHUNK, self.texts.positions)
        starts = list(range(0, rows, size))
        width = max((t.shape[-1] for t in first.values[0].values() if t.dim() == 3), default=1)
        most = max(1, NUMBERS // (size * width))
        if len(starts) > most:
            starts = starts[:: math.ceil(len(starts) / most)]
            self.result.not_run.append(
                f"{where}: of {rows} rows and positions, {len(starts) * size} were run"
            )
        for start in starts:
            numbers = torch.arange(start, min(start + size, rows))
            batch, whole = self._batch(numbers), [(0, len(numbers))]
            try:
                self._one(i, j, equal, weights, batch, batch, (whole, whole))
            except Differs as difference:
                raise Differs(
                    str(difference), self._where_they_differ(i, j, equal, weights, numbers)
                ) from None

    def _batch(self, numbers: Tensor) -> dict[str, Tensor]:
        batch = complete_inputs(
            {
                "input_ids": (numbers % self.texts.rows)[None],
                "position_ids": (numbers % self.texts.positions)[None],
            }
        )
        return {name: value.to(self.device) for name, value in batch.items()}

    def _where_they_differ(
        self,
        i: int,
        j: int,
        equal: Mapping[str, str],
        weights: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        numbers: Tensor,
    ) -> list[dict[str, Tensor]]:
        """Return texts with a few of the tokens and positions for which a look-up differs."""
        while len(numbers) > 8:
            for half in numbers.tensor_split(2):
                batch, whole = self._batch(half), [(0, len(half))]
                try:
                    self._one(i, j, equal, weights, batch, batch, (whole, whole))
                except Differs:
                    numbers = half
                    break
            else:
                break
        # Beside others: a rotation shows in how far two tokens are apart.
        others = torch.arange(min(8, self.texts.positions))
        far = torch.linspace(0, self.texts.positions - 1, 8).long()
        beside = (numbers, torch.cat([others, numbers]), torch.cat([far, numbers]))
        return [self._batch(chosen) for chosen in beside]

    # Comparing whole programs

    def _outputs_differ(
        self, batches: Sequence[Mapping[str, Tensor]], reason: str = ""
    ) -> str | None:
        """Run both programs to the end; return `reason`, or in what their outputs differ.

        Texts at one position, as they are for steps, don't show how far it is from another.
        """
        error = self._run_to_the_end(batches, reason)
        if error is None and self.at_all_positions is not self.texts:
            for side in self.sides:
                side.in_steps = False
            error = self._run_to_the_end(self.at_all_positions.batches, reason)
        return error

    def _run_to_the_end(self, batches: Sequence[Mapping[str, Tensor]], reason: str) -> str | None:
        self._begin(batches)
        try:
            for side in self.sides:
                for index in range(len(side.program.calls)):
                    side.advance(index)
        except Undivided as unable:
            self._note(f"the whole program in steps: {unable}")
            return reason or None
        except _FAILURES as failure:
            return reason or f"it cannot be run any more: {failure}"
        first, second = self.sides
        largest = 0.0
        for ours, theirs in zip(first.values, second.values, strict=True):
            for old, new in zip(first.program.outputs, second.program.outputs, strict=True):
                if ours[old].shape != theirs[new].shape:
                    return reason or f"{new} became {list(theirs[new].shape)}"
                mask = ours["attention_mask"].bool()
                real = mask if ours[old].shape[:2] == mask.shape else None
                largest = max(largest, relative_difference(ours[old], theirs[new], real))
        calls = len(second.program.calls)
        approximate = any(second.is_approximate(j) for j in range(calls))
        tolerance = self._tolerance(self.computed, approximate)
        if largest <= tolerance:
            self.result.largest = max(self.result.largest, largest)
            return None
        return reason or (
            f"outputs differ in fp64 by {largest:.1e} of the largest number, where rounding "
            f"explains {tolerance:.0e}"
        )
