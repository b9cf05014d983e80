"""Layouts of KV states: what they hold, and that no result depends on them."""

from __future__ import annotations

import json

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import tiny_program

from graphopt.backends.opening import open_language_model
from graphopt.compiler import emit
from graphopt.errors import LoweringError, SourceError, UsageError, VerifyError
from graphopt.execute.interpreter import Runner
from graphopt.ir import KVLayout, P, S
from graphopt.ir.compare import first_difference
from graphopt.ir.imprint import Imprint
from graphopt.ir.kv_memory import PagedKV
from graphopt.ir.relayout import with_layouts
from graphopt.ir.serialize import program_from_json, program_to_json
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import B
from graphopt.ir.verify import verify
from graphopt.report.breakdown import kv_cache_bytes

RING, PAGES = KVLayout("ring", 4), KVLayout("paged", 3)
IDS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1] * 12, [0, 0, 0] + [1] * 9])


def program(**options):
    """Two layers, of which the first has a window of 3."""
    return tiny_program(window=3, cache=True, **options)


def by_steps(runner: Runner, counts: list[int]) -> torch.Tensor:
    """Return the logits of the text when it is read in steps of so many tokens."""
    cache, start, logits = None, 0, []
    for count in counts:
        end = start + count
        outputs, cache = runner.run(
            {"input_ids": IDS[:, start:end], "attention_mask": MASK[:, :end]}, cache
        )
        logits.append(outputs[0])
        start = end
    return torch.cat(logits, 1)[MASK.bool()[:, :start]]


LAYOUTS = [
    {"kv.0": RING},
    {"kv.0": KVLayout("ring", 3), "kv.1": PAGES},
    {"kv.0": PAGES, "kv.1": KVLayout("paged", 16)},
]


@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
@pytest.mark.parametrize("mode", ["torch", "reference"])
@pytest.mark.parametrize("alibi", [False, True])
def test_every_layout_gives_the_logits_of_the_whole_text(layouts, mode, alibi):
    plain = program(alibi=alibi)
    changed = with_layouts(plain, layouts)
    expected = by_steps(Runner(plain, dtype=torch.float64, mode="reference"), [12])
    for counts in ([12], [5, 1, 1, 3, 2], [1] * 12):
        logits = by_steps(Runner(changed, dtype=torch.float64, mode=mode), counts)
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_a_ring_keeps_its_last_tokens():
    runner = Runner(with_layouts(program(), {"kv.0": RING}), dtype=torch.float64)
    whole = Runner(program(), dtype=torch.float64)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    held, expected = runner.run(inputs)[1]["kv.0"], whole.run(inputs)[1]["kv.0"]
    for kept, all_tokens in zip(held, expected, strict=True):
        assert kept.equal(all_tokens[:, :, -4:])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_pages_hold_what_was_put_in(page, counts):
    paged = PagedKV.empty(torch.zeros(2, 2, 0, 3), torch.zeros(2, 2, 0, 5), page)
    k, v = torch.randn(2, 2, sum(counts), 3), torch.randn(2, 2, sum(counts), 5)
    total = 0
    for count in counts:
        total += count
        before = paged
        paged = paged.extended(k[:, :, total - count : total], v[:, :, total - count : total])
        assert before.length == total - count  # what continues from it is not disturbed
    held_k, held_v = paged
    assert held_k.equal(k) and held_v.equal(v)
    table = paged.block_table
    assert table.shape == (2, -(-total // page)) and len(paged.k) == table.numel()
    assert table.unique().numel() == table.numel()


def test_without_a_mask_full_rings_do_not_tell_the_past():
    runner = Runner(with_layouts(program(layers=1), {"kv.0": RING}))
    _, cache = runner.run({"input_ids": IDS})
    with pytest.raises(ValueError, match="give the mask"):
        runner.run({"input_ids": IDS[:, :1]}, cache)
    both = Runner(with_layouts(program(), {"kv.0": RING}))
    _, cache = both.run({"input_ids": IDS[:, :-1]})
    logits, _ = both.run({"input_ids": IDS[:, -1:]}, cache)
    expected = both.logits({"input_ids": IDS})[:, -1:]
    torch.testing.assert_close(logits[0], expected, rtol=1e-5, atol=1e-5)


def test_types_and_bytes():
    changed = with_layouts(program(), {"kv.0": RING, "kv.1": PAGES})
    types, _ = infer_program(changed)
    function = changed.functions["block"]
    cache = function.caches[0]
    assert types[1][cache.past_k].shape == (B, 2, sympy.Min(P, 4), 8)
    assert types[1][cache.present_v].shape == (B, 2, sympy.Min(P + S, 4), 8)
    assert types[2][cache.present_v].shape == (B, 2, P + S, 8)
    assert [state.length for state in changed.states.values()] == [sympy.Min(P, 4), P]
    size = 2 * (8 + 8) * 4
    sizes = {B: 3, P: 9, S: 1}
    assert kv_cache_bytes(changed).subs(sizes) == 3 * size * (4 + 12)
    assert kv_cache_bytes(program()).subs(sizes) == 3 * size * (10 + 10)
    assert kv_cache_bytes(changed, 2).subs(sizes) == 3 * size * (4 + 12) // 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("heap",), "no layout"), (("ring",), "size None"), (("paged", 0), "1 or more"),
     (("contiguous", 4), "of size 4")],
)  # fmt: skip
def test_layouts_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        KVLayout(*arguments)


