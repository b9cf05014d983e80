"""Width: feed-forward parts become shared neurons, and experts of which every token runs some."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt.calibrate import calibration_windows, pick
from graphopt.carving import (
    Division,
    chosen,
    divide_as_published,
    divide_by_fit,
    energies,
    static_order,
)
from graphopt.devices import must_fit
from graphopt.errors import PassError
from graphopt.evaluate import ProgramModel
from graphopt.ir.blocks import Block, block_name, find_blocks
from graphopt.ir.feed_forward import (
    FeedForward,
    Split,
    carve_call,
    feed_forwards,
    with_experts,
)
from graphopt.ir.graph import Call, Function, Program, Value, unique_name
from graphopt.passes.base import Context, Pass, PassResult, Skip, register_pass
from graphopt.runtime.ops import ACTIVATIONS
from graphopt.tune import Student

MODES = ("fit", "faithful")

DEFAULT_WINDOWS = ((8, 512), (8, 2048))
"""How many windows are read, of how many tokens: on a CPU and on a GPU."""

HELD_OUT = 0.25
"""Of the windows, on which the report's figures are measured."""


@register_pass
@dataclass
class CarveMoe(Pass):
    """Divide the neurons of every feed-forward part into `experts` equal pieces.

    `shared` of the pieces are run by every token, and of the others the `active` ones with the
    highest scores of a router. No value of a weight changes: pieces are rows and columns of the
    projections. `active=0` leaves the pieces that matter most on average, and no router.

    With `mode=fit` neurons and a linear router are fitted to each other in up to `rounds` turns
    (`graphopt.carving.divide_by_fit`). `mode=faithful` is CMoE as published (arXiv 2502.04416):
    clusters of neurons that are among the `marks` largest of the same tokens, and as router one
    neuron of each.

    Blocks are carved in order, each on what the carved blocks before it give, from `windows`
    windows of `seqlen` tokens: 8 of 2048 on a GPU and 8 of 512 on a CPU.

    Legality:

    1. A block adds one feed-forward part: a projection of an activation, or of its product with
       another projection, whose parts nothing else reads. Others are left as they are.
    2. The number of neurons is a multiple of `experts`.
    """

    name: ClassVar[str] = "carve-moe"
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True

    shared: int = 3
    active: int = 3
    experts: int = 8
    mode: str = "fit"
    rounds: int = 6
    marks: int = 10
    windows: int | None = None
    seqlen: int | None = None

    def check(self, program: Program) -> None:
        if self.mode not in MODES:
            raise PassError(
                f"carve-moe knows no mode {self.mode!r}.", f"Known: {', '.join(MODES)}."
            )
        for option, least in (
            ("shared", 0), ("active", 0), ("experts", 2), ("rounds", 0), ("marks", 1),
            ("windows", 2), ("seqlen", 2),
        ):  # fmt: skip
            value = getattr(self, option)
            if value is not None and value < least:
                raise PassError(
                    f"carve-moe: {option}={value} is below {least}.", f"Leave {option} out."
                )
        if self.shared + self.active > self.experts or self.shared + self.active == 0:
            raise PassError(
                f"{self.shared} shared and {self.active} active pieces are not 1 to "
                f"{self.experts}, which is how many there are.",
                "Lower shared or active, or raise experts.",
            )
        if self.active and self.shared == self.experts:
            raise PassError("All pieces are shared, so none can be active.", "Lower shared.")
        found = _parts(program)
        if not any(isinstance(part, FeedForward) for _, part in found):
            reasons = sorted({part for _, part in found if isinstance(part, str)})
            raise PassError(
                f"{program.name} has no feed-forward part to carve"
                + (f": {'; '.join(reasons)}." if reasons else "."),
                "A model of experts already cannot be carved; leave carve-moe out.",
            )
        for block, part in found:
            if isinstance(part, FeedForward):
                width = _width(program, program.calls[block.position], part)
                if width % self.experts:
                    fitting = [n for n in range(2, 65) if width % n == 0]
                    raise PassError(
                        f"{block_name(program, block)} has {width} neurons, which {self.experts} "
                        "pieces do not divide.",
                        f"Take experts={min(fitting, key=lambda n: abs(n - self.experts))}."
                        if fitting
                        else "Leave carve-moe out.",
                    )
                if width == self.experts:
                    raise PassError(
                        f"{block_name(program, block)} has {width} neurons, one for each piece.",
                        "Lower experts.",
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


def _width(program: Program, call: Call, part: FeedForward) -> int:
    return int(_weights(program, call, part)["up"].shape[0])


@dataclass(frozen=True)
class Carved:
    """What became of one part, on held-out text.

    Attributes:
        where: The block.
        rounds: Turns of fitting.
        static, random, oracle, routed: Energy of the neurons that tokens do not run, as a share
            of all: with the best pieces for every token alike, with random experts, with the
            experts of most energy, and with the router's.
        recall: Energy in the router's experts, as a share of that in the best ones.
        agreement: Share of tokens for which the router's experts are the best ones.
        load: Share of tokens that run each expert.
    """

    where: str
    rounds: int
    static: float
    random: float
    oracle: float
    routed: float
    recall: float
    agreement: float
    load: list[float]


class _Carving:
    """One run of the pass."""

    def __init__(self, options: CarveMoe, program: Program, context: Context) -> None:
        self.options, self.program, self.context = options, program, context
        self.device = context.device
        count, length = DEFAULT_WINDOWS[self.device.type == "cuda"]
        length = options.seqlen or min(length, ProgramModel(program).positions or length)
        windows = calibration_windows(program, context, length)
        windows = pick(windows, options.windows or count, context.seed)
        if len(windows) < 2:
            raise PassError(
                f"The calibration text has {len(windows)} windows of {length} tokens, and carving "
                "needs one to learn from and one to measure on.",
                "Give a longer text with --calib, or a lower seqlen.",
            )
        self.held = max(1, round(HELD_OUT * len(windows)))
        self.windows = windows.to(self.device)
        self.twins: dict[str, tuple[Function, dict[str, str]]] = {}
        self.seconds = {"model": 0.0, "dividing": 0.0}

    def run(self) -> PassResult:
        program, options = self.program, self.options
        blocks = find_blocks(program)
        first, last = blocks[0].position, blocks[-1].position + 1
        walker = Student(program, first, last, {}, self.device, keep_weights=False)
        values = walker.inputs(self.windows)
        skipped: list[Skip] = []
        carved: list[Carved] = []
        with torch.no_grad():
            walker.run(values, 0, first)
            for number, (block, part) in enumerate(_parts(program)):
                self.context.progress("carving", number, len(blocks))
                started = time.perf_counter()
                if isinstance(part, str):
                    skipped.append(Skip(block_name(program, block), part))
                else:
                    seen: dict[Value, Tensor] = {}

                    def watch(
                        value: Value,
                        tensor: Tensor,
                        part: FeedForward = part,
                        seen: dict[Value, Tensor] = seen,
                    ) -> None:
                        if value in (part.x, part.hidden):
                            seen[value] = tensor

                    walker.run(dict(values), block.position, block.position + 1, watch)
                    divided = time.perf_counter()
                    carved.append(self._carve(block, part, seen[part.x], seen[part.hidden]))
                    self.seconds["dividing"] += time.perf_counter() - divided
                    started += time.perf_counter() - divided
                walker.run(values, block.position, block.position + 1)
                self.seconds["model"] += time.perf_counter() - started
            self.context.progress("carving", len(blocks), len(blocks))
        program.prune_unused()
        details = {
            "split": f"S{options.shared}A{options.active}E{options.experts}",
            "parts": [asdict(item) for item in carved],
            "seconds": self.seconds,
        }
        return PassResult(program, len(blocks), len(carved), skipped, details)

    def _carve(self, block: Block, part: FeedForward, x: Tensor, hidden: Tensor) -> Carved:
        program, options = self.program, self.options
        call = program.calls[block.position]
        weights = _weights(program, call, part)
        width = int(weights["up"].shape[0])
        size = width // options.experts
        shared, routed = options.shared * size, options.experts - options.shared
        down = weights["down"].load(torch.float32).to(self.device)
        rows = len(self.windows) - self.held
        learn, held = (
            (x[part_].flatten(0, 1).float(), hidden[part_].flatten(0, 1).float())
            for part_ in (slice(0, rows), slice(rows, None))
        )
        energy = energies(learn[1], down)
        keep = (options.shared + options.active) * size
        if not options.active:
            order = static_order(energy)
            # What is left out is an expert that nothing reads.
            division = Division(order[:keep], keep, {})
        elif options.mode == "faithful":
            gate = weights["gate"].load(torch.float32).to(self.device) if part.gate else None
            up = weights["up"].load(torch.float32).to(self.device)
            division = divide_as_published(learn[1], gate, up, shared, routed, options.marks)
        else:
            division = divide_by_fit(learn[0], energy, shared, routed, options.active,
                                     options.rounds)  # fmt: skip
        result = self._measure(
            block, division, routed, energy, held[0], energies(held[1], down), part.act
        )
        self._put(call, part, division, size)
        return result

    def _put(self, call: Call, part: FeedForward, division: Division, size: int) -> None:
        program, options = self.program, self.options
        function = program.functions[call.function]
        if function.name not in self.twins:
            experts = options.experts - options.shared if options.active else 0
            split = Split(division.shared, experts, options.active)
            name = unique_name(f"{function.name}_experts", set(program.functions))
            router = "neuron" if options.mode == "faithful" else "linear"
            self.twins[function.name] = with_experts(function, part, split, name, router=router)
            program.functions[name] = self.twins[function.name][0]
        twin, made = self.twins[function.name]
        router_cpu = {name: value.cpu() for name, value in division.router.items()}
        carve_call(
            program, call, part, twin, made, division.order.cpu(), division.shared, router_cpu
        )

    def _measure(
        self,
        block: Block,
        division: Division,
        experts: int,
        learnt: Tensor,
        x: Tensor,
        energy: Tensor,
        act: str,
    ) -> Carved:
        """Measure a division on held-out tokens."""
        options = self.options
        size = energy.shape[1] // options.experts
        keep = (options.shared + options.active) * size
        total = float(energy.sum())
        static = 1 - float(energy[:, static_order(learnt)[:keep]].sum()) / total
        where = block_name(self.program, block)
        if not options.active:
            return Carved(where, 0, static, static, static, static, 1.0, 1.0, [])
        order, shared = division.order, division.shared
        of_experts = energy[:, order[shared:]].unflatten(1, (experts, size)).sum(-1)
        own = float(energy[:, order[:shared]].sum())
        best = chosen(of_experts, options.active)
        scores = _scores(division.router, x, act)
        routed = chosen(scores, options.active)
        generator = torch.Generator().manual_seed(self.context.seed)
        noise = torch.rand(scores.shape, generator=generator).to(scores)

        def lost(gates: Tensor) -> float:
            return 1 - (own + float((of_experts * gates).sum())) / total

        return Carved(
            where, division.rounds, static, lost(chosen(noise, options.active)), lost(best),
            lost(routed), float((of_experts * routed).sum() / (of_experts * best).sum()),
            float((routed == best).all(-1).float().mean()), routed.mean(0).tolist(),
        )  # fmt: skip


def _scores(router: dict[str, Tensor], x: Tensor, act: str) -> Tensor:
    """Return what a router gives, as the ops that `with_experts` makes of it do."""
    found = x @ router["router"].t()
    if "router.bias" in router:
        return found + router["router.bias"]
    if "router.gate" in router:
        return (ACTIVATIONS[act](x @ router["router.gate"].t()) * found).abs()
    return ACTIVATIONS[act](found).abs()
