"""Carving the feed-forward parts of a model, block by block."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from graphopt.calibration.expert_load import expert_loads
from graphopt.calibration.layer_sensitivity import LayerSensitivity, measure_sensitivity
from graphopt.calibration.neuron_energy import mean_energies, static_order
from graphopt.calibration.output_path import OutputNorm, OutputPath
from graphopt.calibration.reconstruction import Reconstruction, reconstruct
from graphopt.calibration.routing_thresholds import calibrate_thresholds
from graphopt.calibration.text import (
    PERPLEXITY_WINDOWS,
    held_out_perplexity,
)
from graphopt.execute.batch_sizes import memory_of
from graphopt.execute.block_runner import calibration_runner
from graphopt.execute.hidden_states import BlockStep, HiddenStateStream, PerBatch
from graphopt.ir.blocks import Block, block_name, find_blocks
from graphopt.ir.dtypes import scoring_dtype
from graphopt.ir.expert_neurons import neuron_count
from graphopt.ir.feed_forward import (
    FeedForward,
    Split,
    carve_call,
    routed_gates,
    with_experts,
)
from graphopt.ir.graph import Function, Program, unique_name
from graphopt.ir.layer_config import decoder_config, shrink_expert_width
from graphopt.ir.mixture import Mixture, find_mixtures
from graphopt.ir.shapes import infer_program
from graphopt.ir.weights import SharedSources
from graphopt.pass_manager.contract import Context, PassResult, Skip, Statement, Statements
from graphopt.pass_manager.expert_statements import CarvedExperts, CarvedMixture
from graphopt.pass_manager.outside_blocks import outside_blocks
from graphopt.pass_manager.statements import DividedNeurons, DividedPart
from graphopt.passes.carve_moe.activations import PartActivations
from graphopt.passes.carve_moe.division import (
    Division,
    cosine_hidden,
    divide_as_published,
    divide_by_fit,
    top_k_indicators,
)
from graphopt.passes.carve_moe.measure import measure_division
from graphopt.passes.carve_moe.mixtures import ExpertCarving
from graphopt.passes.carve_moe.parts import output_path, parts_of
from graphopt.passes.carve_moe.record import Carved, CarvedParts, PartSensitivity
from graphopt.passes.carve_moe.text import CarvingText
from graphopt.passes.carve_moe.work import work_of
from graphopt.report.record import Step
from graphopt.solvers.budget import allocate_budget
from graphopt.support.clock import Clock
from graphopt.support.per_device import PerDevice
from graphopt.support.progress import Progress, silent

if TYPE_CHECKING:
    from graphopt.passes.carve_moe.carve_moe import CarveMoe

SENSITIVITY_TOKENS = PerDevice(cpu=512, gpu=4096)
"""Tokens on which the sensitivity of parts is measured; at least one window."""


class Carving:
    """One run of the pass."""

    def __init__(self, options: CarveMoe, program: Program, context: Context) -> None:
        self.options, self.program, self.context = options, program, context
        self.original = program.copy()
        self.device = context.device
        self.text = CarvingText.of(options, program, context)
        self.windows, self.held = self.text.windows, self.text.held
        self.rewritten_functions: dict[tuple[str, int], tuple[Function, dict[str, str]]] = {}
        self.clock = Clock(
            "measuring", "model", "dividing", "reconstructing", "thresholds", "comparing"
        )
        self.sensitivity: dict[int, LayerSensitivity] = {}
        self.reconstructions: list[Reconstruction] = []
        # With all groups run nothing is missing.
        whole = options.shared + options.active == options.experts
        self.reconstructs = options.reconstruct and options.mode == "fit" and not whole

    def run(self) -> PassResult:
        program, found = self.program, parts_of(self.program)
        numbers = self._numbers(found)
        skipped = outside_blocks(self.program)
        perplexity: list[Step] = []
        control: float | None = None
        carved: list[Carved] = []
        divided: list[DividedPart] = []
        experts: list[CarvedMixture] = []
        mixtures = self._mixtures(skipped)
        # The dense block, the carved one and the teacher's are made of the same weights.
        sources = SharedSources()
        student = self._stream(program, sources, self.context.progress)
        teacher = self._stream(self.original, sources, silent) if self.reconstructs else None
        for block in student:
            sources.forget()
            if teacher is not None:
                with self.clock.counting("model"):
                    teacher.current().advance()
            form = found[block.index][1]
            own: frozenset[str] = frozenset()
            if block.index in mixtures:
                mixture, own = self._carve_experts(block, mixtures[block.index], carved)
                experts.append(replace(mixture, beside=not isinstance(form, str)))
                block = block.replace()
                if isinstance(form, str):
                    with self.clock.counting("model"):
                        block.advance()
                    continue
                form = parts_of(program)[block.index][1]
            if isinstance(form, str) or block.index not in numbers:
                reason = form if isinstance(form, str) else "all of its groups are run"
                skipped.append(Skip(block.name, reason))
                with self.clock.counting("model"):
                    block.advance()
                continue
            path = output_path(program, block.block, form)
            norm = None if isinstance(path, str) else path.output_norm(program, block)
            part = PartActivations.of(
                block, form, numbers[block.index], self.options.experts,
                norm, self.clock, memory_of(self.device, self.context.memory),
            )  # fmt: skip
            with self.clock.counting("dividing"):
                division = self._divide(part)
                self._put(part, division)
            order = tuple(division.order.tolist())
            divided.append(
                DividedPart(block.index, order, division.shared, reconstructed=False, solved=own)
            )
            gates = self._run_carved(block)
            with self.clock.counting("dividing"):
                carved.append(
                    measure_division(
                        part, division, gates, self.options.active, self.options.experts,
                        threshold=self.options.threshold, seed=self.context.seed,
                    )
                )  # fmt: skip
            if teacher is None:
                continue
            if isinstance(path, str):
                skipped.append(Skip(f"{block.name}: reconstruction", path))
                continue
            with self.clock.counting("reconstructing"):
                self.reconstructions.append(
                    self._reconstruct(part, division, gates, path, norm, student, teacher.hidden)
                )
            gain = None if norm is None else norm.gain_weight
            solved = own if gain is None else own | {gain}
            divided[-1] = replace(divided[-1], reconstructed=True, solved=solved)
        program.prune_unused()
        if self.options.threshold:
            with self.clock.counting("thresholds"):
                self._calibrate(carved)
        if self.options.control:
            with self.clock.counting("comparing"):
                perplexity, control = self._compare()
        record = CarvedParts(
            split=f"S{self.options.shared}A{self.options.active}E{self.options.experts}",
            parts=carved,
            reconstructions=self.reconstructions,
            sensitivity=[
                PartSensitivity(where=block_name(program, found[number][0]), kl=part.kl)
                for number, part in self.sensitivity.items()
            ],
            work=work_of(self.original, program),
            perplexity=perplexity,
            control=control,
            experts_run=(
                statistics.mean(sum(part.load) for part in carved)
                if carved and self.options.threshold
                else None
            ),
            seconds=self.clock.seconds,
            batches=self.text.at_once.describe("A batch"),
        )
        matched = len(found) + sum(mixture.beside for mixture in experts)
        return PassResult(program, matched, len(carved), skipped, record, _stated(divided, experts))

    def _mixtures(self, skipped: list[Skip]) -> dict[int, Mixture]:
        """Return the mixtures whose experts are carved, by the index of their block."""
        if not self.options.mixtures:
            return {}
        places = {block.position: n for n, block in enumerate(find_blocks(self.program))}
        read: dict[int, Mixture] = {}
        kinds, _ = infer_program(self.program)
        split = self.options.expert_split(reconstruct=self.reconstructs)
        for block, mixture in find_mixtures(self.program):
            reason = mixture if isinstance(mixture, str) else None
            if isinstance(mixture, Mixture):
                neurons = neuron_count(kinds[block.position], mixture)
                if not split.active and split.left_of(neurons) == neurons:
                    reason = f"all of its experts' {neurons} neurons would be left"
                else:
                    read[places[block.position]] = mixture
            if reason is not None:
                skipped.append(Skip(f"{block_name(self.program, block)}: experts", reason))
        return read

    def _carve_experts(
        self, block: BlockStep, mixture: Mixture, carved: list[Carved]
    ) -> tuple[CarvedMixture, frozenset[str]]:
        """Carve the experts of a block's mixture, in the program.

        Returns:
            What is stated of them, and the names of the weights that they were made of.
        """
        options = self.options
        types = infer_program(self.program)[0][block.block.position]
        split = options.expert_split(reconstruct=self.reconstructs)
        neurons = neuron_count(types, mixture)
        with self.clock.counting("model"):
            carving = ExpertCarving(block, mixture, types, split)
        with self.clock.counting("dividing"):
            divisions = carving.divide()
            carving.put(self.program, divisions)
            carved.append(carving.measure(divisions, self.context.seed))
        if self.reconstructs:
            with self.clock.counting("reconstructing"):
                self.reconstructions.append(carving.reconstruct(self.program, divisions))
        if not options.active:
            config = decoder_config(self.program.config)
            shrink_expert_width(config, neurons, len(divisions[0].order))
        return carving.statement(divisions), carving.own_weights

    def _numbers(self, found: list[tuple[Block, FeedForward | str]]) -> dict[int, int]:
        """Return how many shared groups parts have, by number; nothing for those left whole."""
        options = self.options
        forms = {n: form for n, (_, form) in enumerate(found) if isinstance(form, FeedForward)}
        if not options.layerwise_budget:
            return dict.fromkeys(forms, options.shared)
        learn = self.windows[: -self.held]
        count = max(1, SENSITIVITY_TOKENS.on(self.device) // learn.shape[1])
        with self.clock.counting("measuring"):
            self.sensitivity = self.sensitivity or measure_sensitivity(
                self.program, forms, learn[:count], options.experts,
                options.shared + options.active, device=self.device,
                progress=self.context.progress,
            )  # fmt: skip
            # Without a router something must be left.
            least, most = 0 if options.active else 1, options.experts - options.active
            sizes = [part.size for part in self.sensitivity.values()]
            costs = [
                [part.kl_at(number + options.active) for number in range(least, most + 1)]
                for part in self.sensitivity.values()
            ]
            shared = allocate_budget(costs, sizes, least, options.shared * sum(sizes))
        return {n: own for n, own in zip(self.sensitivity, shared, strict=True) if own < most}

    def _stream(
        self, program: Program, sources: SharedSources, progress: Progress
    ) -> HiddenStateStream:
        runner = calibration_runner(program, self.device, sources)
        return HiddenStateStream(
            runner, self.windows, held_out=self.held, tokens_at_once=self.text.at_once.tokens,
            progress=progress, what="carving",
        )  # fmt: skip

    def _divide(self, part: PartActivations) -> Division:
        options = self.options
        size = part.width // options.experts
        shared, experts = part.shared * size, options.experts - part.shared
        learn = part.learnt
        if not options.active:
            # What is left out is an expert that nothing reads.
            order = static_order(mean_energies(learn.energy, part.ranks))
            return Division(order[:shared], shared, {})
        if options.mode == "fit":
            return divide_by_fit(
                learn, part.held_out, shared, experts, options.active, options.rounds,
                threshold=options.threshold,
            )  # fmt: skip
        gate, up = part.weights.get("gate"), part.weights["up"]

        def indicators_of(batch: int) -> Tensor:
            if options.cosine:
                hidden = cosine_hidden(part.x[batch], gate, up, part.part.act)
            else:
                hidden = part.hidden[batch]
            return top_k_indicators(hidden, options.k_activations)

        indicators = PerBatch.of(range(part.learn), indicators_of)
        return divide_as_published(indicators, gate, up, shared, experts, part.ranks)

    def _put(self, part: PartActivations, division: Division) -> None:
        program, options = self.program, self.options
        call = program.calls[part.block.block.position]
        function = part.block.function
        key = (function.name, part.shared)
        if key not in self.rewritten_functions:
            experts = options.experts - part.shared if options.active else 0
            split = Split(division.shared, experts, options.active, options.threshold)
            name = unique_name(f"{function.name}_experts", set(program.functions))
            router = "neuron" if options.mode == "published" else "linear"
            self.rewritten_functions[key] = with_experts(
                function, part.part, split, name, router=router
            )
            program.functions[name] = self.rewritten_functions[key][0]
        rewritten, slots = self.rewritten_functions[key]
        router_cpu = {name: value.cpu() for name, value in division.router.items()}
        carve_call(
            program,
            call,
            part.part,
            rewritten,
            slots,
            division.order.cpu(),
            division.shared,
            router_cpu,
        )

    def _run_carved(self, block: BlockStep) -> list[Tensor]:
        """Go on behind a block that is carved; return its gates, [T, E] for every batch.

        There are none without experts.
        """
        gates: list[Tensor] = []

        def keep(batch: int, tensor: Tensor) -> None:
            gates.append(tensor.flatten(0, -2).float())

        with self.clock.counting("model"):
            choices = [node.output for node in routed_gates(block.replace().function)]
            block.advance(observers=dict.fromkeys(choices, keep))
        return gates

    def _reconstruct(
        self,
        part: PartActivations,
        division: Division,
        gates: list[Tensor],
        path: OutputPath,
        norm: OutputNorm | None,
        student: HiddenStateStream,
        targets: list[Tensor],
    ) -> Reconstruction:
        """Solve for a part's down projections anew, and move the stream behind it with them."""
        shared, size = division.shared, part.width // self.options.experts
        behind = student.hidden
        factor = path.factor(part.block.call)

        def features_and_behind(batch: int) -> tuple[Tensor, Tensor]:
            features = part.hidden[batch][:, division.order]
            if gates:
                features[:, shared:] *= gates[batch].repeat_interleave(size, 1)
            if factor != 1:
                features *= factor
            return features, behind[batch].to(self.device)

        call = self.program.calls[part.block.block.position]
        columns = {"down.shared": slice(0, shared), "down.experts": slice(shared, None)}
        weights = {
            call.weights[slot]: columns[holds]
            for slot, holds in self.rewritten_functions[part.block.function.name, part.shared][
                1
            ].items()
            if holds in columns
        }
        outcome, moved = reconstruct(
            self.program, part.block.name, weights,
            PerBatch.of(range(len(behind)), features_and_behind, student.fits_at_once),
            targets, student.held_out, norm, student.ranks,
        )  # fmt: skip
        student.skip_to(student.index, moved)
        return outcome

    def _calibrate(self, carved: list[Carved]) -> None:
        """Set thresholds on text that was not learnt from, and measure loads on held-out text."""
        calibrate_thresholds(self.program, self.text.unseen, self.device)
        held_out = self.text.held_out
        loads = dict(expert_loads(self.program, held_out, self.device))
        carved[:] = [replace(part, load=loads[part.where]) for part in carved]

    def _compare(self) -> tuple[list[Step], float | None]:
        """Return perplexities on held-out text: before and after carving, and of the control.

        The control runs the same number of groups, the same ones for every token, made in the same
        way; there is none where this is what was made, or where all groups are run.
        """
        options = self.options
        groups = options.shared + options.active

        def perplexity(program: Program) -> float:
            dtype = scoring_dtype(program, self.device)
            windows = self.text.held_out[-PERPLEXITY_WINDOWS:]
            return held_out_perplexity(program, windows, self.device, dtype)

        steps = [
            Step(after="whole model", value=perplexity(self.original)),
            Step(after="carved", value=perplexity(self.program)),
        ]
        if not options.active or groups == options.experts:
            return steps, None
        static = replace(options, shared=groups, active=0, threshold=False, control=False)
        control = Carving(static, self.original.copy(), replace(self.context, progress=silent))
        control.sensitivity = self.sensitivity
        return steps, perplexity(control.run().program)


def _stated(divided: Sequence[DividedPart], experts: Sequence[CarvedMixture]) -> Statement:
    """Return what is stated of dense parts that were divided and of experts that were carved."""
    if not experts:
        return DividedNeurons(tuple(divided))
    parts, mixtures = ({part.block for part in stated} for stated in (divided, experts))
    return Statements(
        (
            DividedNeurons(tuple(divided), frozenset(mixtures)),
            CarvedExperts(tuple(experts), frozenset(parts)),
        )
    )
