"""The torch artifact: `model.py` against eager models and against the program it was made of."""

from __future__ import annotations

import ast
import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from emitted import load_file
from families import (
    EVERY_EXPERT,
    FAMILIES,
    LISTED,
    TOLERANCE,
    Case,
    captured,
    cases,
    eager_logits,
    error,
    mostly_slow,
    random_model,
    sampled,
)
from programs import tiny_program
from tiny_models import save_tiny
from torch import Tensor

from graphopt.backends.opening import open_language_model
from graphopt.backends.torch_artifact import TorchArtifactModel
from graphopt.capture import capture
from graphopt.compiler import emit
from graphopt.errors import LoweringError, SourceError, VerifyError
from graphopt.execute.interpreter import Runner, complete_inputs
from graphopt.ir import (
    Array,
    B,
    Call,
    Function,
    Param,
    Program,
    S,
    Type,
    Value,
    Weight,
    functional,
)
from graphopt.ir.dead_code import remove_dead
from graphopt.ir.graph import In
from graphopt.ir.kv import KVLayout
from graphopt.ir.ops.aten import needs_one_dtype
from graphopt.ir.relayout import with_layouts
from graphopt.ir.serialize import program_from_json, program_to_json
from graphopt.ir.types import P
from graphopt.ir.verify import verify
from graphopt.lowering.torch import TorchEmitter, render_model
from graphopt.lowering.torch.text import numbers, series, size_text, wrap
from graphopt.pass_manager.contract import Context
from graphopt.passes.insert_kv_cache import InsertKVCache
from graphopt.support.progress import silent

STANDARD = {
    "types",
    "__future__", "argparse", "collections", "importlib", "pathlib", "typing",
    "contextlib", "datetime", "inspect", "json", "re", "resource", "subprocess", "sys",
}  # fmt: skip
LIBRARIES = {"torch", "safetensors", "tokenizers", "jinja2"}
"""What the file may import; the last two, and the second row, only where a prompt is a text."""


def write(program: Program, folder: Path, target: str = "cpu") -> ModuleType:
    """Emit a program into a folder and return its `model.py` as a module.

    Weights are stored as the program holds them for a GPU too: code is compared in fp32.
    """
    emitter = TorchEmitter(in_compute_dtype=False)
    emitter.check(program, target)
    folder.mkdir(exist_ok=True)
    emitter.emit(program, folder, target, silent)
    return load_file(folder / "model.py")


def whole(model: Any, case: Case) -> Tensor:
    with torch.no_grad():
        return model(case.input_ids, case.attention_mask, case.position_ids)[0]


