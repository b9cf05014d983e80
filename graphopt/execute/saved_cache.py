"""A KV cache as named tensors: text that was half written is gone on with in another process."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graphopt.errors import SourceError
from graphopt.execute.function_run import CacheContents
from graphopt.ir.graph import KVState, Program
from graphopt.ir.kv_memory import PagedKV, PolicyKV
from graphopt.ir.types import B, P, evaluate


def cache_tensors(program: Program, contents: CacheContents) -> dict[str, Tensor]:
    """Return keys, values and the policies' states of a cache, each by a name.

    Those of the state `kv.0` are `kv.0.key` [B, G, P, D], `kv.0.value` [B, G, P, Dv], and
    `kv.0.NAME` for what its policy keeps under a name. Files of safetensors hold them as they are.
    """
    tensors: dict[str, Tensor] = {}
    for name, held in contents.items():
        k, v = held
        state = held.state if isinstance(held, PolicyKV) else ()
        names = ["key", "value", *program.states[name].policy_types]
        parts = zip(names, (k, v, *state), strict=True)
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts}
    return tensors


def cache_of_tensors(program: Program, tensors: Mapping[str, Tensor]) -> CacheContents:
    """Return the cache that `cache_tensors` gave the tensors of, with each state in its layout.

    Raises:
        SourceError: A tensor is missing, or is of another shape than the program's states.
    """
    return {name: _contents(state, tensors) for name, state in program.states.items()}


def _contents(
    state: KVState, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor] | PagedKV | PolicyKV:
    types = dict(zip(("key", "value"), state.types, strict=True)) | state.policy_types
    parts: dict[str, Tensor] = {}
    for part in types:
        if f"{state.name}.{part}" not in tensors:
            raise SourceError(
                f"The saved cache has no {state.name}.{part}.",
                "Save it from a program with the same states.",
            )
        parts[part] = tensors[f"{state.name}.{part}"]
    k, v = parts["key"], parts["value"]
    # A ring holds P tokens, or as many as it has slots.
    sizes = {B: k.shape[0], P: k.shape[2] if k.dim() > 2 else 0}
    for part, kind in types.items():
        found = tuple(parts[part].shape)
        if found != tuple(evaluate(size, sizes) for size in kind.shape):
            name = f"{state.name}.{part}"
            raise SourceError(
                f"{name} of the saved cache is {list(found)}, and it should be {kind}.",
                "Save it from a program with the same states.",
            )
    kv: tuple[Tensor, Tensor] | PagedKV = k, v
    if state.layout.page is not None:
        kv = PagedKV.empty(k[:, :, :0], v[:, :, :0], state.layout.page).extended(k, v)
    if state.policy is None:
        return kv
    return PolicyKV(kv, tuple(parts[name] for name in state.policy_types))
