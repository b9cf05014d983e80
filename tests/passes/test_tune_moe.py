"""Gates and balance of carved models: what trains them, when, and that they stay."""

from __future__ import annotations

import shutil

import pytest
import torch
from carved import carved
from compiling import with_backend
from programs import tiny_program
from torch.utils.checkpoint import checkpoint
from trained import book, trained_program

import graphopt as go
from graphopt.calibration.expert_load import expert_loads
from graphopt.calibration.routing_thresholds import calibrate_thresholds
from graphopt.errors import UsageError
from graphopt.execute.block_runner import BlockRunner
from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import find_blocks
from graphopt.ir.feed_forward import Split, add_gate_operands
from graphopt.ir.ops import get_op
from graphopt.ir.verify import verify
from graphopt.ir.weights import Array, Weight
from graphopt.pass_manager.contract import make_pass
from graphopt.training.distillation_data import DistillationData, HiddenStateCache
from graphopt.training.losses import LogitObjective
from graphopt.training.parametrisations import FullParametrisation, LoadBalanceBias, assign
from graphopt.training.schedule import Schedule
from graphopt.training.tuner import Tuner

CPU = torch.device("cpu")
IDS = torch.randint(0, 97, (40, 12), generator=torch.Generator().manual_seed(0))
GAMMA = 1e-3


def gated(*, layers=2, train=False, threshold=False):
    """Return a carved program whose choices have a bias and a scale, and their names."""
    program = carved(tiny_program(layers=layers), Split(8, 5, 2, threshold))
    names = add_gate_operands(program, selection_bias=True, gate_scale=True)
    verify(program)
    for function in program.functions.values():
        for node in function.nodes:
            if node.op == "top_k_gating" and train:
                node.attrs |= {"surrogate": True, "balance": True}
    return program, names


def value_of(program, name):
    return program.weights[name].load()


def set_gates(program, names):
    """Put values into biases and scales that make a difference."""
    generator = torch.Generator().manual_seed(4)
    for name in (*names["selection_bias"], *names["gate_scale"]):
        program.weights.replace(Weight(name, Array(torch.randn(5, generator=generator))))


def test_gates_at_0_change_nothing_and_others_do():
    plain = carved(tiny_program(), Split(8, 5, 2))
    program, names = gated()
    assert [len(names[kind]) for kind in ("selection_bias", "gate_scale")] == [2, 2]
    assert names["selection_bias"][0] == "layers.0.mlp.router.selection_bias"
    inputs = {"input_ids": IDS[:2]}
    expected = Runner(plain).logits(inputs)
    assert torch.equal(Runner(program).logits(inputs), expected)
    set_gates(program, names)
    assert not torch.allclose(Runner(program).logits(inputs), expected, atol=1e-3)


def test_a_bias_takes_part_in_choices_and_in_no_gate():
    scores = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    bias, scale = torch.tensor([0.0, 9.0, 0.0, -9.0, 0.0, 0.0]), torch.linspace(-1, 1, 6)
    (gates,) = get_op("top_k_gating").torch([scores, bias, scale], {"top_k": 2})
    assert bool((gates[:, 1] != 0).all()) and bool((gates[:, 3] == 0).all())
    expected = 1 + scores.softmax(-1) * scale
    assert torch.allclose(gates[gates != 0], expected[gates != 0])


@pytest.mark.parametrize("factor", [1.0, -3.0, 0.0])
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_gradient_of_a_bias_is_the_excess_of_load_whatever_comes_from_above(factor, recomputed):
    scores = torch.randn(7, 9, 4, generator=torch.Generator().manual_seed(1))
    bias = torch.tensor([0.3, 0.0, -0.2, 0.0], requires_grad=True)
    attrs = {"top_k": 2, "surrogate": True, "balance": True}
    runs = 0

    def choose(bias):
        nonlocal runs
        runs += 1
        return get_op("top_k_gating").torch([scores, bias], attrs)[0]

    gates = checkpoint(choose, bias, use_reentrant=False) if recomputed else choose(bias)
    (factor * gates).square().sum().backward()
    assert runs == 1 + recomputed
    top = (scores.softmax(-1) + bias.detach()).topk(2).indices.flatten()
    load = torch.bincount(top, minlength=4).float()
    assert torch.equal(bias.grad, load - load.mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=[
            pytest.mark.exhaustive,
            pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ here"),
        ]),
    ],
)  # fmt: skip
def test_a_compiled_call_has_the_same_gradients(backend, monkeypatch):
    from graphopt.execute.compiled import run_compiled
    from graphopt.execute.function_run import run_function
    from graphopt.execute.interpreter import complete_inputs
    from graphopt.ir.types import B, P, S

    with_backend(monkeypatch, backend)

    program, _ = gated(layers=1, train=True)
    runner = Runner(program)
    values = complete_inputs({"input_ids": IDS[:2]}) | {"attention_mask": None}
    sizes = {B: 2, S: 12, P: 0}
    (block,) = find_blocks(program)
    for call in program.calls[: block.position]:
        args = [values[name] for name in call.args]
        made = run_function(
            program.functions[call.function], call, args, runner.call_weights(call), sizes
        )[0]
        values |= dict(zip(call.results, made, strict=True))
    call = program.calls[block.position]
    args = [values[name] for name in call.args]
    found = []
    for run in (lambda *all: run_function(*all)[0], run_compiled):
        leaves = {s: v.clone().requires_grad_() for s, v in runner.call_weights(call).items()}
        run(program.functions[call.function], call, args, leaves, sizes)[
            0
        ].square().sum().backward()
        found.append({slot: leaf.grad for slot, leaf in leaves.items()})
    for slot, expected in found[0].items():
        # fp32 sums of some 50 terms in another order.
        close = 1e-5 * float(expected.abs().max())
        assert float((expected - found[1][slot]).abs().max()) <= close, slot
    assert float(found[1]["mlp.router.selection_bias"].abs().max()) >= 1