def in_steps(model: Any, case: Case) -> Tensor:
    """Prefill half, go on by several tokens at once, then by one; positions come by default."""
    length = case.input_ids.shape[1]
    parts, cache = [], model.empty_cache(case.input_ids.shape[0])
    for start, stop in ((0, length // 2), (length // 2, length - 1), (length - 1, length)):
        with torch.no_grad():
            logits, cache = model(
                case.input_ids[:, start:stop], case.attention_mask[:, :stop], cache=cache
            )
        parts.append(logits)
    return torch.cat(parts, 1)


def run_python(*arguments: str, env: dict[str, str] | None = None) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_families_equal_eager(family: str, tmp_path: Path) -> None:
    model, program = captured(family)
    program = InsertKVCache().run(program, Context()).program
    emitted = write(program, tmp_path)
    mine = emitted.load(tmp_path)
    for case in cases((1, 7, 64) if family in LISTED else (7, 20)):
        expected = eager_logits(model, case)
        assert error(expected, whole(mine, case), case) < TOLERANCE, str(case)
        if program.states and case.input_ids.shape[1] > 2:
            assert error(expected, in_steps(mine, case), case) < TOLERANCE, f"cached, {case}"
    check_text(tmp_path / "model.py", program)
    check_half(emitted, tmp_path, cases((7,))[2])
    check_devices(mine)


@pytest.mark.parametrize(
    "family", mostly_slow(EVERY_EXPERT, (), set(EVERY_EXPERT) - {"jetmoe", "gpt_oss"})
)
def test_experts_in_16_bits(family: str, tmp_path: Path) -> None:
    """Packages and programs, whichever operators experts were left as."""
    model = random_model(family, **EVERY_EXPERT[family])
    program = InsertKVCache().run(capture(model), Context()).program
    module, case = write(program, tmp_path), cases((20,))[2]
    exact = Runner(program).logits(case.inputs)
    real = case.attention_mask.bool()
    for dtype in (torch.bfloat16, torch.float16):
        # Four blocks of some 30 roundings each, of independent signs: sqrt(120) of half a step. A
        # family that magnifies them does so in transformers too.
        eager = eager_logits(copy.deepcopy(model).to(dtype), case).float()
        tolerance = 5 * torch.finfo(dtype).eps * exact[real].norm()
        tolerance = max(tolerance, 2 * (eager - exact)[real].norm())
        package = module.load(tmp_path, dtype=dtype)
        for logits in (
            whole(package, case), *([in_steps(package, case)] if program.states else []),
            Runner(program, dtype).logits(case.inputs),
            Runner(program, autocast=dtype).logits(case.inputs),
        ):  # fmt: skip
            assert float((logits - exact)[real].norm()) < tolerance
        assert whole(package, case).dtype == dtype
        assert all(k.dtype == v.dtype == dtype for k, v in package.empty_cache())


def test_operators_that_take_one_dtype_get_the_narrowest() -> None:
    """What each computes of operands of several dtypes is what it computes of narrowed ones."""
    index, pairs = torch.tensor([0, 2]), torch.tensor([[0, 1, 0], [1, 0, 1]])
    wide, weight = torch.randn(3, 3), torch.randn(3, 3).bfloat16()
    for op, *args in (
        ("index_add.default", wide, 0, index, weight[:2]),
        ("index_add.default", weight, 0, index, wide[:2]),
        ("index_copy.default", wide, 0, index, weight[:2]),
        ("index_put.default", wide, [index], weight[:2]),
        ("scatter.src", wide, 0, pairs, weight),
        ("scatter_add.default", wide, 0, pairs, weight),
        ("masked_scatter.default", wide, wide > 0, weight),
        ("addmm.default", wide, weight, wide),
        ("baddbmm.default", wide[None], weight[None], wide[None]),
        ("einsum.default", "ij,jk->ik", [wide, weight]),
        ("lerp.Scalar", wide, weight, 0.5),
        ("layer_norm.default", wide, [3], weight[0], weight[1]),
        ("prelu.default", wide, weight[0]),
    ):
        packet, overload = op.split(".")
        call = getattr(getattr(torch.ops.aten, packet), overload)
        assert needs_one_dtype(f"aten.{op}", {"args": [*args]})
        narrow = [
            [x.to(torch.bfloat16) for x in arg if x.is_floating_point()] or arg
            if isinstance(arg, list) and isinstance(arg[0], Tensor)
            else arg.to(torch.bfloat16)
            if isinstance(arg, Tensor) and arg.is_floating_point()
            else arg
            for arg in args
        ]
        made = functional.narrowed(call, *args)
        assert made.dtype == torch.bfloat16 and torch.equal(made, call(*narrow)), op


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_lowest_number_of_fp32_masks_in_every_dtype(dtype: torch.dtype) -> None:
    """Rows of which everything is masked have a softmax, as in a model that was made in 16 bits."""
    lowest, mask = torch.finfo(torch.float32).min, torch.tensor([True, False])
    x = torch.zeros(2, dtype=dtype)
    for op, *args in (
        (torch.ops.aten.masked_fill.Scalar, x, mask, lowest),
        (torch.ops.aten.where.ScalarSelf, mask, lowest, x),
        (torch.ops.aten.where.ScalarOther, ~mask, x, lowest),
    ):
        expected = max(lowest, torch.finfo(dtype).min)
        assert functional.narrowed(op, *args).tolist() == [expected, 0]
        infinite = [-math.inf if arg is lowest else arg for arg in args]
        assert functional.narrowed(op, *infinite).tolist() == [-math.inf, 0]
    operand = {"types": [Type((2,), torch.float32)], "args": [In(0), In(1), lowest]}
    assert needs_one_dtype("aten.masked_fill.Scalar", operand)
    assert not needs_one_dtype("aten.masked_fill.Scalar", {**operand, "args": [In(0), In(1), 0.0]})
    full = {"types": operand["types"], "args": [[2], lowest]}
    assert not needs_one_dtype("aten.full.default", full)


def check_text(path: Path, program: Program) -> None:
    """The text is what any other rendering gives, and reads well."""
    text = path.read_text(encoding="utf-8")
    assert text == render_model(program) == render_model(saved(program))
    imported = {name for node in ast.walk(ast.parse(text)) for name in modules_of(node)}
    assert imported <= STANDARD | LIBRARIES
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert not any(line != line.rstrip() for line in lines)


def modules_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return [str(node.module).partition(".")[0]] if isinstance(node, ast.ImportFrom) else []


def check_half(emitted: ModuleType, folder: Path, case: Case) -> None:
    """In 16 bit the model runs and is about the same; constants are as they were."""
    exact, half = emitted.load(folder), emitted.load(folder, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert [b.dtype for b in half.buffers()] == [b.dtype for b in exact.buffers()]
    logits = whole(half, case)
    assert error(whole(exact, case), logits.float(), case) < 0.6
    if half.empty_cache():
        assert error(logits.float(), in_steps(half, case).float(), case) < 0.6


def check_devices(model: Any) -> None:
    """Whatever the model makes by itself is made where the weights and ids are."""
    if any("grouped_matmul" in made.forward.__code__.co_names for made in model.modules()):
        return  # how many rows an expert gets is data
    model.to("meta")
    logits, cache = model(torch.ones(2, 5, dtype=torch.long, device="meta"))
    assert logits.is_meta and all(k.is_meta and v.is_meta for k, v in cache)


def saved(program: Program) -> Program:
    """Return the program as it comes back from program.json."""
    return program_from_json(json.loads(json.dumps(program_to_json(program))), {})


def compare(program: Program, folder: Path) -> Any:
    """Check a program's `model.py` against the program, whole and in steps; return the model."""
    verify(program)
    model = write(program, folder).load(folder)
    check_text(folder / "model.py", program)
    for case in cases((1, 7), vocab=97):
        expected = Runner(program).logits(case.inputs)
        assert error(expected, whole(model, case), case) < 1e-6, str(case)
        if program.states and case.input_ids.shape[1] > 2:
            assert error(expected, in_steps(model, case), case) < 1e-5, f"cached, {case}"
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"alibi": True},
        {"sinks": True, "softcap": 2.0, "window": 3},
        {"norm": "layer", "bias": True, "tied": False, "interleaved": True, "layers": 5},
        {"rotary_dim": 4, "window": 3, "layers": 3},
    ],
)
@pytest.mark.parametrize("cache", [False, True])
def test_features_equal_the_program(options: dict[str, Any], cache: bool, tmp_path: Path) -> None:
    compare(tiny_program(cache=cache, **options), tmp_path)


def test_block_reads_like_the_program() -> None:
    text = render_model(tiny_program(cache=True))
    block = text[text.index("class Block(") : text.index("class Head(")]
    assert block.strip() == BLOCK.strip()
    ops = text[text.index("# What the layers") : text.index("# The layers.")]
    assert re.findall(r"^def (\w+)", ops, flags=re.MULTILINE) == [
        "linear", "rms_norm", "rope_table", "rope", "allowed_keys", "alibi", "masked_scores",
        "shared_by_heads", "sdpa", "attention", "cached_attention", "split_heads", "merge_heads",
    ]  # fmt: skip
    body = text[text.index("        x, cos, sin = ") : text.index("# Loading and running.")]
    assert body.strip() == BODY.strip()


