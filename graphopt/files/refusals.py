"""Folders without a checkpoint that is read: what they hold instead, in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import SourceError
from graphopt.files.confined import inside
from graphopt.ir.weights import Producer
from graphopt.support.inputs import read_json
from graphopt.support.plain import shown

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

REMEDY = (
    "Give the checkpoint in fp32, fp16 or bf16, or dequantise this one with the tool that made it. "
    "GPTQ, AWQ, compressed-tensors and fp8 are read where config.json says so as "
    "quantization_config."
)


def _stated(folder: Path, name: str, *keys: str) -> str:
    """Return a text of a JSON file of the folder, for a message; "" where there is none."""
    try:
        value: Any = read_json(inside(folder, name))
    except SourceError:
        return ""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return shown(value)[1:-1] if isinstance(value, str) else ""


# Folders without a checkpoint -------------------------------------------------------------------


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter, also where its base model lies beside it.

    transformers would load both, and the base model alone computes something else.

    Raises:
        SourceError: It holds one.
    """
    marks = (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)
    held = next((name for name in marks if (folder / name).exists()), None)
    if held is None:
        return
    kind = _stated(folder, ADAPTER_CONFIG, "peft_type")
    base = _stated(folder, ADAPTER_CONFIG, "base_model_name_or_path")
    what = f"a {kind} adapter" if kind else "an adapter"
    raise SourceError(
        f"{folder} holds {what} ({held}), not a model of its own.",
        f"Merge it into its base model{f' {base}' if base else ''} with peft's merge_and_unload, "
        "and give the folder of the result.",
    )


def unfit_folder(folder: Path) -> SourceError:
    """Return the refusal of a folder without config.json that is no output of graphopt either.

    Raises:
        SourceError: It holds an adapter.
    """
    refuse_adapter(folder)

    def some(pattern: str) -> list[Path]:
        return sorted(folder.glob(pattern))

    if found := some("*.gguf"):
        return SourceError(
            f"{folder} holds .gguf files and no config.json.", f"Name the file: {found[0]}."
        )
    if (folder / "model_index.json").exists():
        kind = _stated(folder, "model_index.json", "_class_name")
        return SourceError(
            f"{folder} holds a diffusion pipeline{f' ({kind})' if kind else ''}, a set of models "
            "that is no language model.",
            "graphopt takes decoder-only language models; its text encoder is none either.",
        )
    if (folder / "modules.json").exists() or (
        folder / "config_sentence_transformers.json"
    ).exists():
        return SourceError(
            f"{folder} holds a sentence-transformers model without a config.json of its own.",
            "Give the folder of a decoder-only language model.",
        )
    if (folder / "params.json").exists():
        return SourceError(
            f"{folder} holds a model in its makers' own format (params.json).",
            "Give the version in transformers' format, or convert it with the script that "
            "transformers has for the family.",
        )
    if found := some("*.onnx") + some("onnx/*.onnx"):
        return SourceError(
            f"{folder} holds an ONNX graph ({found[0].name}), which is not read.",
            "Give the checkpoint that it was exported from.",
        )
    if found := some("*.safetensors") + some("*.bin") + some("*.pt") + some("*.pth"):
        return SourceError(
            f"{folder} holds weights ({found[0].name}) and no config.json, so what they belong to "
            "is not known.",
            "Add the model's config.json.",
        )
    if not any(folder.iterdir()):
        return SourceError(f"{folder} is empty.", "Give the folder of a model.")
    inner = sorted(p.parent.name for p in folder.glob("*/config.json"))
    if not inner and any((folder / name).exists() for name in _TOKENIZER_FILES):
        return SourceError(
            f"{folder} holds a tokenizer and no model.",
            "Give the folder with config.json and the weights; tokenizer files belong there too.",
        )
    near = f"Did you mean {folder / inner[0]}?" if inner else ""
    return SourceError(
        f"{folder} holds neither config.json nor program.json, so it is not a model.", near
    )


# Quantised weights ------------------------------------------------------------------------------

_FORMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("GPTQ", ("qweight", "qzeros", "g_idx")),
    ("AWQ", ("qweight", "qzeros", "scales")),
    ("GPTQ or Marlin", ("qweight", "scales")),
    ("compressed-tensors, packed", ("weight_packed", "weight_scale")),
    ("NVFP4", ("weight", "weight_scale_2")),
    ("MXFP4", ("*_blocks", "*_scales")),
    ("bitsandbytes, 4 bits", ("weight", "weight.quant_map")),
    ("bitsandbytes, 8 bits", ("weight", "SCB")),
    ("HQQ", ("W_q", "scale")),
    ("quanto", ("_data", "_scale")),
)
"""How tools call the parts of a quantised weight, beside each other below one module. Named by
AutoGPTQ, AutoAWQ, compressed-tensors, ModelOpt, gpt-oss, bitsandbytes, HQQ and quanto."""

QUANTISED_CODES = frozenset(
    {"U32", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4", "U4", "I4"}
)
"""Element types of safetensors that hold quantised weights and their scales alone."""

_SCALES = re.compile(r"(^|[._])(scales?(_inv|_2)?|absmax|qzeros|zero_point|SCB|zeros?|amax)$")

_METHOD_FILES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("hf_quant_config.json", ("quantization", "quant_algo")),
    ("quantize_config.json", ("quant_method",)),
    ("quant_config.json", ("quant_method",)),
    ("config.json", ("compression_config", "format")),
)

_DTYPES = {
    torch.float8_e4m3fn: "fp8 (E4M3)",
    torch.float8_e5m2: "fp8 (E5M2)",
    torch.int8: "int8",
    torch.uint8: "packed in uint8",
    torch.int16: "packed in int16",
    torch.int32: "packed in int32",
}


def refuse_quantised(folder: Path, tensors: Mapping[str, Producer]) -> None:
    """Refuse a checkpoint whose weights are quantised although its config does not say so.

    They are: fp8 tensors of any kind; and tensors of whole numbers that lie beside scales, or that
    are called as a tool calls them.

    Raises:
        SourceError: Naming the first such weight, its kind, and how many there are.
    """
    beside: dict[str, set[str]] = {}
    for name in tensors:
        module, _, last = name.rpartition(".")
        beside.setdefault(module, set()).add(last)
        outer, _, middle = module.rpartition(".")
        beside.setdefault(outer, set()).add(f"{middle}.{last}")
    found: list[str] = []
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        kind = _DTYPES.get(tensor.dtype)
        if kind is None or _SCALES.search(last) or last == "g_idx":
            continue
        parts = beside[module]
        tool = next((tool for tool, names in _FORMATS if _all_of(names, parts)), "")
        scales = [part for part in sorted(parts) if _SCALES.search(part)]
        own = [part for part in scales if part.startswith((last, last.removesuffix("_blocks")))]
        if tensor.dtype.is_floating_point or tool or (scales and len(tensor.shape) > 1):
            with_scales = f", with {(own or scales)[0]!r} beside it" if scales else ""
            found.append(f"{name!r} is {kind}{f', {tool}' if tool else ''}{with_scales}")
    if found:
        methods = ((file, _stated(folder, file, *keys)) for file, keys in _METHOD_FILES)
        stated = next((f"; {file} says {method}" for file, method in methods if method), "")
        more = f", and {len(found) - 1} more are quantised" if len(found) > 1 else ""
        raise SourceError(f"{folder} holds quantised weights: {found[0]}{more}{stated}.", REMEDY)


def _all_of(names: tuple[str, ...], parts: set[str]) -> bool:
    return all(
        any(part.endswith(name[1:]) for part in parts) if name.startswith("*") else name in parts
        for name in names
    )
