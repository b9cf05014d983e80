"""Checkpoints whose tensors are not the module's parameters: renamed, stacked, joined or cut.

transformers keeps experts as one tensor a layer where checkpoints hold one a matrix, and knows for
every family how to get from one to the other. Its rules are run here a parameter at a time, when
the parameter is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from graphopt.errors import SourceError
from graphopt.ir.weights import Producer

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform


@dataclass(eq=False)
class _Group:
    """Tensors that one rule makes into others.

    Attributes:
        rule: transformers' rule, which is copied for every run.
        first: The key under which the rule collects.
        sources: (pattern of the rule, key, value) in the order the rule wants them.
    """

    rule: WeightConverter
    first: str
    module: PreTrainedModel
    sources: list[tuple[str, str, Producer]] = field(default_factory=list)

    def run(self, *, on_meta: bool = False) -> dict[str, Tensor]:
        """Return what the rule makes, by name; on meta only shapes are known.

        Raises:
            SourceError: The tensors do not fit the rule.
        """
        rule = copy.deepcopy(self.rule)
        for pattern, key, producer in self.sources:
            value = (
                torch.empty(producer.shape, dtype=producer.dtype, device="meta")
                if on_meta
                else producer.load()
            )
            rule.add_tensor(self.first, key, pattern, value)  # type: ignore[arg-type]
        try:
            made = rule.convert(self.first, model=self.module, config=self.module.config)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            names = ", ".join(key for _, key, _ in self.sources[:2])
            raise SourceError(
                f"The tensors {names}, ... do not make {self.first!r}: {error}.",
                "Check that config.json belongs to these weights.",
            ) from error
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


@dataclass(frozen=True, eq=False)
class Converted(Producer):
    """One of the tensors that a rule makes out of others, the sources."""

    group: _Group
    name: str
    shape: tuple[int, ...]  # type: ignore[misc]
    dtype: torch.dtype  # type: ignore[misc]
    sources: tuple[Producer, ...]

    def load(self) -> Tensor:
        return self.group.run()[self.name].contiguous()


def _split(rules: list[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]


def to_module(module: PreTrainedModel, producers: Mapping[str, Producer]) -> dict[str, Producer]:
    """Return the tensors of a checkpoint under the names and in the shapes of the module.

    Args:
        module: A transformers model; parameters may stand on meta.
        producers: The checkpoint's tensors, which are not read. What no rule takes is returned
            as it is.

    Raises:
        SourceError: The tensors do not fit the rule that takes them.
    """
    own: dict[str, Any] = module.state_dict()
    renamings, converters = _split(get_model_conversion_mapping(module))
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = module.base_model_prefix
    result: dict[str, Producer] = {}
    groups: dict[str, _Group] = {}
    for key in sorted(producers, key=dot_natural_key):
        if key in own:
            result[key] = producers[key]
            continue
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own:
            result[key] = producers[key]
        elif pattern is None:
            result[name] = producers[key]
        else:
            group = groups.setdefault(name, _Group(rule_of[pattern], name, module))
            group.sources.append((pattern, key, producers[key]))
    for group in groups.values():
        result |= _converted(group)
    return result


def to_checkpoint(
    module: PreTrainedModel, producers: Mapping[str, Producer]
) -> dict[str, Producer]:
    """Return tensors of the module under the names and in the shapes of the family's checkpoints.

    The reverse of `to_module`.
    """
    rules = [
        rule.reverse_transform()
        for rule in reversed(get_model_conversion_mapping(module, add_legacy=False))
        if not isinstance(rule, PrefixChange)
    ]
    renamings, converters = _split(rules)
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    result: dict[str, Producer] = {}
    groups: dict[str, _Group] = {}
    for key in sorted(producers, key=dot_natural_key):
        name, pattern = rename_source_key(key, [], converters, reverse=True)
        if pattern is None:
            result[_renamed(key, renamings)] = producers[key]
        else:
            group = groups.setdefault(name, _Group(rule_of[pattern], name, module))
            group.sources.append((pattern, key, producers[key]))
    for group in groups.values():
        made = _converted(group)
        result |= {_renamed(name, renamings): producer for name, producer in made.items()}
    return result


def _renamed(key: str, renamings: list[WeightRenaming]) -> str:
    return str(rename_source_key(key, renamings, [], reverse=True)[0])


def _converted(group: _Group) -> dict[str, Producer]:
    sources = tuple(producer for _, _, producer in group.sources)
    return {
        name: Converted(group, name, tuple(value.shape), value.dtype, sources)
        for name, value in group.run(on_meta=True).items()
    }
