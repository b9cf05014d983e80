"""The pass that lets policies select what a step reads: where, what it says, what it refuses."""

from __future__ import annotations

import typing
from dataclasses import replace

import pytest
import torch
from programs import tiny_program
from sampling import slow_but

import graphopt as go
from graphopt.errors import LoweringError, PassError, SourceError, UsageError, VerifyError
from graphopt.execute.interpreter import Runner
from graphopt.ir import Array, Weight
from graphopt.ir.attach_policy import with_policies, without_policies
from graphopt.ir.kv import KVLayout
from graphopt.ir.kv_policies import POLICIES, PageBudget, SinkLocal, policy_from_dict
from graphopt.ir.kv_policies.attention_cnn import new_weights
from graphopt.ir.kv_policies.checkpoint import PredictorCheckpoint
from graphopt.ir.ops import get_op
from graphopt.ir.parse import parse_program
from graphopt.ir.printer import print_program
from graphopt.ir.relayout import with_layouts
from graphopt.pass_manager.contract import Context
from graphopt.pass_manager.options import options_model
from graphopt.pass_manager.pipeline import Pipeline
from graphopt.pass_manager.policy_statements import PolicyProgram, pages_read
from graphopt.pass_manager.verification import RELATIVE_TOLERANCE
from graphopt.passes.attach_kv_policy import AttachedPolicy, AttachKVPolicy

SIZES = {"budget": 16, "page": 4, "sink": 4, "local": 4}


def make(**options):
    return AttachKVPolicy(**{**SIZES, "verdict": "ignore", **options})


def attach(program, **options):
    item = make(**options)
    item.check(program)
    return item.run(program.copy(), Context())


@pytest.mark.parametrize(
    "kind", slow_but(sorted(kind for kind in POLICIES if kind != "predictor"), "quest", "snapkv")
)
def test_every_kind_is_attached_and_verified(kind):
    recipe = f"attach-kv-policy{{kind={kind},budget=16,page=4,sink=4,local=4,verdict=ignore}}"
    pipeline = Pipeline.parse(recipe).within_default()
    assert [item.name for item in pipeline.passes][-2:] == ["insert-kv-cache", "attach-kv-policy"]
    program, report = pipeline.run(tiny_program(sinks=True, softcap=3.0))
    entry = report.passes[-1]
    assert (entry.matched, entry.changed, entry.verification) == (2, 2, "measured")
    assert entry.max_abs_logit_delta < RELATIVE_TOLERANCE  # probes are read in full
    budget = PageBudget(page=4, pages=4, sink=1, local=1)
    assert all(
        state.policy.kind == kind and state.policy.budget == budget
        for state in program.states.values()
    )


def trained(path, page=4, group=2):
    weights = new_weights(2, seed=0)
    PredictorCheckpoint(weights, page, group, history=16, channels=2, about={}).write(path)
    return str(path)


def test_a_learned_policy_has_the_weights_of_its_checkpoint(tmp_path):
    file = trained(tmp_path / "predictor.safetensors")
    before = tiny_program(cache=True)
    result = attach(before, kind="predictor", checkpoint=file)
    assert result.statement.check(before, result.program) is None
    policy = result.program.states["kv.1"].policy
    assert (policy.history, policy.channels, policy.calibrate_every) == (16, 2, 5)
    names = {weight.name for weight in result.program.weights} - {w.name for w in before.weights}
    assert names == {f"kv_policy.{name}" for name in new_weights(2, seed=0)}
    ids = torch.randint(0, 97, (1, 30), generator=torch.Generator().manual_seed(0))
    runner, past = Runner(result.program), None
    for stop in (24, 25, 26):
        start = 0 if past is None else stop - 1
        _, past = runner.run({"input_ids": ids[:, start:stop]}, past)
    assert past["kv.0"].state[0].shape == (1, 2, 16, 7)


