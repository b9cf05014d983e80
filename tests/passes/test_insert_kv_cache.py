from __future__ import annotations

import pytest
import torch
from programs import tiny_program
from small import function, one

from graphopt.errors import UsageError
from graphopt.execute.interpreter import Runner
from graphopt.ir import B, Call, In, P, Param, S, Type
from graphopt.ir.printer import print_function
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import Context
from graphopt.pass_manager.pipeline import Pipeline
from graphopt.passes.canonicalise import Canonicalise
from graphopt.passes.dead_code_elimination import DeadCodeElimination
from graphopt.passes.insert_kv_cache import InsertKVCache

VARIANTS = {
    "plain": {},
    "one head": {"kv_heads": 1, "tied": False},
    "bias, layer norm": {"bias": True, "norm": "layer"},
    "window": {"window": 3},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "partial, interleaved": {"rotary_dim": 4, "interleaved": True},
    "all": {"window": 4, "softcap": 2.0, "sinks": True, "bias": True, "rotary_dim": 4},
}


def insert(program):
    result = InsertKVCache().run(program, Context())
    verify(result.program)
    return result


@pytest.mark.parametrize("along_tokens", [True, False])
def test_what_reads_neighbours_would_need_a_state(along_tokens):
    """A token shift is right for a whole sequence, and wrong from the first step with a past."""
    program = tiny_program()
    block = program.functions["block"]
    first = block.nodes[0]
    kind = Type((B, S, 32), torch.float32)
    attrs = {"args": [In(0), [1], [1 if along_tokens else -1]], "types": [kind]}
    shifted = block.add("aten.roll.default", [block.params[0]], attrs, ["shifted"], before=first)
    first.inputs[0] = shifted.output
    verify(program)
    result = insert(program)
    if along_tokens:
        assert not result.program.states and not result.changed
        assert "aten.roll.default mixes tokens" in result.skipped[0].reason
    else:
        assert len(result.program.states) == 2


def test_before_and_after():
    program = tiny_program()
    before = print_function(program.functions["block"])
    result = insert(program)
    after = print_function(result.program.functions["block"])
    expected = before
    for old, new in (
        (", sin):", ", sin; kv: past_k, past_v -> present_k, present_v):"),
        ("a = attention(", "a, present_k, present_v = attention("),
        ("attention_mask, scale", "attention_mask, past_k=past_k, past_v=past_v, scale"),
    ):
        assert expected.count(old) == 1
        expected = expected.replace(old, new)
    assert after == expected
    assert (result.matched, result.changed, result.skipped) == (2, 2, [])
    cached = result.program
    assert [(s.name, s.heads, s.k_dim, s.v_dim) for s in cached.states.values()] == [
        ("kv.0", 2, 8, 8),
        ("kv.1", 2, 8, 8),
    ]
    blocks = [call for call in cached.calls if call.function == "block"]
    assert [call.caches for call in blocks] == [{"kv": "kv.0"}, {"kv": "kv.1"}]
    assert cached.inputs["attention_mask"] == Type((B, P + S), torch.int64)
    assert cached.inputs["input_ids"] == program.inputs["input_ids"]


def test_a_second_run_finds_nothing_to_change():
    cached = insert(tiny_program()).program
    again = insert(cached)
    assert (again.matched, again.changed, again.skipped) == (2, 0, [])
    assert str(again.program) == str(cached)
    # The exact passes keep caches that nothing but the next step reads.
    text = str(cached)
    for item in (Canonicalise(), DeadCodeElimination()):
        item.run(cached, Context())
    assert list(cached.states) == ["kv.0", "kv.1"]
    assert "present_k" in text and "present_k" in str(cached)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_steps_with_a_cache_equal_one_pass_without(options):
    program = tiny_program(**options)
    ids = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [0] * 2 + [1] * 7, [0] * 5 + [1] * 4])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    plain = Runner(program, dtype=torch.float64, mode="reference")
    whole = plain.logits({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    runner = Runner(insert(program).program, dtype=torch.float64)
    past = None
    pieces = []
    for start, stop in ((0, 4), (4, 7), (7, 8), (8, 9)):
        step = {
            "input_ids": ids[:, start:stop],
            "attention_mask": mask[:, :stop],
            "position_ids": positions[:, start:stop],
        }
        outputs, past = runner.run(step, past)
        pieces.append(outputs[0])
    real = mask.bool()
    # fp64 rounding of a few thousand additions, logits of order 1.
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], rtol=0, atol=1e-10)
    assert past is not None and all(k.shape[2] == 9 for k, _ in past.values())


def attention_alone(mask=True, inputs=None, attrs=None, bias=None):
    """One attention over x, with x as its keys; `bias` is the type of an additive bias."""
    params = ("x", "attention_mask") if mask else ("x",)
    f = function("block", params + (("bias",) if bias else ()))
    heads = f.add("split_heads", [f.params[0]], {"head_dim": 4}).output
    operands = [heads, heads, heads, f.params[1] if mask else None]
    if bias:
        operands.append(f.params[-1])
    settings = {"scale": 0.5, "causal": True, **(attrs or {})}
    a = f.add("attention", operands, settings, ["a"]).output
    f.results = [f.add("merge_heads", [a]).output]
    kinds = {"attention_mask": Type((B, S), torch.int64)}
    if bias:
        kinds["bias"] = bias
    return one(f, inputs=kinds | (inputs or {}))


def reason(program):
    text = str(program)
    result = insert(program)
    assert result.changed == 0 and not result.program.states
    assert str(result.program) == text
    (skip,) = result.skipped
    return skip.where, skip.reason


