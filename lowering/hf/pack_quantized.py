"""Packed weights in a checkpoint: the format `pack-quantized` of compressed-tensors.

A layer of class Linear with packed weights [out, in] holds, in the place of `weight`:

    weight_packed       int32 [out, in * bits / 32]       codes, the first in the lowest bits
    weight_scale        float [out, groups]
    weight_zero_point   int32 [out * bits / 32, groups]   packed along `out`; where asymmetric
    weight_shape        int64 [2]                         out, in

and config.json has an entry `quantization_config` that says which layers those are. Codes are
those of `graphopt.ir.encoding`, so that the bytes of `weight_packed` are those of `NAME.packed`.
Source: compressed-tensors 0.20, `compressors/pack_quantized`, `quantization/quant_config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphopt.ir.encoding import Packed, pack
from graphopt.ir.graph import Program
from graphopt.ir.weights import Array, Dequantised, Producer
from graphopt.lowering.hf.checkpoint_assembly import Assembled
from graphopt.support.plain import first_and_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "pack-quantized"

VERSION = "0.20.0"
"""The release of compressed-tensors whose format is written."""

RUN_TIME = {
    "quantise_dequantise": "activations rounded at run time",
    "kronecker": "transforms of activations at run time",
}
"""Ops that a checkpoint of packed weights has no place for, and what they do."""

_WORD = 32
"""Bits of an element of `weight_packed`."""


@dataclass(frozen=True, eq=False)
class PackedWords(Producer):
    """The codes of a packed matrix as int32 words: those of a row follow each other bit by bit."""

    weight: Dequantised

    @property
    def is_as_stored(self) -> bool:
        """Whether the bytes of the words are those of the weight's codes."""
        _, length = self.weight.shape
        return self.weight.encoding.fills_bytes and length * self.weight.encoding.bits % _WORD == 0

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        rows, length = self.weight.shape
        return (rows, -(-length * self.weight.encoding.bits // _WORD))

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.int32

    def load(self) -> Tensor:
        return self.load_rows(0, self.shape[0])

    def load_rows(self, start: int, stop: int) -> Tensor:
        encoding = self.weight.encoding
        packed = self.weight.packed.load_rows(start, stop)
        if not encoding.fills_bytes:
            packed = pack(encoding.codes(packed).flatten(1), encoding.bits)[:, None]
        return _words(packed.flatten(1))


@dataclass(frozen=True, eq=False)
class PackedZeroPoints(Producer):
    """Zero points of a packed matrix as int32 words along `out`."""

    weight: Dequantised

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        rows, groups = self.weight.scales.shape
        return (-(-rows * self.weight.encoding.bits // _WORD), groups)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.int32

    def load(self) -> Tensor:
        assert self.weight.zeros is not None
        encoding = self.weight.encoding
        points = encoding.zero_points(self.weight.zeros.load(), self.shape[1])
        return _words(pack(points.t(), encoding.bits)).t().contiguous()


def _words(data: Tensor) -> Tensor:
    """Return rows of bytes [n, m] as int32 words [n, ceil(m / 4)], the first byte lowest."""
    padded = nn.functional.pad(data, (0, -data.shape[1] % 4))
    return padded.contiguous().view(torch.int32)


@dataclass
class QuantisedCheckpoint:
    """A checkpoint some of whose layers are packed.

    Attributes:
        tensors: By their names in the file.
        config: The entry `quantization_config` of config.json; None where no layer is packed.
        dense: What is packed in the program and dense in the checkpoint, by the reason.
    """

    tensors: dict[str, Producer]
    config: dict[str, Any] | None = None
    dense: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_asymmetric(self) -> bool:
        """Whether a layer has zero points."""
        return any(isinstance(tensor, PackedZeroPoints) for tensor in self.tensors.values())

    def notes(self) -> list[tuple[str, str]]:
        """Return what is written dense and what loaders fail at, as (where, what)."""
        notes = [
            (first_and_count(names), f"written dense: {reason}")
            for reason, names in self.dense.items()
        ]
        groups = len((self.config or {}).get("config_groups", ()))
        if self.is_asymmetric and groups > 1:
            told = (
                f"transformers 5.23 with compressed-tensors 0.20 loads zero points of one encoding "
                f"alone, and these layers have {groups}: choose a group that divides every row, "
                "bits that are the same in all, or symmetric codes, which load in any mix"
            )
            notes.append(("hf", told))
        elif self.is_asymmetric:
            told = (
                "transformers 5.23 with compressed-tensors 0.20 loads zero points only with "
                "quantization_config=CompressedTensorsConfig(dequantize=True); symmetric codes "
                "have none"
            )
            notes.append(("hf", told))
        return notes


def refused_by_format(program: Program) -> str | None:
    """Return why the format cannot hold what a program computes; None where it may.

    It has packed weights. Activations that are rounded or transformed while the model runs are
    entries of the format that no loader of packed weights reads.
    """
    for call in program.calls:
        for node in program.functions[call.function].nodes:
            if node.op in RUN_TIME:
                where = f"{call.path or call.function}: {node.outputs[0].name} = {node.op}"
                return f"{where}: {FORMAT} holds packed weights, and no {RUN_TIME[node.op]}"
    return None


def pack_quantized(tensors: Mapping[str, Producer], module: PreTrainedModel) -> QuantisedCheckpoint:
    """Return a checkpoint in which layers with packed weights hold their codes.

    Args:
        tensors: Of the checkpoint, as if it were dense: packed weights under their names. Values of
            packed weights in other tensors are dense already.
        module: The model that loads it.
    """
    layers = {name for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    written = QuantisedCheckpoint({})
    schemes: dict[_Scheme, list[str]] = {}
    for name, producer in tensors.items():
        encodings = [producer.encoding] if producer.encoding is not None else []
        if isinstance(producer, Assembled):
            encodings = producer.encodings
        if not encodings:
            written.tensors[name] = producer
            continue
        layer = name.removesuffix(".weight")
        reason = _no_place(module, layer, layers, encodings)
        if reason is None and producer.encoding is None:
            reason = "its parts, which the program has one by one, are not packed alike"
        if reason is not None:
            written.dense.setdefault(reason, []).append(name)
            written.tensors[name] = producer
            continue
        assert isinstance(producer, Dequantised)
        schemes.setdefault(_Scheme.of(producer), []).append(layer)
        written.tensors |= _layer_tensors(layer, producer)
    if schemes:
        packed = {layer for named in schemes.values() for layer in named}
        written.config = _config(schemes, sorted(layers - packed))
    return written


def _no_place(
    module: PreTrainedModel, layer: str, layers: set[str], encodings: Sequence[Packed]
) -> str | None:
    """Return why a layer cannot hold a packed weight; None where it can."""
    if layer not in layers:
        try:
            kind = type(module.get_submodule(layer)).__name__
        except AttributeError:
            return "its class has no layer of that name"
        return f"{FORMAT} is written for layers of class Linear, and this one is of class {kind}"
    if any(encoding.axis != 1 for encoding in encodings):
        return f"its groups lie along axis 0, and those of {FORMAT} along the inputs"
    return None


def _layer_tensors(layer: str, weight: Dequantised) -> dict[str, Producer]:
    tensors: dict[str, Producer] = {
        f"{layer}.weight_packed": PackedWords(weight),
        f"{layer}.weight_scale": weight.scales,
        f"{layer}.weight_shape": Array(torch.tensor(weight.shape)),
    }
    if weight.zeros is not None:
        tensors[f"{layer}.weight_zero_point"] = PackedZeroPoints(weight)
    return tensors


@dataclass(frozen=True)
class _Scheme:
    """How layers are quantised, as compressed-tensors has it.

    Attributes:
        bits: Of a code.
        group: How many inputs share a scale; None for one scale an output channel.
        symmetric: Whether there are no zero points.
    """

    bits: int
    group: int | None
    symmetric: bool

    @classmethod
    def of(cls, weight: Dequantised) -> _Scheme:
        encoding = weight.encoding
        group = None if encoding.group == weight.shape[1] else encoding.group
        return cls(encoding.bits, group, encoding.symmetric)

    @property
    def arguments(self) -> dict[str, Any]:
        """The entry `weights` of a group of layers."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group is None else "group",
            "group_size": self.group,
            "dynamic": False,
        }


def _config(schemes: Mapping[_Scheme, list[str]], ignored: list[str]) -> dict[str, Any]:
    """Return the entry `quantization_config`.

    Args:
        schemes: The layers of each scheme.
        ignored: Layers of class Linear that are dense.
    """
    groups: dict[str, Any] = {}
    for number, (scheme, layers) in enumerate(schemes.items()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else layers,
            "weights": scheme.arguments,
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "version": VERSION,
    }
