"""What a checkpoint of a program is: the class that loads it, and its tensors."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from graphopt.capture import capture_structure, model_of_config
from graphopt.capture.checkpoint import persistent_buffers
from graphopt.capture.conversion import Converted, to_checkpoint
from graphopt.capture.model import build_model
from graphopt.errors import CaptureError, LoweringError
from graphopt.ir.compare import first_difference, in_order_of_use, slots_by_use
from graphopt.ir.expert_neurons import is_masked
from graphopt.ir.graph import KVLayout, Program
from graphopt.ir.layer_config import decoder_config
from graphopt.ir.relayout import with_layouts
from graphopt.ir.weights import Array, Producer
from graphopt.lowering.hf.carved import (
    CarvedPart,
    carve_alike,
    carved_class,
    carved_config,
    render,
)
from graphopt.lowering.hf.checkpoint_assembly import Fragment, assemble, origin
from graphopt.lowering.hf.pack_quantized import pack_quantized, refused_by_format
from graphopt.pass_manager.contract import Context
from graphopt.pass_manager.pipeline import Pipeline

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Checkpoint:
    """What is written.

    Attributes:
        module: The model of transformers that loads it, on meta.
        tensors: By their names in the file.
        code: The source of the class, where it is none of transformers'.
        quantisation: The entry `quantization_config` of config.json, where layers are packed.
        dequantised: It loads only where packed layers are made dense.
        notes: What is packed in the program and dense here, as (where, reason).
    """

    module: PreTrainedModel
    tensors: dict[str, Producer]
    code: str | None = None
    quantisation: dict[str, Any] | None = None
    dequantised: bool = False
    notes: list[tuple[str, str]] = field(default_factory=list)


class NoCheckpoint(LoweringError):
    """A program has no checkpoint.

    Attributes:
        reason: Why, without a full stop.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"There is no transformers checkpoint of this program: {reason}.",
            "Emit torch instead (--emit torch).",
        )
        self.reason = reason


def other_forms(program: Program, *more: str) -> str:
    """Return the remedy where a program has no form of a kind: the forms that it may have.

    Args:
        more: Names of emitters beside torch, and beside onnx where that has the program's codes.
    """
    from graphopt.lowering.onnx.quantised import no_onnx_form

    encodings = {weight.encoding for weight in program.weights if weight.encoding is not None}
    names = ["torch", *(["onnx"] if not any(map(no_onnx_form, encodings)) else []), *more]
    words = " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    return f"Emit {words} instead (--emit {','.join(names)})."


KEPT = 16
"""What configs make is kept for the latest so many: emitting follows upon checking."""


@functools.lru_cache(KEPT)
def _model_of(config: str) -> PreTrainedModel:
    return model_of_config(json.loads(config))


@functools.lru_cache(KEPT)
def _capture_again(config: str, trained: tuple[str, ...]) -> Program:
    """Return the program that a config makes, without values."""
    return in_one_form(capture_structure(_model_of(config), trained))


@functools.lru_cache(KEPT)
def _capture_carved(
    dense: PreTrainedModel, config: str, carving: str, trained: tuple[str, ...]
) -> Program:
    """Return the program that the class for carved models makes, without values."""
    _, kind = carved_class(dense)
    entries = carved_config(dense, json.loads(config), json.loads(carving))
    return in_one_form(capture_structure(build_model(entries, model_class=kind), trained))


def _text(entries: Mapping[str, Any]) -> str:
    return json.dumps(entries, sort_keys=True, default=str)


def made_by_config(
    config: Mapping[str, Any], used: set[str]
) -> tuple[Program, PreTrainedModel, tuple[str, ...]]:
    """Return the program and the module that a config makes, and its buffers among `used`.

    Raises:
        CaptureError: transformers makes no model of the config.
    """
    module = _model_of(_text(config))
    trained = tuple(sorted(used & set(persistent_buffers(module))))
    return _capture_again(_text(config), trained), module, trained


def in_one_form(program: Program) -> Program:
    """Return the program as the default passes, all exact, leave it at last, in one order.

    Its states are contiguous, in fp32: a checkpoint says nothing of caches, and a config's model is
    captured in fp32 whatever the weights are stored in.
    """
    program = with_layouts(program, dict.fromkeys(program.states, KVLayout()))
    while True:
        changed = 0
        for item in Pipeline.default().passes:
            result = item.run(program, Context())
            program, changed = result.program, changed + result.changed
        if not changed:
            for state in program.states.values():
                state.dtype = torch.float32
            return in_order_of_use(program)


