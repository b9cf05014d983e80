"""The attention of an emitted model: by the kernels of its target, or else by the reference.

Which kernel runs which form of attention, and with what constants, was planned when the model was
emitted. What no kernel was planned for, and whatever runs on a CPU, goes to
`functional.attention`; the first time, it is said why.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.runtime.attention import Extras, Keys

DECODE_TOKENS = 16
"""Query tokens up to which keys are split over programs instead of queries."""


class StaticKVCache(NamedTuple):
    """A cache with room for more tokens than it holds; new ones are written into it.

    Attributes:
        k: [B, G, capacity, D].
        v: [B, G, capacity, Dv].
        length: int32 [B], or [1] for all rows: tokens in it before this step. Whoever runs the
            model moves it on.
    """

    k: Tensor
    v: Tensor
    length: Tensor


@dataclass(frozen=True)
class AttentionKey:
    """What decides which kernel runs: the fields of a description that the operands show."""

    phase: str
    head_dim: int
    value_dim: int
    group: int
    dtype: torch.dtype
    causal: bool
    window: int | None
    chunk: int | None
    softcap: float | None
    sinks: bool
    alibi: bool
    bias: bool
    padding_mask: bool
    kv_lens: bool


@dataclass(frozen=True)
class Planned:
    """A kernel that was planned for a key.

    Attributes:
        launcher: The module beside this one whose `load(phase, constants, code)` returns what
            runs the kernel.
        constants: What the kernel is compiled for, and launch options.
        image: Stem of the files of its machine code, beside the plans; None where the machine at
            hand compiles it.
    """

    key: AttentionKey
    launcher: str
    constants: Mapping[str, Any]
    image: str | None = None


class AttentionDispatcher:
    """The functions `attention` and `cached_attention` of a model, as those of `functional`.

    Args:
        plans: The best for a key first.
        folder: Where images lie.
        arch: (major, minor) of the GPU the plans were made for; None for what is no GPU. Images
            of code run on that one alone, Triton on what is not older: plans count on its memory.
        append: Writes new keys and values to a cache, as `functional.append_kv`.
    """

    def __init__(
        self,
        plans: Sequence[Planned],
        folder: Path,
        arch: tuple[int, int] | None,
        append: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = functional.append_kv,
    ) -> None:
        self._plans: dict[AttentionKey, list[Planned]] = {}
        for plan in plans:
            self._plans.setdefault(plan.key, []).append(plan)
        self._folder, self._arch, self._append = folder, arch, append
        self._runs: dict[int, Callable[..., Any]] = {}
        self._said: set[str] = set()

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """As `functional.attention`."""
        q, k = q.to(v.dtype), k.to(v.dtype)
        found = self._run(q, Keys(k, v), Extras(mask, bias, slopes, None, sinks), options)
        if found is None:
            return functional.attention(q, k, v, mask, bias, slopes, sinks, **options)
        return found

    def cached_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: tuple[Tensor, Tensor] | StaticKVCache | None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `functional.cached_attention`; a `StaticKVCache` is written in place and returned.

        Raises:
            ValueError: The new tokens or rows are more than the `StaticKVCache` has room for.
        """
        k = k.to(v.dtype)
        if isinstance(past, StaticKVCache):
            return self._with_slot(q.to(v.dtype), k, v, past, mask, bias, slopes, sinks, options)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        return self.attention(q, k, v, mask, bias, slopes, sinks, **options), k, v

    def _with_slot(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slot: StaticKVCache,
        mask: Tensor | None,
        bias: Tensor | None,
        slopes: Tensor | None,
        sinks: Tensor | None,
        options: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        if k.shape[0] != slot.k.shape[0] or k.shape[2] > slot.k.shape[2]:
            raise ValueError(
                f"keys of {k.shape[2]} tokens in {k.shape[0]} rows do not fit a cache for "
                f"{slot.k.shape[2]} tokens in {slot.k.shape[0]} rows: make one that is large enough"
            )
        kv_lens = self._append(k, v, slot.k, slot.v, slot.length)
        keys = Keys(slot.k, slot.v, kv_lens=kv_lens)
        found = self._run(q, keys, Extras(mask, bias, slopes, None, sinks), options)
        if found is None:
            found = functional.attention(
                q, slot.k, slot.v, mask, bias, slopes, sinks, kv_lens=kv_lens, **options
            )
        return found, slot.k, slot.v

    def _run(
        self, q: Tensor, keys: Keys, extras: Extras, options: Mapping[str, Any]
    ) -> Tensor | None:
        """Return the output, or None where no kernel takes the operands."""
        if q.device.type == "cpu":
            self._instead("attention on a CPU runs by its reference")
            return None
        key = AttentionKey(
            phase="decode" if q.shape[2] <= DECODE_TOKENS else "prefill",
            head_dim=q.shape[3],
            value_dim=keys.v.shape[3],
            group=q.shape[1] // keys.k.shape[1],
            dtype=q.dtype,
            causal=options.get("causal", True),
            window=options.get("window"),
            chunk=options.get("chunk"),
            softcap=options.get("softcap"),
            sinks=extras.sinks is not None,
            alibi=extras.slopes is not None,
            bias=extras.bias is not None,
            padding_mask=extras.mask is not None,
            kv_lens=keys.kv_lens is not None,
        )
        plan = self._plan(key)
        if plan is None and key.phase == "decode":
            # Few query tokens are also a short prefill, if one that leaves most of a tile empty.
            plan = self._plan(replace(key, phase="prefill"))
        if plan is None:
            if key not in self._plans:
                self._instead(f"no kernel was planned for {key}: it runs by its reference")
            return None
        if extras.bias is not None:
            extras = replace(extras, bias=extras.bias.to(q.dtype))
        out: Tensor = self._load(plan)(q, keys, scale=options["scale"], extras=extras)[0]
        return out

    def _plan(self, key: AttentionKey) -> Planned | None:
        for plan in self._plans.get(key, ()):
            if self._runs_here() if plan.image is None else self._code(plan.image) is not None:
                return plan
        return None

    def _runs_here(self) -> bool:
        """Return whether this GPU has what a Triton kernel was planned for."""
        if self._arch is None or torch.cuda.get_device_capability() >= self._arch:
            return True
        self._instead(
            f"the kernels were made for sm_{self._arch[0]}{self._arch[1]} and this is "
            f"{torch.cuda.get_device_name()}: attention runs by its reference; compile the model "
            "for this GPU"
        )
        return False

    def _code(self, image: str) -> Path | None:
        """Return the file of code that this GPU runs: made for it, or for its driver to compile."""
        assert self._arch is not None
        here, name = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
        made, portable = (self._folder / f"{image}{suffix}" for suffix in (".cubin", ".ptx"))
        if here == self._arch and made.is_file():
            return made
        target = f"sm_{self._arch[0]}{self._arch[1]}"
        if here >= self._arch and portable.is_file():
            self._instead(f"{image} was made for {target}: on {name} it is right, and slow")
            return portable
        why = f"was made for {target} and this is {name}"
        if here == self._arch:
            why = "was not compiled when the model was emitted"
        self._instead(f"{image} {why}: another kernel, or the reference, runs its attention")
        return None

    def _load(self, plan: Planned) -> Callable[..., Any]:
        """Return what runs a plan, loaded the first time; see `Planned.launcher`."""
        if id(plan) not in self._runs:
            code: bytes | None = None
            if plan.image is not None:
                path = self._code(plan.image)
                assert path is not None
                code = path.read_bytes() + (b"\0" if path.suffix == ".ptx" else b"")
            launcher = importlib.import_module(f"{__package__}.{plan.launcher}")
            self._runs[id(plan)] = launcher.load(plan.key.phase, plan.constants, code)
        return self._runs[id(plan)]

    def _instead(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(reason, stacklevel=4)