BLOCK = '''
class Block(nn.Module):
    """Called 2 times: layers.0 to layers.1."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.input_layernorm = weights["input_layernorm.weight"]
        self.q_proj = weights["self_attn.q_proj.weight"]
        self.k_proj = weights["self_attn.k_proj.weight"]
        self.v_proj = weights["self_attn.v_proj.weight"]
        self.o_proj = weights["self_attn.o_proj.weight"]
        self.post_attention_layernorm = weights["post_attention_layernorm.weight"]
        self.gate_proj = weights["mlp.gate_proj.weight"]
        self.up_proj = weights["mlp.up_proj.weight"]
        self.down_proj = weights["mlp.down_proj.weight"]

    def forward(
        self, x: Tensor, attention_mask: Tensor, cos: Tensor, sin: Tensor, past: KV | None = None
    ) -> tuple[Tensor, KV]:
        """x [B,S,32], attention_mask [B,P+S], cos [B,S,4], sin [B,S,4] -> [B,S,32]."""
        h = rms_norm(x, self.input_layernorm, eps=1e-05)
        q_rope = rope(split_heads(linear(h, self.q_proj), head_dim=8), cos, sin)
        k_rope = rope(split_heads(linear(h, self.k_proj), head_dim=8), cos, sin)
        a, present = cached_attention(
            q_rope,
            k_rope,
            split_heads(linear(h, self.v_proj), head_dim=8),
            past,
            attention_mask,
            scale=0.3535533905932738,
            causal=True,
        )
        x_1 = x + linear(merge_heads(a), self.o_proj)
        h_1 = rms_norm(x_1, self.post_attention_layernorm, eps=1e-05)
        m = F.silu(linear(h_1, self.gate_proj)) * linear(h_1, self.up_proj)
        x_2 = x_1 + linear(m, self.down_proj)
        return x_2, present
'''

BODY = """
        x, cos, sin = self.embed(input_ids, position_ids)
        for i, layer in enumerate(self.layers):
            x, cache[i] = layer(x, attention_mask, cos, sin, cache[i])
        return self.head(x), cache
"""


def test_a_target_with_kernels_for_layers_gets_joined_ones() -> None:
    text = render_model(tiny_program(cache=True), "ampere")
    block = text[text.index("class Block(") : text.index("class Head(")]
    assert block.strip() == FUSED_BLOCK.strip()
    assert "add_rms_norm = kernels.add_rms_norm\n" in text and "def rms_norm" not in text
    assert "        x, x_delta, cos, sin = self.embed(input_ids, position_ids)\n" in text
    assert "x, x_delta, cache[i] = layer(x, x_delta, attention_mask, cos, sin, cache[i])" in text
    assert "        _, h = add_rms_norm(x, x_delta, self.norm, eps=1e-05)\n" in text
    for target in ("volta", "ascend910b"):
        assert BLOCK.strip() in render_model(tiny_program(cache=True), target)


FUSED_BLOCK = '''
class Block(nn.Module):
    """Called 2 times: layers.0 to layers.1."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.input_layernorm = weights["input_layernorm.weight"]
        self.o_proj = weights["self_attn.o_proj.weight"]
        self.post_attention_layernorm = weights["post_attention_layernorm.weight"]
        self.down_proj = weights["mlp.down_proj.weight"]
        self.q_k_v_proj, self.q_k_v_proj_sizes = pack(
            weights["self_attn.q_proj.weight"],
            weights["self_attn.k_proj.weight"],
            weights["self_attn.v_proj.weight"],
        )
        self.gate_up_proj, self.gate_up_proj_sizes = pack(
            weights["mlp.gate_proj.weight"], weights["mlp.up_proj.weight"]
        )

    def forward(
        self,
        x: Tensor,
        x_delta: Tensor | None,
        attention_mask: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: KV | None = None,
    ) -> tuple[Tensor, Tensor, KV]:
        """x [B,S,32], x_delta [B,S,32], attention_mask [B,P+S], cos [B,S,4], sin [B,S,4] ->
        [B,S,32], [B,S,32]."""
        total, h = add_rms_norm(x, x_delta, self.input_layernorm, eps=1e-05)
        q, k, v = linear(h, self.q_k_v_proj).split(self.q_k_v_proj_sizes, -1)
        q_rope, k_rope = rope_pair(split_heads(q, head_dim=8), split_heads(k, head_dim=8), cos, sin)
        a, present = cached_attention(
            q_rope,
            k_rope,
            split_heads(v, head_dim=8),
            past,
            attention_mask,
            scale=0.3535533905932738,
            causal=True,
        )
        x_1, h_1 = add_rms_norm(
            total, linear(merge_heads(a), self.o_proj), self.post_attention_layernorm, eps=1e-05
        )
        gate, up = linear(h_1, self.gate_up_proj).split(self.gate_up_proj_sizes, -1)
        down = linear(act_mul(gate, up, "silu"), self.down_proj)
        return x_1, down, present
'''


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True, "interleaved": True, "rotary_dim": 4},
        {"norm": "layer", "bias": True, "tied": False},
        {"alibi": True, "layers": 3},
        {"sinks": True, "softcap": 2.0, "window": 3},
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares in fp32, on the CPU")
@pytest.mark.filterwarnings("ignore:attention on a CPU")
def test_joined_nodes_compute_what_they_did_apart(options: dict[str, Any], tmp_path: Path) -> None:
    program = tiny_program(cache=True, **options)
    emitted = write(program, tmp_path, "hopper")
    model = emitted.load(tmp_path)
    for case in cases((1, 7), vocab=97):
        expected = Runner(program).logits(case.inputs)
        assert error(expected, whole(model, case), case) < 1e-6, str(case)
    whole_sizes = sum(w.load().numel() for w in program.weights if not w.constant)
    assert sum(p.numel() for p in model.parameters()) == whole_sizes


def test_sums_that_something_else_reads_stay_where_they_are() -> None:
    """No norm comes next, two calls read one, or the norm is another."""
    program = tiny_program(cache=True)
    head = program.functions["head"]
    norm = head.nodes[0]
    norm.inputs[0] = head.add("scale", [head.params[0]], {"factor": 2.0}, before=norm).output
    text = render_model(program, "ampere")
    assert "_delta" not in text and "x_2 = x_1 + " in text
    program = tiny_program(cache=True)
    head = program.functions["head"]
    head.params.append(Value("before"))
    operands = [head.nodes[0].output, head.params[1]]
    head.nodes[-1].inputs[0] = head.add("add", operands, before=head.nodes[-1]).output
    # Layer 1 and the head read what layer 0 makes.
    program.calls[1].results, program.calls[2].args[0] = ["x_0"], "x_0"
    program.calls[3].args.append("x_0")
    assert "_delta" not in render_model(program, "ampere")
    assert "_delta" not in render_model(tiny_program(cache=True, norm="layer"), "ampere")