def test_attention_that_looks_ahead_is_left_alone():
    where, why = reason(attention_alone(attrs={"causal": False}))
    assert (where, why) == ("block: a", "its tokens see later ones too, in some layer at least")
    program = attention_alone(attrs={"causal": Param("causal")})
    program.calls[0].attrs["causal"] = True
    program.calls.append(Call("block", ["r0", "attention_mask"], ["r1"], attrs={"causal": False}))
    assert reason(program)[1] == "its tokens see later ones too, in some layer at least"


def test_a_bias_with_a_row_for_each_query_is_left_alone():
    rows = Type((B, 1, S, S), torch.float64)
    said = "its bias f64[B,1,S,S] has a row for each query, counted from the first token"
    assert reason(attention_alone(bias=rows))[1] == said
    keys = Type((B, 1, 1, S), torch.float64)
    said = "its bias f64[B,1,1,S] is laid out for a text without a past"
    assert reason(attention_alone(bias=keys))[1] == said


def test_a_constant_bias_is_no_obstacle():
    result = insert(attention_alone(bias=Type((1, 2, 1, 1), torch.float64)))
    assert (result.changed, result.skipped) == (1, [])


def test_a_computed_mask_is_left_alone():
    program = attention_alone()
    f = program.functions["block"]
    kind = Type((B, S), torch.int64)
    attrs = {"args": [In(0), 1], "kwargs": {}, "types": [kind]}
    made = f.add("aten.mul.Tensor", [f.params[1]], attrs, ["made"], before=f.nodes[0]).output
    next(node for node in f.nodes if node.op == "attention").inputs[3] = made
    result = insert(program)
    assert result.changed == 0
    assert [(skip.where, skip.reason) for skip in result.skipped] == [
        (
            "block: made",
            "aten.mul.Tensor makes something else of the padding mask than attention does, for the "
            "tokens of a text without a past",
        ),
        ("block: a", "it is masked by made, which is more than the padding of a text"),
    ]


def test_no_mask_is_fine():
    result = insert(attention_alone(mask=False))
    assert result.changed == 1


@pytest.mark.parametrize("start", [(), (0,)])
@pytest.mark.parametrize("looked_up", [True, False])
def test_places_are_counted_on_behind_the_cache(start, looked_up):
    """Decoders of encoder-decoder families count the tokens of a step."""
    program = tiny_program()
    embed = program.functions["embed"]
    op = f"aten.arange.{'start' if start else 'default'}"
    kinds = {"types": [Type((S,), torch.int64)]}
    places = embed.add(op, [], {"args": [*start, S], "kwargs": {}, **kinds}, ["places"])
    if looked_up:
        table = embed.weights["weight"]
        added = embed.add("embedding", [places.output, table], {}, ["learned"])
    else:
        kinds = {"types": [Type((S,), torch.float32)]}
        added = embed.add("aten.sin.default", [places.output], {"args": [In(0)], **kinds}, ["wave"])
    assert added.outputs and not program.states
    result = insert(program).program
    (node,) = (n for n in result.functions["embed"].nodes if n.op.startswith("aten.arange."))
    assert list(node.attrs["args"]) == [P, P + S]


def laid_out(program, **options):
    result = InsertKVCache(**options).run(program, Context())
    verify(result.program)
    return result, [str(state.layout) for state in result.program.states.values()]


def test_options_give_the_states_a_layout():
    program = tiny_program(window=5)  # of the first layer alone
    assert laid_out(program)[1] == ["contiguous", "contiguous"]
    assert laid_out(program, ring=True)[1] == ["ring(slots=5)", "contiguous"]
    result, layouts = laid_out(program, ring=True, step=4, page=16)
    assert layouts == ["ring(slots=8)", "paged(page=16)"] and result.changed == 2
    assert laid_out(program, page=3)[1] == ["paged(page=3)", "paged(page=3)"]
    # States that are there already are laid out anew; the same layout is no change.
    result, layouts = laid_out(laid_out(program)[0].program, ring=True)
    assert layouts == ["ring(slots=5)", "contiguous"] and result.changed == 1
    again, _ = laid_out(result.program, ring=True)
    assert again.changed == 0 and again.program is result.program


def test_a_ring_without_a_window_is_noted():
    result, layouts = laid_out(tiny_program(), ring=True)
    assert layouts == ["contiguous", "contiguous"] and result.changed == 2
    assert [skip.reason for skip in result.skipped] == [
        "no attention has a window to keep in a ring"
    ]
    chunked = tiny_program(window=5)
    (node,) = (n for n in chunked.functions["block"].nodes if n.op == "attention")
    node.attrs["chunk"] = 8
    assert laid_out(chunked, ring=True)[1] == ["contiguous", "contiguous"]


def test_options_that_make_no_sense():
    with pytest.raises(UsageError, match="and ring is false"):
        InsertKVCache(step=3)
    with pytest.raises(UsageError, match="page"):
        InsertKVCache(page=0)


@pytest.mark.parametrize("options", [{"ring": True}, {"ring": True, "step": 3, "page": 4}])
def test_layouts_change_no_logit(options):
    """As the pipeline verifies them: whole texts, and in steps beyond the ring and the pages."""
    program = tiny_program(window=5)
    passes = [InsertKVCache(**options)]
    cached, report = Pipeline(passes).run(program)
    assert report.passes[0].verification == "passed"
    assert {state.layout.kind for state in cached.states.values()} >= {"ring"}
