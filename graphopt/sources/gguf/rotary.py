"""How a GGUF file rotates queries and keys, as transformers' `rope_parameters`.

llama.cpp multiplies cosine and sine by `rope.scaling.attn_factor`, divides the frequencies by the
tensor `rope_freqs` or, for a context beyond the original one, `rope_factors_long`, and then
interpolates them by `rope.scaling.factor`, linearly or by YaRN. Source: `llama-context.cpp` and
`ggml_rope_ext` of llama.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from graphopt.errors import SourceError
from graphopt.sources.gguf.container import GgufFile
from graphopt.sources.gguf.keys import RotaryKeys
from graphopt.sources.gguf.schema import CHECKPOINT

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"

_SCALING = "rope.scaling."


def rope_parameters(file: GgufFile, keys: RotaryKeys, rotated: int) -> dict[str, Any]:
    """Return transformers' `rope_parameters`.

    Args:
        rotated: How many features of a head are rotated.

    Raises:
        SourceError: The file scales positions in a way that cannot be expressed, or that files
            and readers of files disagree on.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.freq_base}
    # llama.cpp's defaults: a factor without a type is linear, a type of none ends all scaling.
    kind = keys.scaling_type or "linear"
    factor = keys.scaling_factor or keys.scale_linear or 1.0
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise _refusal(file, f"scales positions by {kind!r:.60}, which is not supported")
    if kind == "none":
        factor = 1.0
    if LONG in file.tensors or SHORT in file.tensors:
        _only(file, keys, factor, "LongRoPE's factors", allowed={"attn_factor"})
        return rope | _longrope(file, keys, rotated)
    if kind == "longrope":
        raise _refusal(file, f"scales positions by LongRoPE and lacks the tensor {LONG!r}")
    if FREQS in file.tensors:
        _only(file, keys, factor, f"the tensor {FREQS!r}")
        return _llama3(file, rope, rotated)
    if kind == "yarn":
        return rope | _yarn(file, keys, factor)
    _only(file, keys, 1.0, f"{_SCALING}type {kind!r}")
    return rope if factor == 1.0 else rope | {"rope_type": "linear", "factor": factor}


def _refusal(file: GgufFile, what: str) -> SourceError:
    return SourceError(f"{file.path} {what}.", CHECKPOINT)


def _only(
    file: GgufFile, keys: RotaryKeys, factor: float, what: str, allowed: set[str] | None = None
) -> None:
    """Refuse scaling beside `what` that transformers cannot do at once.

    YaRN's bounds do nothing where YaRN does not run.
    """
    stated = {
        "factor": factor != 1.0,
        "attn_factor": keys.attn_factor not in (None, 1.0),
        "yarn_ext_factor": keys.yarn_ext_factor > 0,
        "yarn_attn_factor": keys.yarn_attn_factor not in (None, 1.0),
    }
    for name, is_set in stated.items():
        if is_set and name not in (allowed or ()):
            raise _refusal(file, f"states {_SCALING}{name} beside {what}, which is not supported")


def _yarn(file: GgufFile, keys: RotaryKeys, factor: float) -> dict[str, Any]:
    """YaRN's entries.

    Three keys scale cosine and sine. What llama.cpp makes of them changed between its releases,
    and it is not what its converter writes them for; at these values all agree.
    """
    attention = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    if keys.attn_factor not in (None, 1.0):
        raise _refusal(file, f"states {_SCALING}attn_factor beside YaRN, which is not supported")
    if keys.yarn_attn_factor is not None and not math.isclose(
        keys.yarn_attn_factor, attention, rel_tol=1e-6
    ):
        raise _refusal(
            file,
            f"states {_SCALING}yarn_attn_factor {keys.yarn_attn_factor}; of a scaling by {factor} "
            f"only {attention:.7g} is supported, which is YaRN's own",
        )
    if keys.yarn_ext_factor >= 0 and keys.yarn_ext_factor != 1.0:
        raise _refusal(
            file,
            f"states {_SCALING}yarn_ext_factor {keys.yarn_ext_factor}, of which only 1 is "
            "supported",
        )
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.original_context or keys.context_length,
        "beta_fast": keys.yarn_beta_fast,
        "beta_slow": keys.yarn_beta_slow,
    }


def _divisors(file: GgufFile, name: str, rotated: int) -> list[float]:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise _refusal(file, f"lacks the tensor {name!r}")
    if tensor.shape != (rotated // 2,):
        raise _refusal(
            file, f"rotates {rotated} features and has {list(tensor.shape)} divisors in {name!r}"
        )
    values: list[float] = tensor.load().tolist()
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise _refusal(file, f"has a divisor in {name!r} that is not above 0")
    return values


def _longrope(file: GgufFile, keys: RotaryKeys, rotated: int) -> dict[str, Any]:
    original = keys.original_context or keys.context_length
    if keys.attn_factor is None and keys.context_length > original:
        # llama.cpp takes 1 for it, the model's class a function of the two lengths.
        raise _refusal(file, f"holds LongRoPE's factors and no {_SCALING}attn_factor")
    return {
        "rope_type": "longrope",
        "long_factor": _divisors(file, LONG, rotated),
        "short_factor": _divisors(file, SHORT, rotated),
        "original_max_position_embeddings": original,
        "attention_factor": keys.attn_factor or 1.0,
    }


def _llama3(file: GgufFile, rope: dict[str, Any], rotated: int) -> dict[str, Any]:
    """Llama 3.1's scaling, whose GGUF form is one divisor per rotary frequency.

    The file keeps the divisors and not the four numbers they come from. Every release used the
    same three of them, so the fourth is the largest divisor, and the result is compared.
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stated = torch.tensor(_divisors(file, FREQS, rotated))
    scaled = rope | {
        "rope_type": "llama3",
        "factor": float(stated.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=rotated, num_attention_heads=1, head_dim=rotated, rope_parameters=scaled
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, rotated, 2, dtype=torch.float64) / rotated
    divisors = rope["rope_theta"] ** -exponents / frequencies.double()
    if not torch.allclose(divisors.float(), stated, rtol=1e-4):
        raise _refusal(file, "scales its rotary frequencies in a way other than Llama 3's")
    return scaled
