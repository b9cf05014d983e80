"""Width: feed-forward parts become shared neurons, and experts of which every token runs some."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from graphopt.calibration.budget import Need, measure_needs, share_out
from graphopt.calibration.carving import (
    Division,
    Tokens,
    chosen,
    divide_as_published,
    divide_by_fit,
    first_marks,
    mean_magnitudes,
    neuron_energies,
    normalised_hidden,
    static_order,
    top_marks,
)
from graphopt.calibration.reconstruction import Reconstruction, held_out_windows, reconstruct
from graphopt.calibration.text import calibration_windows, pick, window_length
from graphopt.errors import PassError, UsageError
from graphopt.execute.block_runner import calibration_runner
from graphopt.execute.hidden_states import BlockStep, HiddenStateStream, PerBatch
from graphopt.ir.blocks import Block, block_name, find_blocks, sub_blocks
from graphopt.ir.cost import total_cost, weight_products
from graphopt.ir.dataflow import region
from graphopt.ir.feed_forward import (
    FeedForward,
    Split,
    carve_call,
    feed_forwards,
    with_experts,
)
from graphopt.ir.graph import Call, Function, Program, Value, unique_name
from graphopt.ir.types import B, P, S, evaluate
from graphopt.pass_manager.contract import Context, Pass, PassResult, Skip, register_pass
from graphopt.passes.carved_parts import Carved, CarvedParts, PartNeed, Work
from graphopt.report.record import Record
from graphopt.support.devices import must_fit
from graphopt.support.per_device import PerDevice
from graphopt.support.progress import Progress, silent

NEEDS_TOKENS = PerDevice(cpu=512, gpu=4096)
"""Of which the parts' needs are measured, at least one window."""

PROMPT = 128
"""Tokens of the prompt for which the report says what the models take, as in CMoE's table 7."""


