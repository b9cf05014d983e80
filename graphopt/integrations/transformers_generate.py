"""KV policies in `generate` of transformers: a cache that has a policy, and the attention for it.

    model.set_attn_implementation(POLICY_ATTENTION)
    cache = PolicyCache(model.config, policy)
    model.generate(**inputs, past_key_values=cache)

Importing this module registers the attention. A cache knows what the policy remembers of each
layer, and hands itself to the attention with the keys that it returns. Prompts are read densely,
and a step of one token reads what the policy selects (`graphopt.ir.policy_attention`, as programs
have it). It is plain torch: what a step reads less is not yet time that it saves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from graphopt.errors import UsageError
from graphopt.ir import functional
from graphopt.ir.kv_policies import KVPolicy, State
from graphopt.ir.policy_attention import policy_attention

POLICY_ATTENTION = "graphopt_kv_policy"
"""The name of the attention, for `set_attn_implementation`."""

_OWNER = "graphopt_policy_cache"


class PolicyCache(DynamicCache):
    """Keys and values that grow, of which a step of one token reads what a policy selects.

    It goes with the attention `POLICY_ATTENTION` alone: any other reads everything.

    Args:
        config: That of the model. Layers of which it says that they have a window are left alone.
        policy: With its weights, where it has some.
        dense_layers: How many layers at the front read everything.
    """

    def __init__(
        self, config: PreTrainedConfig, policy: KVPolicy, *, dense_layers: int = 0
    ) -> None:
        super().__init__(config=config)
        self.policy, self.dense_layers = policy, dense_layers
        self.states: dict[int, State] = {}

    def follows(self, layer_idx: int) -> bool:
        """Return whether a layer's steps read what the policy selects."""
        layer = self.layers[layer_idx]
        return layer_idx >= self.dense_layers and not getattr(layer, "is_sliding", False)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, G, S, D]; return those of all tokens, the keys with the cache.

        The cache is an attribute of the keys, since transformers gives attentions no cache.
        """
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        setattr(keys, _OWNER, weakref.ref(self))
        return keys, values

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to forget tokens: what a policy has learnt of them is not to be taken back.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "A cache with a KV policy cannot be cropped: the policy remembers more than keys.",
            "Generate without an assistant, or with a cache that has no policy.",
        )

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.states.clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take other rows of the batch, those of `beam_idx`."""
        super().reorder_cache(beam_idx)
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        super().batch_select_indices(indices)
        self._map(lambda x: x[indices])

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor that the policy remembers."""
        self.states = {
            layer: {name: function(x) for name, x in state.items()}
            for layer, state in self.states.items()
        }


def policy_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: The layer's attention, which knows its `layer_idx`.
        query: [B, H, S, D].
        key, value: [B, G, T, D] and [B, G, T, Dv], from a `PolicyCache`.
        attention_mask: bool [B, 1, S, T], True where a query sees a key; None where each sees all
            up to its own.
        softcap, s_aux: Of models that have them: a cap of the scores, and sinks [H].

    Returns:
        [B, S, H, Dv], and no weights.

    Raises:
        UsageError: The keys are from no `PolicyCache`, or dropout is asked for.
    """
    owner = getattr(key, _OWNER, None)
    cache = owner() if owner is not None else None
    if cache is None or dropout:
        raise UsageError(
            f"The attention {POLICY_ATTENTION} decodes with a PolicyCache, and was given "
            f"{'dropout' if cache is not None else 'keys of no such cache'}.",
            "Pass past_key_values=PolicyCache(model.config, policy), or give the model another "
            "attention by set_attn_implementation.",
        )
    layer = int(getattr(module, "layer_idx"))  # noqa: B009  (a Module's attributes have no types)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not cache.follows(layer):
        out = functional.attention(
            query, key, value, sinks=s_aux, scale=scale, softcap=softcap,
            causal=attention_mask is None, seen=attention_mask,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None
    before = key.shape[2] - query.shape[2]
    (past_k, new_k), (past_v, new_v) = (x.tensor_split([before], 2) for x in (key, value))
    out, _, cache.states[layer] = policy_attention(
        query, new_k, new_v, (past_k, past_v), cache.states.get(layer, {}),
        # The last query sees all real keys.
        None if attention_mask is None else attention_mask[:, 0, -1, :],
        s_aux, policy=cache.policy, layer=layer, scale=scale, softcap=softcap,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(POLICY_ATTENTION, policy_attention_forward)
AttentionMaskInterface.register(POLICY_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
