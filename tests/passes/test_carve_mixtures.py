"""carve-moe on the experts of mixtures: cut, or divided with routers of their own."""

from __future__ import annotations

import functools

import pytest
import torch
from checkpoints import CLOSE, loaded, padded_case
from families import eager_logits, error, mostly_slow
from mixtures import mixture, mixture_model
from tiny_models import byte_tokenizer
from trained import book

import graphopt as go
from graphopt.errors import PassError, UsageError
from graphopt.execute.block_runner import calibration_runner
from graphopt.execute.hidden_states import HiddenStateStream
from graphopt.execute.interpreter import Runner
from graphopt.ir import Array, Program
from graphopt.ir.expert_neurons import keep_neurons, mask_neurons
from graphopt.ir.layer_config import shrink_expert_width
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import make_pass
from graphopt.pass_manager.expert_statements import CarvedExperts, CarvedMixture

NEURONS = {"mixtral": 40, "gpt_oss": 40, "qwen3_moe": 24}


def _kept(neurons: int, left: int, seed: int = 0) -> list[list[int]]:
    """Return random neurons of each of eight experts, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(neurons, generator=generator)[:left].tolist() for _ in range(8)]


def _cut(family: str, left: int) -> Program:
    _, program = mixture(family)
    cut = program.copy()
    keep_neurons(cut, {block: _kept(NEURONS[family], left, block) for block in range(2)})
    shrink_expert_width(cut.config, NEURONS[family], left)
    verify(cut)
    return cut


@pytest.mark.slow
@pytest.mark.parametrize("family", mostly_slow(NEURONS, ("mixtral",), ("qwen3_moe",)))
def test_cut_experts_are_those_of_a_narrower_config(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = mixture(family)
    left = 16
    cut = _cut(family, left)
    config = type(model.config).from_dict(cut.config)
    narrow = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    narrow.config._attn_implementation = model.config._attn_implementation
    state = model.state_dict()
    for block, layer in enumerate(model.model.layers):
        experts, stem = layer.mlp.experts, f"model.layers.{block}.mlp.experts."
        kept = torch.tensor(_kept(NEURONS[family], left, block))
        if family == "gpt_oss":
            columns = torch.stack([2 * kept, 2 * kept + 1], 2).flatten(1)
            first = zip(experts.gate_up_proj, columns, strict=True)
            biases = zip(experts.gate_up_proj_bias, columns, strict=True)
            last = zip(experts.down_proj, kept, strict=True)
            state[stem + "gate_up_proj"] = torch.stack([w[:, c] for w, c in first])
            state[stem + "gate_up_proj_bias"] = torch.stack([b[c] for b, c in biases])
            state[stem + "down_proj"] = torch.stack([w[n] for w, n in last])
        else:
            columns = torch.cat([kept, kept + NEURONS[family]], 1)
            first = zip(experts.gate_up_proj, columns, strict=True)
            last = zip(experts.down_proj, kept, strict=True)
            state[stem + "gate_up_proj"] = torch.stack([w[c] for w, c in first])
            state[stem + "down_proj"] = torch.stack([w[:, n] for w, n in last])
    narrow.load_state_dict(state)
    case = padded_case()
    expected = eager_logits(narrow, case)
    assert error(expected, eager_logits(model, case), case) > 0.01, "nothing is cut"
    assert error(expected, Runner(cut).logits(case.inputs), case) < CLOSE
    go.emit(cut, tmp_path / "out", emit=("hf",))
    assert error(expected, eager_logits(loaded(tmp_path / "out/hf"), case), case) < CLOSE


SHARED, GROUPS, SIZE = 16, 3, 8


def _masked(active: int, family: str = "mixtral") -> Program:
    """Return a program of which each row runs `active` of three groups of its expert, and 16."""
    _, program = mixture(family)
    masked = program.copy()
    keep_neurons(masked, {block: _kept(40, 40, block) for block in range(2)})
    for block in range(2):
        generator = torch.Generator().manual_seed(block)
        router = torch.randn(8, 48, GROUPS, generator=generator)
        bias = torch.randn(8, GROUPS, generator=generator)
        mask_neurons(masked, block, SHARED, active, router, bias)
    verify(masked)
    return masked


@pytest.mark.parametrize("family", mostly_slow(["mixtral", "gpt_oss"], ("mixtral",)))
def test_with_all_groups_active_it_is_the_dense_model(family):
    _, program = mixture(family)
    inputs = padded_case().inputs
    before, after = (
        Runner(p, dtype=torch.float64).logits(inputs) for p in (program, _masked(GROUPS, family))
    )
    assert float((before - after).abs().max()) < 1e-12 * float(before.abs().max())


@torch.no_grad()
def test_each_row_runs_the_groups_of_its_own_experts_highest_logits():
    masked = _masked(1)
    windows = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    stream = HiddenStateStream(calibration_runner(masked, torch.device("cpu")), windows)
    for block in stream:
        nodes = {node.outputs[0].name: node for node in block.function.nodes}
        gating = next(n for n in block.function.nodes if n.op == "top_k_gating")
        product = gating.inputs[0].node.inputs[0].node
        rows, _, _ = product.inputs
        owner = next(n.inputs[0] for n in block.function.nodes if n.op == "embedding")
        x, experts, mask = block.values(0, [rows, owner, nodes["mask"].output])
        weights = {slot.rpartition("router.")[2]: w for slot, w in block.weights.items()
                   if "router." in slot}  # fmt: skip
        for row in range(len(x)):
            expert = int(experts[row])
            logits = x[row] @ weights["weight"][expert] + weights["bias"][expert]
            wanted = torch.zeros(SHARED + GROUPS * SIZE)
            wanted[:SHARED] = 1
            start = SHARED + int(logits.argmax()) * SIZE
            wanted[start : start + SIZE] = 1
            assert torch.equal(mask[row], wanted)


# What is stated


@functools.cache
def _stated() -> tuple[Program, Program, CarvedExperts]:
    parts = tuple(
        CarvedMixture(b, tuple(map(tuple, _kept(40, 40, b))), SHARED, 1, reconstructed=False)
        for b in range(2)
    )
    return mixture("mixtral")[1], _masked(1), CarvedExperts(parts)


def _scale(program: Program, part: str, factor: float = 0.5) -> None:
    names = [name for call in program.calls for name in call.weights.values()]
    name = next(name for name in names if "layers.1." in name and part in name)
    weight = program.weights[name]
    program.weights.replace(weight.with_producer(Array(weight.load() * factor)))


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("gate_up_proj", "gate_up_proj is not the source's"),
        ("down_proj", "down_proj is not the source's"),
        ("mlp.gate.weight", "mlp.gate.weight is not the source's"),
        ("router.members", "router.members is not the source's"),
        ("q_proj", "q_proj.weight is not the source's"),
    ],
)
def test_a_mistake_is_found(part, found):
    before, after, statement = _stated()
    assert statement.check(before, after) is None
    wrong = after.copy()
    _scale(wrong, part)
    assert found in (statement.check(before, wrong) or "")


def test_routers_may_be_any_and_a_reconstructed_projection_too():
    before, after, statement = _stated()
    other = after.copy()
    _scale(other, "experts.router.weight")
    assert statement.check(before, other) is None
    _scale(other, "down_proj")
    solved = tuple(
        CarvedMixture(m.block, m.orders, m.shared, m.active, True) for m in statement.mixtures
    )
    assert CarvedExperts(solved).check(before, other) is None
    more = tuple(CarvedMixture(m.block, m.orders, m.shared, 2, False) for m in statement.mixtures)
    assert "computes something else" in (CarvedExperts(more).check(before, after) or "")


# The pass


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("carved")
    (folder / "text.txt").write_text(book(120), encoding="utf-8")

    def run(family: str, options: str, behind: str = ""):
        model = folder / family
        if not model.exists():
            mixture_model(family).save_pretrained(model)
            byte_tokenizer().save_pretrained(model)
        recipe = f"carve-moe{{{options},mixtures=true,windows=8,seqlen=64}}"
        return go.Pipeline.parse(f"{recipe},{behind}" if behind else recipe).run(
            go.capture(str(model)), go.RunOptions(calib=folder / "text.txt")
        )

    return run


@pytest.mark.slow
def test_experts_are_cut_and_their_projections_solved_for(run):
    program, report = run("mixtral", "shared=4,active=0,experts=8")
    (entry,) = report.passes
    # Four of eight groups of five neurons, up to a multiple of eight.
    assert program.config["intermediate_size"] == 24
    assert (entry.matched, entry.changed, entry.verification) == (2, 2, "measured")
    for part, solved in zip(entry.details["parts"], entry.details["reconstructions"], strict=True):
        assert part["where"] == solved["where"] and part["where"].endswith(": experts")
        assert 0 < part["static"] == part["routed"] < 0.5
        assert solved["after"] < solved["before"]


@pytest.mark.slow
def test_routers_within_experts_lose_less_than_random_ones(run):
    program, report = run("mixtral", "shared=3,active=3,experts=8")
    for part in report.passes[0].details["parts"]:
        assert part["oracle"] < part["routed"] < part["random"]
    with pytest.raises(go.GraphoptError, match="experts of its mixtures have routers of their own"):
        go.emit(program, "unused", emit=("hf",))


@pytest.mark.slow
def test_routers_within_experts_are_trained(run):
    _, report = run("mixtral", "shared=2,active=1,experts=4", "tune-moe{steps=4,seqlen=32}")
    (_, entry) = report.passes
    assert entry.changed == 2 and entry.details["loads"] == []


@pytest.mark.slow
def test_shared_experts_are_carved_beside_the_others(run, tmp_path):
    program, report = run("qwen2_moe", "shared=4,active=0,experts=8")
    where = [
        part["where"].removeprefix("model.layers.") for part in report.passes[0].details["parts"]
    ]
    assert where == ["0: experts", "0", "1: experts", "1"]
    go.emit(program, tmp_path / "out", emit=("hf",))
    case = padded_case()
    found = eager_logits(loaded(tmp_path / "out/hf"), case)
    assert error(Runner(program).logits(case.inputs), found, case) < CLOSE


# What is refused


@pytest.mark.parametrize(
    "option",
    [{"mode": "published"}, {"threshold": True}, {"layerwise_budget": True}, {"pad": True}],
)
def test_options_of_dense_parts(option):
    with pytest.raises(UsageError, match="is for dense feed-forward parts"):
        make_pass("carve-moe", {"mixtures": True, **option})


def test_a_mixture_has_to_be_asked_for():
    _, program = mixture("mixtral")
    with pytest.raises(PassError, match="no feed-forward part to carve") as caught:
        make_pass("carve-moe", {}).check(program)
    assert caught.value.remedy == "Carve each of its experts with mixtures=true."
    make_pass("carve-moe", {"mixtures": True}).check(program)
    with pytest.raises(PassError, match=r"An expert of model\.layers\.0 has 40 neurons, which 16"):
        make_pass("carve-moe", {"mixtures": True, "experts": 16}).check(program)
