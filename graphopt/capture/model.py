"""Building the module to capture: parameters on meta, buffers real."""

from __future__ import annotations

import contextlib
import copy
import inspect
import mmap
import sys
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from graphopt.errors import CaptureError, first_line
from graphopt.ir.graph import PROGRAM_INPUTS
from graphopt.sources.vision import takes_pictures
from graphopt.support.boundary import out_of_memory
from graphopt.support.meta_parameters import parameters_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attention_implementation(config: Any) -> str | None:
    """Return the attention that a model of this config needs; None for the one of its class.

    PyTorch's fused attention caps no scores. Versions of transformers that choose it for Gemma 2
    and its kin all the same (5.17 does) leave the cap out without a word.
    """
    inner = getattr(config, "text_config", None) or config
    return "eager" if getattr(inner, "attn_logit_softcapping", None) is not None else None


def build_model(
    config: Any,
    *,
    trust_remote_code: bool = False,
    model_class: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """Return the causal language model of a Hugging Face config, without weights, in fp32.

    One that takes pictures is whole: tower, projector and language model.

    Args:
        model_class: None for the class that transformers, or the checkpoint, has for the config.

    Raises:
        CaptureError: transformers has no causal language model for this config.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    config.use_cache = False
    how: dict[str, Any] = {"dtype": torch.float32}
    if (implementation := attention_implementation(config)) is not None:
        how["attn_implementation"] = implementation
    try:
        with no_init_weights(), parameters_on_meta():
            if model_class is None:
                sees = takes_pictures(config)
                loader = AutoModelForImageTextToText if sees else AutoModelForCausalLM
                model = loader.from_config(config, trust_remote_code=trust_remote_code, **how)
            else:
                model = model_class._from_config(config, **how)
            # `no_init_weights` skips tying, which must hold for the export to see one weight.
            model.tie_weights()
    except Exception as error:
        # What a class says of a config that it cannot make a model of has assorted types.
        if out_of_memory(error):
            raise
        raise CaptureError(
            f"No causal language model can be built from the config of type "
            f"{getattr(config, 'model_type', '?')!r}: {first_line(error)}.",
            "Check its entries; graphopt takes decoder-only language models that transformers can "
            "build.",
        ) from error
    model.eval()
    return model


def _reserved(parameter: Tensor) -> Tensor:
    """Return a tensor on the CPU in memory that is reserved and not touched.

    Linux refuses to reserve more than the machine has, unless it is told that nothing of it is to
    be kept free.
    """
    try:
        return torch.empty_like(parameter, device="cpu")
    except RuntimeError as error:
        if not out_of_memory(error) or not sys.platform.startswith("linux"):
            raise
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, parameter.numel() * parameter.itemsize, flags=private)
    return torch.frombuffer(memory, dtype=parameter.dtype).view(parameter.shape)


_MAP_NORESERVE = 0x4000
"""Linux's flag, which the module mmap has no name for."""


@contextlib.contextmanager
def parameters_reserved(module: nn.Module) -> Iterator[None]:
    """Inside, meta parameters stand on the CPU in memory that is reserved and never touched.

    torch.export replaces them by fake tensors, so nothing is computed; but a module that asks
    its parameters for their device, to put constants there, now gets real constants.
    """
    made: dict[int, nn.Parameter] = {}
    places: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(_reserved(parameter), requires_grad=False)
            places.append((part._parameters, key, parameter))
            part._parameters[key] = made[id(parameter)]
    try:
        yield
    finally:
        for store, key, parameter in places:
            store[key] = parameter


def own_tensors(
    module: nn.Module, without: Collection[nn.Module] = ()
) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """Yield the parameters, buffers and tensor attributes of a module and its parts.

    Each with its qualified name, the dict that holds it, and its key there.

    Args:
        without: Parts that are left out.
    """
    left_out = {part for whole in without for part in whole.modules()}
    for path, part in module.named_modules():
        if part in left_out:
            continue
        stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, part.__dict__)
        for store in stores:
            for key, value in list(store.items()):
                if isinstance(value, Tensor):
                    yield f"{path}.{key}".lstrip("."), store, key, value


@contextlib.contextmanager
def tensors_replaced(
    module: nn.Module, replace: Callable[[Tensor], Tensor], without: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Inside, `replace` of every tensor of a module stands in its place; see `own_tensors`."""
    places: list[tuple[dict[str, Any], str, Tensor]] = []
    replaced: dict[int, Tensor] = {}
    for _, store, key, value in own_tensors(module, without):
        if id(value) not in replaced:
            replacement = replace(value)
            is_parameter = isinstance(value, nn.Parameter)
            replaced[id(value)] = nn.Parameter(replacement, False) if is_parameter else replacement
        places.append((store, key, value))
        store[key] = replaced[id(value)]
    try:
        yield
    finally:
        for store, key, value in places:
            store[key] = value


@contextlib.contextmanager
def everything_on_meta(module: nn.Module) -> Iterator[None]:
    """Inside, buffers and tensor attributes stand on meta too, so that running is free.

    What a module makes without naming a device is made there as well. Distributions do not check
    their arguments: these have no values there.
    """
    checks = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        with tensors_replaced(module, lambda value: value.to("meta")), torch.device("meta"):
            yield
    finally:
        Distribution.set_default_validate_args(checks)


def accepted_inputs(module: nn.Module) -> tuple[str, ...]:
    """Return which of the program inputs the module's forward takes by name.

    Raises:
        CaptureError: It takes no `input_ids`.
    """
    parameters = inspect.signature(module.forward).parameters
    names = tuple(name for name in PROGRAM_INPUTS if name in parameters)
    if "input_ids" not in names:
        raise CaptureError(
            f"{type(module).__name__}.forward takes no 'input_ids'.",
            "Wrap the module in one whose forward(input_ids, attention_mask, position_ids) "
            "returns logits; the last two may be left out.",
        )
    return names


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a model returned: a tensor, `.logits`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise CaptureError(
            f"The model returns {type(output).__name__}, which holds no logits.",
            "graphopt takes language models whose forward returns logits [B, S, vocab].",
        )
    return logits