@register_pass
@dataclass
class CarveMoe(Pass):
    """Divide the neurons of every feed-forward part into `experts` equal pieces.

    `shared` of the pieces are run by every token, and of the others the `active` ones with the
    highest scores of a router. Pieces are rows and columns of the projections. `active=0` leaves
    the pieces that matter most on average, and no router.

    With `mode=fit` neurons and a linear router are fitted to each other in up to `rounds` turns
    (`graphopt.calibration.carving.divide_by_fit`). `mode=faithful` is CMoE as published (arXiv
    2502.04416): clusters of neurons that are among the `marks` largest of the same tokens, and as
    router one neuron of each. With `normalised` it marks as CMoE's code does, by activations of
    inputs and rows of the projections scaled to length 1.

    With `refit` (and `mode=fit`) the down projections are then solved for anew, by least squares
    that pull towards the weights as they are, so that the stream behind each part is nearest to
    what it was before carving. The pull is the one that is best on windows that the fit does not
    see.

    With `threshold` a token runs every expert whose score is above 0, and the router's constants
    are such that these are `active` on average: tokens that need more of them get more.

    With `by_layer` every part has a number of shared pieces of its own, which are at most `shared`
    on average: those get more by which the model loses more (`graphopt.calibration.budget`). A
    part that then runs all of its pieces is left as it is.

    Where `experts` do not divide the neurons, `pad` adds neurons of zeros.

    Blocks are carved in order, each on what the carved blocks before it give, from `windows`
    windows of `seqlen` tokens: 8 of 2048 on a GPU and 8 of 512 on a CPU.

    Legality:

    1. A block adds one feed-forward part: a projection of an activation, or of its product with
       another projection, whose parts nothing else reads. Others are left as they are.
    2. The number of neurons is a multiple of `experts`, or `pad` is given.
    """

    name: ClassVar[str] = "carve-moe"
    record: ClassVar[type[Record]] = CarvedParts
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True

    shared: Annotated[int, Field(ge=0)] = 3
    active: Annotated[int, Field(ge=0)] = 3
    experts: Annotated[int, Field(ge=2)] = 8
    mode: Literal["fit", "faithful"] = "fit"
    rounds: Annotated[int, Field(ge=0)] = 6
    refit: bool = True
    threshold: bool = False
    by_layer: bool = False
    pad: bool = False
    marks: Annotated[int, Field(ge=1)] = 10
    normalised: bool = False
    windows: Annotated[int, Field(ge=2)] = 8
    seqlen: Annotated[int, Field(ge=2)] | PerDevice[int] = PerDevice(cpu=512, gpu=2048)

    def check_options(self) -> None:
        if self.shared + self.active > self.experts or self.shared + self.active == 0:
            raise UsageError(
                f"{self.shared} shared and {self.active} active pieces are not 1 to "
                f"{self.experts}, which is how many there are.",
                "Lower shared or active, or raise experts.",
            )
        if self.pad and self.mode == "faithful":
            raise UsageError(
                "mode=faithful takes the neuron that is marked least as an expert's router, which "
                "would be one of the zeros that pad=true adds.",
                "Use mode=fit, or experts that divide the neurons.",
            )
        if self.normalised and self.mode != "faithful":
            raise UsageError(
                f"normalised=true is a way of marking neurons, which mode={self.mode} does by "
                "their energy.",
                "Leave normalised out, or take mode=faithful.",
            )
        if self.threshold and (self.mode == "faithful" or not self.active):
            what = "mode=faithful" if self.mode == "faithful" else "active=0"
            raise UsageError(
                f"threshold=true goes by scores of a fitted router, and {what} has none.",
                "Leave threshold out.",
            )
        if self.active and self.shared == self.experts:
            raise UsageError("All pieces are shared, so none can be active.", "Lower shared.")
        if self.by_layer and (not self.shared or self.shared + self.active == self.experts):
            what = "shared=0 has none" if not self.shared else "no part is to run fewer than all"
            raise UsageError(
                f"by_layer=true shares out the shared pieces of all parts, and {what}.",
                "Leave by_layer out.",
            )

    def check(self, program: Program) -> None:
        found = _parts(program)
        if not any(isinstance(part, FeedForward) for _, part in found):
            if any(node.op == "top_gates" for f in program.functions.values() for node in f.nodes):
                raise PassError(
                    f"{program.name} is carved into experts already.", "Leave carve-moe out."
                )
            reasons = sorted({part for _, part in found if isinstance(part, str)})
            raise PassError(
                f"{program.name} has no feed-forward part to carve"
                + (f": {'; '.join(reasons)}." if reasons else "."),
                "A model of experts already cannot be carved; leave carve-moe out.",
            )
        for block, part in found:
            if isinstance(part, FeedForward):
                self._check_width(block_name(program, block), _width(program, block, part))

    def _check_width(self, where: str, width: int) -> None:
        if width % self.experts and not self.pad:
            fitting = [n for n in range(2, 65) if width % n == 0]
            nearest = min(fitting, key=lambda n: abs(n - self.experts), default=None)
            raise PassError(
                f"{where} has {width} neurons, which {self.experts} pieces do not divide.",
                ("" if nearest is None else f"Take experts={nearest}, or ")
                + ("add" if nearest else "Add")
                + " neurons of zeros with pad=true.",
            )
        if width <= self.experts:
            raise PassError(
                f"{where} has {width} neurons, and {self.experts} pieces need more than one each.",
                "Lower experts.",
            )
        if self.mode == "faithful" and self.marks > width:
            raise PassError(
                f"{where} has {width} neurons, of which {self.marks} cannot be marked.",
                f"Give marks={width} or less.",
            )

    def run(self, program: Program, context: Context) -> PassResult:
        remedy = "Lower windows or seqlen, or take --device cpu."
        with must_fit(context.device, "carve-moe", remedy):
            return _Carving(self, program, context).run()


