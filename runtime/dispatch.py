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
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir import functional, kv_memory
from graphopt.ir.kv_memory import PagedKV
from graphopt.runtime.attention import Extras, Keys
from graphopt.runtime.kv_cache import AppendKV, FixedKVCache, KVCache, dense, in_order

DECODE_TOKENS = 16
"""Query tokens up to which keys are split over programs instead of queries."""


Results: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]
"""The output, and where they are asked for the log-sum-exp and the page maxima."""


@dataclass(frozen=True)
class AttentionKey:
    """What decides which kernel runs: the fields of a description that the operands show.

    Of `kv` the `size` is the slots of a ring, or the tokens of a page.
    """

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
    kv: str = "contiguous"
    size: int | None = None
    selected_blocks: bool = False
    lse: bool = False
    page_max: bool = False
    kv_bits: int = 16


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
    """The functions `attention`, `cached_attention` and `attention_results` of a model.

    They are those of `functional`, and take caches of every layout as their past.

    Args:
        plans: The best for a key first; None where the reference is meant to run.
        folder: Where images lie.
        arch: (major, minor) of the GPU the plans were made for; None for what is no GPU. Images
            of code run on that one alone, Triton on what is not older: plans count on its memory.
        append: Writes new keys and values to a cache, as `kv_memory.append_kv`.
    """

    def __init__(
        self,
        plans: Sequence[Planned] | None,
        folder: Path,
        arch: tuple[int, int] | None,
        append: AppendKV = kv_memory.append_kv,
    ) -> None:
        self._by_reference = plans is None
        self._plans: dict[AttentionKey, list[Planned]] = {}
        for plan in plans or ():
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
        extras = Extras(mask, bias, slopes, None, sinks)
        return self._attend(q.to(v.dtype), Keys(k.to(v.dtype), v), extras, options)[0]

    def cached_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: KVCache | None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, KVCache]:
        """As `functional.cached_attention`; a cache of fixed room is written and returned.

        Raises:
            ValueError: The new tokens or rows are more than such a cache has room for, or there is
                a padding mask besides.
        """
        extras = Extras(mask, bias, slopes, None, sinks)
        (out, _, _), cache = self._attend_cached(q, k, v, past, extras, options)
        return out, cache

    def picture_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: KVCache | None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        *,
        pictures: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, KVCache]:
        """As `functional.picture_attention`, which runs where there are pictures.

        Kernels run attentions without. In a cache of fixed room pictures are those of a prompt,
        before which there is nothing.
        """
        if pictures is None:
            return self.cached_attention(
                q, k, v, past, mask, bias, slopes, sinks, **options
            )  # fmt: skip
        q, k = q.to(v.dtype), k.to(v.dtype)
        cache, keys, extras = self._extended(
            k, v, past, Extras(mask, bias, slopes, None, sinks), options
        )
        if isinstance(past, FixedKVCache):
            bits = options.get("kv_bits", 16)
            if bits < 16:
                k, v = (
                    functional.quantise_dequantise(x, bits=bits, symmetric=False) for x in (k, v)
                )
            keys = Keys(k, v)
        elif isinstance(cache, PagedKV):
            keys, extras = Keys(*cache), replace(extras, mask=mask)
        own = pictures[:, -keys.k.shape[2] :]
        both_ways = functional.picture_mask(own, q[:, 0, :, 0], options.get("window"))
        extras = replace(extras, bias=both_ways if bias is None else bias + both_ways)
        options = {**options, "causal": False, "window": None}
        return by_reference(q, keys, extras, options)[0], cache

    def attention_results(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: KVCache | None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        *,
        cached: bool,
        **options: Any,
    ) -> tuple[Any, ...]:
        """As `functional.attention_results`.

        In a cache of fixed room the pages are those of its room, -inf where nothing is seen.

        Raises:
            ValueError: As for `cached_attention`.
        """
        extras = Extras(mask, bias, slopes, None, sinks)
        (out, *statistics), cache = self._attend_cached(q, k, v, past, extras, options)
        return out, *([cache] if cached else []), *(x for x in statistics if x is not None)

    def _attend_cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: KVCache | None,
        extras: Extras,
        options: Mapping[str, Any],
    ) -> tuple[Results, KVCache]:
        """Put new keys and values behind those of a cache, and attend to them."""
        q, k = q.to(v.dtype), k.to(v.dtype)
        cache, keys, extras = self._extended(k, v, past, extras, options)
        return self._attend(q, keys, extras, options), cache

    def _extended(
        self,
        k: Tensor,
        v: Tensor,
        past: KVCache | None,
        extras: Extras,
        options: Mapping[str, Any],
    ) -> tuple[KVCache, Keys, Extras]:
        """Put new keys and values behind those of a cache; return it, and what is read of it."""
        ring, bits = options.get("ring"), options.get("kv_bits", 16)
        held = past.bits if isinstance(past, FixedKVCache) else 16
        if held not in (16, bits):
            raise ValueError(
                f"a cache of {held} bits for keys of {bits}: make one by the model's kv_bits"
            )
        if bits < held:
            # What holds codes rounds where it is written.
            k, v = (functional.quantise_dequantise(x, bits=bits, symmetric=False) for x in (k, v))
        cache: KVCache
        if isinstance(past, FixedKVCache):
            past.check(k)
            if extras.mask is not None:
                raise ValueError(
                    "a padding mask with a cache of fixed room, which tells padding by the lengths "
                    "of its rows: leave out the mask"
                )
            cache, keys = past, past.append(k, v, self._append, options.get("window"))
        elif isinstance(past, PagedKV):
            cache = past.extended(k, v)
            keys = Keys(cache.k, cache.v, kv_lens=cache.lens, block_table=cache.block_table)
            if extras.mask is not None:
                behind = keys.capacity() - extras.mask.shape[1]
                extras = replace(extras, mask=F.pad(extras.mask, (0, behind)))
        else:
            if past is not None:
                k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
            keys, cache = Keys(k, v), (k, v)
            if ring is not None:
                cache = k[:, :, -ring:], v[:, :, -ring:]
                mask = extras.mask
                extras = replace(extras, mask=None if mask is None else mask[:, -k.shape[2] :])
        return cache, keys, extras

    def _attend(self, q: Tensor, keys: Keys, extras: Extras, options: Mapping[str, Any]) -> Results:
        """Return what an attention gives, by a kernel or by the reference."""
        selected = options.get("selected_blocks")
        if selected is not None:
            selected = selected.expand(q.shape[0], keys.k.shape[1], -1)
            keys = replace(keys, selected_blocks=selected)
        plan = self._choose(q, keys, extras, options)
        if plan is None:
            return by_reference(q, keys, extras, options)
        if extras.bias is not None:
            extras = replace(extras, bias=extras.bias.to(q.dtype))
        run = self._load(plan)
        out, *statistics = run(q, keys, scale=options["scale"], extras=extras)
        return out, statistics[0], statistics[1] if len(statistics) > 1 else None

    def _choose(
        self, q: Tensor, keys: Keys, extras: Extras, options: Mapping[str, Any]
    ) -> Planned | None:
        """Return the plan whose kernel takes the operands; None where there is none."""
        if not self._on_device(q):
            self._instead("attention on a CPU runs by its reference")
            return None
        if self._by_reference:
            return None
        kv, size = "contiguous", None
        if keys.block_table is not None or keys.ring_start is not None:
            kv, size = "ring" if keys.block_table is None else "paged", keys.k.shape[2]
        page_max, page = options.get("page_max"), options.get("page")
        key = AttentionKey(
            phase="decode" if q.shape[2] <= DECODE_TOKENS else "prefill",
            head_dim=q.shape[3],
            value_dim=keys.values,
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
            kv=kv,
            size=size,
            selected_blocks=keys.selected_blocks is not None,
            lse=bool(options.get("lse")),
            page_max=page_max is not None,
            kv_bits=keys.bits,
        )
        if any(tokens not in (None, size) for tokens in (page_max, page)):
            tokens = page_max or page
            self._instead(
                f"pages of {tokens} tokens over a cache that has none of them: attention runs by "
                "its reference"
            )
            return None
        plan = self._plan(key)
        if plan is None and key.phase == "decode":
            # Few query tokens are also a short prefill, if one that leaves most of a tile empty.
            plan = self._plan(replace(key, phase="prefill"))
        if plan is None and key not in self._plans:
            self._instead(f"no kernel was planned for {key}: it runs by its reference")
        return plan

    @staticmethod
    def _on_device(q: Tensor) -> bool:
        """Return whether kernels may run there at all."""
        return q.device.type != "cpu"

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


def by_reference(q: Tensor, keys: Keys, extras: Extras, options: Mapping[str, Any]) -> Results:
    """Return what an attention gives, by `functional`."""
    own = ("lse", "page_max", "ring", "selected_blocks", "page", "kv_bits")
    plain = {name: value for name, value in options.items() if name not in own}
    k, v = in_order(dense(keys, q.shape[3], q.dtype))
    operands = (extras.mask, extras.bias, extras.slopes, extras.sinks)
    plain["kv_lens"] = keys.kv_lens
    if keys.selected_blocks is not None:
        groups = q.shape[1] // k.shape[1]
        plain["seen"] = functional.selected_keys(
            keys.selected_blocks, options["page"], k.shape[2], groups
        )
    out = functional.attention(q, k, v, *operands, **plain)
    lse, page_max = bool(options.get("lse")), options.get("page_max")
    if not lse and page_max is None:
        return out, None, None
    total, maxima = functional.attention_statistics(
        q, k, *operands, page_max=page_max, selected_blocks=keys.selected_blocks, **plain
    )
    return out, total if lse else None, maxima
