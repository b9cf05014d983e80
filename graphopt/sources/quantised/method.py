"""What a reader of quantised checkpoints is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from graphopt.errors import SourceError
from graphopt.files.refusals import REMEDY
from graphopt.ir.types import Type
from graphopt.ir.weights import Producer
from graphopt.sources.quantised.words import ConsecutiveGroups, UnevenGroups
from graphopt.support.plain import first_and_count


@dataclass
class ReadTensors:
    """The tensors of a quantised checkpoint as those of a dense one.

    Attributes:
        tensors: By the names that a dense checkpoint has; weights may be packed.
        notes: What a user should know of how they are read.
        out_by_in: Weights that are [out, in] also where the model's class has [in, out].
    """

    tensors: dict[str, Producer] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    out_by_in: set[str] = field(default_factory=set)


class Method(ABC):
    """How the weights of a checkpoint are quantised, as its config states it.

    Attributes:
        where: The file that states it, for messages.
    """

    where: str

    @abstractmethod
    def read(self, tensors: Mapping[str, Producer], dtype: torch.dtype) -> ReadTensors:
        """Return the tensors of a checkpoint as a dense one has them; no weight is read.

        Args:
            tensors: The checkpoint's.
            dtype: In which the model computes, by its config.

        Raises:
            SourceError: A tensor is missing, or has another shape than the config says.
        """


def unread(where: str, what: str) -> SourceError:
    """Return the refusal of a form of quantisation that is not read.

    Args:
        what: What the file states, such as "the GPTQ format 'marlin'".
    """
    return SourceError(f"{where} states {what}, which is not read.", REMEDY)


def parts_of(tensors: Mapping[str, Producer], suffix: str) -> dict[str, dict[str, Producer]]:
    """Return the tensors of the modules that have one called `suffix`, by module and name."""
    modules = {name.removesuffix(f".{suffix}") for name in tensors if name.endswith(f".{suffix}")}
    parts: dict[str, dict[str, Producer]] = {module: {} for module in modules}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if module in parts:
            parts[module][last] = tensor
    return parts


def needed(where: str, module: str, parts: Mapping[str, Producer], name: str) -> Producer:
    """Return a part of a quantised weight.

    Raises:
        SourceError: There is none.
    """
    if name not in parts:
        raise SourceError(
            f"The quantised weight of {module!r} has no {name!r}, which {where} calls for.",
            "Download the checkpoint again.",
        )
    return parts[name]


def misshapen(module: str, parts: Mapping[str, Producer], where: str) -> SourceError:
    """Return the refusal of parts whose shapes do not fit each other or the config."""
    shapes = ", ".join(
        f"{name} {Type(part.shape, part.dtype)}" for name, part in sorted(parts.items())
    )
    return SourceError(
        f"The parts of the quantised weight of {module!r} do not fit together and what {where} "
        f"states: {shapes}.",
        "Check that the config belongs to these weights.",
    )


def check_words(
    module: str,
    words: Iterable[Producer],
    scales: Producer,
    parts: Mapping[str, Producer],
    where: str,
) -> None:
    """Refuse parts of a weight that are no matrices of words and of scales.

    Raises:
        SourceError: With their shapes.
    """
    matrices = all(len(part.shape) == 2 and 0 not in part.shape for part in (*words, scales))
    as_words = all(part.dtype == torch.int32 for part in words)
    if not matrices or not as_words or not scales.dtype.is_floating_point:
        raise misshapen(module, parts, where)


def groups_of_inputs(
    module: str,
    parts: Mapping[str, Producer],
    length: int,
    count: int,
    stated: Collection[int],
    where: str,
    order: Producer | None = None,
) -> Producer:
    """Return the group of each input, int [length]: `ConsecutiveGroups` where neighbours share one.

    Args:
        length: How many inputs there are.
        count: How many groups there are.
        stated: The sizes of groups that the config states for the weight, or for weights of which
            this may be one; -1 for all inputs. None at all leaves equal groups.
        order: The group of each input, where the checkpoint holds it.

    Raises:
        SourceError: No size that is stated, or more than one, makes so many groups of the inputs;
            or `order` names a group that there is not, or is of another length.
    """
    sizes = {size if size > 0 else length for size in stated}
    fitting = {size for size in sizes if -(-length // size) == count}
    if count == 1:
        fitting = {length}
    elif not sizes and count > 0 and length % count == 0:
        fitting = {length // count}
    consecutive = ConsecutiveGroups(length, *fitting) if len(fitting) == 1 else None
    if order is None:
        if consecutive is None:
            raise misshapen(module, parts, where)
        return consecutive
    if order.shape != (length,) or order.dtype.is_floating_point:
        raise misshapen(module, parts, where)
    index = order.load().long()
    if int(index.min()) < 0 or int(index.max()) >= count:
        raise misshapen(module, parts, where)
    if consecutive is not None and index.equal(consecutive.load()):
        return consecutive
    return order


def about_uneven_groups(weights: Mapping[str, Producer], option: str) -> list[str]:
    """Return notes about the weights of a checkpoint that are dense for their groups of inputs.

    Args:
        weights: By name; others may be among them.
        option: What tools call the order of inputs by their activations.
    """
    reasons: dict[str, list[str]] = {}
    for name, weight in weights.items():
        if not isinstance(weight, UnevenGroups):
            continue
        reason = f"inputs are grouped in the order of their activations ({option})"
        if isinstance(weight.groups, ConsecutiveGroups):
            length, size = weight.groups.length, weight.groups.size
            reason = f"its {length} inputs are no multiple of its groups of {size}"
        reasons.setdefault(reason, []).append(name.removesuffix(".weight"))
    return [
        f"{first_and_count(names)}: {reason}, so it is read as dense values"
        for reason, names in reasons.items()
    ]
