"""Carved programs: the class that their checkpoint brings, and the tensors it holds."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphopt.ir.blocks import find_blocks
from graphopt.ir.feed_forward import (
    FeedForward,
    Split,
    carve_call,
    feed_forwards,
    read_split,
    with_experts,
)
from graphopt.ir.graph import Call, Function, Node, Program, Value, unique_name
from graphopt.ir.shapes import infer_program
from graphopt.ir.weights import Producer
from graphopt.lowering.hf.checkpoint_assembly import origin, stacked_columns, stacked_rows
from graphopt.sources.vision import AUTO_CLASS, takes_pictures

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CODE_NAME = "modeling_carved.py"
"""The file of the checkpoint that holds the class."""

_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
"""What transformers calls activations, where it is not what their ops are called."""

_OPTIONAL = ("selection_bias", "gate_scale")
"""What the class calls the operands of `top_k_gating` behind the scores."""


@dataclass(frozen=True)
class CarvedPart:
    """A feed-forward part of the model that a config makes, carved as the program's is.

    Attributes:
        position: The position of the call.
        width: Neurons before.
        split, router: See `with_experts`.
        made: What the new weight slots hold; see `with_experts`.
        path: The module in whose place the carved part goes.
        options: What the class gives the carved part; see `modeling_carved.py`.
        renamed: What tensors of the dense model are called now.
    """

    position: int
    width: int
    split: Split
    router: str
    made: dict[str, str]
    path: str
    options: dict[str, Any]
    renamed: dict[str, str]

    @property
    def whole(self) -> dict[str, Any]:
        """The options of a part that keeps all neurons for every token: the dense one."""
        routed = ("experts", "size", "active", "router", "threshold", *_OPTIONAL)
        kept = {key: value for key, value in self.options.items() if key not in routed}
        return kept | {"shared": self.width}

    def tensors(self, held: Mapping[str, Producer]) -> dict[str, Producer]:
        """Return the tensors of the part, by the names the class gives them.

        Args:
            held: The values of the new weights, by what they hold.
        """
        found: dict[str, Producer] = {}
        firsts = ("gate", "up") if self.options["gated"] else ("up",)
        for kind in (*firsts, "down"):
            for end, suffix in (("", "weight"), (".bias", "bias")):
                if f"{kind}{end}.shared" in held:
                    found[f"shared.{kind}_proj.{suffix}"] = held[f"{kind}{end}.shared"]
        if self.split.experts:
            count = self.split.experts
            stem = "experts." + "_".join(firsts) + "_proj"
            for end, suffix in (("", ""), (".bias", "_bias")):
                values = [held[key] for k in firsts if (key := f"{k}{end}.experts") in held]
                if values:
                    found[stem + suffix] = stacked_rows(tuple(values), count)
            found["experts.down_proj"] = stacked_columns(held["down.experts"], count)
        names = {"router": "router.weight", "router.bias": "router.bias"}
        if self.router == "neuron":
            names = {"router": "router.up_proj.weight", "router.gate": "router.gate_proj.weight"}
        names |= {name: name for name in _OPTIONAL}
        found |= {names[holds]: held[holds] for holds in names if holds in held}
        return {f"{self.path}.{name}": producer for name, producer in found.items()}


def carve_alike(
    have: Program, want: Program, module: PreTrainedModel
) -> tuple[Program, list[CarvedPart]]:
    """Return what a config makes, carved as a program is, and the parts that are carved.

    Nothing is recognised but sizes and kinds: whether the two are one is for
    `graphopt.ir.compare.first_difference` to say.

    Args:
        have: The program.
        want, module: What the config makes, as a program without values and as a module.

    Raises:
        ValueError: A part has no place in the modules where a carved one could go.
    """
    rewritten = want.copy()
    kinds, _ = infer_program(have)
    functions: dict[tuple[str, str, Split], tuple[Function, dict[str, str]]] = {}
    found: list[CarvedPart] = []
    for block, own in zip(find_blocks(rewritten), find_blocks(have), strict=False):
        call = rewritten.calls[block.position]
        function = rewritten.functions[call.function]
        parts = feed_forwards(function, block.stream)
        if len(parts) != 1 or isinstance(parts[0], str):
            continue
        part = parts[0]
        dense = _Dense(rewritten, call, part)
        read = read_split(have, own, kinds[own.position], dense.width)
        if read is None:
            continue
        split, router, neurons = read
        model = have.calls[own.position].function
        if (function.name, model, split) not in functions:
            name = unique_name(f"{function.name}_experts", set(rewritten.functions))
            new, made = with_experts(function, part, split, name, router=router)
            if split.experts:
                _add_optional(new, _gates(have.functions[model]), made)
            rewritten.functions[name] = new
            functions[function.name, model, split] = new, made
        new, made = functions[function.name, model, split]
        found.append(dense.carved(module, block.position, split, router, neurons, made))
        # Numbers behind its width are neurons of zeros.
        order = torch.arange(neurons)
        carve_call(
            rewritten, call, part, new, made, order, split.shared, dense.router(split.experts)
        )
    rewritten.prune_unused()
    return rewritten, found


def _gates(function: Function) -> Node:
    return next(node for node in function.nodes if node.op == "top_k_gating")


def _add_optional(function: Function, model: Node, made: dict[str, str]) -> None:
    """Give the gates of a function the operands behind the scores that those of another have."""
    gates = _gates(function)
    for value, name in zip(model.inputs[1:], _OPTIONAL, strict=False):
        if value is not None:
            slot = unique_name(name, set(function.weights))
            function.weights[slot] = Value(slot)
            made[slot] = name
        gates.inputs.append(None if value is None else function.weights[slot])


class _Dense:
    """A feed-forward part of the model that a config makes, and the modules it is made of."""

    def __init__(self, program: Program, call: Call, part: FeedForward) -> None:
        self.part = part
        function = program.functions[call.function]
        slots = function.slots_by_value()
        nodes = {"gate": part.gate, "up": part.up, "down": part.down}
        self.nodes = {kind: node for kind, node in nodes.items() if node is not None}
        self.weights = {
            kind: [program.weights[call.weights[slots[v]]] for v in node.inputs[1:] if v in slots]
            for kind, node in self.nodes.items()
        }
        self.width, self.inputs = self.weights["up"][0].shape
        self.outputs = self.weights["down"][0].shape[0]

    def router(self, experts: int) -> dict[str, Tensor]:
        """Return values of the shapes that weights of a router have."""
        rows, entries = torch.zeros(experts, self.inputs), torch.zeros(experts)
        return {"router": rows, "router.gate": rows, "router.bias": entries} | dict.fromkeys(
            _OPTIONAL, entries
        )

    def carved(
        self,
        module: PreTrainedModel,
        position: int,
        split: Split,
        router: str,
        neurons: int,
        made: dict[str, str],
    ) -> CarvedPart:
        path, identities = self._place(module)
        biased = {kind: len(weights) > 1 for kind, weights in self.weights.items()}
        if biased.get("gate", biased["up"]) != biased["up"]:
            raise ValueError(f"of the two first projections in {path} one has a bias")
        options: dict[str, Any] = {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "activation": _ACTIVATIONS.get(self.part.act, self.part.act),
            "gated": self.part.gate is not None,
            "bias": biased["up"],
            "output_bias": biased["down"],
            "shared": split.shared,
        }
        if identities:
            options["identities"] = identities
        if split.experts:
            options |= {
                "experts": split.experts,
                "size": (neurons - split.shared) // split.experts,
                "active": split.active,
                "router": router,
            }
            options |= {name: True for name in _OPTIONAL if name in made.values()}
            if split.threshold:
                options["threshold"] = True
        renamed = {}
        if biased["down"]:
            name = f"{path}.shared.down_proj.bias" if split.shared else f"{path}.bias"
            renamed[origin(self.weights["down"][1].producer)[0]] = name
        return CarvedPart(position, self.width, split, router, made, path, options, renamed)

    def _place(self, module: PreTrainedModel) -> tuple[str, list[str]]:
        """Return the module that makes way, and those around it that become identities.

        A module that is the feed-forward part, and nothing else, makes way whole. Otherwise the
        first of two projections does: what is between it and the last one, and the last one
        itself, then let its result through.
        """
        linears = {
            kind: origin(weights[0].producer)[0].rpartition(".")[0]
            for kind, weights in self.weights.items()
        }
        owners = {name.rpartition(".")[0] for name in linears.values()}
        if len(owners) > 1:
            raise ValueError(f"its projections lie in several modules, {', '.join(owners)}")
        (owner,) = owners
        around = module.get_submodule(owner)
        own = {origin(w.producer)[0] for weights in self.weights.values() for w in weights}
        names = {f"{owner}.{name}" for name, _ in around.named_parameters()}
        if names == own and _takes_one(around):
            return owner, []
        if self.part.gate is not None:
            raise ValueError(
                f"{owner} does more than its feed-forward part, whose two first projections "
                "cannot make way for one module"
            )
        between = [
            f"{owner}.{name}"
            for name, child in around.named_children()
            if not isinstance(child, nn.Dropout) and not list(child.parameters())
        ]
        return linears["up"], [*between, linears["down"]]


def _takes_one(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return len(parameters) == 1


def render(module: PreTrainedModel) -> str:
    """Return the code of the class for carved models of a class of transformers."""
    config, model = type(module.config), type(module)
    text = Path(__file__).with_name(CODE_NAME).read_text(encoding="utf-8")
    names = ", ".join(sorted((config.__name__, model.__name__)))
    instead = {
        "AutoModelForCausalLM": loader_of(module),
        "import LlamaConfig, LlamaForCausalLM": f"import {names}",
        "carved_llama": f"carved_{config.model_type}",
        "LlamaConfig": config.__name__,
        "LlamaForCausalLM": model.__name__,
    }
    # All at once: a new name may hold an old one, as DiffLlamaConfig does.
    return re.sub("|".join(instead), lambda found: instead[found.group()], text)


@functools.cache
def _run(code: str, name: str) -> types.ModuleType:
    """Return a module of this code, which transformers looks up by the name of its classes'."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(code, f"<{name}>", "exec"), module.__dict__)
    return module


def carved_class(
    module: PreTrainedModel,
) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Return the classes for carved models of a class of transformers: of config and model."""
    name = f"graphopt_carved_{type(module).__name__}"
    code = _run(render(module), name)
    return (
        getattr(code, f"Carved{type(module.config).__name__}"),
        getattr(code, f"Carved{type(module).__name__}"),
    )


def carved_config(
    module: PreTrainedModel, config: Mapping[str, Any], carving: Mapping[str, Any]
) -> PreTrainedConfig:
    """Return the config of a carved model.

    Args:
        module: The dense model.
        config: Its config's entries.
        carving: The class's entry `carving`; see `modeling_carved.py`.
    """
    kind, model = carved_class(module)
    entries = {key: value for key, value in config.items() if key != "model_type"}
    made = kind(**copy.deepcopy({**entries, "carving": dict(carving)}))
    stem = Path(CODE_NAME).stem
    made.auto_map = {
        "AutoConfig": f"{stem}.{kind.__name__}",
        loader_of(module): f"{stem}.{model.__name__}",
    }
    return made


def loader_of(dense: PreTrainedModel) -> str:
    """Return what of transformers loads a model, dense or carved."""
    return AUTO_CLASS if takes_pictures(dense.config) else "AutoModelForCausalLM"