def test_checkpoints_that_do_not_fit(tmp_path):
    file = trained(tmp_path / "predictor.safetensors", page=8)
    with pytest.raises(UsageError, match="trained for pages of 8 tokens, and here there are pages"):
        attach(tiny_program(cache=True), kind="predictor", checkpoint=file)
    file = trained(tmp_path / "predictor.safetensors", group=4)
    with pytest.raises(UsageError, match="4 query heads a KV head, and here there are 2"):
        attach(tiny_program(cache=True), kind="predictor", checkpoint=file)
    with pytest.raises(UsageError, match="predictor has weights, and no checkpoint is given"):
        make(kind="predictor")
    with pytest.raises(UsageError, match="quest has no weights"):
        make(kind="quest", checkpoint=file)
    with pytest.raises(SourceError, match="no KV policy checkpoint"):
        make(kind="predictor", checkpoint=str(tmp_path / "absent"))


def test_expected_attention_is_attached_with_the_angles_of_the_model():
    result = attach(tiny_program(cache=True), kind="expected-attention")
    policies = {state.policy for state in result.program.states.values()}
    (policy,) = policies
    assert len(policy.frequencies) == 4 and policy.frequencies[0] == 1.0
    again = parse_program(print_program(result.program))
    assert {state.policy for state in again.states.values()} == policies


def test_layers_that_stay_dense():
    program = tiny_program(layers=5, cache=True, window=6)
    result = attach(program, kind="sink-local", dense_layers=1, dense=["layers.3"])
    reasons = {skip.where: skip.reason for skip in result.skipped}
    windowed = "it has a window of 6 tokens: a step reads no more than that anyway"
    assert reasons == {
        "layers.0": "it is among the first 1 layers, which stay dense",
        "layers.2": windowed,
        "layers.3": "it is to stay dense",
        "layers.4": windowed,
    }
    assert (result.matched, result.changed) == (5, 1)
    assert [s.policy is not None for s in result.program.states.values()] == [
        False, True, False, False, False,
    ]  # fmt: skip
    assert result.record.layers == 1 and result.record.dense == 4
    with pytest.raises(PassError, match=r"dense='kv\.9' is no layer"):
        attach(program, dense=["kv.9"])


def test_a_second_run_finds_nothing_to_change():
    once = attach(tiny_program(cache=True), kind="ema").program
    again = attach(once, kind="ema")
    assert (again.matched, again.changed) == (2, 0) and str(again.program) == str(once)
    assert "has the policy ema already" in again.skipped[0].reason


def test_left_out_again_it_is_the_program_before():
    before = tiny_program(layers=3, cache=True, sinks=True)
    after = attach(before, kind="last-row", dense_layers=1, calibrate=3).program
    assert "layer=1" in str(after)
    plain = without_policies(after)
    assert {node.op for f in plain.functions.values() for node in f.nodes} == {
        node.op for f in before.functions.values() for node in f.nodes
    }
    assert list(plain.states.values()) == list(before.states.values())
    assert [call.attrs for call in plain.calls] == [{}] * 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 4}, "below sink plus local"),
        ({"budget": 18}, "A budget of 18 tokens is no multiple of the page of 4"),
        ({"sink": 6}, "A sink of 6 tokens is no multiple"),
        ({"kind": "qest"}, "knows no kind 'qest'. Did you mean 'quest'"),
        ({"kind": "quest", "calibrate": 4}, "quest has no dense steps"),
        ({"target": "hoper"}, "hoper"),
    ],
)
def test_options_that_make_no_policy(options, said):
    with pytest.raises(UsageError, match=said):
        make(**options)


def test_every_policy_is_a_choice_that_the_listing_tells():
    kind = options_model(AttachKVPolicy).model_fields["kind"]
    assert list(typing.get_args(kind.annotation)) == list(POLICIES)


@pytest.mark.parametrize(
    ("form", "what"), [("hf", "A transformers checkpoint"), ("gguf", "A GGUF file")]
)
def test_forms_without_a_place_for_a_policy_say_so(form, what, tmp_path):
    program = attach(tiny_program(cache=True), kind="quest").program
    with pytest.raises(LoweringError) as refused:
        go.emit(program, tmp_path / "out", emit=(form,))
    assert refused.value.message == f"{what} has no place for the KV policy quest."


def test_models_that_no_policy_fits():
    for program, said in (
        (tiny_program(cache=True, alibi=True), "slopes"),
        (with_layouts(tiny_program(cache=True), {f"kv.{n}": KVLayout("paged", 8) for n in (0, 1)}),
         "pages of 8 tokens, and the policy selects pages of 4"),
    ):  # fmt: skip
        with pytest.raises(PassError, match=f"No attention of tiny can have .*{said}"):
            make().check(program)
    with pytest.raises(PassError, match="needs a program with kv-cache"):
        Pipeline([make()]).run(tiny_program())