def _parts(program: Program) -> list[tuple[Block, FeedForward | str]]:
    """Return every block's feed-forward part, or why it has none that can be divided."""
    found: list[tuple[Block, FeedForward | str]] = []
    for block in find_blocks(program):
        function = program.functions[program.calls[block.position].function]
        parts = feed_forwards(function, block.stream)
        if len(parts) != 1:
            reason = f"it adds {len(parts)} feed-forward parts" if parts else "it has none"
            found.append((block, reason))
        else:
            found.append((block, parts[0]))
    return found


def _weights(program: Program, call: Call, part: FeedForward) -> dict[str, Any]:
    """Return the program weights of a part's projections, by `gate`, `up` and `down`."""
    slots = {value: slot for slot, value in program.functions[call.function].weights.items()}
    nodes = {"gate": part.gate, "up": part.up, "down": part.down}
    return {
        kind: program.weights[call.weights[slots[node.inputs[1]]]]  # type: ignore[index]
        for kind, node in nodes.items()
        if node is not None
    }


def _width(program: Program, block: Block, part: FeedForward) -> int:
    return int(_weights(program, program.calls[block.position], part)["up"].shape[0])


@dataclass(frozen=True)
class _Part:
    """A part that is carved, and its activations on the calibration text.

    Attributes:
        shared: Pieces of it that every token will run.
        weights: Its projections in fp32, by `gate`, `up` and `down`.
        x: Its input, [T, D] for every batch.
        hidden: Its hidden activations, [T, N] for every batch, with the neurons that were added.
        energy: Of the neurons, [T, N] for every batch.
        learn: How many of the batches, the first ones, are learnt from; the others are held out.
        added: Neurons of zeros.
    """

    block: BlockStep
    part: FeedForward
    shared: int
    weights: dict[str, Tensor]
    x: PerBatch[Tensor]
    hidden: PerBatch[Tensor]
    energy: PerBatch[Tensor]
    learn: int
    added: int

    @property
    def learnt(self) -> Tokens:
        return Tokens(self.x[: self.learn], self.energy[: self.learn])

    @property
    def held_out(self) -> Tokens:
        return Tokens(self.x[self.learn :], self.energy[self.learn :])

    @property
    def width(self) -> int:
        """Neurons, with those that were added."""
        return self.weights["down"].shape[1] + self.added


