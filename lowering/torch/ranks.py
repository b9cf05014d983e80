"""What a `model.py` for several ranks has besides: collectives, and who has which part of weights.

The text is that of every rank. Sizes in it are those of one rank's parts, as they are in the
program, and what depends on the rank is read from its part of a weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping

import torch

from graphopt.ir.encoding import Packed
from graphopt.ir.graph import Node, Program, Value
from graphopt.ir.placement import Placement
from graphopt.ir.ranks import group_of
from graphopt.lowering.kernels.family import runtime_text
from graphopt.lowering.torch.body import BodyPrinter
from graphopt.lowering.torch.forms import torch_form
from graphopt.lowering.torch.text import quoted, wrap
from graphopt.runtime.split_weights import Split
from graphopt.support.quantities import format_bytes

FOLDER = "ranks"
_INIT = '''"""Ranks that run one model together; written by graphopt."""

from .ranks import RankError, Ranks, join, joined
from .split_weights import Split, own_part

__all__ = ["RankError", "Ranks", "Split", "join", "joined", "own_part"]
'''

_FUNCTIONS = {
    "all_reduce": '''
def all_reduce(x: Tensor) -> Tensor:
    """Write the sum of all ranks' `x` over it, and return it; it is the same on each to the bit."""
    x = x.contiguous()
    dist.all_reduce(x, group=ranks.joined().group)
    return x
''',
    "all_gather": '''
def all_gather(x: Tensor, axis: int) -> Tensor:
    """Return what all ranks have in `x`, one behind the other along an axis."""
    whole = x.new_empty(RANKS * x.shape[0], *x.shape[1:])
    # Newer releases of torch have another name for it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, x.contiguous(), group=ranks.joined().group)
    return torch.cat(whole.chunk(RANKS), axis)
''',
    "reduce_scatter": '''
