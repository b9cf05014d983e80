"""What capture does with graphs it was not made for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from families import cases, eager_logits, error, random_model
from programs import tiny_program

from graphopt.capture import capture, steps
from graphopt.capture.sizes_check import check_sizes
from graphopt.errors import CaptureError
from graphopt.execute.interpreter import Runner
from graphopt.ir import Program, Type
from graphopt.ir.graph import In
from graphopt.ir.types import B, S


def _with_reshape(shape: list[object], kind: Type) -> Program:
    program = tiny_program()
    block = program.functions["block"]
    attrs = {"args": [In(0), shape], "kwargs": {}, "types": [kind]}
    block.add("aten.reshape.default", [block.results[0]], attrs, ["odd"])
    return program


def test_a_graph_that_holds_for_the_traced_length_alone_is_refused_by_name() -> None:
    check_sizes(_with_reshape([B, S, 32], Type((B, S, 32), torch.float32)))
    with pytest.raises(CaptureError, match=r"layers\.0: odd = aten\.reshape.* does not compute"):
        check_sizes(_with_reshape([3, 11, 32], Type((B, S, 32), torch.float32)))
    with pytest.raises(CaptureError, match=r"makes \[1, 1, 32\] where the graph says \[1, 1, 8\]"):
        check_sizes(_with_reshape([B, S, 32], Type((B, S, 8), torch.float32)))


def test_a_rule_that_stops_leaves_aten_behind_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_norms(raiser: object) -> None:
        raise IndexError("index 0 is out of bounds")

    monkeypatch.setattr(steps, "raise_norms", raise_norms)
    model, case = random_model("llama"), cases((7,))[-1]
    program = capture(model)
    reasons = [reason for _, reason in program.notes]
    assert any("the rule raise_norms stopped: IndexError" in reason for reason in reasons)
    assert any("aten.rsqrt" in reason for reason in reasons)
    assert error(eager_logits(model, case), Runner(program).logits(case.inputs), case) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is reserved by Linux")
def test_experts_that_no_memory_holds_are_captured(tmp_path: Path) -> None:
    strict = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    if strict:
        pytest.skip("this machine reserves no more memory than it has")
    sizes = {"hidden_size": 8192, "num_experts": 4096, "moe_intermediate_size": 8192}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "vocab_size": 9, **sizes, **heads}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    # 2.2 TB in one weight.
    program = capture(f"config:{path}")
    assert program.parameter_count() > 4096 * 3 * 8192**2