@contextlib.contextmanager
def _naming_other_forms(program: Program) -> Iterator[None]:
    """Give refusals within the remedy that fits the program."""
    try:
        yield
    except NoCheckpoint as error:
        error.remedy = other_forms(program)
        raise


def checkpoint_of(program: Program) -> Checkpoint:
    """Return what a checkpoint of the program is.

    Raises:
        NoCheckpoint: The program is not what its config makes, carved or not; or it holds packed
            weights, none of which has a place in a checkpoint.
    """
    with _naming_other_forms(program):
        return _checkpoint_of(program)


def _checkpoint_of(program: Program) -> Checkpoint:
    if (reason := refused_by_format(program)) is not None:
        raise NoCheckpoint(reason)
    dense = dense_checkpoint(program)
    written = pack_quantized(dense.tensors, dense.module)
    if written.config is not None and dense.code is not None:
        raise NoCheckpoint("no loader knows packed weights in the class for carved models")
    if written.config is not None and any(isinstance(t, Converted) for t in dense.tensors.values()):
        raise NoCheckpoint(
            "transformers takes all experts of a checkpoint with packed weights for packed, one by "
            "one, and the program has them as stacks, which are dense"
        )
    if written.config is None and written.dense:
        reason, names = next(iter(written.dense.items()))
        raise NoCheckpoint(f"none of its packed weights has a place there. {names[0]}: {reason}")
    return replace(
        dense, tensors=written.tensors, quantisation=written.config, notes=written.notes(),
        dequantised=written.is_asymmetric,
    )  # fmt: skip


def difference_of(have: Program, want: Program) -> str | None:
    """Return in what a program is not another one, but for how weights are stored."""
    return first_difference(have, want, encodings=False)


def dense_checkpoint(program: Program) -> Checkpoint:
    """Return the checkpoint of a program as if its weights were dense.

    Raises:
        NoCheckpoint: The program is not what its config makes, carved or not.
    """
    with _naming_other_forms(program):
        return _dense_checkpoint(program)


def _dense_checkpoint(program: Program) -> Checkpoint:
    if not program.config:
        raise NoCheckpoint("it was captured from a module without a transformers config")
    if program.config.get("auto_map"):
        raise NoCheckpoint("its class is code of the checkpoint, which is not part of transformers")
    used = {w.checkpoint for w in program.used_weights() if w.checkpoint and not w.constant}
    try:
        want, module, trained = made_by_config(program.config, used)
    except CaptureError as error:
        raise NoCheckpoint(error.message.rstrip(".")) from error
    have = in_one_form(program)
    difference = difference_of(have, want)
    if difference is None:
        tensors = _module_tensors(have, want, module)
        return Checkpoint(module, to_checkpoint(module, tensors))
    try:
        carved, parts = carve_alike(have, want, module)
    except ValueError as error:
        raise NoCheckpoint(
            f"a carved part has no place in {type(module).__name__}: {error}"
        ) from error
    if any(is_masked(function) for function in have.functions.values()):
        raise NoCheckpoint(
            "experts of its mixtures have routers of their own, and no class of transformers has"
        )
    if not parts:
        raise NoCheckpoint(f"{difference}, as its config makes it")
    carved = in_one_form(carved)
    difference = difference_of(have, carved)
    if difference is not None:
        raise NoCheckpoint(f"{difference}, as its config makes it with carved feed-forward parts")
    return _narrower(program, have, parts, used) or _with_class(
        program, have, want, carved, module, parts, trained
    )


FEED_FORWARD_WIDTHS = ("n_inner", "intermediate_size", "ffn_dim", "ffn_hidden_size")
"""Entries of configs that may be null, which stands for a multiple of the hidden size."""


def _narrower(
    program: Program, have: Program, parts: list[CarvedPart], used: set[str]
) -> Checkpoint | None:
    """Return the checkpoint of a config with narrower feed-forward parts, if one makes them."""
    splits = {part.split for part in parts}
    widths = {part.width for part in parts}
    if len(splits) > 1 or len(widths) > 1 or any(split.experts for split in splits):
        return None
    (split,), (width,) = splits, widths
    # Each try is a capture: first what is called so, then whatever else has the width's value.
    own = decoder_config(program.config)
    likely_first = sorted(own.items(), key=lambda e: e[0] not in FEED_FORWARD_WIDTHS)
    for key, value in likely_first:
        if value == width or (value is None and key in FEED_FORWARD_WIDTHS):
            try:
                config = {**own, key: split.shared}
                if own is not program.config:
                    config = {**program.config, "text_config": config}
                want, module, _ = made_by_config(config, used)
            except CaptureError:
                continue  # the entry is something else that happens to have this value
            if difference_of(have, want) is None:
                tensors = _module_tensors(have, want, module)
                return Checkpoint(module, to_checkpoint(module, tensors))
    return None


