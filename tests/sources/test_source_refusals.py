"""Folders that hold no checkpoint in floating point: the refusal says what they hold instead."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from torch import Tensor

from graphopt.capture import capture
from graphopt.errors import SourceError
from graphopt.sources import open_model

pytestmark = pytest.mark.oldest

F8, I8, U8, I32 = torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32
MODULE = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("dense") / "m")


def quantised(dense: Path, folder: Path, parts: dict[str, Tensor], **files: Any) -> Path:
    """Write the model with the parts of one quantised weight in place of it."""
    tensors = load_file(dense / "model.safetensors")
    del tensors[f"{MODULE}.weight"]
    tensors |= {f"{MODULE}{name}": value for name, value in parts.items()}
    folder.mkdir()
    config = json.loads((dense / "config.json").read_text()) | files.pop("config", {})
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


HALF, ONE = zeros(torch.float16, 4, 32), torch.ones(1)
FORMATS: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "fp8, scale": (
        {".weight": zeros(F8, 32, 48), ".weight_scale": ONE},
        {"hf_quant_config": {"quantization": {"quant_algo": "FP8"}}},
        r"down_proj\.weight' is fp8 \(E4M3\), with 'weight_scale' beside it; hf_quant_.* says FP8",
    ),
    "fp8, inverse scales": (
        {".weight": zeros(torch.float8_e5m2, 32, 48), ".weight_scale_inv": torch.ones(1, 1)},
        {},
        r"fp8 \(E5M2\), with 'weight_scale_inv' beside",
    ),
    "fp8 alone": ({".weight": zeros(F8, 32, 48)}, {}, r"is fp8 \(E4M3\)\. Give"),
    "int8": (
        {".weight": zeros(I8, 32, 48), ".weight_scale": torch.ones(32, 1)},
        {"config": {"compression_config": {"format": "int-quantized"}}},
        "whose weights are quantised by 'int-quantized'",
    ),
    "int8, nothing said": (
        {".weight": zeros(I8, 32, 48), ".weight_scale": torch.ones(32, 1)},
        {},
        "is int8, with 'weight_scale' beside it",
    ),
    "int4 packed": (
        {".weight_packed": zeros(I32, 32, 6), ".weight_scale": torch.ones(32, 1),
         ".weight_shape": torch.tensor([32, 48])},
        {},
        "packed in int32, compressed-tensors, packed, with 'weight_scale'",
    ),
    "GPTQ": (
        {".qweight": zeros(I32, 6, 32), ".qzeros": zeros(I32, 4, 4), ".scales": HALF,
         ".g_idx": zeros(I32, 48)},
        {"quantize_config": {"quant_method": "bitblas", "bits": 4}},
        r"packed in int32, GPTQ, with '\w+' beside it; quantize_config\.json says bitblas",
    ),
    "AWQ": (
        {".qweight": zeros(I32, 48, 4), ".qzeros": zeros(I32, 4, 4), ".scales": HALF},
        {},
        "packed in int32, AWQ",
    ),
    "bitsandbytes, 4 bits": (
        {".weight": zeros(U8, 768, 1), ".weight.absmax": zeros(U8, 24),
         ".weight.quant_map": torch.ones(16),
         ".weight.quant_state.bitsandbytes__nf4": zeros(U8, 80)},
        {},
        "packed in uint8, bitsandbytes, 4 bits",
    ),
    "bitsandbytes, 8 bits": (
        {".weight": zeros(I8, 32, 48), ".SCB": torch.ones(32), ".weight_format": zeros(U8)},
        {},
        "is int8, bitsandbytes, 8 bits, with 'SCB' beside",
    ),
    "NVFP4": (
        {".weight": zeros(U8, 32, 24), ".weight_scale": zeros(F8, 32, 3), ".weight_scale_2": ONE},
        {},
        "packed in uint8, NVFP4",
    ),
    "MXFP4": (
        {"_blocks": zeros(U8, 32, 3, 16), "_scales": zeros(U8, 32, 3)},
        {},
        "down_proj_blocks' is packed in uint8, MXFP4, with 'down_proj_scales' beside",
    ),
    "HQQ": ({".W_q": zeros(U8, 16, 48), ".scale": HALF, ".zero": HALF + 1}, {}, "HQQ"),
    "quanto": ({".weight._data": zeros(I8, 32, 48), ".weight._scale": ONE}, {}, "int8, quanto"),
    "MLX": (
        {".weight": zeros(torch.float32, 32, 48)},
        {"config": {"quantization": {"group_size": 64, "bits": 4}}},
        r"whose weights are quantised \(quantization\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", FORMATS)
def test_quantised_weights_are_named_whatever_the_config_says(
    label: str, dense: Path, tmp_path: Path
) -> None:
    parts, files, message = FORMATS[label]
    folder = quantised(dense, tmp_path / "m", parts, **files)
    with pytest.raises(SourceError, match=message) as refusal:
        open_model(str(folder))
    assert "fp32, fp16 or bf16" in refusal.value.remedy
    assert str(refusal.value).count("\n") == 0


def test_tables_of_whole_numbers_are_no_quantised_weights(dense: Path, tmp_path: Path) -> None:
    """Old checkpoints of GPT-2 hold their causal mask as bytes, others their positions."""
    tensors = load_file(dense / "model.safetensors")
    tensors[f"{MODULE}.bias_mask"] = zeros(U8, 1, 1, 16, 16)
    tensors["model.position_ids"] = torch.arange(16)[None]
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text((dense / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"{MODULE}.bias_mask" in open_model(str(folder)).producers


@pytest.mark.parametrize("code", ["U32", "F4", "F8_E8M0", "I4"])
def test_element_types_of_quantised_weights_alone(code: str, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    header = json.dumps({"w": {"dtype": code, "shape": [8], "data_offsets": [0, 4]}}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(SourceError, match=f"quantised weights: tensor 'w' has elements.*{code}"):
        open_model(str(tmp_path))


LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "vocab_size": 64,
}  # fmt: skip


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", None])
@pytest.mark.parametrize("beside", [False, True])
def test_adapters(weights: str | None, beside: bool, dense: Path, tmp_path: Path) -> None:
    """Also beside a whole model, to which transformers would add it."""
    config = {"peft_type": "LORA", "base_model_name_or_path": "base/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if weights:
        (tmp_path / weights).write_bytes(b"")
    for name in ("config.json", "model.safetensors") if beside else ():
        (tmp_path / name).write_bytes((dense / name).read_bytes())
    with pytest.raises(SourceError, match="holds a LORA adapter") as refusal:
        open_model(str(tmp_path))
    assert "its base model base/model with peft's merge_and_unload" in refusal.value.remedy


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model_index.json": {"_class_name": "FluxPipeline"}}, r"diffusion pipeline \(Flux"),
        ({"modules.json": []}, "sentence-transformers model"),
        ({"params.json": {}, "consolidated.safetensors": ""}, r"own format \(params\.json\)"),
        ({"genai_config.json": {}, "model.onnx": ""}, r"ONNX graph \(model\.onnx\)"),
        ({"model.safetensors": ""}, r"weights \(model\.safetensors\) and no config\.json"),
        ({"pytorch_model.bin": ""}, r"weights \(pytorch_model\.bin\) and no config\.json"),
        ({"a.gguf": ""}, r"\.gguf files and no config\.json.*Name the file: "),
        ({"README.md": ""}, "neither config.json nor program.json"),
        ({}, "is empty"),
        ({"tokenizer.json": {}, "README.md": ""}, "holds a tokenizer and no model"),
        ({"config.json": LLAMA}, r"holds no weights.*graphopt inspect --config .*config\.json"),
        ({"inner/config.json": {}}, "Did you mean .*inner"),
        ({"adapter_config.json": "{", "README.md": ""}, r"an adapter \(adapter_config\.json\)"),
    ],
)
def test_folders_of_other_kinds(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SourceError, match=message):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("https://huggingface.co/owner/model", "hub: owner/model, or download it"),
        ("https://huggingface.co/owner/model/tree/main", "hub: owner/model, or"),
        ("http://example.org/model.gguf", "is an address"),
    ],
)
def test_addresses_are_no_models(spec: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_model(spec)


def test_a_file_of_a_model_folder_names_the_folder(dense: Path) -> None:
    with pytest.raises(SourceError, match=f"the model's folder, {dense}"):
        open_model(str(dense / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool])
def test_weights_that_are_whole_numbers_are_refused_by_name(tmp_path: Path, dtype) -> None:
    folder = save_tiny(tmp_path / "tiny")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"'model\.norm\.weight' is stored as \w+, and the model"):
        capture(str(folder))
