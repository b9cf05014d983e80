"""Running one call of a program in fp64, whole or in steps that continue each other in a cache."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch import Tensor

from graphopt.execute.checked import CheckedRunner
from graphopt.execute.function_run import run_function
from graphopt.execute.interpreter import extend_caches
from graphopt.ir.graph import Call, Function, Program
from graphopt.ir.ops.attention import ATTENTIONS
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import B, P, S, Type
from graphopt.pass_manager.lengths import with_short_lengths

LOOK_UPS = frozenset({"embedding", "aten.embedding.default", "vocab_parallel_embedding"})
"""Ops that read rows of a table by number."""

CHOICES = frozenset(
    {"route", "top_k_gating", "aten.topk.default", "aten.argmax.default", "aten.sort.default"}
)
"""Ops that choose by their operands: those may differ without any result that shows it."""

_LARGE = 1 << 30
"""Bytes in fp64 from which on a table keeps the dtype that it has."""

Step = tuple[int, int]
"""The first token of a step, and the one behind its last."""


def is_look_up(program: Program, call: Call) -> bool:
    """Return whether a call only looks rows up, and computes for every token by itself."""
    function = program.function_of(call)
    uses = function.uses()
    for slot, value in function.weights.items():
        is_vector = len(program.weights[call.weights[slot]].shape) < 2
        if not is_vector and any(node.op not in LOOK_UPS for node, _ in uses[value]):
            return False
    return all(node.op not in ATTENTIONS for node in function.nodes)


class _Fp64Runner(CheckedRunner):
    """Holds weights in fp64, but for large tables of which rows are read."""

    tables: frozenset[str] = frozenset()

    def weight(self, name: str) -> Tensor:
        if name in self.tables:
            return self.program.weights[name].load().to(self.device)
        return super().weight(name)


def _large_tables(program: Program) -> frozenset[str]:
    """Return the large weights that nothing but look-ups reads."""
    looked_up: set[str] = set()
    others: set[str] = set()
    for call in program.calls:
        function = program.function_of(call)
        uses = function.uses()
        for slot, value in function.weights.items():
            plain = all(node.op in LOOK_UPS for node, _ in uses[value])
            (looked_up if plain else others).add(call.weights[slot])
    return frozenset(
        name for name in looked_up - others if program.weights[name].numel * 8 > _LARGE
    )


def observe_choices(program: Program) -> None:
    """Make what ops choose by a result of every call, in place, under a name of its own."""
    names: dict[str, list[str]] = {}
    for call in program.calls:
        if call.function not in names:
            names[call.function] = _observe(program.function_of(call))
        where = call.path or call.function
        call.results += [f"{name} in {where}" for name in names[call.function]]


def _observe(function: Function) -> list[str]:
    names: list[str] = []
    choices = [node for node in function.nodes if node.op in CHOICES]
    for number, node in enumerate(choices):
        op, read = node.op, list(node.inputs)
        if op == "route":
            # Scores and a choice in one: the scores are computed once more, to be seen.
            scores = function.add("linear", read[:3], before=node).output
            op, read = "top_k_gating", [scores, *read[3:]]
        for place, value in enumerate(read):
            if value is not None:
                names.append(f"operand {place} of {op} {number}")
                function.results.append(value)
    return names


@dataclass
class Side:
    """One of two programs that are run beside each other.

    Attributes:
        program: As it is, with its long windows.
        values: For every batch, the live program values by name.
        in_steps: Whether texts are run in steps where there are states.
    """

    program: Program
    short: dict[int, int]
    device: torch.device
    values: list[dict[str, Tensor]] = field(default_factory=list)
    in_steps: bool = True

    def __post_init__(self) -> None:
        shortened = with_short_lengths(self.program, self.short)
        observe_choices(shortened)
        self.types, _ = infer_program(shortened)
        self.runner = _Fp64Runner(
            shortened, dtype=torch.float64, device=self.device, keep_weights=False
        )
        self.runner.tables = _large_tables(self.program)

    def function(self, index: int) -> Function:
        """Return the function that call number `index` runs, with short windows."""
        return self.runner.program.function_of(self.runner.program.calls[index])

    def observed(self, index: int) -> list[str]:
        """Return the names under which `run` gives what call number `index` chooses by."""
        call = self.runner.program.calls[index]
        return call.results[len(self.program.calls[index].results) :]

    def type_of(self, index: int, result: str) -> Type:
        """Return the type of a result of call number `index`, by the result's name."""
        place = self.runner.program.calls[index].results.index(result)
        return self.types[index][self.function(index).results[place]]

    def is_divided(self, index: int) -> bool:
        """Return whether results of call number `index` for steps are parts of those for a text."""
        for value in self.function(index).results:
            try:
                places(self.types[index][value], 1, 2, 4)
            except Undivided:
                return False
        return True

    def begin(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Put the programs' inputs in place of all values."""
        self.values = [
            {name: value.to(self.device) for name, value in batch.items()} for batch in batches
        ]

    def advance(self, index: int) -> None:
        """Run call number `index` on every batch."""
        weights = self.weights(index)
        for number, values in enumerate(self.values):
            values.update(self.run(index, weights, values, self.steps(number)))

    @property
    def has_states(self) -> bool:
        return bool(self.program.states)

    def weights(self, index: int) -> dict[str, Tensor]:
        """Return the weights of call number `index`, by slot."""
        return self.runner.call_weights(self.runner.program.calls[index])

    def is_approximate(self, index: int) -> bool:
        """Return whether a table of a call is not in fp64."""
        return bool(self.runner.tables & set(self.program.calls[index].weights.values()))

    def steps(self, batch: int) -> list[Step]:
        """Return the steps in which a batch is run: one for the first, of which others continue it.

        A program without states can run no text in steps.
        """
        length = self.values[batch]["input_ids"].shape[1]
        if batch == 0 or not (self.in_steps and self.has_states) or length < 4:
            return [(0, length)]
        cut = length // 3
        ends = [0, cut, cut + 1, length - 1, length]
        return [(start, stop) for start, stop in itertools.pairwise(ends) if start < stop]

    def run(
        self,
        index: int,
        weights: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        steps: Sequence[Step],
    ) -> dict[str, Tensor]:
        """Run call number `index` on one batch and return its results by name.

        Of a result with an axis of keys, what a step has no keys for is 0. A result whose value
        for a step is no part of that for the text is returned a step each, under `step_name` names.

        Raises:
            Undivided: A value cannot be divided into steps.
        """
        call = self.runner.program.calls[index]
        function, types = self.runner.program.function_of(call), self.types[index]
        ids = values["input_ids"]
        batch, length = ids.shape[0], ids.shape[1]
        past = self.runner.empty_cache(batch) if function.caches else {}
        whole: dict[str, Tensor] = {}
        for start, stop in steps:
            args: list[Tensor] = []
            for param, name in zip(function.params, call.args, strict=True):
                args.append(_part(values, name, types[param], (start, stop), length))
            sizes: dict[sympy.Symbol, int] = {B: batch, S: stop - start, P: start}
            with torch.no_grad():
                results, present = run_function(function, call, args, weights, sizes, past)
            extend_caches(past, present)
            for value, name, result in zip(function.results, call.results, results, strict=True):
                if result.is_floating_point():
                    result = result.double()
                try:
                    where = places(types[value], start, stop, length)
                except Undivided:
                    whole[step_name(name, start)] = result
                    continue
                if where == () or (start, stop) == (0, length):
                    whole[name] = result
                    continue
                if name not in whole:
                    shape = _whole_shape(types[value], result, length)
                    whole[name] = result.new_zeros(shape)
                whole[name][where] = result
        return whole


def step_name(name: str, start: int) -> str:
    """Return what the value of one step alone is called."""
    return f"{name} from {start}"


def _part(values: Mapping[str, Tensor], name: str, kind: Type, step: Step, length: int) -> Tensor:
    """Return a value of one step.

    Raises:
        Undivided: Neither is it known by itself, nor is it a part of the value for the text.
    """
    alone = values.get(step_name(name, step[0]))
    if alone is not None:
        return alone
    if name not in values:
        raise Undivided(f"{name} is not known for the whole text")
    return values[name][places(kind, *step, length)]


class Undivided(Exception):
    """A value of a whole text does not say what the value of a step is."""


def places(kind: Type, start: int, stop: int, length: int) -> tuple[slice, ...]:
    """Return where in the value of a whole text that of a step lies; () where it has no tokens.

    Raises:
        Undivided: Its size is another expression of the number of tokens.
    """
    if (start, stop) == (0, length):
        return ()
    found: list[slice] = []
    for size in kind.shape:
        if isinstance(size, int) or not {S, P} & size.free_symbols:
            found.append(slice(None))
        elif size == S:
            found.append(slice(start, stop))
        elif size == P + S:
            found.append(slice(0, stop))
        elif size == P:
            found.append(slice(0, start))
        else:
            raise Undivided(f"a value {kind} cannot be divided")
    return tuple(found) if any(place != slice(None) for place in found) else ()


def _whole_shape(kind: Type, result: Tensor, length: int) -> Sequence[int]:
    return [
        given if isinstance(size, int) or not {S, P} & size.free_symbols else length
        for size, given in zip(kind.shape, result.shape, strict=True)
    ]