class _Carving:
    """One run of the pass."""

    def __init__(self, options: CarveMoe, program: Program, context: Context) -> None:
        self.options, self.program, self.context = options, program, context
        self.given = program.copy()
        self.device = context.device
        length = window_length(program, options.seqlen, self.device)
        windows = calibration_windows(program, context, length)
        windows = pick(windows, options.windows, context.seed)
        if len(windows) < 2:
            raise PassError(
                f"The calibration text has {len(windows)} windows of {length} tokens, and carving "
                "needs one to learn from and one to measure on.",
                "Give a longer text with --calib, or a lower seqlen.",
            )
        self.held = held_out_windows(len(windows))
        self._check_tokens((len(windows) - self.held) * length)
        self.windows = windows
        self.twins: dict[tuple[str, int], tuple[Function, dict[str, str]]] = {}
        self.seconds = {"measuring": 0.0, "model": 0.0, "dividing": 0.0, "refitting": 0.0}
        self.clocks: list[tuple[str, float]] = []
        self.needs: dict[int, Need] = {}
        # With all pieces run nothing is missing.
        whole = options.shared + options.active == options.experts
        self.refits = options.refit and options.mode == "fit" and not whole

    def _check_tokens(self, tokens: int) -> None:
        """Refuse so few tokens that most neurons are marked in none of them."""
        widths = [
            _width(self.program, block, part)
            for block, part in _parts(self.program)
            if isinstance(part, FeedForward)
        ]
        for width in widths if self.options.active else []:
            marks = first_marks(width) if self.options.mode == "fit" else self.options.marks
            if tokens * marks < width:
                raise PassError(
                    f"{tokens} tokens to learn from, with {marks} marked neurons each, cannot tell "
                    f"{width} neurons apart.",
                    f"Give a longer text with --calib, or windows and seqlen of {width // marks} "
                    "tokens and more.",
                )

    def run(self) -> PassResult:
        program, found = self.program, _parts(self.program)
        numbers = self._numbers(found)
        skipped: list[Skip] = []
        carved: list[Carved] = []
        refits: list[Reconstruction] = []
        student = self._stream(program, self.context.progress)
        teacher = self._stream(self.given, silent) if self.refits else None
        for block in student:
            if teacher is not None:
                with self._clock("model"):
                    teacher.current().advance()
            form = found[block.index][1]
            if isinstance(form, str) or block.index not in numbers:
                reason = form if isinstance(form, str) else "all of its pieces are run"
                skipped.append(Skip(block.name, reason))
                with self._clock("model"):
                    block.advance()
                continue
            fixed = _not_refitted(program, block.block, form)
            part = self._activations(block, form, numbers[block.index])
            with self._clock("dividing"):
                division = self._divide(part)
                self._put(part, division)
            gates = self._run_carved(block)
            with self._clock("dividing"):
                carved.append(self._measure(part, division, gates))
            if teacher is None:
                continue
            if fixed:
                skipped.append(Skip(f"{block.name}: refit", fixed))
                continue
            with self._clock("refitting"):
                refits.append(self._refit(part, division, gates, student, teacher.hidden))
        program.prune_unused()
        record = CarvedParts(
            split=f"S{self.options.shared}A{self.options.active}E{self.options.experts}",
            parts=carved,
            refits=refits,
            needs=[
                PartNeed(where=block_name(program, found[number][0]), kl=need.kl)
                for number, need in self.needs.items()
            ],
            work=self._work(),
            seconds=self.seconds,
        )
        return PassResult(program, len(found), len(carved), skipped, record)

    def _numbers(self, found: list[tuple[Block, FeedForward | str]]) -> dict[int, int]:
        """Return how many shared pieces parts have, by number; nothing for those left whole."""
        options = self.options
        forms = {n: form for n, (_, form) in enumerate(found) if isinstance(form, FeedForward)}
        if not options.by_layer:
            return dict.fromkeys(forms, options.shared)
        learn = self.windows[: -self.held]
        count = max(1, NEEDS_TOKENS.on(self.device) // learn.shape[1])
        with self._clock("measuring"):
            self.needs = measure_needs(
                self.program, forms, learn[:count], options.experts,
                options.shared + options.active, device=self.device,
                progress=self.context.progress,
            )  # fmt: skip
            # Without a router something must be left.
            least, most = 0 if options.active else 1, options.experts - options.active
            sizes = [need.size for need in self.needs.values()]
            costs = [
                [need.at(number + options.active) for number in range(least, most + 1)]
                for need in self.needs.values()
            ]
            shared = share_out(costs, sizes, least, options.shared * sum(sizes))
        return {n: own for n, own in zip(self.needs, shared, strict=True) if own < most}

    def _stream(self, program: Program, progress: Progress) -> HiddenStateStream:
        runner = calibration_runner(program, self.device)
        return HiddenStateStream(
            runner, self.windows, held_out=self.held, progress=progress, what="carving"
        )

    @contextlib.contextmanager
    def _clock(self, what: str) -> Iterator[None]:
        """Count the body's seconds as `what`, but those of clocks inside it as theirs."""
        self._lap()
        self.clocks.append((what, time.perf_counter()))
        try:
            yield
        finally:
            self._lap()
            self.clocks.pop()
            if self.clocks:
                self.clocks[-1] = (self.clocks[-1][0], time.perf_counter())

    def _lap(self) -> None:
        if self.clocks:
            what, started = self.clocks[-1]
            self.seconds[what] += time.perf_counter() - started

    def _activations(self, block: BlockStep, form: FeedForward, shared: int) -> _Part:
        """Return a part's activations on what the carved blocks before it give.

        They are made anew batch by batch, from the residual stream in front of the part.
        """
        entry = _entry(block, form)
        if entry is not None:
            with self._clock("model"):
                block.keep(entry)
        slots = {value: slot for slot, value in block.function.weights.items()}
        nodes = {"gate": form.gate, "up": form.up, "down": form.down}
        weights = {
            name: block.weights[slots[node.inputs[1]]]  # type: ignore[index]
            for name, node in nodes.items()
            if node is not None
        }
        down = weights["down"]
        added = -down.shape[1] % self.options.experts
        padded = F.pad(down, (0, added))

        def value_of(value: Value) -> PerBatch[Tensor]:
            def maker(batch: int) -> Tensor:
                with self._clock("model"):
                    return block.values(batch, [value])[0].flatten(0, -2).float()

            batches = range(len(block.hidden))
            return PerBatch.of(batches, maker, block.stream.fits_at_once)

        hidden = value_of(form.hidden)
        if added:
            hidden = hidden.map(lambda hidden_TN: F.pad(hidden_TN, (0, added)))
        return _Part(
            block, form, shared, weights, value_of(form.x), hidden,
            hidden.map(lambda hidden_TN: neuron_energies(hidden_TN, padded)),
            block.stream.held_out.index(True), added,
        )  # fmt: skip

    def _divide(self, part: _Part) -> Division:
        options = self.options
        size = part.width // options.experts
        shared, experts = part.shared * size, options.experts - part.shared
        learn = part.learnt
        if not options.active:
            # What is left out is an expert that nothing reads.
            return Division(static_order(mean_magnitudes(learn.energy))[:shared], shared, {})
        if options.mode == "fit":
            return divide_by_fit(
                learn, part.held_out, shared, experts, options.active, options.rounds,
                threshold=options.threshold,
            )  # fmt: skip
        gate, up = part.weights.get("gate"), part.weights["up"]

        def marks_of(batch: int) -> Tensor:
            if options.normalised:
                hidden = normalised_hidden(part.x[batch], gate, up, part.part.act)
            else:
                hidden = part.hidden[batch]
            return top_marks(hidden, options.marks)

        marks = PerBatch.of(range(part.learn), marks_of)
        return divide_as_published(marks, gate, up, shared, experts)

    def _put(self, part: _Part, division: Division) -> None:
        program, options = self.program, self.options
        call = program.calls[part.block.block.position]
        function = part.block.function
        key = (function.name, part.shared)
        if key not in self.twins:
            experts = options.experts - part.shared if options.active else 0
            split = Split(division.shared, experts, options.active, options.threshold)
            name = unique_name(f"{function.name}_experts", set(program.functions))
            router = "neuron" if options.mode == "faithful" else "linear"
            self.twins[key] = with_experts(function, part.part, split, name, router=router)
            program.functions[name] = self.twins[key][0]
        twin, slots = self.twins[key]
        router_cpu = {name: value.cpu() for name, value in division.router.items()}
        carve_call(
            program, call, part.part, twin, slots, division.order.cpu(), division.shared, router_cpu
        )

    def _run_carved(self, block: BlockStep) -> list[Tensor]:
        """Go on behind a block that is carved; return its gates, [T, E] for every batch.

        There are none without experts.
        """
        gates: list[Tensor] = []

        def keep(batch: int, tensor: Tensor) -> None:
            gates.append(tensor.flatten(0, -2).float())

        with self._clock("model"):
            nodes = block.replace().function.nodes
            choices = [node.output for node in nodes if node.op == "top_gates"]
            block.advance(observers=dict.fromkeys(choices, keep))
        return gates

    def _measure(self, part: _Part, division: Division, gates: list[Tensor]) -> Carved:
        """Measure a division on held-out tokens."""
        options = self.options
        size = part.width // options.experts
        keep = (part.shared + options.active) * size
        best = static_order(mean_magnitudes(part.learnt.energy))[:keep]
        order, shared = division.order, division.shared
        total = of_best = of_shared = 0.0
        of_experts: list[Tensor] = []
        for energy_TN in part.held_out.energy:
            total += float(energy_TN.sum())
            of_best += float(energy_TN[:, best].sum())
            of_shared += float(energy_TN[:, order[:shared]].sum())
            if gates:
                routed = energy_TN[:, order[shared:]]
                of_experts.append(routed.unflatten(1, (gates[0].shape[1], size)).sum(-1))
        static = 1 - of_best / total
        if not gates:
            return Carved(
                part.block.name, part.shared, part.added, 0,
                static, static, static, static, 1.0, 1.0, [],
            )  # fmt: skip
        energy_TE = torch.cat(of_experts)
        runs = (torch.cat(gates[part.learn :]) != 0).float()
        oracle = chosen(energy_TE, options.active, threshold=options.threshold)
        generator = torch.Generator().manual_seed(self.context.seed)
        noise = torch.rand(runs.shape, generator=generator).to(runs)

        def lost(runs: Tensor) -> float:
            return 1 - (of_shared + float((energy_TE * runs).sum())) / total

        return Carved(
            part.block.name, part.shared, part.added, division.rounds,
            static, lost(chosen(noise, options.active)), lost(oracle), lost(runs),
            float((energy_TE * runs).sum() / (energy_TE * oracle).sum()),
            float((runs == oracle).all(-1).float().mean()), runs.mean(0).tolist(),
        )  # fmt: skip

    def _refit(
        self,
        part: _Part,
        division: Division,
        gates: list[Tensor],
        student: HiddenStateStream,
        targets: list[Tensor],
    ) -> Reconstruction:
        """Solve for a part's down projections anew, and move the stream behind it with them."""
        shared, size = division.shared, part.width // self.options.experts
        behind = student.hidden

        def features_and_behind(batch: int) -> tuple[Tensor, Tensor]:
            features = part.hidden[batch][:, division.order]
            if gates:
                features[:, shared:] *= gates[batch].repeat_interleave(size, 1)
            return features, behind[batch].to(self.device)

        call = self.program.calls[part.block.block.position]
        columns = {"down.shared": slice(0, shared), "down.experts": slice(shared, None)}
        weights = {
            call.weights[slot]: columns[holds]
            for slot, holds in self.twins[part.block.function.name, part.shared][1].items()
            if holds in columns
        }
        outcome, moved = reconstruct(
            self.program, part.block.name, weights,
            PerBatch.of(range(len(behind)), features_and_behind, held=False),
            targets, student.held_out,
        )  # fmt: skip
        student.skip_to(student.index, moved)
        return outcome

    def _work(self) -> Work:
        """Return what a prompt of `PROMPT` tokens takes, of the model as given and carved."""
        sizes = {B: 1, S: PROMPT, P: 0}
        given, carved = (
            (evaluate(total_cost(model).flops, sizes), evaluate(weight_products(model), sizes))
            for model in (self.given, self.program)
        )
        flops, products = zip(given, carved, strict=True)
        return Work(tokens=PROMPT, flops=flops, weight_products=products)


def _entry(block: BlockStep, form: FeedForward) -> Value | None:
    """Return the residual stream in front of a part, where another part of the block makes it."""
    parts = sub_blocks(block.function, block.block.stream)
    places = [number for number, part in enumerate(parts) if part.kind == "ffn"]
    before = parts[places[0] - 1].behind if places and places[0] else None
    if before is None or before.node not in region(block.function, [form.x]):
        return None
    return before


def _not_refitted(program: Program, block: Block, form: FeedForward) -> str | None:
    """Return why what the down projection makes is no plain term of the block's result."""
    function = program.functions[program.calls[block.position].function]
    parts = sub_blocks(function, block.stream)
    places = [number for number, part in enumerate(parts) if part.term is form.down.output]
    if not places:
        return "something stands between its down projection and the stream"
    node = parts[places[0]].node
    if any(node in region(function, [part.term]) for part in parts[places[0] + 1 :]):
        return "the block goes on behind it"
    return None