def test_a_policy_that_costs_more_than_it_saves_is_refused():
    """Two heads of keys of 8 features: the ops of a selection take longer than to read all."""
    program = tiny_program(cache=True)
    for target in ("cpu", "hopper"):
        item = make(kind="quest", target=target, context=512, verdict="refuse")
        with pytest.raises(PassError, match=f"not worth it on {target} with 512 tokens: .*pay"):
            item.check(program)
        make(kind="quest", target=target, context=512).check(program)
    with pytest.raises(UsageError, match=r"states no host\.link"):
        make(kind="quest", offload=True, verdict="refuse").check(program)


def test_the_verdict_is_that_of_the_cost_model():
    large = tiny_program(cache=True, heads=16, kv_heads=8, head_dim=32, hidden=64)
    sizes = {"budget": 256, "page": 16, "sink": 16, "local": 16}
    item = AttachKVPolicy(kind="sink-local", context=131072, **sizes)
    item.check(large)
    record = item.run(large.copy(), Context()).record
    assert "saves" in record.verdict and record.budget == 256
    last = record.costs[-1]
    assert last.tokens == 131072 and last.policy < last.dense
    assert last.policy_bytes * 512 == last.dense_bytes
    again = AttachedPolicy.model_validate(record.to_json())
    assert again.line() == record.line() and "131,072" in record.card()


def test_what_verification_finds():
    """It reads the programs, and not what the pass says."""
    before = tiny_program(cache=True)
    result = attach(before, kind="sink-local")
    stated = result.statement
    assert stated.check(before, result.program) is None

    other = result.program.copy()
    weight = other.weights["layers.1.mlp.up_proj.weight"]
    other.weights.replace(Weight(weight.name, Array(weight.load() * 1.001), weight.checkpoint))
    assert "not the program of before" in stated.check(before, other)

    larger = replace(stated.policy, budget=replace(stated.policy.budget, pages=9))
    assert "another policy" in stated.check(before, with_policies(before, dict.fromkeys(
        before.states, larger)))  # fmt: skip
    narrower = PolicyProgram(stated.policy, ("kv.0",))
    assert "state 'kv.1' has another policy" in narrower.check(before, result.program)


def test_a_policy_that_reads_more_than_its_budget_is_found(monkeypatch):
    before = tiny_program(cache=True)
    result = attach(before, kind="sink-local")
    select = SinkLocal.select

    def greedy(self, state, q, k, lengths, scoring):
        more = replace(self, budget=replace(self.budget, pages=self.budget.pages + 1))
        return select(more, state, q, k, lengths, scoring)

    monkeypatch.setattr(SinkLocal, "select", greedy)
    assert "reads 5 pages of a key head" in result.statement.check(before, result.program)


def test_a_policy_that_leaves_out_what_it_has_room_for_is_found(monkeypatch):
    before = tiny_program(cache=True)
    result = attach(before, kind="sink-local")
    select = SinkLocal.select

    def miser(self, state, q, k, lengths, scoring):
        chosen = select(self, state, q, k, lengths, scoring)
        return torch.where(chosen == 1, -1, chosen)

    monkeypatch.setattr(SinkLocal, "select", miser)
    assert "budget of everything" in result.statement.check(before, result.program)
    with pytest.raises(VerifyError, match="did not do what it states"):
        Pipeline([make(kind="sink-local")]).run(before)


@pytest.mark.parametrize("kind", ["ema", "last-row"])
def test_dense_steps_are_not_counted_as_steps_of_the_policy(kind):
    budget = {"page": 4, "pages": 3, "sink": 1, "local": 1}
    policy = policy_from_dict({"kind": kind, **budget, "calibrate_every": 2})
    program = with_policies(tiny_program(cache=True), {"kv.1": policy})
    (call,) = [c for c in program.calls if "layer" in c.attrs]
    (node,) = [n for n in program.function_of(call).nodes if n.op == "policy_attention"]
    assert pages_read(program, call, node, program.states["kv.1"]) == 3
    assert get_op(node.op).check_count(node.inputs) is None
