"""Attention of emitted models some of whose keys lie in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graphopt.runtime.attention import Extras
from graphopt.runtime.dispatch import AttentionDispatcher, Results
from graphopt.runtime.host_layer import HostLayer


class HostDispatcher(AttentionDispatcher):
    """An `AttentionDispatcher` that takes a `HostLayer` as the past of an attention too."""

    def _attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, past: Any, extras: Extras, options: Mapping[str, Any]
    ) -> tuple[Results, Any]:
        if not isinstance(past, HostLayer):
            return super()._attend_cached(q, k, v, past, extras, options)
        unknown = [
            name
            for name, value in (
                ("a padding mask", extras.mask), ("a bias", extras.bias), ("slopes", extras.slopes),
                ("a window", options.get("window")), ("chunks", options.get("chunk")),
            )
            if value is not None
        ]  # fmt: skip
        if unknown:
            raise ValueError(f"{unknown[0]} with keys in host memory: keep them on the device")
        q, k = q.to(v.dtype), k.to(v.dtype)
        out = past.attend(q, k, v, extras.sinks, options, self._attend, self._append)
        return (out, None, None), past
