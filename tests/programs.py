"""A tiny decoder, built by hand as capture builds it, with every feature of attention."""

from __future__ import annotations

from typing import Any, Literal

import torch

from graphopt.ir import Array, B, Call, Function, Param, Program, S, Type, Value, Weight
from graphopt.pass_manager.contract import Context
from graphopt.passes.insert_kv_cache import InsertKVCache

IDS = Type((B, S), torch.int64)


class _Builder:
    """Collects functions and random weights."""

    def __init__(self, seed: int, std: float = 0.15) -> None:
        self.program = Program("tiny")
        self.generator = torch.Generator().manual_seed(seed)
        self.std = std

    def random(self, name: str, *shape: int, mean: float = 0.0) -> str:
        """Add a random weight and return its name."""
        if name not in self.program.weights:
            value = torch.randn(shape, generator=self.generator) * self.std + mean
            self.program.weights.add(Weight(name, Array(value), checkpoint=name))
        return name

    def constant(self, name: str, value: torch.Tensor) -> str:
        self.program.weights.add(Weight(name, Array(value), constant=True))
        return name

    def function(self, name: str, *params: str) -> Function:
        function = Function(name)
        function.params = [Value(param) for param in params]
        self.program.functions[name] = function
        return function


def _slot(function: Function, name: str) -> Value:
    if name not in function.weights:
        value = Value(name.removesuffix(".weight").replace(".", "_") + "_w")
        function.weights[name] = value
    return function.weights[name]


def tiny_program(
    *,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    ffn: int = 48,
    vocab: int = 97,
    window: int | None = None,
    softcap: float | None = None,
    alibi: bool = False,
    sinks: bool = False,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    tied: bool = True,
    bias: bool = False,
    norm: Literal["rms", "layer"] = "rms",
    cache: bool = False,
    seed: int = 0,
) -> Program:
    """Return a decoder with random weights of standard deviation 0.15.

    Args:
        window: Sliding window of every second layer, as a `Param` of the calls.
        alibi: Slopes in place of rotary positions.
        rotary_dim: How many features of a head rotate; None for all.
        bias: Of every projection.
        cache: Run `insert-kv-cache`.
    """
    make = _Builder(seed)
    program = make.program
    program.inputs = dict.fromkeys(("input_ids", "attention_mask", "position_ids"), IDS)
    program.outputs = ["logits"]

    def normed(f: Function, x: Value, name: str, into: str) -> Value:
        gain = _slot(f, f"{name}.weight")
        if norm == "rms":
            return f.add("rms_norm", [x, gain], {"eps": 1e-5}, [into]).output
        shift = _slot(f, f"{name}.bias")
        return f.add("layer_norm", [x, gain, shift], {"eps": 1e-5}, [into]).output

    def linear(f: Function, x: Value, name: str, into: str) -> Value:
        operands = [x, _slot(f, f"{name}.weight")]
        if bias:
            operands.append(_slot(f, f"{name}.bias"))
        return f.add("linear", operands, names=[into]).output

    embed = make.function("embed", "input_ids", *([] if alibi else ["position_ids"]))
    x = embed.add("embedding", [embed.params[0], _slot(embed, "weight")], names=["x"]).output
    embed.results = [x]
    embed_weights = {"weight": make.random("embed.weight", vocab, hidden)}
    rotated = rotary_dim or head_dim
    if not alibi:
        inv_freq = 1.0 / 100.0 ** (torch.arange(0, rotated, 2) / rotated)
        slot = _slot(embed, "rope.inv_freq")
        embed_weights["rope.inv_freq"] = make.constant("rope.inv_freq", inv_freq)
        embed.results += embed.add(
            "rope_table", [embed.params[1], slot], names=["cos", "sin"], outputs=2
        ).outputs
    tables = [] if alibi else ["cos", "sin"]

    block = make.function("block", "x", "attention_mask", *tables)
    x, mask, *rope_tables = block.params
    h = normed(block, x, "input_layernorm", "h")
    projected = {p: linear(block, h, f"self_attn.{p}_proj", p) for p in "qkv"}
    split = {
        p: block.add("split_heads", [value], {"head_dim": head_dim}, [f"{p}_heads"]).output
        for p, value in projected.items()
    }
    if not alibi:
        for p in "qk":
            attrs = {"interleaved": interleaved}
            operands = [split[p], *rope_tables]
            split[p] = block.add("rope", operands, attrs, [f"{p}_rope"]).output
    slopes = _slot(block, "slopes") if alibi else None
    sink = _slot(block, "self_attn.sinks") if sinks else None
    operands: list[Value | None] = [split["q"], split["k"], split["v"], mask, None, slopes, sink]
    while operands[-1] is None:
        operands.pop()
    attrs: dict[str, Any] = {"scale": head_dim**-0.5, "causal": True}
    if window is not None:
        attrs["window"] = Param("window")
    if softcap is not None:
        attrs["softcap"] = softcap
    a = block.add("attention", operands, attrs, ["a"]).output
    merged = block.add("merge_heads", [a], names=["merged"]).output
    o = linear(block, merged, "self_attn.o_proj", "o")
    x = block.add("add", [x, o], names=["x"]).output
    h = normed(block, x, "post_attention_layernorm", "h")
    gate = block.add("silu", [linear(block, h, "mlp.gate_proj", "gate")], names=["act"]).output
    product = block.add("mul", [gate, linear(block, h, "mlp.up_proj", "up")], names=["m"]).output
    down = linear(block, product, "mlp.down_proj", "down")
    block.results = [block.add("add", [x, down], names=["x"]).output]

    head = make.function("head", "x")
    h = normed(head, head.params[0], "norm", "h")
    logits = head.add("linear", [h, _slot(head, "lm_head.weight")], names=["logits"]).output
    head.results = [logits]

    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }

    def weight_of(prefix: str, slot: str) -> str:
        part, _, kind = slot.rpartition(".")
        if slot == "self_attn.sinks":
            return make.random(prefix + slot, heads)
        if part not in shapes:
            return make.random(prefix + slot, hidden, mean=1.0 if kind == "weight" else 0.0)
        shape = shapes[part] if kind == "weight" else shapes[part][:1]
        return make.random(prefix + slot, *shape)

    if alibi:
        make.constant("slopes", 2.0 ** -(torch.arange(heads) + 1.0))
    args = ["input_ids"] if alibi else ["input_ids", "position_ids"]
    program.calls.append(Call("embed", args, ["x", *tables], embed_weights, path="embed"))
    for layer in range(layers):
        prefix = f"layers.{layer}."
        weights = {
            slot: slot if slot == "slopes" else weight_of(prefix, slot) for slot in block.weights
        }
        attributes = {} if window is None else {"window": window if layer % 2 == 0 else None}
        inputs = ["x", "attention_mask", *tables]
        path = prefix.removesuffix(".")
        program.calls.append(Call("block", inputs, ["x"], weights, attributes, path=path))
    weights = {slot: weight_of("", slot) for slot in head.weights if slot != "lm_head.weight"}
    weights["lm_head.weight"] = (
        "embed.weight" if tied else make.random("lm_head.weight", vocab, hidden)
    )
    program.calls.append(Call("head", ["x"], ["logits"], weights, path="head"))
    if cache:
        program = InsertKVCache().run(program, Context()).program
    return program
