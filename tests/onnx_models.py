"""Programs emitted as ONNX folders and run by ONNX Runtime, in one step or in many."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from graphopt.ir.graph import Program
from graphopt.lowering.base import Emitted
from graphopt.lowering.onnx import OnnxEmitter
from graphopt.support.progress import silent

Cache = dict[str, np.ndarray]


def emit(program: Program, root: Path) -> tuple[Emitted, Path]:
    """Write `root/onnx`; return what was emitted and the path of `model.onnx`."""
    emitter = OnnxEmitter()
    emitter.check(program, "cpu")
    return emitter.emit(program, root, "cpu", silent), root / "onnx" / "model.onnx"


def session(path: Path) -> ort.InferenceSession:
    """Open a model on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options)


def run(
    model: ort.InferenceSession, inputs: Mapping[str, Tensor], past: Cache | None = None
) -> tuple[Tensor, Cache]:
    """Return logits and the new cache, by the names of inputs; without `past` from nothing."""
    names = [item.name for item in model.get_inputs()]
    feeds = {name: inputs[name].numpy() for name in names if name in inputs}
    for item in model.get_inputs():
        if item.name.startswith("past_key_values"):
            empty = (inputs["input_ids"].shape[0], item.shape[1], 0, item.shape[3])
            feeds[item.name] = (past or {}).get(item.name, np.zeros(empty, dtype=np.float32))
    outputs = dict(zip([o.name for o in model.get_outputs()], model.run(None, feeds), strict=True))
    cache = {n.replace("present", "past_key_values"): v for n, v in outputs.items() if "." in n}
    return torch.from_numpy(outputs["logits"]), cache


def run_in_steps(
    model: ort.InferenceSession, inputs: Mapping[str, Tensor], stops: Sequence[int]
) -> Tensor:
    """Return the logits of a whole batch, computed step by step with a cache.

    Args:
        inputs: `input_ids`, `attention_mask` and `position_ids`, int64 [B, S].
        stops: Where each step ends, the last at S.
    """
    pieces: list[Tensor] = []
    past: Cache | None = None
    for start, stop in itertools.pairwise((0, *stops)):
        step = {
            "input_ids": inputs["input_ids"][:, start:stop],
            "attention_mask": inputs["attention_mask"][:, :stop],
            "position_ids": inputs["position_ids"][:, start:stop],
        }
        logits, past = run(model, step, past)
        pieces.append(logits)
        assert {value.shape[2] for value in past.values()} <= {stop}
    return torch.cat(pieces, 1)


def run_in_one_buffer(
    model: ort.InferenceSession, inputs: Mapping[str, Tensor], stops: Sequence[int], room: int
) -> Tensor:
    """As `run_in_steps`, with past and present in one buffer of `room` tokens a sequence.

    This is how onnxruntime-genai runs a model with `past_present_share_buffer`.
    """
    batch = inputs["input_ids"].shape[0]
    buffers = {
        item.name: ort.OrtValue.ortvalue_from_numpy(
            # What was there before must not matter.
            np.full((batch, item.shape[1], room, item.shape[3]), 7.0, dtype=np.float32)
        )
        for item in model.get_inputs()
        if item.name.startswith("past_key_values")
    }
    taken = {item.name for item in model.get_inputs()}
    pieces: list[Tensor] = []
    for start, stop in itertools.pairwise((0, *stops)):
        binding = model.io_binding()
        for name, columns in (
            ("input_ids", slice(start, stop)),
            ("attention_mask", slice(0, stop)),
            ("position_ids", slice(start, stop)),
        ):
            if name in taken:
                value = np.ascontiguousarray(inputs[name][:, columns].numpy())
                binding.bind_cpu_input(name, value)
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        model.run_with_iobinding(binding)
        (logits,) = (v for v in binding.get_outputs() if v.shape()[1] == stop - start and
                     len(v.shape()) == 3)  # fmt: skip
        pieces.append(torch.from_numpy(logits.numpy().copy()))
    return torch.cat(pieces, 1)
