"""The tensors of a GGUF file under their checkpoint names, as the checkpoint had them.

llama.cpp renames tensors, permutes the rows of Llama's query and key projections, adds one to
Gemma's norm gains, transposes GPT-2's projections, and may join projections or leave them apart.
All of it is undone here, lazily, tensor by tensor, so that a GGUF file captures like the
checkpoint it was made from.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.errors import SourceError
from graphopt.ir.weights import Producer, Rows, Transposed
from graphopt.sources.gguf.architectures import QKV, Architecture, find_architecture
from graphopt.sources.gguf.container import GgufFile
from graphopt.sources.gguf.schema import CHECKPOINT


class _Like(Producer):
    """A tensor of the shape and dtype of another one."""

    source: Producer

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.source.dtype


@dataclass(frozen=True)
class HalvesFromPairs(_Like):
    """Rows of each head put back from rotary pairs (0, 1), (2, 3), ... to halves (0, D/2), ...

    llama.cpp stores Llama's query and key projections for the interleaved form of rotary
    embedding; transformers computes the other one.
    """

    source: Producer
    heads: int

    def load(self) -> torch.Tensor:
        value = self.source.load()
        pairs = value.view(self.heads, -1, 2, *value.shape[1:])
        return pairs.transpose(1, 2).reshape(value.shape)


@dataclass(frozen=True)
class LessOne(_Like):
    """The tensor minus one, in fp32: Gemma has gains `1 + weight`, which llama.cpp stores whole."""

    source: Producer

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.float32

    def load(self) -> torch.Tensor:
        return self.source.load().float() - 1


@dataclass(frozen=True)
class Joined(Producer):
    """The rows of several tensors one after the other: a fused projection."""

    parts: tuple[Producer, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return functools.reduce(torch.promote_types, (part.dtype for part in self.parts))

    def load(self) -> torch.Tensor:
        return torch.cat([part.load().to(self.dtype) for part in self.parts])


@dataclass(frozen=True)
class Zeros(Producer):
    """A bias that the model's class has and the file does not, which changes nothing."""

    size: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.size,)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.float32

    def load(self) -> torch.Tensor:
        return torch.zeros(self.size)


_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,3})\.(.+)\.(weight|bias)")
_FUSED = {"attn_qkv": QKV, "ffn_up": ("ffn_gate", "ffn_up")}
"""What llama.cpp joins, by the name of the joined projection."""


def gguf_producers(file: GgufFile, config: Any) -> dict[str, Producer]:
    """Return the tensors of a GGUF file under their checkpoint names, as the checkpoint had them.

    Args:
        file: The file.
        config: Its config, from `gguf_config`.

    Raises:
        SourceError: A tensor has no place in a model of this architecture, or the blocks are not
            as many as the header says.
    """
    architecture = find_architecture(file)
    producers: dict[str, Producer] = {}
    blocks: dict[int, dict[str, Producer]] = {}
    for name, tensor in file.tensors.items():
        if name in architecture.rotary:
            continue
        match = _BLOCK.fullmatch(name)
        if match:
            block, part, suffix = match.groups()
            blocks.setdefault(int(block), {})[f"{part}.{suffix}"] = tensor
            continue
        part, _, suffix = name.rpartition(".")
        module = architecture.outer.get(part)
        if module is None or not architecture.has(part, suffix):
            raise _no_place(file, architecture, name)
        value: Producer = tensor
        if architecture.gains_plus_one and part.endswith("norm"):
            value = LessOne(tensor)
        producers[f"{module}.{suffix}"] = value
    count = config.num_hidden_layers
    if sorted(blocks) != list(range(count)):
        held = f"blocks 0 to {max(blocks)}" if blocks else "no block"
        raise SourceError(
            f"{file.path} states {count} blocks ({file.architecture}.block_count) and holds "
            f"tensors of {held}{' with gaps' if len(blocks) <= max(blocks, default=-1) else ''}.",
            "The file is incomplete; convert the model again.",
        )
    for block, tensors in sorted(blocks.items()):
        path = f"{architecture.layers}.{block}"
        for name, value in _block(file, architecture, config, block, tensors).items():
            producers[f"{path}.{name}"] = value
    return producers