def test_a_ring_that_does_not_hold_what_is_read():
    with pytest.raises(VerifyError, match="sees the last 3, and a ring of 2 does not hold them"):
        with_layouts(program(), {"kv.0": KVLayout("ring", 2)})
    with pytest.raises(VerifyError, match="sees all keys, and a ring of 4"):
        with_layouts(program(), {"kv.1": RING})
    with pytest.raises(UsageError, match=r"no state 'kv\.7'"):
        with_layouts(program(), {"kv.7": RING})
    chunked = program(layers=1)
    (node,) = (n for n in chunked.functions["block"].nodes if n.op == "attention")
    node.attrs["chunk"] = 4
    with pytest.raises(VerifyError, match="chunks begin at positions"):
        with_layouts(chunked, {"kv.0": RING})
    changed = program()
    changed.states["kv.0"].layout = RING
    with pytest.raises(VerifyError, match=r"'kv.0' is ring\(slots=4\), and a keeps all keys"):
        verify(changed)


def test_comparisons_and_saved_programs_know_layouts():
    plain = program()
    changed = with_layouts(plain, {"kv.0": RING, "kv.1": PAGES})
    changed.states["kv.1"].dtype = torch.float16
    data = json.loads(json.dumps(program_to_json(changed)))
    opened = program_from_json(data, {w.name: w.producer for w in changed.weights})
    assert opened.states == changed.states and program_to_json(opened) == program_to_json(changed)
    assert first_difference(changed, opened) is None
    paged = with_layouts(plain, {"kv.1": PAGES})
    assert "paged(page=3), not f32" in str(first_difference(paged, plain))
    assert Imprint(plain).difference(paged) == "the program's states changed"
    data["states"][0]["layout"] = {"kind": "ring", "size": None}
    with pytest.raises(SourceError, match="of size None"):
        program_from_json(data, {})


@pytest.mark.slow
def test_emitted_rings(tmp_path):
    """In plain PyTorch with and without a state that tells how many tokens came before."""
    for name, changed in (
        ("one", with_layouts(program(layers=3), {"kv.0": RING})),
        ("all", with_layouts(program(layers=1), {"kv.0": RING})),
    ):
        emit(changed, tmp_path / name, target="cpu", emit=("torch",))
        model = open_language_model(str(tmp_path / name), "torch")
        expected = Runner(changed).logits({"input_ids": IDS, "attention_mask": MASK})
        cache, logits = model.start(2), []
        for start, end in ((0, 6), (6, 7), (7, 12)):
            ids, mask = IDS[:, start:end], MASK[:, :end]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            step, cache = model.step(inputs, cache)
            logits.append(step)
        real = MASK.bool()
        found = torch.cat(logits, 1)[real]
        torch.testing.assert_close(found, expected[real], rtol=1e-5, atol=1e-5)
        assert cache[0][0].shape[2] == 4


@pytest.mark.parametrize(
    ("layout", "emitter", "target", "message"),
    [
        (PAGES, "torch", "cpu", r"is paged\(page=3\), and model.py in plain PyTorch keeps keys"),
        (RING, "onnx", "cpu", r"is ring\(slots=4\), and a graph takes"),
    ],
)
def test_what_cannot_be_emitted_says_why(layout, emitter, target, message, tmp_path):
    changed = with_layouts(program(), {"kv.0": layout})
    with pytest.raises(LoweringError, match=message):
        emit(changed, tmp_path / "out", target=target, emit=(emitter,))