def test_weights_with_two_uses_are_not_packed(tmp_path: Path) -> None:
    """They would be there twice."""
    program = tiny_program(layers=3, cache=True)
    program.calls[3].weights = dict(program.calls[1].weights)  # layer 2 is layer 0 again
    text = render_model(program, "ampere")
    assert "pack(" not in text and "add_rms_norm(" in text


def test_what_stands_between_is_not_passed_by() -> None:
    """A rotation that reads what another one made is no pair with it; a value read twice stays."""
    program = tiny_program(cache=True, kv_heads=4)
    block = program.functions["block"]
    q_rope, k_rope = (node for node in block.nodes if node.op == "rope")
    k_rope.inputs[0] = block.add("scale", [q_rope.output], {"factor": 0.5}, before=k_rope).output
    attention = next(node for node in block.nodes if node.op == "attention")
    attention.inputs[2] = attention.inputs[1]
    attention.inputs[0] = attention.inputs[1]
    act = next(node for node in block.nodes if node.op == "silu")
    down = next(n for n in reversed(block.nodes) if n.op == "linear")
    down.inputs[0] = block.add("add", [down.inputs[0], act.output], before=down).output
    text = render_model(program, "ampere")
    assert "rope_pair(" not in text and "act_mul(" not in text


@pytest.mark.parametrize("kind", ["grows", "none", "fixed"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares tokens in fp32, on the CPU")
@pytest.mark.filterwarnings("ignore:attention on a CPU")
def test_texts_of_unequal_length_at_once(kind: str, tmp_path: Path) -> None:
    program = tiny_program(cache=kind != "none", window=3)
    emitted = write(program, tmp_path, "ampere" if kind == "fixed" else "cpu")
    assert hasattr(emitted, "Decoder") == (kind == "fixed")
    model = emitted.load(tmp_path)
    texts = [[5, 6], [1, 2, 3, 4, 5, 6, 7], [9]]
    alone = [greedy(program, text, 8) for text in texts]
    assert emitted.generate(model, texts, 8) == alone
    assert emitted.generate(model, texts[1], 8) == alone[1]
    assert emitted.generate(model, texts[:1], 8) == alone[:1]
    # A row that ended stays so, whatever it would say behind its end.
    stop = {alone[0][2], alone[2][5]}
    cut = [next((a[:i] for i, token in enumerate(a) if token in stop), a) for a in alone]
    assert emitted.generate(model, texts, 8, stop) == cut


@pytest.mark.parametrize("kind", ["grows", "none", "fixed"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU")
def test_nothing_to_run_and_too_much_are_refused(kind: str, tmp_path: Path) -> None:
    program = with_positions(tiny_program(cache=kind != "none", alibi=True), 12)
    emitted = write(program, tmp_path, "ampere" if kind == "fixed" else "cpu")
    assert emitted.POSITIONS == 12
    model = emitted.load(tmp_path)
    for ids in ([], [[]], [[1, 2], []]):
        with pytest.raises(ValueError, match="a text without tokens: give every text at least one"):
            emitted.generate(model, ids, 3)
    with pytest.raises(ValueError, match="9 tokens and 4 more: the model has 12 positions"):
        emitted.generate(model, [[1] * 9, [1]], 4)
    for shape in ((0, 3), (2, 0)):
        with pytest.raises(ValueError, match=rf"input_ids is \[{shape[0]}, {shape[1]}\]"):
            model(torch.ones(shape, dtype=torch.long))


def with_positions(program: Program, rows: int) -> Program:
    """Add learned positions, as GPT-2 has them."""
    embed = program.functions["embed"]
    ids, table = Value("position_ids"), Value("wpe")
    embed.params.append(ids)
    embed.weights["wpe.weight"] = table
    place = embed.add("embedding", [ids, table], names=["place"]).output
    embed.results[0] = embed.add("add", [embed.results[0], place], names=["x"]).output
    program.calls[0].args.append("position_ids")
    program.calls[0].weights["wpe.weight"] = "wpe.weight"
    value = torch.randn(rows, 32, generator=torch.Generator().manual_seed(1)) * 0.1
    program.weights.add(Weight("wpe.weight", Array(value)))
    return program


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU")
@pytest.mark.filterwarnings("ignore:attention on a CPU")
def test_decoder_refusals_and_rows(tmp_path: Path) -> None:
    program = with_positions(tiny_program(cache=True, alibi=True), 12)
    emitted = write(program, tmp_path, "hopper")
    model = emitted.load(tmp_path)
    with pytest.raises(ValueError, match="a cache of 13 tokens: the model has 12 positions"):
        emitted.Decoder(model, 13)
    for capacity, batch in ((12, 0), (1, 1)):
        with pytest.raises(ValueError, match=f"a cache of {capacity} tokens for {batch} texts"):
            emitted.Decoder(model, capacity, batch)
    decoder = emitted.Decoder(model, 6, batch=2)
    with pytest.raises(ValueError, match="is empty: start with a prompt"):
        decoder.step()
    with pytest.raises(ValueError, match="3 prompts in a cache for 2"):
        decoder.start([[1], [2], [3]])
    with pytest.raises(ValueError, match="a prompt of 6 tokens in a cache of 6"):
        decoder.start([[1], [1] * 6])
    with pytest.raises(ValueError, match="a prompt of 0 tokens in a cache of 6"):
        decoder.start([[1], []])
    slots = emitted.Decoder(model, 6).cache
    for shape in ((1, 7), (2, 3)):
        with pytest.raises(ValueError, match=rf"{shape[1]} tokens in {shape[0]} rows do not fit"):
            ids = torch.ones(shape, dtype=torch.long)
            model(ids, None, torch.zeros_like(ids), slots)
    texts = [[1, 2, 3], [4]]
    for _ in range(2):  # a decoder starts anew
        tokens = [decoder.start(texts), decoder.step(), decoder.step([7, 8])]
        assert decoder.logits.shape == (2, 97)
        for row, text in enumerate(texts):
            first, second = greedy(program, text, 2)
            assert [step[row] for step in tokens[:2]] == [first, second]
            given = [*text, first, [7, 8][row]]
            assert tokens[2][row] == greedy(program, given, 1)[0]
    decoder.step()
    with pytest.raises(ValueError, match="the cache of 6 tokens is full"):
        decoder.step()
    decoder.start(texts)
    assert next(decoder.steps(2)) == tokens[1]
    decoder.step()
    with pytest.raises(ValueError, match="2 tokens behind 5 in a cache of 6: there is no room"):
        next(decoder.steps(2))


@pytest.mark.filterwarnings("ignore:attention on a CPU")
def test_a_step_runs_while_the_token_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emitted = write(tiny_program(cache=True), tmp_path, "hopper")
    model, texts = emitted.load(tmp_path, device="cpu"), [[1, 2, 3], [4]]
    plain = emitted.Decoder(model, 12, batch=2)
    wanted = [plain.start(texts), *(plain.step() for _ in range(5))]
    launched: list[str] = []

    def record(work: Any, device: torch.device, pool: Any) -> tuple[Any, None]:
        def replay() -> None:
            launched.append("step")
            work()

        work()  # as a recording does first; what it changed is put back
        return SimpleNamespace(replay=replay, pool=lambda: None), None

    event = SimpleNamespace(
        record=lambda stream: None, synchronize=lambda: launched.append("waited")
    )
    empty = torch.empty
    inside = sys.modules[emitted.Decoder.__mro__[1].__module__]
    monkeypatch.setattr(inside, "record", record)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **how: empty(*size, **how))
    ahead = type("Ahead", (emitted.Decoder,), {"_records": lambda self: True})(model, 12, batch=2)
    assert [ahead.start(texts), *ahead.steps(5)] == wanted
    assert launched == ["step", *["step", "waited"] * 4, "waited"]
    assert ahead.used == 8
    # Whoever stops early finds the decoder a token further, and can go on from there.
    assert ahead.start(texts) == wanted[0]
    assert next(ahead.steps(5)) == wanted[1]
    assert ahead.used == 5 and ahead.step() == wanted[3]
    assert ahead.start(texts) == wanted[0] and list(ahead.steps(0)) == []


@pytest.mark.filterwarnings("ignore:attention on a CPU")
@pytest.mark.parametrize("ring", [None, 8])
def test_steps_whose_attention_reads_all_room_are_given_what_the_texts_need(
    ring: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tiny_program(layers=2, cache=True, window=ring)
    if ring is not None:
        program = with_layouts(program, {next(iter(program.states)): KVLayout("ring", ring)})
    emitted = write(program, tmp_path, "any-gpu")
    model, texts = emitted.load(tmp_path, device="cpu"), [[1, 2, 3], [4]]
    inside = sys.modules[emitted.Decoder.__mro__[1].__module__]
    monkeypatch.setattr(inside, "LEAST_ROOM", 4)
    rooms: list[int] = []
    append = inside.StaticKVCache.append

    def seen(cache: Any, *operands: Any) -> Any:
        rooms.append(cache.room)
        return append(cache, *operands)

    monkeypatch.setattr(inside.StaticKVCache, "append", seen)
    static = sum(kind == "contiguous" for kind, _ in model.kv_layouts)
    plain = type("Plain", (emitted.Decoder,), {"reads_room": False})(model, 20, batch=2)
    decoder = emitted.Decoder(model, 20, batch=2)
    for _ in range(2):  # a decoder starts anew
        wanted = [plain.start(texts), *plain.steps(8), plain.extend([[5, 6], [7]])]
        assert set(rooms) == {20}
        rooms.clear()
        assert [decoder.start(texts), *decoder.steps(8), decoder.extend([[5, 6], [7]])] == wanted
        assert rooms[::static] == [4, 4, 6, 6, 8, 8, 12, 12, 12, 16]
        torch.testing.assert_close(decoder.logits, plain.logits)
        rooms.clear()
    wanted, given = list(plain.steps(6)), list(decoder.steps(6))
    assert given == wanted and rooms[-1] == 20


def test_steps_that_the_host_takes_part_in_are_not_recorded() -> None:
    program = tiny_program(cache=True)
    assert "RECORDS = True" in render_model(program, "ampere")
    block = program.functions["block"]
    x = block.results[0]
    kind = {"types": [Type((B, S, 32), torch.float32)], "args": [In(0)]}
    block.results = [block.add("aten.nonzero.default", [x], kind, ["odd"]).output]
    assert "RECORDS = False" in render_model(program, "ampere")


def test_layers_of_two_kinds_and_tables_of_their_own_are_one_loop(tmp_path: Path) -> None:
    """As in Gemma 3, where layers take other tables, and in SmolLM3, where some take none."""
    program = tiny_program(layers=6, cache=True)
    embed, block = program.functions["embed"], program.functions["block"]
    positions, frequencies = embed.params[1], embed.weights["rope.inv_freq"]
    names = ["cos_wide", "sin_wide"]
    embed.results += embed.add(
        "rope_table", [positions, frequencies], {"scale": 2.0}, names, outputs=2
    ).outputs
    program.calls[0].results += names
    plain = block.clone("plain")
    for node in [node for node in plain.nodes if node.op == "rope"]:
        assert node.inputs[0] is not None
        plain.replace(node.output, node.inputs[0])
    remove_dead(plain)
    plain.params = plain.params[:2]
    program.functions["plain"] = plain
    for number, call in enumerate(program.calls[1:-1]):
        call.args = [*call.args[:2], *(names if number % 3 == 0 else call.args[2:])]
        if number % 3 == 2:
            call.function, call.args = "plain", call.args[:2]
    compare(program, tmp_path)
    text = (tmp_path / "model.py").read_text()
    assert "[(cos_wide, sin_wide), (cos, sin), ()] * 2" in text
    assert "for kind, i in zip([Block, Block, Plain] * 2, range(6))" in text
    assert "x, cache[i] = layer(x, attention_mask, *tables, cache[i])" in text


def test_pruned_tied_and_unequal_layers(tmp_path: Path) -> None:
    program = tiny_program(layers=6, cache=True, window=3)
    narrow = tiny_program(layers=6, ffn=16, seed=1)
    for part in ("gate", "up", "down"):  # layer 5 is narrower than the others
        name = f"layers.5.mlp.{part}_proj.weight"
        program.weights.replace(Weight(name, narrow.weights[name].producer, name))
    program.calls[5].weights = dict(program.calls[2].weights)  # layer 4 is layer 1 again
    del program.calls[3]  # layer 2
    program.states = dict(reversed(program.states.items()))  # the last layer's comes first
    program.prune_unused()
    model = compare(program, tmp_path)
    assert model.layers[1].q_proj is model.layers[3].q_proj
    assert model.layers[4].gate_proj.shape[0] == 16
    text = (tmp_path / "model.py").read_text()
    assert 'Block(under(f"layers.{i}.", weights), window=window)' in text
    assert "zip([0, 1, 3, 1, 5], [5, " not in text and "zip([0, 1, 3, 1, 5], " in text


def odd_program() -> Program:
    """Return a program with names that are no names, and values that flow across its loops."""
    program = Program('a "\\" name\nand """', source="C:\\models\\é\u2028")
    generator = torch.Generator().manual_seed(0)

    def weight(name: str, *shape: int) -> str:
        value = torch.randn(shape, generator=generator) * 0.3
        program.weights.add(Weight(name, Array(value)))
        return name

    program.inputs = {"input_ids": Type((B, S), torch.int64)}
    embed = Function("embed", [Value("input_ids")], {"weight": Value("weight")})
    x = embed.add("embedding", [embed.params[0], embed.weights["weight"]], names=["x"]).output
    embed.results = [x, embed.add("scale", [x], {"factor": 0.5}, ["class"]).output, x]
    mix = Function("half", [Value("lambda"), Value("b")])
    mix.weights = {'q"uo\\te': Value("w"), "training.weight": Value("c"), "ß": Value("d")}
    w, c, d = mix.weights.values()
    made = mix.add("linear", [mix.params[0], w], names=["linear"]).output
    made = mix.add("add", [made, c], names=["sum"]).output
    turned = mix.add("mul", [made, d], names=["self"]).output
    made = mix.add("mul", [turned, mix.add("mul", [made, d], names=["F"]).output], names=["m"])
    made = mix.add("add", [made.output, mix.params[1]], names=["__and__"])
    scaled = mix.add("scale", [mix.params[1]], {"factor": Param("from")}, ["torch"]).output
    mix.results = [scaled, made.output, w]
    head = Function("model", [Value("x"), Value("y"), Value("z")], {"weight": Value("weight")})
    y = head.add("add", head.params[:2], names=["y_1"]).output
    y = head.add("mul", [y, head.params[2]], names=["rms_norm"]).output
    logits = head.add("linear", [y, head.weights["weight"]], names=["logits"]).output
    head.results = [logits]
    program.functions = {f.name: f for f in (embed, mix, head)}
    table = weight('ta"ble\U0001f600', 97, 8)
    program.calls.append(Call("embed", ["input_ids"], ["x", "p", "q"], {"weight": table}))
    p, q = "p", "q"
    for layer in range(7):
        weights = {
            slot: weight(f"{layer} {slot}", *shape)
            for slot, shape in zip(mix.weights, ((8, 8), (8,), (8,)), strict=True)
        }
        # Each layer hands on its two results crosswise, under names used before.
        results = ["r", "p", "w"] if layer != 4 else ["r", "kept", "w"]
        attrs: dict[str, Any] = {"from": 0.5 + layer % 2}
        program.calls.append(Call("half", [p, q], results, weights, attrs, path="a.b"))
        p, q = results[1], results[0]
    program.calls.append(Call("model", ["x", "p", "kept"], ["logits"], {"weight": table}))
    program.outputs = ["logits"]
    return program


def test_odd_names_and_wiring(tmp_path: Path) -> None:
    model = compare(odd_program(), tmp_path)
    assert model.empty_cache(3) == []
    text = (tmp_path / "model.py").read_text(encoding="utf-8")
    # The fifth layer's result is read by the head as well, which no loop can say.
    assert text.count("nn.ModuleList(") == 2 and text.count("for layer in self.layers") == 2


def sized_program() -> Program:
    """Return a program that makes its mask from B, S and P, on the device of the ids."""
    program = tiny_program(cache=True)
    inter_layer = Function("inter_layer")
    where = {"device": torch.device("cpu"), "pin_memory": False}

    def aten(op: str, inputs: list[Value], shape: tuple[Any, ...], *args: Any, **kw: Any) -> Value:
        kind = Type(shape, torch.int64)
        attrs = {"args": list(args), "kwargs": kw, "types": [kind]}
        return inter_layer.add(f"aten.{op}", list(inputs), attrs).output

    row = aten("arange.start", [], (P + S,), 3, P + S + 3, **where)
    row = aten("clamp.default", [row], (P + S,), In(0), 0, 1)
    row = aten("unsqueeze.default", [row], (1, P + S), In(0), 0)
    inter_layer.results = [aten("expand.default", [row], (B, P + S), In(0), [B, P + S])]
    program.functions["inter_layer"] = inter_layer
    program.calls.insert(1, Call("inter_layer", [], ["ones"]))
    for call in program.calls[2:-1]:
        call.args = ["ones" if arg == "attention_mask" else arg for arg in call.args]
    return program


def test_sizes_and_devices(tmp_path: Path) -> None:
    compare(sized_program(), tmp_path)
    text = (tmp_path / "model.py").read_text()
    assert "ones = self.inter_layer(B, S, P, input_ids.device)" in text
    assert "aten.arange.start(3, P + S + 3, device=device)" in text


def test_past_that_something_else_reads(tmp_path: Path) -> None:
    """Keys go through a product before attention, and come back out as they came."""
    program = tiny_program(cache=True, layers=2)
    block = program.functions["block"]
    (cache,) = block.caches
    node = cache.present_k.node
    assert node is not None
    scaled = block.add("scale", [cache.past_k], {"factor": 1.0}, ["scaled"], before=node).output
    node.inputs[7] = scaled
    compare(program, tmp_path)
    text = (tmp_path / "model.py").read_text()
    assert "past_k, past_v = past\n" in text and "(past_k * 1.0, past_v)" in text


@pytest.mark.parametrize(
    "op, attrs, said",
    [
        ("other.thing.default", {"args": []}, "PyTorch itself has no such operator"),
        ("aten.nothing.default", {"args": []}, "PyTorch has no such operator"),
        ("aten.cat.__class__", {"args": []}, "PyTorch has no such operator"),
        ("aten.x(print()).y", {"args": []}, "PyTorch itself has no such operator"),
        ("aten.exp.default", {"args": [print]}, "not of type Tensor"),
        ("aten.exp.default", {"args": [], "kwargs": {"a=print() or b": 1}}, "has no argument"),
        ("aten.exp.default", {"args": [S**B]}, "cannot be written as whole-number arithmetic"),
    ],
)
def test_what_cannot_be_written_is_refused(op: str, attrs: dict[str, Any], said: str) -> None:
    program = tiny_program()
    block = program.functions["block"]
    x = block.results[0]
    kind = {"types": [Type((B, S, 32), torch.float32)]}
    block.results = [block.add(op, [x], {**attrs, **kind}, ["odd"]).output]
    with pytest.raises((LoweringError, VerifyError), match=rf"layers\.0: odd = .*{said}"):
        TorchEmitter().check(program, "cpu")


def test_other_inputs_are_refused() -> None:
    program = tiny_program()
    program.inputs["pixels"] = Type((B, S), torch.float32)
    with pytest.raises(LoweringError, match=r"its inputs are input_ids, .*pixels"):
        TorchEmitter().check(program, "cpu")


def test_attribute_names_that_would_be_code_are_refused() -> None:
    program = tiny_program()
    program.functions["head"].nodes[0].attrs["eps=1) or print("] = 1
    with pytest.raises(VerifyError, match="it has no attribute 'eps=1"):
        render_model(program)


SIZES = [B, S - 1, 2 * B * S, P + S, (P + S) / 2 * 2, S**2 - 3 * B, 4, B * (S + P), -S, 2 - B * S]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_as_text(size: Any) -> None:
    for b, s, p in ((1, 1, 0), (3, 7, 5), (2, 64, 9)):
        value = eval(size_text(size), {"B": b, "S": s, "P": p})
        assert value == (size if isinstance(size, int) else size.subs({B: b, S: s, P: p}))


def test_quotients_as_text() -> None:
    from sympy import Max, Min, Mod, ceiling, floor

    for size in (floor(S / 2), ceiling(S / 3) + 1, Mod(S, 4) * B, Max(S - 5, P), Min(B, S) - P,
                 floor((B * S + 1) / 4) * 4, -ceiling(S / 4)):  # fmt: skip
        for b, s, p in ((1, 1, 0), (3, 7, 5), (2, 64, 9)):
            value = eval(size_text(size), {"B": b, "S": s, "P": p})
            assert value == size.subs({B: b, S: s, P: p}), size


@pytest.mark.parametrize(
    "items, text",
    [
        ("abc", "[a, b, c]"),
        ("aaaa", "[a] * 4"),
        ("aaaaabaaaaabaaaaabaa", "([a] * 5 + [b]) * 3 + [a, a]"),
        ("aaaaaaaabbbbbbbb", "[a] * 8 + [b] * 8"),
        ("ababa", "[a, b, a, b, a]"),
        ("abcdefabcdefabc", "[a, b, c, d, e, f] * 2 + [a, b, c]"),
    ],
)
def test_series(items: str, text: str) -> None:
    assert series(list(items)) == text
    assert "".join(eval(text, {letter: letter for letter in items})) == items


def test_numbers() -> None:
    assert numbers([0, 1, 2]) == "range(3)" and numbers([4, 5]) == "range(4, 6)"
    assert numbers([0, 1, 2, 3, 5, 8, 9, 10, 11]) == "[*range(4), 5, *range(8, 12)]"


def test_long_lines_are_broken_inside_brackets() -> None:
    text = "value = call(" + ", ".join(f'name_{i}(["a, (b", {i}])' for i in range(12)) + ")"
    lines = wrap(text, 8)
    assert max(map(len, lines)) <= 100 and len(lines) == 14
    same = ast.dump(ast.parse("\n".join(line[8:] for line in lines)))
    assert same == ast.dump(ast.parse(text))


def test_linters_and_formatters_have_nothing_to_say(tmp_path: Path) -> None:
    pytest.importorskip("ruff", reason="ruff is not installed")
    programs = {"odd": odd_program(), "sized": sized_program(), "window": tiny_program(window=3)}
    for name, program in programs.items():
        for target in ("cpu", "hopper"):
            path = tmp_path / f"{name}_{target}.py"
            path.write_text(render_model(program, target), encoding="utf-8")
    run_python("-m", "ruff", "check", "--isolated", "--select", "E9,F", str(tmp_path))
    for path in tmp_path.glob("odd_*"):
        path.unlink()  # its names hold quotes, which ruff would write in single ones
    run_python("-m", "ruff", "format", "--isolated", "--line-length=100", "--check", str(tmp_path))


def test_prompt_without_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    emitted = write(tiny_program(), tmp_path)
    for arguments, said in (([], "give token ids"), (["--prompt", "a"], "needs tokenizer.json")):
        monkeypatch.setattr(sys, "argv", [str(tmp_path / "model.py"), *arguments])
        with pytest.raises(SystemExit) as caught:
            emitted.main()
        assert caught.value.code == 2 and said in capsys.readouterr().err


def test_damaged_weights(tmp_path: Path) -> None:
    program = tiny_program()
    write(program, tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[8] = 0
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(SourceError, match=r"is corrupt: .*Compile the model again"):
        TorchArtifactModel(tmp_path, program)


@pytest.mark.slow
def test_runs_where_neither_graphopt_nor_transformers_can_be_imported(tmp_path: Path) -> None:
    program = tiny_program(cache=True)
    program.config["eos_token_id"] = [500, 501]
    write(program, tmp_path)
    expected = greedy(program, [1, 2, 3], 6)
    # As a module, and as the command line.
    code = (
        "import runpy, sys; sys.modules['graphopt'] = sys.modules['transformers'] = None; "
        "import model; print(model.generate(model.load(), [1, 2, 3], 6), model.END); "
        f"sys.argv[0] = {str(tmp_path / 'model.py')!r}; "
        "runpy.run_path(sys.argv[0], None, '__main__')"
    )
    # Not isolated from the folder, as a person's own python is.
    environment = {**os.environ, "PYTHONSAFEPATH": "", "PYTHONPATH": str(tmp_path)}
    printed = run_python("-c", code, "1", "2", "3", "--new", "6", env=environment).split("\n", 1)
    assert printed[0] == f"{expected} [500, 501]"
    assert printed[1].split() == [str(token) for token in expected]


def greedy(program: Program, ids: list[int], count: int) -> list[int]:
    made: list[int] = []
    for _ in range(count):
        made.append(
            int(Runner(program).logits({"input_ids": torch.tensor([ids + made])})[0, -1].argmax())
        )
    return made


@pytest.mark.parametrize("cache", [False, True])
def test_generation_stops(cache: bool, tmp_path: Path) -> None:
    program = tiny_program(cache=cache)
    emitted = write(program, tmp_path)
    model = emitted.load(tmp_path)
    expected = greedy(program, [5, 6], 8)
    assert emitted.generate(model, [5, 6], 8) == expected
    last = expected[3]
    assert emitted.generate(model, [5, 6], 8, stop=[last]) == expected[: expected.index(last)]
    assert emitted.generate(model, [5, 6], 0) == []


def test_constants_keep_their_dtype_and_ties_hold(tmp_path: Path) -> None:
    program = tiny_program(cache=True)
    emitted = write(program, tmp_path)
    model = emitted.load(tmp_path, dtype=torch.float16)
    assert model.embed.inv_freq.dtype == torch.float32
    assert model.head.lm_head is model.embed.weight
    parameters = list(model.parameters())
    assert len(parameters) == sum(not weight.constant for weight in program.weights)
    assert not any(p.requires_grad for p in parameters)
    assert {p.dtype for p in parameters} == {torch.float16}
    assert model.empty_cache(2)[0][0].dtype == torch.float16
    assert emitted.load(tmp_path).embed.weight.dtype == torch.float32


def test_weights_are_stored_as_they_are(tmp_path: Path) -> None:
    from safetensors.torch import load_file as load_tensors

    program = tiny_program(tied=False)
    name = "layers.0.mlp.up_proj.weight"
    half = program.weights[name].load().to(torch.bfloat16)
    program.weights.replace(Weight(name, Array(half), name))
    program.weights.add(Weight("unused", Array(torch.tensor([float("inf"), 1.0])), constant=True))
    emitted = TorchEmitter().emit(program, tmp_path, "cpu", silent)
    stored = load_tensors(tmp_path / "model.safetensors")
    assert set(stored) == set(emitted.storage) == {weight.name for weight in program.weights}
    for weight in program.weights:
        assert stored[weight.name].dtype == weight.dtype
        assert torch.equal(stored[weight.name], weight.load())
    assert emitted.files == [tmp_path / "model.py", tmp_path / "model.safetensors"]
    broken = torch.full((97, 32), float("nan"))
    program.weights.replace(Weight("embed.weight", Array(broken), "embed.weight"))
    with pytest.raises(SourceError, match=r"embed\.weight"):
        TorchEmitter().emit(program, tmp_path, "cpu", silent)


@pytest.mark.slow
def test_an_output_folder_is_a_model_that_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        InsertKVCache()
        .run(capture(str(save_tiny(tmp_path / "source", "gemma2"))), Context())
        .program
    )
    report = emit(program, out, emit=("torch",))
    assert report.artifact is not None
    assert any("--prompt" in line for line in report.artifact.usage)
    assert not list((out).glob("*.onnx*")) and (out / "tokenizer.json").is_file()
    model = open_language_model(str(out))
    assert isinstance(model, TorchArtifactModel) and model.tokenizer == out
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.logits(ids), Runner(program).logits({"input_ids": ids}))
    said = run_python(str(out / "model.py"), "--prompt", "the", "--new", "3")
    assert said.endswith("\n")
    (out / "model.py").write_text((out / "model.py").read_text() + "# changed\n")
    with pytest.raises(SourceError, match="is not the file that graphopt writes"):
        open_language_model(str(out))


@pytest.mark.parametrize("forms", [("onnx", "torch"), ("torch", "onnx")])
def test_beside_onnx(forms: tuple[str, ...], tmp_path: Path) -> None:
    """Another emitter may store weights in another dtype; the file is the same."""
    program = tiny_program(cache=True)
    for weight in list(program.weights):
        if not weight.constant:
            half = weight.load().to(torch.bfloat16)
            program.weights.replace(Weight(weight.name, Array(half), weight.name))
    emit(program, tmp_path / "out", emit=forms)
    model = open_language_model(str(tmp_path / "out"), "torch")
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(model.logits(ids), Runner(program).logits({"input_ids": ids}))


def test_without_states_the_tokens_run_again(tmp_path: Path) -> None:
    program = tiny_program()
    emit(program, tmp_path / "out", emit=("torch",))
    model = open_language_model(str(tmp_path / "out"))
    ids, mask = torch.randint(0, 97, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    expected = model.logits(ids)
    cache = model.start(2)
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        step = complete_inputs({"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]})
        logits, cache = model.step(step, cache)
        torch.testing.assert_close(logits, expected[:, start:stop])
