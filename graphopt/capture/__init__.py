"""Capture: from a model as users have it to a program."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graphopt.errors import SourceError
from graphopt.ir.graph import Program
from graphopt.ir.made_of import is_unpacked
from graphopt.ir.weights import Array, Missing, Producer
from graphopt.support.boundary import users_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graphopt.capture.assemble import Resolve
    from graphopt.capture.steps import Watch
    from graphopt.sources import ModelSource


def capture(
    source: str | nn.Module | ModelSource,
    *,
    trust_remote_code: bool = False,
    watch: Watch | None = None,
) -> Program:
    """Capture a model into a program.

    Args:
        source: A Hugging Face id or folder, a `.gguf` file, `demo`, a config file, a graphopt
            output folder, an opened `ModelSource`, or an `nn.Module` whose
            forward(input_ids [, attention_mask, position_ids]) returns logits [B, S, vocab].
        trust_remote_code: Allow a checkpoint to bring its own modelling code.
        watch: Told about every step of capture; there are none where a program is opened.

    Returns:
        The program. Weights are not read, but for the constants the model computes itself.

    Raises:
        SourceError: The model cannot be read, or its weights do not fit its config.
        CaptureError: The model cannot be traced.
    """
    from graphopt.capture.assemble import capture_module

    if isinstance(source, nn.Module):
        return capture_module(source, type(source).__name__, _own_values(source), watch=watch)
    if isinstance(source, str):
        from graphopt.sources import open_model

        source = open_model(source, trust_remote_code=trust_remote_code)
    if source.program is not None:
        return source.program
    from graphopt.capture.checkpoint import CheckpointNames
    from graphopt.capture.model import build_model
    from graphopt.capture.ties import say_untied
    from graphopt.capture.unsupported import refuse_unsupported
    from graphopt.capture.vision import ReadWeights, language_decoder, read_vision
    from graphopt.sources.vision import takes_pictures

    module = build_model(source.config, trust_remote_code=trust_remote_code)
    refuse_unsupported(module)  # before the checkpoint is matched, which takes longer
    names = CheckpointNames(module, source)
    sees = source.config is not None and takes_pictures(source.config)
    if sees:
        language_decoder(module)
    resolve = ReadWeights(module, names.resolve)
    with users_model(source.spec, "be captured"):
        program = capture_module(module, source.name, resolve, names.trained_buffers(), watch)
        if sees:
            program.vision = read_vision(module, program, names.resolve, resolve.read)
    notes = [*source.notes, *_about_unpacked(program)]
    program.notes += [("checkpoint", note) for note in notes] + names.finish()
    program.source = source.spec
    program.config = source.config.to_dict() if source.config is not None else {}
    if names.apart:
        say_untied(program.config)
    program.generation = source.generation
    program.tokenizer = str(source.tokenizer) if source.tokenizer is not None else None
    program.checkpoint_dtype = source.dtype
    program.licence, program.licence_files = source.licence, source.licence_files
    return program


def _about_unpacked(program: Program) -> list[str]:
    """Return what a user should know of packed weights that the program has as dense values."""
    names = [weight.name for weight in program.weights if is_unpacked(weight.producer)]
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{names[0]}{more}: packed weights in stacks of experts are read as dense values"]


def model_of_config(config: dict[str, Any]) -> PreTrainedModel:
    """Return the model of transformers that a config makes, its parameters on meta.

    Args:
        config: The content of a config.json of a type that transformers knows.

    Raises:
        CaptureError: transformers has no causal language model for this config.
    """
    from transformers import AutoConfig

    from graphopt.capture.model import build_model
    from graphopt.files.config_schema import without_code

    return build_model(AutoConfig.for_model(**copy.deepcopy(without_code(config))))


def capture_structure(module: nn.Module, trained: Collection[str] = ()) -> Program:
    """Capture a module whose parameters stand on meta, without weights.

    Args:
        trained: Buffers that are weights; see `capture_module`.

    Returns:
        The program, whose weights have no values and are called as the module calls its
        parameters.
    """
    from graphopt.capture.assemble import capture_module

    return capture_module(module, type(module).__name__, _no_values, trained)


def _no_values(name: str, parameter: Tensor) -> tuple[Producer, str | None]:
    return Missing(tuple(parameter.shape), parameter.dtype, name), name


def _own_values(module: nn.Module) -> Resolve:
    """Take the values of a module's own parameters."""
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=True):
        names[id(parameter)] = name

    def resolve(name: str, parameter: Tensor) -> tuple[Producer, str | None]:
        own = names.get(id(parameter), name)
        if parameter.is_meta:
            return Missing(tuple(parameter.shape), parameter.dtype, own), own
        return Array(parameter.detach()), own

    return resolve


class _CallableModule(types.ModuleType):
    """Lets `graphopt.capture(...)` work although importing this module hides the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Program:
        return capture(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

__all__ = ["SourceError", "capture", "capture_structure", "model_of_config"]
