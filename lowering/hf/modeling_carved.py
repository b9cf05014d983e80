"""A model whose feed-forward parts are shared neurons and experts, of which tokens run some.

Everything else is the class of transformers that it derives from. `carving` in config.json says
for every carved part where it is and how it is divided. Source: CMoE, arXiv 2502.04416.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN


class CarvedLlamaConfig(LlamaConfig):
    """The config of the dense model, and how its feed-forward parts are divided.

    Attributes:
        carving: By module path, the arguments of `CarvedFeedForward`, and as `identities` the
            paths of modules around it that have nothing to do any more.
    """

    model_type = "carved_llama"

    carving: dict[str, Any] | None = None

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return that kinds of layers keep their names, by which transformers' own layers go.

        transformers 5.17 renames some in the configs of all other code.
        """
        return False


class SharedNeurons(nn.Module):
    """Neurons that every token runs: down(act(gate x) * up x), or down(act(up x))."""

    def __init__(
        self, inputs: int, neurons: int, outputs: int, activation: str, gated: bool,
        bias: bool, output_bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.act_fn = ACT2FN[activation]
        self.gate_proj = nn.Linear(inputs, neurons, bias) if gated else None
        self.up_proj = nn.Linear(inputs, neurons, bias)
        self.down_proj = nn.Linear(neurons, outputs, output_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Neurons in experts of equal size, each run by the tokens that chose it.

    Attributes:
        gate_up_proj: [E, 2 m, inputs], an expert's gate rows first; without gates it is
            `up_proj` [E, m, inputs].
        down_proj: [E, outputs, m].
    """

    def __init__(
        self, inputs: int, experts: int, size: int, outputs: int, activation: str, gated: bool,
        bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.act_fn = ACT2FN[activation]
        self.first = "gate_up_proj" if gated else "up_proj"
        rows = 2 * size if gated else size
        self.register_parameter(self.first, nn.Parameter(torch.empty(experts, rows, inputs)))
        offset = nn.Parameter(torch.zeros(experts, rows)) if bias else None
        self.register_parameter(f"{self.first}_bias", offset)
        self.down_proj = nn.Parameter(torch.empty(experts, outputs, size))
        for weight in (self.get_parameter(self.first), self.down_proj):
            nn.init.normal_(weight, std=0.02)  # what transformers does where a config says nothing

    def neurons(self, products: Tensor) -> Tensor:
        """Return the hidden activations, given what `gate_up_proj` makes of tokens."""
        if self.first == "up_proj":
            return self.act_fn(products)
        gate, up = products.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """Return the sum of every token's experts [..., outputs].

        Args:
            x: [..., inputs].
            chosen: int64 [..., K], the experts of each token.
            gates: [..., K], what their outputs are multiplied by; those of 0 are not computed.
        """
        first, offsets = getattr(self, self.first), getattr(self, f"{self.first}_bias")
        count, outputs = self.down_proj.shape[:2]
        if torch.compiler.is_compiling():
            # How many tokens an expert has is not known to a graph: all run all of them.
            every = gates.new_zeros(*x.shape[:-1], count).scatter(-1, chosen, gates)
            offsets = None if offsets is None else offsets.flatten()
            products = F.linear(x, first.flatten(0, 1), offsets)
            hidden = self.neurons(products.unflatten(-1, (count, -1)))
            hidden = hidden * every.to(hidden.dtype)[..., None]
            return F.linear(hidden.flatten(-2), self.down_proj.transpose(0, 1).flatten(1))
        rows = x.reshape(-1, x.shape[-1])
        chosen, gates = chosen.flatten(0, -2), gates.flatten(0, -2)
        total = rows.new_zeros(len(rows), outputs)
        for number in range(count):
            tokens, places = ((chosen == number) & (gates != 0)).nonzero(as_tuple=True)
            offset = None if offsets is None else offsets[number]
            products = F.linear(rows[tokens], first[number], offset)
            made = F.linear(self.neurons(products), self.down_proj[number])
            weights = gates[tokens, places, None].to(made.dtype)
            total = total.index_add(0, tokens, made * weights)
        return total.reshape(*x.shape[:-1], outputs)


class NeuronRouter(nn.Module):
    """Scores that are the magnitude of one neuron an expert."""

    def __init__(self, inputs: int, experts: int, activation: str, gated: bool) -> None:
        super().__init__()
        self.act_fn = ACT2FN[activation]
        self.gate_proj = nn.Linear(inputs, experts, bias=False) if gated else None
        self.up_proj = nn.Linear(inputs, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.up_proj.weight.dtype)
        if self.gate_proj is None:
            return self.act_fn(self.up_proj(x)).abs()
        return (self.act_fn(self.gate_proj(x)) * self.up_proj(x)).abs()


class LinearRouter(nn.Linear):
    """Scores that are a linear of the part's input, in the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class CarvedFeedForward(nn.Module):
    """A feed-forward part of shared neurons and experts.

    Args:
        activation: A name of transformers.
        gated: A neuron is act(gate x) * up x, not act(up x).
        bias: The first projections have one.
        output_bias: The last projection has one.
        shared: Number of neurons that every token runs.
        experts: Number of experts.
        size: Neurons of an expert.
        active: Experts of a token: those of the highest scores.
        threshold: A token has every expert of a score above 0, `active` is their mean number.
        router: `linear` or `neuron`; see the two classes.
        selection_bias: The highest of softmax(scores) + `selection_bias` are chosen instead; with
            `threshold` it is added to the scores.
        gate_scale: A chosen expert counts 1 + softmax(scores) `gate_scale`, not 1.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        activation: str,
        gated: bool,
        bias: bool,
        output_bias: bool,
        shared: int,
        experts: int = 0,
        size: int = 0,
        active: int = 0,
        router: str = "linear",
        threshold: bool = False,
        selection_bias: bool = False,
        gate_scale: bool = False,
    ) -> None:
        super().__init__()
        self.active = experts if threshold else active
        self.threshold = threshold
        self.shared: nn.Module | None = None
        self.experts: nn.Module | None = None
        self.router: nn.Module | None = None
        if shared:
            kind = (activation, gated, bias, output_bias)
            self.shared = SharedNeurons(inputs, shared, outputs, *kind)
        own = output_bias and not shared
        self.bias = nn.Parameter(torch.zeros(outputs)) if own else None
        if experts:
            self.experts = Experts(inputs, experts, size, outputs, activation, gated, bias)
            if router == "linear":
                self.router = LinearRouter(inputs, experts)
            else:
                self.router = NeuronRouter(inputs, experts, activation, gated)
        self.selection_bias: Tensor | None
        # It changes by a rule, not by a gradient, and is in no gate.
        self.register_buffer("selection_bias", torch.zeros(experts) if selection_bias else None)
        self.gate_scale = nn.Parameter(torch.zeros(experts)) if gate_scale else None

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of every token, int64 [..., K], and their gates [..., K]."""
        assert self.router is not None
        scores = self.router(x)
        probabilities = scores.float().softmax(-1)
        ranked = scores
        if self.selection_bias is not None:
            ranked = (scores if self.threshold else probabilities) + self.selection_bias
        # Of equal scores the first expert is taken, which `topk` does not promise.
        order = ranked.sort(dim=-1, descending=True, stable=True).indices
        chosen = order[..., : self.active]
        gates = torch.ones_like(chosen, dtype=probabilities.dtype)
        if self.gate_scale is not None:
            gates = gates + (probabilities * self.gate_scale).gather(-1, chosen)
        if self.threshold:
            gates = gates * (ranked.gather(-1, chosen) > 0)
        return chosen, gates

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Tensor] = []
        if self.shared is not None:
            parts.append(self.shared(x))
        if self.experts is not None:
            parts.append(self.experts(x, *self.choose(x)))
        if self.bias is not None:
            parts.append(self.bias)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


class CarvedLlamaForCausalLM(LlamaForCausalLM):
    """The model of the dense class with carved feed-forward parts in the place of its own."""

    config_class = CarvedLlamaConfig

    def __init__(self, config: CarvedLlamaConfig) -> None:
        super().__init__(config)
        decisive: set[str] = set()
        for path, given in (config.carving or {}).items():
            options = dict(given)
            for name in options.pop("identities", ()):
                self.set_submodule(name, nn.Identity())
            self.set_submodule(path, CarvedFeedForward(**options))
            decisive |= {f"{path}.{name}" for name in ("router", "selection_bias", "gate_scale")}
        self.post_init()
        # What decides between experts stays in fp32, whatever the model is loaded in.
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), *decisive}