def tuner_of(program, names, steps, saved=None, gamma=GAMMA, device=CPU):
    forms = {
        name: LoadBalanceBias(value_of(program, name), gamma) for name in names["selection_bias"]
    }
    forms |= {
        name: FullParametrisation(value_of(program, name), 2.0) for name in names["gate_scale"]
    }
    blocks = find_blocks(program)
    first, stop = blocks[0].position, blocks[-1].position + 1
    whole = BlockRunner(tiny_program(), first, stop, {}, device)
    lessons = DistillationData(IDS, HiddenStateCache(whole, IDS), held_out=8)
    student = BlockRunner(program, first, stop, forms, device)
    return Tuner(
        student, lessons, LogitObjective(), Schedule(steps=steps, batch=4, rate=1e-2), saved=saved
    )


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
        ]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("compiled", [False, True])
def test_a_bias_moves_once_a_step_also_recorded_and_compiled(device, compiled, monkeypatch):
    from graphopt.training import tuner

    if compiled:
        monkeypatch.setattr(tuner, "compile_from", lambda kinds: (0.0, 0))
    program, names = gated(train=True)
    for name in names["selection_bias"]:
        # The first two experts are always chosen, and the others never.
        start = torch.tensor([9.0, 9.0, -9.0, -9.0, -9.0])
        program.weights.replace(Weight(name, Array(start)))
    tuner = tuner_of(program, names, 8, gamma=2.0**-10, device=torch.device(device))
    tuner._prepare()
    for step in range(1, 9):
        tuner._step(1e-3)
        tuner._check(step / 8)
        moved = step * 2.0**-10
        expected = torch.tensor([9 - moved, 9 - moved, *[moved - 9] * 3])
        for name in names["selection_bias"]:
            assert torch.equal(tuner.student.parametrisations[name]().detach().cpu(), expected), (
                step
            )


def test_a_step_moves_every_bias_by_gamma_and_a_check_by_nothing():
    program, names = gated(train=True)
    tuner = tuner_of(program, names, 1)
    tuner._check(0.0)
    assert all(
        not float(form().detach().abs().max()) for form in tuner.student.parametrisations.values()
    )
    rows = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()[:4]
    tuner._step(1e-2)
    loads = []
    watched = BlockRunner(program, 1, len(program.calls) - 1, {}, CPU)
    values = watched.window_inputs(IDS[rows])
    with torch.no_grad():
        for _ in watched.run_calls(
            [values], 0, find_blocks(program)[-1].position + 1, observe=lambda value, tensor: (
            loads.append((tensor != 0).flatten(0, -2).sum(0).float())
            if value.node is not None and value.node.op == "top_k_gating" else None
        )):  # fmt: skip
            pass
    assert len(loads) == 2
    for name, load in zip(names["selection_bias"], loads, strict=True):
        moved = tuner.student.parametrisations[name]().detach()
        assert torch.equal(moved, -GAMMA * (load - load.mean()).sign())
    for name in names["gate_scale"]:
        assert float(tuner.student.parametrisations[name]().detach().abs().max()) > 0


@pytest.mark.slow
def test_loads_come_nearer_to_each_other_by_balance_alone():
    program, names = gated(train=True)
    for name in names["selection_bias"]:
        # Odds are about 0.2 each: the first expert has next to no tokens, and the last all.
        program.weights.replace(Weight(name, Array(torch.linspace(-0.3, 0.3, 5))))
    tuner = tuner_of(program, names, 80, gamma=0.01)
    excess = []
    for _ in range(80):
        tuner._step(0.0)
        forms = [tuner.student.parametrisations[name] for name in names["selection_bias"]]
        excess.append(sum(float(form.value.grad.abs().sum()) for form in forms))
    assert sum(excess[-8:]) < 0.6 * sum(excess[:8])


