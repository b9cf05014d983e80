"""Which checkpoint tensor every parameter is, and whether config and weights agree."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graphopt.capture.conversion import to_module
from graphopt.capture.ties import untie
from graphopt.errors import SourceError
from graphopt.ir.cuts import transposed
from graphopt.ir.types import DTYPE_NAMES
from graphopt.ir.weights import Missing, Producer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graphopt.sources import ModelSource


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a checkpoint of the module holds, by qualified name."""
    own = module.state_dict()
    return {name: value for name, value in module.named_buffers() if name in own}


class CheckpointNames:
    """Resolves parameter names of a module against the tensors of a source."""

    def __init__(self, module: PreTrainedModel, source: ModelSource) -> None:
        self.source = source
        self.module = module
        self.prefix = getattr(module, "base_model_prefix", "") or ""
        self.producers = to_module(module, self._as_class_has_them())
        self.used: set[str] = set()
        self.apart = untie(module, self._producer, source.dtype)
        self.aliases: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self.aliases.setdefault(id(parameter), []).append(name)
        self.known = {re.sub(r"\d+", "#", n) for names in self.aliases.values() for n in names}
        self.ignored = [
            *(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()),
            r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$",
            r"rotary_emb\.(cos|sin)_cached$",
        ]  # fmt: skip

    def _as_class_has_them(self) -> dict[str, Producer]:
        """Return the tensors of the source with weights of class Conv1D as [in, out]."""
        producers = dict(self.source.producers)
        for path, part in self.module.named_modules():
            if isinstance(part, Conv1D):
                for name in self._spellings(f"{path}.weight"):
                    if name in self.source.out_by_in:
                        producers[name] = transposed(producers[name])
        return producers

    def _spellings(self, name: str) -> list[str]:
        """Return the names a checkpoint may hold a parameter under."""
        spellings = [name]
        if self.prefix:
            if name.startswith(self.prefix + "."):
                spellings.append(name.removeprefix(self.prefix + "."))
            else:
                spellings.append(f"{self.prefix}.{name}")
        return spellings

    def _producer(self, name: str) -> Producer | None:
        """Return the checkpoint's value of a parameter; None where it holds none."""
        found = (self.producers.get(spelling) for spelling in self._spellings(name))
        return next((producer for producer in found if producer is not None), None)

    def resolve(self, name: str, parameter: Tensor) -> tuple[Producer, str | None]:
        """Return the producer of a parameter and the checkpoint tensor's name.

        Raises:
            SourceError: The checkpoint lacks it, or has it in another shape or as whole numbers.
        """
        aliases = self.aliases.get(id(parameter), [name])
        if self.source.kind == "config":
            first = aliases[0]
            return Missing(tuple(parameter.shape), self.source.dtype, first), first
        for alias in aliases:
            for spelling in self._spellings(alias):
                producer = self.producers.get(spelling)
                if producer is None:
                    continue
                if tuple(producer.shape) != tuple(parameter.shape):
                    raise SourceError(
                        f"{self.source.spec}: config and weights disagree: {spelling!r} has shape "
                        f"{list(producer.shape)}, the config makes it {list(parameter.shape)}.",
                        "Check that config.json belongs to these weights.",
                    )
                if parameter.is_floating_point() and not producer.dtype.is_floating_point:
                    kind = DTYPE_NAMES.get(producer.dtype, str(producer.dtype))
                    raise SourceError(
                        f"{self.source.spec}: tensor {spelling!r} is stored as {kind}, and the "
                        "model computes with real numbers there.",
                        "If the weights are quantised, give the model as it was before; else "
                        "download the file again.",
                    )
                self.used.add(spelling)
                return producer, spelling
        raise SourceError(
            f"{self.source.spec}: the checkpoint has no tensor {name!r}.",
            "Check that config.json belongs to these weights and that no file is missing"
            + (
                "; tie_word_embeddings=true there would take the embedding for it."
                if name == self._output()
                else "."
            ),
        )

    def _output(self) -> str | None:
        """Return the name of the output embedding's matrix, where the config does not tie it."""
        output = self.module.get_output_embeddings()
        weights = {id(p): n for n, p in self.module.named_parameters()}
        return None if output is None else weights.get(id(getattr(output, "weight", None)))

    def trained_buffers(self) -> set[str]:
        """Return the buffers in which the checkpoint holds other values than the class computes.

        A table of positions or a mask is as the class makes it; a bias of a router's scores or a
        scale of a layer is trained, though the class calls it a buffer.
        """
        found: set[str] = set()
        for name, value in persistent_buffers(self.module).items():
            for spelling in self._spellings(name):
                producer = self.producers.get(spelling)
                if producer is None or tuple(producer.shape) != tuple(value.shape):
                    continue
                self.used.add(spelling)
                if not torch.equal(producer.load().to(value.dtype), value):
                    found.add(name)
        return found

    def finish(self) -> list[tuple[str, str]]:
        """Report the tensors that no parameter took.

        Raises:
            SourceError: Some belong to layers that the config does not have.
        """
        left = [name for name in self.producers if name not in self.used]
        left = [name for name in left if not any(re.search(p, name) for p in self.ignored)]
        tied = {s for names in self.aliases.values() for n in names for s in self._spellings(n)}
        left = [name for name in left if name not in tied]
        for name in left:
            if re.sub(r"\d+", "#", name) in self.known:
                raise SourceError(
                    f"{self.source.spec}: config and weights disagree: the checkpoint holds "
                    f"{name!r}, a layer that the config does not have.",
                    "Check num_hidden_layers in config.json.",
                )
        notes = [
            (
                "checkpoint",
                f"it holds two matrices, {target!r} and {source!r}, that its config ties: both "
                "are kept, as transformers keeps them, and the config here says that none is tied",
            )
            for target, source in self.apart
        ]
        if not left:
            return notes
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        return [*notes, ("checkpoint", f"{len(left)} tensors the model does not use: {shown}")]
