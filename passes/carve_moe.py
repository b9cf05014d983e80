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
    energies,
    first_marks,
    normalised_hidden,
    static_order,
)
from graphopt.calibration.repair import Refit
from graphopt.calibration.text import calibration_windows, pick, window_length
from graphopt.errors import PassError, UsageError
from graphopt.execute.student import Student
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
from graphopt.ir.weights import Array
from graphopt.pass_manager.contract import Context, Pass, PassResult, Skip, register_pass
from graphopt.passes.carved_parts import Carved, CarvedParts, PartNeed, Work
from graphopt.report.record import Record
from graphopt.solvers.least_squares import LeastSquares, best_ridge
from graphopt.support.devices import must_fit
from graphopt.support.per_device import PerDevice

HELD_OUT = 0.25
"""Of the windows, on which the report's figures are measured."""

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
    """A part that is carved, and what it has of all tokens.

    Attributes:
        shared: Pieces of it that every token will run.
        x: Its input [T, D].
        hidden: Its hidden activations [T, N], with the neurons that were added.
        energy: Of the neurons [T, N].
        learn, held: Which tokens are learnt from, and which are held out.
        added: Neurons of zeros.
    """

    block: Block
    form: FeedForward
    shared: int
    x: Tensor
    hidden: Tensor
    energy: Tensor
    learn: slice
    held: slice
    added: int

    def tokens(self, which: slice) -> Tokens:
        return Tokens(self.x[which], self.energy[which])


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
        self.held = max(1, round(HELD_OUT * len(windows)))
        self._check_tokens((len(windows) - self.held) * length)
        self.windows = windows.to(self.device)
        self.twins: dict[tuple[str, int], tuple[Function, dict[str, str]]] = {}
        self.seconds = {"measuring": 0.0, "model": 0.0, "dividing": 0.0, "refitting": 0.0}
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
        first, last = found[0][0].position, found[-1][0].position + 1
        self.ours, theirs = (
            Student(model, first, last, {}, self.device, keep_weights=False)
            for model in (program, self.given)
        )
        skipped: list[Skip] = []
        carved: list[Carved] = []
        refits: list[Refit] = []
        values = self.ours.inputs(self.windows)
        with torch.no_grad():
            self.ours.run(values, 0, first)
            targets = dict(values)
            for number, (block, form) in enumerate(found):
                self.context.progress("carving", number, len(found))
                where = block_name(program, block)
                if self.refits:
                    with self._clock("model"):
                        theirs.run(targets, block.position, block.position + 1)
                if isinstance(form, str) or number not in numbers:
                    reason = form if isinstance(form, str) else "all of its pieces are run"
                    skipped.append(Skip(where, reason))
                    with self._clock("model"):
                        self.ours.run(values, block.position, block.position + 1)
                    continue
                fixed = _not_refitted(program, block, form)
                part = self._look(values, block, form, numbers[number])
                with self._clock("dividing"):
                    division = self._divide(part)
                    self._put(part, division)
                gates = self._run_carved(values, block)
                with self._clock("dividing"):
                    carved.append(self._measure(part, division, gates))
                if not self.refits:
                    continue
                if fixed:
                    skipped.append(Skip(f"{where}: refit", fixed))
                    continue
                with self._clock("refitting"):
                    refits.append(self._refit(part, division, gates, values, targets))
            self.context.progress("carving", len(found), len(found))
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

    @contextlib.contextmanager
    def _clock(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started

    def _look(self, values: dict[str, Any], block: Block, form: FeedForward, shared: int) -> _Part:
        """Run a block as it is, over the stream of the carved ones before it."""
        seen: dict[Value, Tensor] = {}

        def watch(value: Value, tensor: Tensor) -> None:
            if value in (form.x, form.hidden):
                seen[value] = tensor.flatten(0, -2).float()

        with self._clock("model"):
            self.ours.run(dict(values), block.position, block.position + 1, watch)
        with self._clock("dividing"):
            weights = _weights(self.program, self.program.calls[block.position], form)
            added = -seen[form.hidden].shape[1] % self.options.experts
            down = weights["down"].load(torch.float32).to(self.device)
            hidden, down = (F.pad(value, (0, added)) for value in (seen[form.hidden], down))
            rows = (len(self.windows) - self.held) * self.windows.shape[1]
            return _Part(
                block, form, shared, seen[form.x], hidden, energies(hidden, down),
                slice(0, rows), slice(rows, None), added,
            )  # fmt: skip

    def _divide(self, part: _Part) -> Division:
        options = self.options
        size = part.hidden.shape[1] // options.experts
        shared, experts = part.shared * size, options.experts - part.shared
        learn, held = part.tokens(part.learn), part.tokens(part.held)
        if not options.active:
            # What is left out is an expert that nothing reads.
            return Division(static_order(learn.energy)[:shared], shared, {})
        if options.mode == "fit":
            return divide_by_fit(
                learn, held, shared, experts, options.active, options.rounds,
                threshold=options.threshold,
            )  # fmt: skip
        weights = _weights(self.program, self.program.calls[part.block.position], part.form)
        gate, up = (
            weights[kind].load(torch.float32).to(self.device) if kind in weights else None
            for kind in ("gate", "up")
        )
        assert up is not None
        hidden = part.hidden[part.learn]
        if options.normalised:
            hidden = normalised_hidden(part.x[part.learn], gate, up, part.form.act)
        return divide_as_published(hidden, gate, up, shared, experts, options.marks)

    def _put(self, part: _Part, division: Division) -> None:
        program, options = self.program, self.options
        call = program.calls[part.block.position]
        function = program.functions[call.function]
        key = (function.name, part.shared)
        if key not in self.twins:
            experts = options.experts - part.shared if options.active else 0
            split = Split(division.shared, experts, options.active, options.threshold)
            name = unique_name(f"{function.name}_experts", set(program.functions))
            router = "neuron" if options.mode == "faithful" else "linear"
            self.twins[key] = with_experts(function, part.form, split, name, router=router)
            program.functions[name] = self.twins[key][0]
        twin, slots = self.twins[key]
        router_cpu = {name: value.cpu() for name, value in division.router.items()}
        carve_call(
            program, call, part.form, twin, slots, division.order.cpu(), division.shared, router_cpu
        )

    def _run_carved(self, values: dict[str, Any], block: Block) -> Tensor | None:
        """Run a block that is carved; return its gates [T, E], if there are experts."""
        found: list[Tensor] = []

        def watch(value: Value, tensor: Tensor) -> None:
            if value.node is not None and value.node.op == "top_gates":
                found.append(tensor.flatten(0, -2).float())

        with self._clock("model"):
            self.ours.run(values, block.position, block.position + 1, watch)
        return found[0] if found else None

    def _measure(self, part: _Part, division: Division, gates: Tensor | None) -> Carved:
        """Measure a division on held-out tokens."""
        options, energy = self.options, part.energy[part.held]
        where = block_name(self.program, part.block)
        size = energy.shape[1] // options.experts
        keep = (part.shared + options.active) * size
        total = float(energy.sum())
        best = static_order(part.energy[part.learn])[:keep]
        static = 1 - float(energy[:, best].sum()) / total
        if gates is None:
            return Carved(
                where, part.shared, part.added, 0, static, static, static, static, 1.0, 1.0, []
            )
        order, shared = division.order, division.shared
        of_experts = energy[:, order[shared:]].unflatten(1, (gates.shape[1], size)).sum(-1)
        own = float(energy[:, order[:shared]].sum())
        routed = (gates[part.held] != 0).float()
        oracle = chosen(of_experts, options.active, threshold=options.threshold)
        generator = torch.Generator().manual_seed(self.context.seed)
        noise = torch.rand(routed.shape, generator=generator).to(routed)

        def lost(runs: Tensor) -> float:
            return 1 - (own + float((of_experts * runs).sum())) / total

        return Carved(
            where, part.shared, part.added, division.rounds,
            static, lost(chosen(noise, options.active)), lost(oracle), lost(routed),
            float((of_experts * routed).sum() / (of_experts * oracle).sum()),
            float((routed == oracle).all(-1).float().mean()), routed.mean(0).tolist(),
        )  # fmt: skip

    def _refit(
        self,
        part: _Part,
        division: Division,
        gates: Tensor | None,
        values: dict[str, Any],
        targets: dict[str, Any],
    ) -> Refit:
        """Solve for a part's down projections anew, and move the stream behind it with them."""
        program, options = self.program, self.options
        call, given = (model.calls[part.block.position] for model in (program, self.given))
        stream = call.results[0]
        target = targets[given.results[0]].flatten(0, -2).float()
        here = values[stream].flatten(0, -2).float()
        features = part.hidden[:, division.order]
        if gates is not None:
            size = part.hidden.shape[1] // options.experts
            features[:, division.shared :] *= gates.repeat_interleave(size, 1)
        # A token counts in units of its target's square: few of a huge norm would decide else.
        root = target.square().sum(-1, keepdim=True).clamp(min=1e-12).rsqrt()
        sums = [LeastSquares(), LeastSquares()]
        for fit, which in zip(sums, (part.learn, part.held), strict=True):
            fit.add(features[which] * root[which], ((target - here) * root)[which])
        learn, held = sums
        ridge, after = best_ridge(learn, held)
        where = block_name(program, part.block)
        result = Refit(where, held.error(None) / held.count, after / held.count, ridge)
        if ridge is None:
            return result
        change = (learn + held).solve(ridge).float()
        values[stream] = (here + features @ change).to(values[stream]).view_as(values[stream])
        for slot, holds in self.twins[given.function, part.shared][1].items():
            if holds in ("down.shared", "down.experts"):
                weight = program.weights[call.weights[slot]]
                own = slice(0, division.shared)
                if holds == "down.experts":
                    own = slice(division.shared, None)
                value = weight.load(torch.float32).cpu() + change[own].t().cpu()
                value = value.to(weight.dtype).contiguous()
                program.weights.replace(weight.with_producer(Array(value)))
        return result

    def _work(self) -> Work:
        """Return what a prompt of `PROMPT` tokens takes, of the model as given and carved."""
        sizes = {B: 1, S: PROMPT, P: 0}
        given, carved = (
            (evaluate(total_cost(model).flops, sizes), evaluate(weight_products(model), sizes))
            for model in (self.given, self.program)
        )
        flops, products = zip(given, carved, strict=True)
        return Work(tokens=PROMPT, flops=flops, weight_products=products)


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
