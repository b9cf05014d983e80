"""The arena of an emitted package: same results, in the buffer, as large as the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from emitted import load_file
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import tiny_program
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.ir import KVLayout
from graphopt.ir.graph import Program
from graphopt.ir.relayout import with_layouts
from graphopt.lowering.torch import TorchEmitter, source_files
from graphopt.memory.planning import Problem, check_offsets
from graphopt.memory.planning.sections import live_at_peak
from graphopt.runtime.arena import Arena
from graphopt.runtime.arena_offsets import Block, most_at_once, place_blocks
from graphopt.runtime.out_forms import out_form
from graphopt.support.progress import silent

aten = torch.ops.aten


def write(program: Program, folder: Path, target: str) -> ModuleType:
    """Emit a program into a folder and return its `model.py` as a module."""
    TorchEmitter(in_compute_dtype=False).emit(program, folder, target, silent)
    return load_file(folder / "model.py")


def _problem(blocks: list[Block]) -> Problem:
    columns = np.array([(b.lower, b.upper, b.size) for b in blocks], np.int64).reshape(-1, 3)
    lower, upper, size = columns.T.copy()
    return Problem([str(k) for k in range(len(blocks))], lower, upper, size)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(0, 4000))))
def test_offsets_are_a_plan_no_lower_than_the_bound(rows):
    blocks = [Block(at, size, at + length) for at, length, size in rows]
    height = place_blocks(blocks)
    of = _problem(blocks)
    assert check_offsets(of, np.array([b.offset for b in blocks], np.int64)) == height
    assert height >= most_at_once(blocks) == live_at_peak(of)
    assert all(b.offset % 512 == 0 and b.size >= max(b.bytes, 1) for b in blocks)


class Outside(TorchDispatchMode):
    """Collects operations whose results lie neither in a buffer nor in what they were given."""

    def __init__(self, buffer: torch.Tensor) -> None:
        super().__init__()
        self.bounds = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()
        self.found: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = op(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves
        given = {x.untyped_storage().data_ptr() for x in leaves((args, kwargs)) if _is_tensor(x)}
        for x in filter(_is_tensor, leaves(result)):
            inside = self.bounds[0] <= x.data_ptr() <= self.bounds[1]
            if x.numel() and not inside and x.untyped_storage().data_ptr() not in given:
                self.found.add(str(op))
        return result


def _is_tensor(x: object) -> bool:
    return isinstance(x, torch.Tensor)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("grows", {}),
        pytest.param("grows", {"window": 3}, marks=pytest.mark.slow),
        pytest.param("grows", {"alibi": True}, marks=pytest.mark.slow),
        ("ring", {"window": 3}),
        pytest.param("fixed", {}, marks=pytest.mark.slow),
        pytest.param("fixed", {"window": 3}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares what a CPU computes")
@pytest.mark.filterwarnings("ignore:attention on a CPU")
def test_steps_in_an_arena_answer_the_same_and_lie_in_it(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    program = tiny_program(cache=True, **options)
    if kind == "ring":
        program = with_layouts(program, {"kv.0": KVLayout("ring", 4)})
    emitted = write(program, tmp_path, "ampere" if kind == "fixed" else "cpu")
    model = emitted.load(tmp_path)
    texts = [[5, 6, 1], [1, 2, 3], [9, 9, 2]]
    wanted = emitted.generate(model, texts, 8)
    arena = emitted.arena_for(model)
    assert emitted.generate(model, texts, 8, arena=arena) == wanted
    # Every step has its plan now.
    buffer = arena.buffer
    outside = Outside(buffer)
    with outside:
        assert emitted.generate(model, texts, 8, arena=arena) == wanted
    assert arena.buffer is buffer
    left_out = {op for step in arena.steps.values() for op in step.left_out}
    # What is made around the steps: token ids, masks and caches.
    around = {"aten.new_zeros.default", "aten.zeros.default", "aten.zeros_like.default"}
    around |= {"aten.lift_fresh.default", "aten.ones_like.default", "aten.arange.default"}
    around |= {"aten.empty.memory_format", "aten.repeat.default", "aten.empty_like.default"}
    assert outside.found <= left_out | around
    for step in arena.steps.values():
        blocks = step.planned()
        offsets = np.array([b.offset for b in blocks], np.int64)
        assert blocks and check_offsets(_problem(blocks), offsets) == step.height
        assert step.live <= step.height <= arena.bytes
    assert arena.bytes == max(step.height for step in arena.steps.values())
    # Prompts of unequal lengths, another number of texts, and a longer answer.
    for ids, count in (([[1], [2, 3, 4, 5]], 5), ([[1, 2]], 20)):
        assert emitted.generate(model, ids, count, arena=arena) == emitted.generate(
            model, ids, count
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU")
def test_the_command_line_prints_the_size_and_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    emitted = write(tiny_program(cache=True), tmp_path, "cpu")
    outputs = []
    for option in ([], ["--arena"]):
        monkeypatch.setattr("sys.argv", ["model.py", "1", "2", "3", "--new", "5", *option])
        emitted.main()
        outputs.append(capsys.readouterr())
    assert outputs[0].out == outputs[1].out and not outputs[0].err
    first, *steps = outputs[1].err.splitlines()
    assert first.startswith("arena: one buffer of ")
    names = [line.split(":")[0].strip() for line in steps if "planned" in line]
    assert names == ["prefill 1 x 3 tokens", "decode 1 x 1 token"]
    assert "not in it: aten._scaled_dot_product_flash_attention_for_cpu.default" in outputs[1].err


@pytest.mark.parametrize("options, has_one", [({"cache": False}, False), ({"cache": True}, True)])
def test_a_model_whose_steps_have_no_cache_has_no_arena(
    options: dict[str, bool], has_one: bool
) -> None:
    files = source_files(tiny_program(**options), "cpu")
    assert ("arena/arena.py" in files) == has_one
    assert ("--arena" in files["model.py"]) == has_one


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU")
@pytest.mark.filterwarnings("ignore:attention on a CPU")
def test_a_decoder_in_an_arena_reads_further_tokens(ring: bool, tmp_path: Path) -> None:
    program = tiny_program(cache=True, window=4)
    if ring:
        program = with_layouts(program, {"kv.0": KVLayout("ring", 4)})
    emitted = write(program, tmp_path, "ampere")
    model = emitted.load(tmp_path)
    answers = []
    for arena in (None, emitted.arena_for(model)):
        decoder = emitted.Decoder(model, 30, 2, arena)
        tokens = []
        for _ in range(2):
            tokens += [decoder.start([[1, 2, 3], [4, 5, 6]]), decoder.step(), decoder.step()]
            tokens += [decoder.extend([[7, 8, 9], [3, 2, 1]]), decoder.step()]
        answers.append(tokens)
    assert answers[0] == answers[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU")
def test_logits_in_an_arena_are_the_same_bits(tmp_path: Path) -> None:
    emitted = write(tiny_program(cache=True), tmp_path, "cpu")
    model = emitted.load(tmp_path)
    arena = emitted.arena_for(model)
    rooms = [(arena.room(k, 12), arena.room(v, 12)) for k, v in model.empty_cache(2)]
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]])

    def step(tokens: int) -> torch.Tensor:
        cache = [(k[:, :, :tokens], v[:, :, :tokens]) for k, v in rooms]
        return model(ids[:, tokens : tokens + 1], cache=cache)[0]

    cache = None
    for tokens in range(8):
        logits, cache = model(ids[:, tokens : tokens + 1], cache=cache)
        assert torch.equal(arena.run("decode", step, tokens, 7), logits)
    assert len(arena.steps) == 1 and arena._changes == {}


def _runs(arena: Arena, key: str, step: Callable[[int], torch.Tensor], *tokens: int) -> None:
    for count in tokens:
        assert torch.equal(arena.run(key, step, count), step(count))


def test_a_step_that_changes_is_planned_anew_and_right(monkeypatch) -> None:
    x, arena = torch.arange(64.0), Arena("cpu")
    planned: list[str] = []
    first = arena._first
    monkeypatch.setattr(arena, "_first", lambda key, *r: planned.append(key) or first(key, *r))
    _runs(arena, "other operations", lambda n: (x + n) * 2 if n < 3 else (x - n).exp(), 1, 2, 3, 4)
    _runs(arena, "more room", lambda n: x[: 8 * n].cos().repeat_interleave(99).sin(), 1, 1, 2, 8)
    _runs(arena, "fewer", lambda n: x + 1 if n < 2 else x.view(8, 8), 1, 2)
    _runs(arena, "less room", lambda n: x[:n].cos(), 60, 60, 3, 7)
    assert planned == ["other operations"] * 2 + ["more room"] * 3 + ["fewer"] * 2 + ["less room"]


def test_blocks_that_grow_have_room_for_the_most_tokens() -> None:
    x, arena = torch.rand(4, 2000), Arena("cpu")

    def step(tokens: int) -> torch.Tensor:
        return (x[:, :tokens] * 2).softmax(-1) @ x[:, :tokens].T

    for tokens in range(5, 40):
        assert torch.equal(arena.run("decode", step, tokens, 40), step(tokens))
    assert arena._changes == {}
    # 4 rows of 40 numbers of 4 bytes are 640, in twos of 512; of them, two are needed at once.
    assert arena.steps["decode"].height == 2 * 1024


def test_what_depends_on_values_is_left_as_it_is_and_said() -> None:
    x, arena = torch.tensor([0.0, 1, 2, 0]), Arena("cpu")
    _runs(arena, "mask", lambda n: x[x > n] * 2, 0, 1)
    assert arena.steps["mask"].unplanned
    _runs(arena, "index", lambda n: x[torch.tensor([n, 0])] * 2, 0, 1)
    assert not arena.steps["index"].unplanned
    _runs(arena, "nonzero", lambda n: (x + n - 1).nonzero() + 1, 0, 1, 2, 3)
    assert "nonzero: not planned, since what aten.nonzero.default gives depends on values" in (
        "\n".join(arena.report())
    )
    sizes = iter(range(1, 100))
    for _ in range(12):
        arena.run("sizes", lambda n: torch.ones(600 * next(sizes)) + 1)
    assert arena.steps["sizes"].unplanned == "its operations or their sizes change from run to run"


def test_operations_without_a_form_for_given_memory_are_named() -> None:
    x, arena = torch.rand(2, 8), Arena("cpu")
    weight = torch.rand(8)
    _runs(arena, "norm", lambda n: torch.layer_norm(x + n, (8,), weight), 0, 1, 2)
    (line,) = [line for line in arena.report() if "not in it" in line]
    assert "aten.native_layer_norm.default, 1 times" in line


def test_a_cache_without_room_is_refused() -> None:
    arena = Arena("cpu")
    room = arena.room(torch.zeros(1, 2, 0, 3), 4)
    new = torch.ones(1, 2, 3, 3)
    held = arena.run("append", lambda n: torch.cat((room[:, :, :n], new), 2), 1)
    assert held.data_ptr() == room.data_ptr() and torch.equal(held[:, :, 1:], new)
    # A step without a plan writes there too.
    arena.steps["append"].unplanned = "this is a test"
    held = arena.run("append", lambda n: torch.cat((room[:, :, :n], new + 1), 2), 0)
    assert held.data_ptr() == room.data_ptr() and torch.equal(held, new + 1)
    with pytest.raises(ValueError, match="5 tokens in a cache with room for 4"):
        arena.run("append", lambda n: torch.cat((room[:, :, :n], new), 2), 2)


CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten._to_copy.default, (torch.rand(3, 4).T,), {"dtype": torch.bfloat16}),
    (aten.clone.default, (torch.rand(3, 4).T,), {}),
    (aten.clone.default, (torch.rand(3, 4).T,), {"memory_format": torch.contiguous_format}),
    (aten.clone.default, (torch.rand(3, 1).expand(3, 4),), {}),
    (aten.masked_fill.Scalar, (torch.rand(3, 1), torch.rand(3, 4) > 0.5, -1.0), {}),
    (aten.embedding.default, (torch.rand(9, 4), torch.tensor([[1, 8], [0, 3]])), {}),
    (aten.empty_like.default, (torch.rand(3, 4).T,), {"dtype": torch.int64}),
    (aten.zeros_like.default, (torch.rand(3, 4).T,), {}),
    (aten.ones_like.default, (torch.rand(3, 4),), {"dtype": torch.bool}),
    (aten.full_like.default, (torch.rand(3, 4), 7), {}),
    (aten.new_zeros.default, (torch.rand(3), [2, 2]), {}),
    (aten.new_ones.default, (torch.rand(3), [2, 2]), {}),
    (aten.new_full.default, (torch.rand(3), [2, 2], 5), {}),
    (aten.new_empty_strided.default, (torch.rand(3), [2, 3], [1, 2]), {}),
    (aten.empty_strided.default, ([2, 3], [1, 2]), {}),
    (aten.zeros.default, ([2, 3],), {"dtype": torch.int64}),
    (aten.full.default, ([2, 3], 4), {"dtype": torch.float32}),
    (aten.scalar_tensor.default, (2.5,), {"dtype": torch.float32}),
    (aten.arange.default, (5,), {"dtype": torch.int64}),
    (aten.arange.start, (2, 5), {}),
    (aten.arange.start_step, (2, 9, 3), {}),
    (aten.relu.default, (torch.tensor([-1.0, -0.0, 2.0, torch.nan]).nan_to_num(3.0),), {}),
    (
        aten.index_put.default,
        (torch.rand(4, 2).T, [torch.tensor([1, 1])], torch.ones(2, 4), True),
        {},
    ),
    (aten.remainder.Scalar, (torch.arange(5), 3), {}),
    (aten.mul.Scalar, (torch.rand(2, 3, 4).transpose(0, 1), 0.3), {}),
    (aten.mul.Tensor, (torch.rand(3, 4).T, torch.rand(4, 3)), {}),
    (aten.cat.default, ([torch.rand(2, 3), torch.rand(2, 5)], 1), {}),
    (aten.stack.default, ([torch.rand(2, 3), torch.rand(2, 3)], 1), {}),
    (aten.mean.dim, (torch.rand(3, 4), [-1], True), {}),
    (aten.topk.default, (torch.rand(3, 9), 2), {}),
    (aten.max.dim, (torch.rand(3, 9), 1), {}),
    (aten.where.self, (torch.rand(3) > 0.5, torch.rand(3), torch.zeros(())), {}),
    (aten.index.Tensor, (torch.rand(3, 4), [torch.tensor([2, 0])]), {}),
    (aten.bmm.default, (torch.rand(2, 3, 4), torch.rand(2, 4, 3)), {}),
    (aten.addmm.default, (torch.rand(5), torch.rand(3, 4), torch.rand(4, 5)), {}),
    (aten._softmax.default, (torch.rand(3, 4), -1, False), {}),
    (aten.cumsum.default, (torch.ones(2, 3, dtype=torch.bool), 1), {}),
]


@pytest.mark.parametrize("op, args, kwargs", CALLS, ids=[str(call[0]) for call in CALLS])
def test_an_operation_writes_the_same_to_given_memory(op, args, kwargs) -> None:
    plain = op(*args, **kwargs)
    results = list(plain) if isinstance(plain, tuple) else [plain]
    write_to = out_form(op, len(results), "cpu")
    assert write_to is not None
    memory = [torch.empty(0, dtype=x.dtype) for x in results]
    storages = [m.untyped_storage().resize_(4096).data_ptr() for m in memory]
    made = write_to(args, kwargs, memory)
    made = list(made) if isinstance(made, tuple) else [made]
    for got, want, storage in zip(made, results, storages, strict=True):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
        assert got.untyped_storage().data_ptr() == storage
        assert "empty" in str(op) or torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares what a CPU computes")
def test_attention_without_a_kernel_lies_in_the_buffer(tmp_path: Path) -> None:
    """As on a GPU, for grouped heads in 32 bits: torch multiplies and normalises op by op."""
    emitted = write(tiny_program(cache=True), tmp_path, "cpu")
    model = emitted.load(tmp_path)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = emitted.generate(model, [[5, 6, 1], [1, 2, 3]], 4)
        arena = emitted.arena_for(model)
        for _ in range(2):
            assert emitted.generate(model, [[5, 6, 1], [1, 2, 3]], 4, arena=arena) == wanted
    operations = {str(made.op) for step in arena.steps.values() for made in step.operations}
    assert "aten._softmax.default" in operations and "aten.bmm.default" in operations
    assert not any(step.left_out for step in arena.steps.values())


def test_a_softmax_of_masked_rows_is_that_of_torch() -> None:
    x = torch.randn(3, 4).masked_fill(torch.rand(3, 4) > 0.5, -torch.inf)
    x[1], x[2, 0] = -torch.inf, torch.nan
    arena = Arena("cpu")
    plain = aten._safe_softmax.default(x, -1)
    for _ in range(2):
        got = arena.run("step", lambda _: aten._safe_softmax.default(x, -1))
        assert torch.equal(got.nan_to_num(2.0), plain.nan_to_num(2.0)) and got.isnan()[2].all()
    assert not arena.steps["step"].left_out and arena.steps["step"].planned()


def test_forms_that_copy_from_elsewhere_are_none() -> None:
    for op in (aten.native_layer_norm.default, aten.repeat.default, aten.constant_pad_nd.default):
        assert out_form(op, 3 if "norm" in str(op) else 1, "cpu") is None
