"""What the recorder sees, against lists of events made by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from graphopt.errors import UsageError
from graphopt.memory.cost import Roofline
from graphopt.memory.operators import data_dependence
from graphopt.memory.recorder import Recorder
from graphopt.memory.recording import record
from graphopt.memory.stand_in import StandIn
from graphopt.memory.trace import FREE, KIND_NAMES, MALLOC, Trace


def events(trace: Trace) -> list[str]:
    """Return the events as lines, with instances by name or by size."""
    trace.check()
    lines = []
    for kind, index in zip(trace.kind.tolist(), trace.instance.tolist(), strict=True):
        instance = trace.instances[index]
        lines.append(f"{KIND_NAMES[kind]} {instance.name or instance.size}")
    return lines


def plain(trace: Trace) -> list[tuple[Any, ...]]:
    """Return the events as what does not depend on the device: kind, instance, size, operation."""
    trace.check()
    columns = (trace.kind.tolist(), trace.instance.tolist(), trace.op.tolist())
    return [
        (kind, index, trace.instances[index].size, trace.op_names[op])
        for kind, index, op in zip(*columns, strict=True)
    ]


def mlp_step(device: str) -> tuple[Callable[[], None], Callable[[], Any]]:
    """Return a training step of two matrices, and what its tensors are called."""
    x = torch.ones(3, 4, device=device)
    w1 = nn.Parameter(torch.ones(4, 8, device=device))
    w2 = nn.Parameter(torch.ones(8, 2, device=device))
    sgd = torch.optim.SGD([w1, w2], lr=0.1, foreach=False)

    def step() -> None:
        loss = ((x @ w1).relu() @ w2).sum()
        loss.backward()
        sgd.step()
        sgd.zero_grad()

    return step, lambda: {"input": {"x": x}, "weight": {"w1": w1, "w2": w2}}


MLP = """
malloc 96   read x    read w1   write 96
malloc 96   read 96   write 96  free 96
malloc 24   read 96   read w2   write 24
malloc 4    read 24   write 4   free 24
malloc 4    write 4
malloc 64   read 96   read 4    write 64
malloc 96   read 4    read w2   write 96
malloc 96   read 96   read 96   write 96  free 96   free 96
malloc 128  read x    read 96   write 128 free 96   free 4
read w1     read 128  write w1
read w2     read 64   write w2
free 128    free 64   free 4
"""
"""Forward: h = x w1 [3, 8], a = relu(h), after which h is not needed, y = a w2 [3, 2], its sum.
Backward: the ones that it begins with, of which the gradient of the sum is a view, and which its
caller holds to the end; the gradient of w2 [8, 2] from a, and that of a from w2; of h, from a's
sign, when a is let go of; of w1 [4, 8].
Then SGD in place, gradients dropped, and the loss."""


def test_a_training_step_of_two_matrices_has_the_events_counted_by_hand() -> None:
    step, tags = mlp_step("cpu")
    trace = record(step, tags=tags)
    assert events(trace) == [line.replace("  ", " ").strip() for line in _lines(MLP)]
    by_category = {c: [i.size for i in trace.instances if i.category == c]
                   for c in ("activation", "gradient", "weight", "input")}  # fmt: skip
    assert by_category["gradient"] == [64, 96, 96, 128]
    assert by_category["weight"] == [128, 64]
    assert by_category["input"] == [48]
    # Autograd keeps the input, w2 and the activation, whose sign is the gradient of relu.
    saved = {i.name or i.size for i in trace.instances if i.saved and i.size > 4}
    assert saved == {"x", "w2", 96}
    assert trace.clock == "host"
    assert trace.complete


def _lines(text: str) -> list[str]:
    words = text.split()
    return [f"{kind} {name}" for kind, name in zip(words[::2], words[1::2], strict=True)]


def by_fake_mode(make: Callable[[str], Any], iterations: int) -> Trace:
    with FakeTensorMode():
        step, tags = make("cpu")
        return record(step, tags=tags, iterations=iterations)


def by_stand_in(make: Callable[[str], Any], iterations: int) -> Trace:
    with StandIn():
        step, tags = make("cuda")
        return record(step, tags=tags, iterations=iterations)


@pytest.mark.parametrize("without_values", [by_fake_mode, by_stand_in])
def test_tensors_without_values_give_the_same_events(
    without_values: Callable[[Callable[[str], Any], int], Trace],
) -> None:
    step, tags = mlp_step("cpu")
    real = record(step, tags=tags, iterations=3)
    fake = without_values(mlp_step, 3)
    assert plain(fake) == plain(real)
    assert fake.iteration_marks == real.iteration_marks
    assert fake.clock == "operation index"
    assert [i.category for i in fake.instances] == [i.category for i in real.instances]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_gives_the_same_events() -> None:
    step, tags = mlp_step("cuda")
    gpu = record(step, tags=tags, iterations=3, device="cuda")
    assert plain(gpu) == plain(by_stand_in(mlp_step, 3))
    assert gpu.clock == "cuda events"


def test_views_are_no_instances_and_touch_nothing() -> None:
    x = torch.ones(4, 6)

    def views() -> Tensor:
        y = x.t()[1:].reshape(10, 2).unflatten(0, (2, 5)).permute(2, 0, 1)  # reshape copies here
        return y.squeeze().unsqueeze(0).detach()

    trace = record(views, tags=lambda: {"input": {"x": x}})
    assert events(trace) == ["malloc 80", "read x", "write 80", "free 80"]


def test_a_view_keeps_its_storage_alive() -> None:
    def work() -> Tensor:
        part = torch.ones(64)[:1]
        torch.zeros(8)
        return part + 1

    assert events(record(work)) == [
        "malloc 256", "write 256", "malloc 32", "write 32", "free 32",
        "malloc 4", "read 256", "write 4", "free 256", "free 4",
    ]  # fmt: skip


def test_in_place_keeps_the_instance_and_a_copy_overwrites() -> None:
    x, y = torch.ones(4), torch.ones(4)

    def work() -> None:
        x.add_(y)
        x[1:].mul_(2)
        x.copy_(y)
        x.zero_()

    trace = record(work, tags=lambda: {"input": {"x": x, "y": y}})
    assert events(trace) == [
        "read x", "read y", "write x", "read x", "write x", "read y", "write x", "write x",
    ]  # fmt: skip
    assert len(trace.instances) == 2


def test_out_is_written_and_grows_where_it_is_too_small() -> None:
    x, right, small = torch.ones(4), torch.empty(4), torch.empty(0)

    def work() -> None:
        torch.exp(x, out=right)
        torch.exp(x, out=small)

    trace = record(work, tags=lambda: {"input": {"x": x, "right": right, "small": small}})
    assert events(trace) == [
        "read x", "write right", "malloc small", "free small", "read x", "write small",
    ]  # fmt: skip
    assert [i.size for i in trace.instances] == [16, 16, 0, 16]


def test_nested_results_are_instances_and_lists_of_arguments_are_read() -> None:
    x = torch.ones(2, 3)

    def work() -> Tensor:
        values, _ = x.max(1)
        return torch.cat([values, x.flatten()])

    trace = record(work, tags=lambda: {"input": {"x": x}})
    assert events(trace) == [
        "malloc 8", "malloc 16", "read x", "write 8", "write 16",
        "malloc 32", "read 8", "read x", "write 32", "free 8", "free 16", "free 32",
    ]  # fmt: skip


def test_a_storage_resized_by_hand_is_another_instance() -> None:
    def work() -> None:
        x = torch.ones(4)
        x.untyped_storage().resize_(0)
        x.untyped_storage().resize_(64)

    assert events(record(work)) == [
        "malloc 16", "write 16", "malloc 0", "free 16", "malloc 64", "free 0", "free 64",
    ]  # fmt: skip
    assert torch.ones(1).untyped_storage().resize_(8).nbytes() == 8


def test_tensors_made_outside_are_external_and_may_be_let_go_of() -> None:
    held = [torch.ones(4), torch.ones(8)]

    def work() -> Tensor:
        return held.pop() + 1

    trace = record(work)
    assert events(trace) == ["malloc 32", "read 32", "write 32", "free 32", "free 32"]
    external = [i for i in trace.instances if i.external]
    assert [(i.born, i.died, i.producer) for i in external] == [(0, 3, "")]
    assert trace.live_bytes().tolist() == [64, 64, 64, 32, 0]


def test_running_means_are_weights_and_not_inputs() -> None:
    norm = nn.BatchNorm1d(4)
    trace = record(lambda: norm(torch.ones(2, 4)))
    named = [i for i in trace.instances if i.external]
    assert len(named) == 5
    assert {i.category for i in named} == {"weight"}


def test_what_a_graph_keeps_is_saved_before_any_backward_pass() -> None:
    x = torch.ones(4, requires_grad=True)

    def work() -> Tensor:
        y = x.exp()
        return y * y.detach() + torch.ones(4)

    trace = record(work)
    saved = [(i.producer, i.saved) for i in trace.instances]
    assert saved == [
        ("", False), ("aten.exp.default", True), ("aten.mul.Tensor", False),
        ("aten.ones.default", False), ("aten.add.Tensor", False),
    ]  # fmt: skip


def test_what_a_checkpoint_computes_again_is_an_activation() -> None:
    w = nn.Parameter(torch.ones(4, 4))
    x = torch.ones(4, 4)

    def work() -> None:
        checkpoint(lambda v: (v @ w).exp(), x, use_reentrant=False).sum().backward()

    trace = record(work)
    producers = [i.category for i in trace.instances if i.producer == "aten.exp.default"]
    assert producers == ["activation", "activation"]
    assert sum(i.category == "gradient" for i in trace.instances) >= 2


def test_a_checkpoint_without_values_has_the_events_of_one_with_values() -> None:
    def make(device: str) -> Any:
        w = nn.Parameter(torch.ones(4, 4, device=device))
        x = torch.ones(4, 4, device=device)

        def step() -> None:
            w.grad = None
            checkpoint(lambda v: (v @ w).exp(), x, use_reentrant=False).sum().backward()

        return step

    with StandIn():
        without = record(make("cuda"), iterations=2)
    assert without.complete
    assert plain(without) == plain(record(make("cpu"), iterations=2))


def test_a_callable_that_fails_midway_gives_what_was_traced() -> None:
    def work() -> None:
        torch.ones(4)
        raise ValueError("no more")

    trace = record(work, iterations=3)
    assert events(trace) == ["malloc 16", "write 16", "free 16"]
    assert not trace.complete
    assert trace.notes == [
        "Iteration 1 of 3 failed, and the trace ends there: ValueError: no more."
    ]


@pytest.mark.parametrize("mode", [FakeTensorMode, StandIn])
def test_what_depends_on_values_is_refused_without_them(mode: Callable[[], Any]) -> None:
    def branches() -> Tensor:
        x = torch.ones(4, device="cuda" if mode is StandIn else "cpu")
        return x if x.sum() > 3 else -x

    def sizes() -> Tensor:
        return torch.ones(4, device="cuda" if mode is StandIn else "cpu").nonzero()

    for work, reason in ((branches, "a value"), (sizes, "nonzero")):
        with mode(), pytest.raises(UsageError, match=f"{work.__qualname__}.*{reason}.*line") as e:
            record(work)
        assert __file__ in str(e.value)


def test_a_trace_ends_at_its_limit() -> None:
    def work() -> None:
        for _ in range(50):
            torch.ones(4)

    trace = record(work, most=30)
    trace.check()
    assert 30 <= len(trace) < 40
    assert not trace.complete
    assert "as many as are kept" in trace.notes[0]


def test_tensors_without_a_storage_are_named() -> None:
    x = torch.ones(3, 3).to_sparse()
    trace = record(lambda: x + x)
    trace.check()
    assert any("sparse" in note for note in trace.notes)


def test_every_iteration_has_its_mark() -> None:
    trace = record(lambda: torch.ones(4) + 1, iterations=4)
    events(trace)
    assert trace.iteration_marks == [0, 7, 14, 21]


def test_allocations_inside_an_optimizer_are_its_own() -> None:
    w = nn.Parameter(torch.ones(8))
    adam = torch.optim.AdamW([w], foreach=False)

    def step() -> None:
        (w * w).sum().backward()
        adam.step()

    trace = record(step, tags=lambda: {"weight": {"w": w}})
    trace.check()
    kept = [i for i in trace.instances if i.category == "optimizer" and i.died is None]
    assert sorted(i.size for i in kept) == [4, 32, 32]  # the step and both moments


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), torch.ones(32, 64)


def convolutions() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 49, 10),
    )  # fmt: skip
    return model, torch.ones(4, 3, 16, 16)


def transformer() -> tuple[nn.Module, Tensor]:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), torch.ones(2, 9, 32)


@pytest.mark.parametrize("make", [mlp, convolutions, transformer])
def test_peak_agrees_with_torchs_own_tracker(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    model, x = make()

    def step() -> None:
        model(x).square().mean().backward()
        model.zero_grad()

    def tags() -> Any:
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {"weight": named, "input": {"x": x}}

    mine = record(step, tags=tags)
    mine.check()
    theirs = tracker.MemTracker()
    theirs.track_external(model, x)
    with theirs:
        step()
    peak = theirs.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert mine.complete
    assert mine.peak().bytes == peak


def test_every_malloc_has_at_most_one_free() -> None:
    step, _ = mlp_step("cpu")
    trace = record(step, iterations=5)
    for kind in (MALLOC, FREE):
        seen = trace.instance[trace.kind == kind].tolist()
        assert len(seen) == len(set(seen))


class Counter:
    """Stands for `torch.cuda.Event` where there is no GPU: the n-th to be recorded is at n ms."""

    recorded = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at = -1

    def record(self) -> None:
        Counter.recorded += 1
        self.at = Counter.recorded

    def elapsed_time(self, other: Counter) -> float:
        return float(other.at - self.at)


def test_on_a_gpu_times_are_those_of_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Counter)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    x = torch.ones(4)
    with Recorder("cuda events") as recorder:
        recorder.tag({"x": x}, "input")
        y = x + 1
        y.mul_(2)
        del y
    trace = recorder.finish()
    assert events(trace) == [
        "malloc 16", "read x", "write 16", "read 16", "write 16", "free 16",
    ]  # fmt: skip
    # Each operator is between two events; what is let go of has the time of the one before.
    assert (trace.time_ns / 1e6).tolist() == [0, 0, 1, 2, 3, 3]
    assert len(recorder.addresses) == len(trace.instances) == 2
    assert recorder.addresses[0][0] == x.data_ptr()
    assert (recorder.log.host_times[1:] >= recorder.log.host_times[:-1]).all()
    assert abs(recorder.log.host_times[0] - time.time_ns()) < 60e9


def test_tensors_inside_a_wrapper_are_what_is_followed() -> None:
    inner = (torch.ones(4), torch.ones(4))
    wrapped = TwoTensor(*inner)
    trace = record(lambda: wrapped + wrapped, tags=lambda: {"input": {"a": inner[0]}})
    assert [i.size for i in trace.instances] == [16] * 4
    assert {i.producer for i in trace.instances if not i.external} == {"aten.add.Tensor"}
    assert events(trace).count("read a") == 2


def test_tensors_with_values_are_one_instance_each_in_a_fake_mode() -> None:
    x, w = torch.ones(3, 3), nn.Parameter(torch.ones(3, 3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        trace = record(lambda: (x @ w).t() @ (w.t() @ x), iterations=2)
    trace.check()
    external = [(i.size, i.category) for i in trace.instances if i.external]
    assert external == [(36, "input"), (36, "weight")]


def test_an_operator_that_runs_others_is_one() -> None:
    x = torch.ones(4)

    def work() -> Any:
        return torch.cond(torch.ones(()) > 0, lambda a: a + 1, lambda a: a - 1, (x,))

    trace = record(work, tags=lambda: {"input": {"x": x}})
    assert events(trace)[-6:-2] == ["malloc 16", "read 1", "read x", "write 16"]
    assert trace.complete
    assert trace.notes == ["What cond runs inside is not seen."]


def test_transforms_of_functions_are_followed() -> None:
    x = torch.ones(4)
    trace = record(lambda: torch.func.grad(lambda v: (v * v).sum())(x))
    trace.check()
    assert trace.complete
    assert {i.size for i in trace.instances} == {4, 16}


def test_a_cost_that_a_formula_refuses_is_a_note_and_no_failure() -> None:
    def cost(function: object, *rest: object) -> float:
        if "mm" in str(function):
            raise AssertionError("heads differ")
        return 5.0

    with FakeTensorMode():
        a = torch.ones(4, 4)
        trace = record(lambda: (a @ a).sum(), cost=cost)
    assert trace.complete and trace.clock == "cost model" and trace.time_ns[-1] == 5
    assert [note for note in trace.notes if "aten.mm" in note and "heads differ" in note]


def test_a_roofline_counts_attention_with_grouped_heads() -> None:
    gpu = Roofline(bandwidth=1e30, flops=1e9, flops_32=1e9, launch=0.0, name="slow")
    with StandIn():
        q = torch.zeros(2, 6, 8, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.zeros(2, 3, 8, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        forward = record(
            lambda: nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), cost=gpu
        )
    # Two products of 2 B H S T D operations each, at one operation a nanosecond.
    assert forward.time_ns.max() == 2 * (2 * 2 * 6 * 8 * 8 * 16)


def test_nested_tensors_are_said_not_to_be_followed() -> None:
    parts = [torch.randn(2, 4), torch.randn(3, 4)]

    def work() -> Tensor:
        return torch.nested.nested_tensor(parts, layout=torch.strided) * 2

    trace = record(work)
    assert "Tensors that are nested have no sizes, and are not followed." in trace.notes


def test_attention_that_drops_is_told_from_attention_that_does_not() -> None:
    q = torch.randn(1, 2, 8, 16, device="meta")

    def work() -> None:
        for dropout in (0.0, 0.5):
            torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, dropout)

    with StandIn():
        trace = record(work)
    name = "aten._scaled_dot_product_flash_attention.default"
    assert [n for n in trace.op_names if "attention" in n] == [name, f"{name}, with dropout"]


def test_lists_are_overwritten_as_tensors_are() -> None:
    out, values = [torch.zeros(4), torch.zeros(2)], [torch.ones(4), torch.ones(2)]

    def work() -> None:
        torch._foreach_copy_(out, values)
        torch._foreach_zero_(out)

    trace = record(work)
    read = {trace.instance[i] for i, kind in enumerate(trace.kind) if KIND_NAMES[kind] == "read"}
    written = {
        trace.instance[i] for i, kind in enumerate(trace.kind) if KIND_NAMES[kind] == "write"
    }
    assert len(read) == len(written) == 2 and not read & written


@pytest.mark.parametrize(
    ("words", "depends"),
    [
        ("no metadata for layer 3", False),
        ("Expected all tensors to be on the same device, found two: meta and cuda:0", False),
        ("Cannot copy out of meta tensor; no data!", True),
    ],
)
def test_an_error_is_put_down_to_values_where_it_is_of_meta_tensors(
    words: str, depends: bool
) -> None:
    assert (data_dependence(RuntimeError(words)) is not None) == depends


def test_what_no_operator_made_counts_from_where_it_is_seen_first() -> None:
    """A buffer of another library's, made in each iteration, lives as long as it is held."""
    weight = nn.Parameter(torch.ones(100))
    weight.grad = torch.zeros(100)

    def work() -> None:
        batch = torch.frombuffer(bytearray(4000), dtype=torch.float32)
        weight.grad.add_((batch.sum() * weight).detach())

    trace = record(work, iterations=4)
    made = [i for i in trace.instances if i.size == 4000]
    assert len(made) == 4 and all(not i.external and i.died is not None for i in made)
    assert sorted(i.size for i in trace.instances if i.external) == [400, 400]
    assert int(trace.live_bytes().max()) < 6000