def reduce_scatter(x: Tensor, axis: int) -> Tensor:
    """Return this rank's part along an axis of the sum of all ranks' `x`."""
    parts = torch.cat(x.chunk(RANKS, axis))
    own = parts.new_empty(parts.shape[0] // RANKS, *parts.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(own, parts, group=ranks.joined().group)
    return own
''',
    "agreed": '''
def agreed(x: Tensor) -> Tensor:
    """Write the first rank's `x` over it, and return it: others may have rounded differently."""
    x = x.contiguous()
    dist.broadcast(x, src=0, group=ranks.joined().group)
    return x
''',
}  # fmt: skip

# What comes out of these is the same on all ranks where what goes in is.
_ALIKE = frozenset({"aten.slice.Tensor", "scale", "softcap", "tanh"})
# Ops whose result nothing else than their reader has: it may be written over.
_FRESH = frozenset(
    {
        "add", "bmm", "embedding", "experts", "integer_linear", "linear", "moe", "mul",
        "packed_linear", "scale", "vocab_parallel_embedding",
    }
)  # fmt: skip


def logits_gathered(program: Program) -> bool:
    """Return whether the logits come out of a collective, and are so the same on all ranks."""
    name = program.outputs[0]
    call = next((call for call in reversed(program.calls) if name in call.results), None)
    if call is None:
        return False
    node = program.function_of(call).results[call.results.index(name)].node
    while node is not None and node.op in _ALIKE:
        value = node.inputs[0]
        node = None if value is None else value.node
    return node is not None and node.op == "all_gather"


def functions(used: Collection[str]) -> list[str]:
    """Return the text of the functions of ranks that a model calls."""
    return [text.strip() for name, text in _FUNCTIONS.items() if name in used]


def ranks_package() -> dict[str, str]:
    """Return the text of every file of the folder `ranks`, by path."""
    names = ("package_digest.py", "rank_watch.py", "ranks.py", "split_weights.py")
    return {"__init__.py": _INIT, **{name: runtime_text(name) for name in names}}


@torch_form("all_reduce")
def _all_reduce(printer: BodyPrinter, node: Node) -> str:
    (x,) = node.inputs
    assert x is not None
    copied = "" if printer.reads_once(x) and _is_fresh(x) else ".clone()"
    return _call(printer, "all_reduce", f"{printer.name(x)}{copied}")


@torch_form("all_gather")
@torch_form("reduce_scatter")
def _along_axis(printer: BodyPrinter, node: Node) -> str:
    (x,) = node.inputs
    assert x is not None
    return _call(printer, node.op, f"{printer.name(x)}, axis={node.attrs['axis']}")


@torch_form("attention_linear_all_reduce")
@torch_form("linear_all_reduce")
def _by_operands(printer: BodyPrinter, node: Node) -> str:
    return _call(printer, node.op, ", ".join(printer.operands(node, node.inputs)))


@torch_form("vocab_parallel_embedding")
def _rows_of_vocabulary(printer: BodyPrinter, node: Node) -> str:
    return printer.call(node, node.op, node.inputs)


def _is_fresh(value: Value) -> bool:
    return value.node is not None and value.node.op in _FRESH


def _call(printer: BodyPrinter, name: str, arguments: str) -> str:
    printer.helpers.add(name)
    return f"{name}({arguments})"


def split_lines(program: Program) -> list[str]:
    """Return the statements that say how many ranks there are, and what each has of the weights."""
    ranks = len(group_of(program))
    rows = [f"{quoted(name)}: {_text(split)}" for name, split in _by_pattern(program).items()]
    return [
        f"RANKS = {ranks}  # that run it together: torchrun --nproc-per-node {ranks} model.py",
        "# Which tensors a rank has a part of; * is any number.",
        *wrap(f"SPLIT: dict[str, Split] = {{{', '.join(rows)}}}", 0),
    ]


def _text(split: Split) -> str:
    given = {k: v for k, v in split._asdict().items() if v != Split._field_defaults[k]}
    return f"Split({', '.join(f'{name}={value}' for name, value in given.items())})"


def pattern_of(name: str) -> str:
    """Return a tensor's name with * for each part of it that is a number."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _by_pattern(program: Program) -> dict[str, Split]:
    """Return the splits of tensors, under one name where those of all layers are split alike."""
    by_pattern: dict[str, dict[str, Split]] = {}
    for name, split in tensor_splits(program):
        by_pattern.setdefault(pattern_of(name), {})[name] = split
    found: dict[str, Split] = {}
    for pattern, splits in by_pattern.items():
        if len(set(splits.values())) == 1:
            split = next(iter(splits.values()))
            found |= {} if split == Split() else {pattern: split}
        else:
            found |= splits
    return found


def tensor_splits(program: Program) -> Iterator[tuple[str, Split]]:
    """Yield for every tensor that is stored its name and how ranks share it.

    Raises:
        LoweringError: A part of it cannot be read by itself.
    """
    for weight in program.weights:
        placement, encoding = weight.placement, weight.encoding
        for tensor in weight.tensors():
            if placement is None or (placement.axis is None and not placement.summed):
                yield tensor.name, Split()
            elif encoding is None:
                yield tensor.name, _split(placement, placement.axis)
            else:
                groups = weight.shape[encoding.axis] // encoding.group
                suffix = tensor.name.removeprefix(f"{weight.name}.")
                yield tensor.name, _packed_split(placement, encoding, suffix, groups)


def size_note(program: Program, dtypes: Mapping[str, torch.dtype]) -> str:
    """Return how much of the weights a rank reads, in a sentence.

    Args:
        dtypes: In which each tensor is stored.
    """
    ranks, own, whole = len(group_of(program)), 0, 0
    tensors = {tensor.name: tensor for tensor in program.weights.tensors()}
    for name, split in tensor_splits(program):
        size = math.prod(tensors[name].shape) * dtypes[name].itemsize
        whole += size
        own += size if split.axis is None else size * split.copies // ranks
    return (
        f"split over {ranks} devices, each of which holds {format_bytes(own)} of "
        f"{format_bytes(whole)} of weights and reads its slices of the one file alone"
    )


def _split(placement: Placement, axis: int | None) -> Split:
    return Split(axis, placement.sections, placement.copies, placement.summed)


def _packed_split(placement: Placement, encoding: Packed, suffix: str, groups: int) -> Split:
    """Return how a tensor [rows, groups, ...] of an encoding is shared."""
    if placement.axis != encoding.axis:
        return _split(placement, 0)
    split = _split(placement, 1)
    return split._replace(bits=encoding.bits, numbers=groups) if suffix == "zeros" else split