def _with_class(
    program: Program,
    have: Program,
    want: Program,
    carved: Program,
    dense: PreTrainedModel,
    parts: list[CarvedPart],
    trained: tuple[str, ...],
) -> Checkpoint:
    """Return a checkpoint with a class of its own.

    That carved parts go where they belong is not assumed: with parts that keep every neuron for
    every token, the class must be what the config makes.

    Args:
        want, carved: The program that the config makes, and that one carved as the program is.

    Raises:
        LoweringError: The class would be something else.
    """
    paths = [part.path for part in parts]
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise NoCheckpoint(f"several layers run {twice[0]}, each with its own carved part")
    _, kind = carved_class(dense)
    whole = {part.path: part.whole for part in parts}
    try:
        probe = _capture_carved(dense, _text(program.config), _text(whole), trained)
        difference = difference_of(probe, want)
    except CaptureError as error:
        difference = error.message
    if difference is not None:
        raise NoCheckpoint(
            f"carved parts in {', '.join(list(whole)[:2])}, ... are not in the place of the "
            f"dense ones: {difference.rstrip('.')}"
        )
    carving = {part.path: part.options for part in parts}
    module = build_model(carved_config(dense, program.config, carving), model_class=kind)
    tensors = _module_tensors(have, carved, module, parts)
    return Checkpoint(module, to_checkpoint(module, tensors), render(dense))


def _module_tensors(
    have: Program, want: Program, module: PreTrainedModel, carved: Sequence[CarvedPart] = ()
) -> dict[str, Producer]:
    """Return the value of every parameter and persistent buffer of the module."""
    filled: dict[str, str] = {}
    fragments: dict[str, list[Fragment]] = {}
    carved_at = {part.position: part for part in carved}
    renamed = {old: new for part in carved for old, new in part.renamed.items()}
    for position, (ours, theirs) in enumerate(zip(have.calls, want.calls, strict=True)):
        slots = zip(
            *(slots_by_use(p.functions[c.function]) for p, c in ((have, ours), (want, theirs))),
            strict=True,
        )
        held: dict[str, Producer] = {}
        for slot, other_slot in slots:
            name = theirs.weights[other_slot]
            weight, value = want.weights[name], have.weights[ours.weights[slot]]
            if weight.constant:
                if not torch.equal(weight.load(), value.load().to(weight.dtype)):
                    raise NoCheckpoint(
                        f"the constant {value.name!r} is not what the config makes it"
                    )
                continue
            if filled.setdefault(name, value.name) != value.name:
                raise NoCheckpoint(f"the config ties {filled[name]!r} and {value.name!r}")
            if position in carved_at and other_slot in carved_at[position].made:
                held[carved_at[position].made[other_slot]] = value.producer
                continue
            parent, steps = origin(weight.producer)
            fragment = Fragment(steps, value.producer)
            parent = renamed.get(parent, parent)
            if fragment not in fragments.setdefault(parent, []):
                fragments[parent].append(fragment)
        if position in carved_at:
            for name, producer in carved_at[position].tensors(held).items():
                fragments[name] = [Fragment((), producer)]
    tied = set(getattr(module, "all_tied_weights_keys", None) or ())
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tensors: dict[str, Producer] = {}
    carried = {} if have.vision is None else {w.name: w for w in have.vision.carried}
    for aliases in names.values():
        kept = next((name for name in aliases if name not in tied), aliases[0])
        shape = tuple(module.get_parameter(kept).shape)
        found = [fragment for alias in aliases for fragment in fragments.get(alias, [])]
        if not found and kept in carried:
            tensors[kept] = carried[kept].producer
            continue
        if not found:
            raise NoCheckpoint(
                f"its class has the parameter {kept!r}, which the program never reads"
            )
        try:
            tensors[kept] = assemble(shape, found)
        except ValueError as error:
            raise NoCheckpoint(f"{kept!r} cannot be put together: {error}") from error
    for name, buffer in persistent_buffers(module).items():
        found = fragments.get(name, [])
        if not found and name in carried:
            tensors[name] = carried[name].producer
            continue
        tensors[name] = assemble(tuple(buffer.shape), found) if found else Array(buffer)
    left = set(fragments).difference(*names.values(), tensors)
    if left:
        raise NoCheckpoint(f"its class has no parameter {min(left)!r}")
    return tensors