def test_with_thresholds_a_form_that_learns_runs_the_mean_number_of_experts():
    scores = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    bias = torch.full((4,), 0.2, requires_grad=True)
    attrs = {"top_k": 4, "mean_active_experts": 1, "surrogate": True, "balance": True}
    (gates,) = get_op("top_k_gating").torch([scores, bias], attrs)
    # The 30 highest of 120, with the threshold between the last of them and the next.
    threshold = (scores + 0.2).flatten().sort(descending=True).values[29:31].mean()
    assert torch.equal(gates, (scores + 0.2 > threshold).float()) and int(gates.sum()) == 30
    gates.sum().backward()
    torch.testing.assert_close(bias.grad, threshold.expand(4))
    # What is deployed goes by the bias as it is; taking the gradient from it makes the two one.
    with torch.no_grad():
        (plain,) = get_op("top_k_gating").torch([scores, bias], attrs)
        assert torch.equal(plain, (scores + 0.2 > 0).float())
        (moved,) = get_op("top_k_gating").torch([scores, bias - bias.grad], attrs)
    assert torch.equal(moved, gates.detach())


def test_training_with_thresholds_holds_the_mean_number_of_experts():
    program, names = gated(train=True, threshold=True)
    tuner = tuner_of(program, names, 60, gamma=None)

    def means():
        with torch.no_grad():
            for name, form in tuner.student.parametrisations.items():
                assign(program, name, form())
        loads = expert_loads(program, IDS, CPU)
        return [sum(load) for _, load in loads]

    for _ in range(60):
        tuner._step(1e-3)
    # Random routers run any number of experts; followed edges bring it to 2, as far as the few
    # tokens of a batch tell.
    assert all(abs(mean - 2) < 0.25 for mean in means())


@pytest.mark.slow
def test_after_training_thresholds_are_set_on_windows_that_it_did_not_see(
    tmp_path_factory, tmp_path, monkeypatch
):
    from graphopt.passes import tune_moe

    dense = trained_program(tmp_path_factory, layers=2)
    text = tmp_path / "text.txt"
    text.write_text(book()[:24000], encoding="utf-8")
    set_on = []

    def calibrate(program, windows, device):
        set_on.append(windows)
        return calibrate_thresholds(program, windows, device)

    monkeypatch.setattr(tune_moe, "calibrate_thresholds", calibrate)
    trained_on = []
    real = Tuner.__init__

    def init(self, student, data, *rest, **named):
        trained_on.append(data.ids)
        real(self, student, data, *rest, **named)

    monkeypatch.setattr(Tuner, "__init__", init)
    recipe = (
        "carve-moe{shared=2,active=2,experts=8,threshold=true,control=false,seqlen=96},"
        "tune-moe{steps=4,seqlen=96,rate=0.01}"
    )
    program, _ = go.Pipeline.parse(recipe).run(dense, go.RunOptions(calib=text, verify=False))
    (windows,) = set_on
    seen = {tuple(row) for row in trained_on[0].tolist()}
    assert len(windows) > 1 and not seen & {tuple(row) for row in windows.tolist()}
    # Of these very windows the mean is exact, up to equal logits at the threshold.
    assert [sum(load) for _, load in expert_loads(program, windows, CPU)] == pytest.approx(
        [2.0, 2.0], abs=1e-3
    )


def test_an_interrupted_training_goes_on_with_its_biases(tmp_path):
    program, names = gated(train=True)
    straight = tuner_of(program, names, 8)
    straight.run()
    stopped = tuner_of(program, names, 8, tmp_path / "state.pt")
    real, count = stopped._step, 0

    def stops(rate):
        nonlocal count
        count += 1
        if count == 5:
            stopped._save()
            raise KeyboardInterrupt
        return real(rate)

    stopped._step = stops
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = tuner_of(program, names, 8, tmp_path / "state.pt")
    assert again.run().steps == 8
    for name, form in straight.student.parametrisations.items():
        assert torch.allclose(form(), again.student.parametrisations[name](), atol=1e-7), name
    moved = [
        form().detach()
        for name, form in again.student.parametrisations.items()
        if "selection_bias" in name
    ]
    assert all(float(value.abs().max()) >= GAMMA / 2 for value in moved)


@pytest.mark.slow
def test_biases_and_scales_stay_in_what_is_emitted(tmp_path):
    from graphopt.backends.opening import open_language_model

    program, names = gated()
    set_gates(program, names)
    expected = Runner(program).logits({"input_ids": IDS[:2]})
    go.emit(program, tmp_path / "out", emit=("torch", "onnx"))
    for backend in ("torch", "onnx"):
        found = open_language_model(str(tmp_path / "out"), backend=backend).logits(IDS[:2])
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max())), backend
    opened = go.capture(str(tmp_path / "out"))
    for name in (*names["selection_bias"], *names["gate_scale"]):
        assert torch.equal(value_of(opened, name), value_of(program, name))


def test_a_negative_balance_is_refused():
    with pytest.raises(UsageError, match=r"balance=-1\.0 is below 0"):
        make_pass("tune-moe", {"balance": -1.0})
