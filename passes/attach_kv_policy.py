"""Policies for KV caches: a step of one token reads the pages that matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from graphopt.errors import PassError, UsageError
from graphopt.ir.attach_policy import reason_against, with_policies
from graphopt.ir.context import context_length
from graphopt.ir.graph import Call, Node, Program
from graphopt.ir.kv_policies import POLICIES, KVHeads, KVPolicy, PageBudget, policy_from_dict
from graphopt.ir.kv_policies.checkpoint import read_checkpoint
from graphopt.ir.kv_policies.expected_attention import ExpectedAttention
from graphopt.ir.kv_policies.predictor import Predictor
from graphopt.ir.ops.attention import QUERY
from graphopt.ir.policy_fitting import fitted_policy
from graphopt.ir.shapes import infer_program
from graphopt.pass_manager.contract import Context, Pass, PassResult, Skip, register_pass
from graphopt.pass_manager.policy_statements import PolicyProgram
from graphopt.plan.kv_policy import StepCosts, step_costs
from graphopt.report.pictures import sentences, table
from graphopt.report.record import Record
from graphopt.targets import get_target

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)
"""Tokens of a text at which the report says what a step costs."""


@dataclass(frozen=True)
class ContextCost:
    """What the attentions with a policy take in a step, at one number of tokens.

    Attributes:
        tokens: Of each row.
        dense, policy: Seconds of all layers with a policy, without it and with it.
        dense_bytes, policy_bytes: Keys and values that are read.
    """

    tokens: int
    dense: float
    policy: float
    dense_bytes: int
    policy_bytes: int


class AttachedPolicy(Record):
    """Which policy was attached, to how many layers, and what it saves.

    Attributes:
        kind: The policy.
        budget, page, sink, local: Tokens per KV head, sink and local included.
        calibrate_every: Steps from one dense step to the next; None for none.
        layers: How many attentions have it.
        dense: How many read all keys.
        state_bytes: What the policy remembers of one text, at the number of tokens of the verdict.
        target: The machine that is asked about.
        verdict: What it saves or costs there, in a sentence; "" where nobody was asked.
        costs: The prediction at several numbers of tokens.
    """

    kind: str
    budget: int
    page: int
    sink: int
    local: int
    calibrate_every: int | None
    layers: int
    dense: int
    state_bytes: int
    target: str
    verdict: str
    costs: list[ContextCost]

    def line(self) -> str:
        every = "" if self.calibrate_every is None else f", dense every {self.calibrate_every}"
        told = (
            f"{self.kind}: {self.budget} tokens per KV head in {self.layers} layers{every}; "
            f"{self.dense} layers read all"
        )
        return f"{told}. {self.verdict}" if self.verdict else told

    def card(self) -> str:
        facts = [
            f"A step of one token reads {self.budget} tokens per KV head at most, in pages of "
            f"{self.page}; {self.sink} at the front and {self.local} newest are among them.",
            "Prompts are read in full, and so is the text that this pass was measured on: what its "
            "steps lose is measured by graphopt eval --kv-policy.",
            f"The policy remembers {self.state_bytes:,} bytes of a text.",
        ]
        rows = [
            (
                f"{cost.tokens:,}",
                f"{1e6 * cost.dense:,.0f} µs",
                f"{1e6 * cost.policy:,.0f} µs",
                f"{cost.dense / cost.policy:.2f}",
                f"{cost.policy_bytes / cost.dense_bytes:.1%}",
            )
            for cost in self.costs
        ]
        heads = ("tokens", "all keys", "with the policy", "times as fast", "bytes read")
        drawn = table(heads, rows, numbers=heads) if rows else ""
        return sentences([*facts, *([self.verdict] if self.verdict else [])]) + drawn


@register_pass
@dataclass
class AttachKVPolicy(Pass):
    """Let a policy select the pages of the KV cache that a step of one token reads.

    Attentions become `policy_attention`; what the policy remembers is part of their states. Prompts
    are read in full, so that nothing but steps of one token gives other logits.

    Legality:

    1. The attention has a state of its own, which it reads and extends, and is causal: a key that
       was not selected may be selected later.
    2. It has no window and no chunk: a step reads no more than that anyway.
    3. No bias and no slopes (ALiBi) are added to its scores, of which a policy does not know. A cap
       and sinks are known.
    4. Its state is no ring, whose pages move; a paged one has the policy's pages.
    5. It reads no selected pages yet, gives no log-sum-exp or page maxima, and its cache holds no
       codes.
    6. It is none of the layers that are to stay dense.
    7. A budget of everything gives the logits of before, and none reads more than its pages: both
       are tried, on random text and on random keys.

    A policy that costs more than it saves on the target is refused.

    Options:
        kind: Which policy, by its name.
        budget: How many tokens a step reads for each KV head, sink and local included.
        page: Tokens of a page, by which is selected; it divides budget, sink and local.
        sink: How many tokens at the front of a text are always read.
        local: How many of the newest tokens are always read, the page being filled included.
        dense_layers: How many of the first layers read all keys.
        dense: Layers that read all keys besides, by the names of their states or module paths.
        calibrate: Steps from one that reads all keys to the next; none for the policy's own choice.
        checkpoint: File with the weights of a learned policy, from `graphopt train-kv-policy`;
            `demo` is the one that ships for the demo model.
        target: The machine whose figures say whether the policy saves time.
        context: Tokens of the text for which that is asked; none for what the model has positions
            for, and 32,768 at most.
        offload: Whether keys and values lie in the host's memory.
        verdict: What becomes of a policy that costs more than it saves: `refuse`, or `ignore` where
            its quality is what is studied.
    """

    kind: Literal[
        "dense", "sink-local", "last-row", "ema", "quest", "page-range", "key-codes",
        "snapkv", "expected-attention", "predictor", "oracle", "oracle-top-p",
    ] = "page-range"  # fmt: skip
    budget: Annotated[int, Field(ge=1)] = 1024
    page: Annotated[int, Field(ge=1)] = 16
    sink: Annotated[int, Field(ge=0)] = 64
    local: Annotated[int, Field(ge=1)] = 64
    dense_layers: Annotated[int, Field(ge=0)] = 0
    dense: list[str] = dataclasses.field(default_factory=list)
    calibrate: Annotated[int, Field(ge=1)] | None = None
    checkpoint: str | None = None
    target: str = "cpu"
    context: Annotated[int, Field(ge=1)] | None = None
    offload: bool = False
    verdict: Literal["refuse", "ignore"] = "refuse"

    name: ClassVar[str] = "attach-kv-policy"
    exact: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ("kv-cache",)
    record: ClassVar[type[Record]] = AttachedPolicy

    def check_options(self) -> None:
        """Refuse what is no policy.

        Raises:
            UsageError: There is no such kind, pages do not come out even, the budget is below sink
                plus local, the kind is never calibrated, it lacks weights or has none, or the
                target is unknown.
            SourceError: The checkpoint cannot be read.
        """
        learned = bool(self.policy().weight_types(KVHeads(1, 1, 1, 1)))
        if learned and self.checkpoint is None:
            raise UsageError(
                f"The KV policy {self.kind} has weights, and no checkpoint is given.",
                "Give checkpoint=FILE; `graphopt train-kv-policy` writes one.",
            )
        if self.checkpoint is not None and not learned:
            raise UsageError(
                f"checkpoint={self.checkpoint}: the KV policy {self.kind} has no weights.",
                "Leave checkpoint out, or give kind=predictor.",
            )
        get_target(self.target)

    def policy(self) -> KVPolicy:
        """Return the policy that the options describe, without weights.

        Raises:
            UsageError: See `check_options`.
        """
        budget = PageBudget.of(self.page, self.budget, self.sink, self.local)
        values: dict[str, Any] = {"kind": self.kind, **dataclasses.asdict(budget)}
        known = POLICIES.get(self.kind)
        if self.calibrate is not None and known is not None:
            if "calibrate_every" not in {field.name for field in dataclasses.fields(known)}:
                raise UsageError(
                    f"calibrate={self.calibrate}: the KV policy {self.kind} has no dense steps.",
                    "Leave calibrate out.",
                )
            values["calibrate_every"] = self.calibrate
        if self.checkpoint is not None and known is Predictor:
            trained = read_checkpoint(self.checkpoint)
            values |= {"history": trained.history, "channels": trained.channels}
        return policy_from_dict(values)

    def check(self, program: Program) -> None:
        """Refuse a model that no policy fits, and a policy that does not pay.

        Raises:
            PassError: No attention can have one, a layer that is to stay dense is none, or it costs
                more than it saves.
            UsageError: The target's file has no figures for it, or the checkpoint was trained for
                another page or head layout.
        """
        policy = self.policy()
        chosen, skipped = self._places(program, policy)
        if self.checkpoint is not None and isinstance(policy, Predictor):
            trained, heads = read_checkpoint(self.checkpoint), _heads(program)
            for name in chosen:
                trained.policy(policy, heads[name], repr(self.checkpoint))
        if not chosen:
            if any(state.policy is not None for state in program.states.values()):
                return
            why = "; ".join(dict.fromkeys(skip.reason for skip in skipped)) or "it has none"
            raise PassError(
                f"No attention of {program.name} can have a KV policy: {why}.",
                "Give a model with causal attention over all its tokens, and fewer dense layers.",
            )
        if self.verdict == "refuse":
            costs = self._costs(program, policy, chosen[0], self._context(program))
            if not costs.worth_it:
                raise PassError(
                    f"The KV policy {policy.kind} is not worth it on {self.target} with "
                    f"{self._context(program):,} tokens{' in host memory' * self.offload}: "
                    f"{costs.sentence()}",
                    "Give a smaller budget, a longer context= or another target=; verdict=ignore "
                    "attaches it nonetheless.",
                )

    def run(self, program: Program, context: Context) -> PassResult:
        policy = self.policy()
        chosen, skipped = self._places(program, policy)
        result = PassResult(program, len(chosen) + len(skipped), len(chosen), skipped)
        if not chosen:
            return result
        if isinstance(policy, ExpectedAttention):
            policy = fitted_policy(program, policy, _attentions(program, chosen))
        weights = None if self.checkpoint is None else read_checkpoint(self.checkpoint).weights
        result.program = with_policies(program, dict.fromkeys(chosen, policy), weights)
        result.statement = PolicyProgram(policy, tuple(chosen))
        result.record = self._record(result.program, policy, chosen)
        return result

    def _places(self, program: Program, policy: KVPolicy) -> tuple[list[str], list[Skip]]:
        """Return the states that get the policy, and the attentions that are left alone.

        Raises:
            PassError: A name of `dense` is that of no layer.
        """
        chosen: list[str] = []
        skipped: list[Skip] = []
        unknown = set(self.dense)
        numbers = {name: number for number, name in enumerate(program.states)}
        for call in program.calls:
            for cache in program.functions[call.function].caches:
                name = call.caches[cache.slot]
                where = call.path or call.function
                unknown -= {name, where}
                reason = reason_against(program, call, cache, policy)
                if numbers[name] < self.dense_layers:
                    reason = f"it is among the first {self.dense_layers} layers, which stay dense"
                elif {name, where} & set(self.dense):
                    reason = "it is to stay dense"
                if reason is None:
                    chosen.append(name)
                else:
                    skipped.append(Skip(where, reason))
        if unknown:
            state = next(iter(program.states))
            raise PassError(
                f"dense={sorted(unknown)[0]!r} is no layer of {program.name} with a KV cache.",
                f"Give names such as {where!r}, or of states such as {state!r}.",
            )
        return chosen, skipped

    def _context(self, program: Program) -> int:
        """Return the tokens of a text that the verdict is for."""
        longest = context_length(program) or CONTEXTS[3]
        return self.context or min(longest, CONTEXTS[3])

    def _costs(self, program: Program, policy: KVPolicy, name: str, tokens: int) -> StepCosts:
        """Return what a step of one layer takes."""
        machine = get_target(self.target)
        # What emitted models keep keys in: 16 bits where the machine computes in them.
        dtype = torch.float16 if "f16" in machine.dtypes else torch.float32
        heads = dataclasses.replace(_heads(program)[name], dtype=dtype)
        return step_costs(policy, heads, tokens, machine, offloaded=self.offload)

    def _record(self, program: Program, policy: KVPolicy, chosen: list[str]) -> AttachedPolicy:
        tokens, verdict, costs = self._context(program), "", list[ContextCost]()
        if get_target(self.target).decode is not None:
            verdict = self._costs(program, policy, chosen[0], tokens).sentence()
            longest = max(context_length(program) or CONTEXTS[3], tokens)
            for count in sorted({tokens, *(n for n in CONTEXTS if n <= longest)}):
                layers = [self._costs(program, policy, name, count) for name in chosen]
                costs.append(
                    ContextCost(
                        count,
                        sum(layer.dense for layer in layers),
                        sum(layer.policy for layer in layers),
                        sum(layer.dense_bytes for layer in layers),
                        sum(layer.policy_bytes for layer in layers),
                    )
                )
        budget = policy.budget
        kept = (program.states[name].policy_nbytes(tokens) for name in chosen)
        return AttachedPolicy(
            kind=policy.kind,
            budget=budget.tokens,
            page=budget.page,
            sink=budget.sink * budget.page,
            local=budget.local * budget.page,
            calibrate_every=policy.calibrate_every,
            layers=len(chosen),
            dense=len(program.states) - len(chosen),
            state_bytes=sum(kept),
            target=self.target,
            verdict=verdict,
            costs=costs,
        )

    def milder(self, recipe: Sequence[str]) -> str:
        return "give attach-kv-policy a larger budget=, or more dense_layers="


def _attentions(program: Program, states: Sequence[str]) -> list[tuple[Call, Node]]:
    """Return the attentions that extend some states, each with its call."""
    return [
        (call, cache.present_k.node)
        for call in program.calls
        for cache in program.functions[call.function].caches
        if call.caches[cache.slot] in states and cache.present_k.node is not None
    ]


def _heads(program: Program) -> dict[str, KVHeads]:
    """Return the sizes of the attention that extends each state, by the state's name."""
    found: dict[str, KVHeads] = {}
    for call, types in zip(program.calls, infer_program(program)[0], strict=True):
        for cache in program.functions[call.function].caches:
            node, state = cache.present_k.node, program.states[call.caches[cache.slot]]
            q = None if node is None else node.inputs[QUERY]
            if q is not None:
                sizes = dataclasses.replace(state, query_heads=int(types[q].shape[1]))
                found[state.name] = sizes.kv_heads
    return found
