"""One run of `quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphopt.calibration.reconstruction import held_out_windows
from graphopt.calibration.text import calibration_windows, pick, window_length
from graphopt.errors import PassError
from graphopt.execute.hidden_states import BlockStep, HiddenStateStream
from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import block_name, find_blocks, with_own_functions
from graphopt.ir.encoding import Packed, group_of
from graphopt.ir.graph import Call, Program
from graphopt.ir.weights import Array, Weight
from graphopt.pass_manager.contract import Context, PassResult, Skip
from graphopt.pass_manager.outside_blocks import outside_blocks
from graphopt.pass_manager.rounding_statements import (
    ROUNDED,
    PackedMatrix,
    RoundedProgram,
    with_dtypes_of,
)
from graphopt.passes.quantize.calibrated import BlockPair
from graphopt.passes.quantize.places import (
    Stage,
    find_places,
    round_activations,
    round_kv,
)
from graphopt.passes.quantize.record import QuantizedModel, RoundedBlock, RoundedWeight
from graphopt.passes.quantize.rounding import (
    RoundedMatrix,
    choose_grid,
    packed,
    packed_weight,
    round_to_grid,
)
from graphopt.passes.quantize.scaling import scale_features
from graphopt.passes.quantize.tables import find_tables
from graphopt.rewrite import calls_of
from graphopt.solvers.gptq import damped
from graphopt.support.clock import Clock
from graphopt.support.per_device import on_device
from graphopt.support.progress import silent

if TYPE_CHECKING:
    from graphopt.passes.quantize.quantize import Quantize

WHOLE = 16


@dataclass(frozen=True)
class _Outcome:
    """What became of a matrix: squared error and square, for relative errors of several."""

    weight: RoundedWeight
    stated: PackedMatrix
    error: float
    power: float


class Quantizing:
    """One run of the pass.

    Raises:
        PassError: The calibration text is too short, or a weight or an activation is not finite.
        SourceError: The model has no tokenizer, or a weight cannot be read.
    """

    def __init__(self, options: Quantize, program: Program, context: Context) -> None:
        self.options, self.context = options, context
        self.device = context.device
        self.clock = Clock("scaling", "measuring", "rounding")
        program = with_own_functions(program)
        self.source, self.scaled = program, 0
        self.windows: Tensor | None = None
        if options.needs_text:
            length = window_length(program, options.seqlen, self.device)
            windows = calibration_windows(program, context, length)
            self.windows = pick(windows, on_device(options.windows, self.device), context.seed)
        if options.scale:
            program = self._scale_features(program)
        # What is rounded computes the same as the source, but for roundings.
        self.dense = program
        # Gains that were scaled in wider numbers are stored as they were; so are scales of codes,
        # while the matrices that these are chosen for stay wide till then.
        self.program = with_dtypes_of(program, self.source, _packable(program))
        self.places = find_places(self.program)
        self.skipped = list(self.places.skipped) if options.w < WHOLE else outside_blocks(program)
        self.outcomes: dict[str, _Outcome] = {}
        self.streams: dict[str, float] = {}
        self.readers: set[str] = set()
        self.pending: list[Weight] = []

    def _scale_features(self, program: Program) -> Program:
        """Return a program that computes the same, its features scaled as rounding asks for."""
        options = self.options
        assert self.windows is not None

        def encoding(length: int) -> Packed:
            return Packed(options.w, group_of(options.group, length), 1, options.symmetric)

        with self.clock.counting("scaling"):
            scaled, self.scaled = scale_features(
                program, self.windows, encoding, options.clip, self.context
            )
        return scaled

    def run(self) -> PassResult:
        options = self.options
        activations, caches = self._insert_roundings()
        if options.w < WHOLE:
            if options.method == "gptq":
                self._round_on_text()
            else:
                self._round_blocks()
        self._round_tables()
        weights = [outcome.weight for outcome in self.outcomes.values()]
        record = QuantizedModel(
            w=options.w, a=options.a, kv=options.kv, method=options.method,
            weights=weights, blocks=self._blocks(), roundings=(activations, caches),
            bits_per_weight=self._bits_per_weight(),
            bytes=(_bytes(self.source), _bytes(self.program)),
            scaled=self.scaled, tokens=0 if self.windows is None else self.windows.numel(),
            seconds=self.clock.seconds,
        )  # fmt: skip
        changed = len(weights) + activations + caches
        matched = changed + len(self.skipped)
        statement = RoundedProgram(
            tuple(outcome.stated for outcome in self.outcomes.values()),
            None if options.a == WHOLE else options.a,
            None if options.kv == WHOLE else options.kv,
            self.dense if options.scale else None,
            frozenset(self.readers),
        )
        return PassResult(self.program, matched, changed, self.skipped, record, statement)

    def _insert_roundings(self) -> tuple[int, int]:
        """Put roundings into the blocks' functions; return how many calls make, of each sort."""
        options, activations, caches = self.options, 0, 0
        by_function = calls_of(self.program)
        for name, stages in self.places.stages.items():
            function, calls = self.program.functions[name], by_function[name]
            if options.a < WHOLE:
                fresh = [stage for stage in stages if not self._is_rounded(name, stage)]
                activations += len(calls) * round_activations(function, fresh, options.a)
                slots = [slot for stage in fresh for slot in stage.linears]
                self.readers |= {call.weights[slot] for call in calls for slot in slots}
            if options.kv < WHOLE:
                attentions = self.places.attentions[name]
                round_kv(function, attentions, options.kv)
                caches += len(calls) * len(attentions)
        return activations, caches

    def _is_rounded(self, function: str, stage: Stage) -> bool:
        """Return whether what linears read is rounded to as few bits already, and say so."""
        node = stage.x.node
        if node is None or node.op != ROUNDED or node.attrs["bits"] > self.options.a:
            return False
        where = f"{function}: what {', '.join(stage.linears)} reads"
        self.skipped.append(Skip(where, f"it is rounded to {node.attrs['bits']} bits already"))
        return True

    # Weights --------------------------------------------------------------------------------

    def _encoding(self, weight: Weight, bits: int) -> Packed:
        options = self.options
        length = weight.shape[1]
        group = group_of(options.group, length)
        if options.group and group != options.group:
            kind = "each output channel" if group == length else f"groups of {group}"
            reason = f"its {length} features are no multiple of {options.group}: a scale for {kind}"
            self.skipped.append(Skip(f"{weight.name}, groups of {options.group}", reason))
        return Packed(bits, group, 1, options.symmetric)

    def _round(
        self,
        weights: Sequence[Weight],
        bits: int,
        matrix: Tensor,
        moments: Tensor | None = None,
    ) -> None:
        """Put codes in the place of weights.

        Args:
            weights: Whose rows follow each other.
            matrix: What is rounded, fp32 [sum of outs, in]: the weights' values, or what makes up
                for errors in front of them.
            moments: See `round_to_grid`.
        """
        dtypes = [self.source.weights[weight.name].dtype for weight in weights]
        if len(set(dtypes)) > 1:  # scales are of each weight's own, and rows are independent
            rows_of = matrix.split([weight.shape[0] for weight in weights])
            for weight, own in zip(weights, rows_of, strict=True):
                self._round([weight], bits, own, moments)
            return
        for weight in weights:
            self._check_finite(weight.name, matrix)
        encodings = [self._encoding(weight, bits) for weight in weights]
        encoding, dtype = encodings[0], dtypes[0]
        importance = None if moments is None else moments.diagonal()
        grid = choose_grid(matrix, encoding, dtype, self.options.clip, importance)
        grid, codes = round_to_grid(matrix, grid, dtype, moments)
        start = 0
        for weight in weights:
            rows = slice(start, start + weight.shape[0])
            start = rows.stop
            rounded = packed(encoding, grid.rows(rows), codes[rows], dtype)
            self._put(weight, encoding, rounded, nearest=moments is None)

    def _put(self, weight: Weight, encoding: Packed, rounded: RoundedMatrix, nearest: bool) -> None:
        made = packed_weight(weight, encoding, rounded)
        if nearest:
            self.program.weights.replace(made)
        else:
            # The block is run on; unpacked, on its device, the weight is read at once.
            self.pending.append(made)
            values = Array(rounded.values.to(weight.dtype))
            self.program.weights.replace(weight.with_producer(values))
        source = weight.load(torch.float32).to(rounded.values.device)
        error = float((rounded.values - source).double().square().sum())
        power = max(float(source.double().square().sum()), 1e-30)
        told = RoundedWeight(weight.name, encoding.bits, encoding.group, error / power)
        stated = PackedMatrix(weight.name, encoding, error / power, nearest)
        self.outcomes[weight.name] = _Outcome(told, stated, error, power)

    def _check_finite(self, name: str, matrix: Tensor) -> None:
        if not bool(matrix.isfinite().all()):
            raise PassError(
                f"Weight {name!r} holds NaN or infinity, which no code stands for.",
                "Mend the checkpoint, or download it again.",
            )

    def _round_blocks(self) -> None:
        """Take the nearest codes, weight by weight."""
        positions = [block.position for block in find_blocks(self.program)]
        with self.clock.counting("rounding"):
            for number, position in enumerate(positions):
                call = self.program.calls[position]
                self.context.progress("rounding weights", number, len(positions))
                for stage in self.places.packable_stages(self.program, position):
                    for slot in stage.linears:
                        weight = self.program.weights[call.weights[slot]]
                        matrix = weight.load(torch.float32).to(self.device)
                        self._round([weight], self.options.w, matrix)
            self.context.progress("rounding weights", len(positions), len(positions))

    def _round_on_text(self) -> None:
        """Choose codes by what linears give on the calibration text, block by block."""
        windows = self.windows
        assert windows is not None
        held_out = held_out_windows(len(windows)) if len(windows) > 1 else 0
        dense, rounded = (
            HiddenStateStream(
                # In fp32: what is missing is a small difference of large sums.
                Runner(program, device=self.device, keep_weights=False), windows,
                held_out=held_out, progress=told, what="rounding weights",
            )
            for program, told in ((self.dense, silent), (self.program, self.context.progress))
        )  # fmt: skip
        for block in rounded:
            pair = BlockPair(dense.current(), block)
            for stage in self.places.packable_stages(self.program, block.block.position):
                self._round_stage(pair, block, stage)
                pair.reload()
            with self.clock.counting("measuring"):
                self.streams[block.name] = pair.advance()
            for weight in self.pending:
                self.program.weights.replace(weight)
            self.pending.clear()

    def _round_stage(self, pair: BlockPair, block: BlockStep, stage: Stage) -> None:
        slots = ", ".join(stage.linears)
        try:
            with self.clock.counting("measuring"):
                measured = pair.moments(stage)
            with self.clock.counting("rounding"):
                moments = damped(measured.gram)
                weights = [self.program.weights[block.call.weights[slot]] for slot in measured.rows]
                # Linears of one input have rows of one length, which are rounded together.
                matrix = torch.cat([w.load(torch.float32).to(self.device) for w in weights])
                if measured.change is not None:
                    matrix = matrix + measured.change
                self._round(weights, self.options.w, matrix, moments)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise PassError(
                f"{block.name}: the second moments of what {slots} reads have no inverse.",
                "Give more windows or a text of more variety (--calib), or take method=rtn.",
            ) from error
        except ValueError as error:
            raise PassError(
                f"{block.name}: what {slots} reads cannot be measured: {error}.",
                "Compare the model with its source (graphopt eval), or take method=rtn.",
            ) from error

    def _round_tables(self) -> None:
        """Take the nearest codes for the embeddings and the output matrix, where asked for."""
        options, tables = self.options, find_tables(self.program)
        for option, name in (("embedding", tables.embedding), ("head", tables.head)):
            bits = getattr(options, option)
            if name is None or name in self.outcomes:
                continue
            if bits == WHOLE:
                if options.w < WHOLE:
                    reason = f"{option}={WHOLE}, the default, leaves it as it is"
                    self.skipped.append(Skip(name, reason))
                continue
            with self.clock.counting("rounding"):
                weight = self.program.weights[name]
                self._round([weight], bits, weight.load(torch.float32).to(self.device))

    # What is told ---------------------------------------------------------------------------

    def _blocks(self) -> list[RoundedBlock]:
        found: list[RoundedBlock] = []
        for block in find_blocks(self.program):
            call, name = self.program.calls[block.position], block_name(self.program, block)
            mine = self._outcomes_of(call)
            power = sum(outcome.power for outcome in mine)
            error = sum(outcome.error for outcome in mine) / power if mine else None
            found.append(RoundedBlock(name, error, self.streams.get(name)))
        return found

    def _outcomes_of(self, call: Call) -> list[_Outcome]:
        names = call.weights.values()
        return [self.outcomes[name] for name in names if name in self.outcomes]

    def _bits_per_weight(self) -> float | None:
        weights = [self.program.weights[name] for name in self.outcomes]
        elements = sum(weight.numel for weight in weights)
        return 8 * sum(weight.nbytes for weight in weights) / elements if elements else None


def _packable(program: Program) -> set[str]:
    """Return the names of a program's weights of blocks that can become codes."""
    places = find_places(program)
    return {
        program.calls[position].weights[slot]
        for position, slots in places.packable.items()
        for slot in slots
    }


def _bytes(program: Program) -> int:
    return sum(weight.nbytes for weight in program.used_weights())