def _no_place(file: GgufFile, architecture: Architecture, name: str) -> SourceError:
    return SourceError(
        f"{file.path}: the tensor {name!r} has no place in a {architecture.model_type} model.",
        CHECKPOINT,
    )


def _block(
    file: GgufFile,
    architecture: Architecture,
    config: Any,
    block: int,
    tensors: dict[str, Producer],
) -> dict[str, Producer]:
    """The tensors of one block by the checkpoint's names inside a layer."""
    inner = architecture.inner
    tensors = _joined_as_class_has_them(file, architecture, config, block, tensors)
    for flag, parts in architecture.biases.items():
        if not flag or getattr(config, flag):
            for part in parts:
                weight = tensors.get(f"{part}.weight")
                if weight is not None and f"{part}.bias" not in tensors:
                    tensors[f"{part}.bias"] = Zeros(weight.shape[0])
    found: dict[str, Producer] = {}
    for name, value in tensors.items():
        part, _, suffix = name.rpartition(".")
        if part not in inner or not architecture.has(part, suffix):
            raise _no_place(file, architecture, f"blk.{block}.{name}")
        module = inner[part]
        if architecture.paired_heads and part in ("attn_q", "attn_k"):
            query = part == "attn_q"
            heads = config.num_attention_heads if query else config.num_key_value_heads
            if value.shape[0] % (2 * heads):
                raise SourceError(
                    f"{file.path}: {value.shape[0]} rows of 'blk.{block}.{name}' do not make "
                    f"{heads} heads.",
                    "The file is incomplete; convert the model again.",
                )
            value = HalvesFromPairs(value, heads)
        if architecture.gains_plus_one and part.endswith("norm"):
            value = LessOne(value)
        if suffix == "weight" and module in architecture.transposed:
            if len(value.shape) != 2:
                raise SourceError(
                    f"{file.path}: 'blk.{block}.{name}' has the shape {list(value.shape)} and "
                    "should be a matrix.",
                    "The file is damaged; convert the model again.",
                )
            value = Transposed(value)
        found[f"{module}.{suffix}"] = value
    return found


def _joined_as_class_has_them(
    file: GgufFile,
    architecture: Architecture,
    config: Any,
    block: int,
    tensors: dict[str, Producer],
) -> dict[str, Producer]:
    """Cut what the file joins and the class has apart, and join what is the other way round."""
    tensors = dict(tensors)
    for fused, parts in _FUSED.items():
        for suffix in ("weight", "bias"):
            whole = tensors.get(f"{fused}.{suffix}")
            names = [f"{part}.{suffix}" for part in parts]
            if fused in architecture.inner and parts[0] not in architecture.inner:
                # Phi-3's class has them joined; so has GPT-2's, whose files never have them apart.
                if all(name in tensors for name in names):
                    tensors[f"{fused}.{suffix}"] = Joined(tuple(map(tensors.pop, names)))
            elif fused == "attn_qkv" and whole is not None:
                # The other joined projection is told from a plain one by its rows alone.
                sizes = [
                    heads * config.head_dim
                    for heads in (config.num_attention_heads, *2 * [config.num_key_value_heads])
                ]
                if sum(sizes) != whole.shape[0] or any(name in tensors for name in names):
                    raise SourceError(
                        f"{file.path}: 'blk.{block}.{fused}.{suffix}' has {whole.shape[0]} rows, "
                        f"queries, keys and values have {sum(sizes)}.",
                        "The file is damaged; convert the model again.",
                    )
                del tensors[f"{fused}.{suffix}"]
                start = 0
                for name, size in zip(names, sizes, strict=True):
                    tensors[name] = Rows(whole, slice(start, start + size))
                    start += size
    return tensors
