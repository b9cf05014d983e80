"""The attention of an emitted model: by the kernels of its target, or else by the reference.

Which kernel runs which form of attention, and with what constants, was planned when the model was
emitted. What no kernel was planned for, and whatever runs on a CPU, goes to
`functional.attention`; the first time, it is said why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.runtime.attention import Extras, Keys, decode, prefill

DECODE_TOKENS = 16
"""Query tokens up to which keys are split over programs instead of queries."""


class Slot(NamedTuple):
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
class Form:
    """What decides which kernel runs: the fields of a description that hang on operands."""

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
    key_mask: bool
    lengths: bool


@dataclass(frozen=True)
class Planned:
    """A kernel for a form.

    Attributes:
        kernel: `triton`, or the name of a kernel that was compiled ahead.
        constants: Of the kernel, and launch options.
        image: Stem of the files of its code, beside the plans; None for Triton.
    """

    form: Form
    kernel: str
    constants: Mapping[str, Any]
    image: str | None = None


class Tiled:
    """The functions `attention` and `cached_attention` of a model, as those of `functional`.

    Args:
        plans: The best for a form first.
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
        self._plans: dict[Form, list[Planned]] = {}
        for plan in plans:
            self._plans.setdefault(plan.form, []).append(plan)
        self._folder, self._arch, self._append = folder, arch, append
        self._kernels: dict[int, Any] = {}
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
        past: tuple[Tensor, Tensor] | Slot | None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `functional.cached_attention`; a `Slot` is written to in place, and returned whole.

        Raises:
            ValueError: The new tokens or rows are more than the `Slot` has room for.
        """
        k = k.to(v.dtype)
        if isinstance(past, Slot):
            return self._with_slot(q.to(v.dtype), k, v, past, mask, bias, slopes, sinks, options)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        return self.attention(q, k, v, mask, bias, slopes, sinks, **options), k, v

    def _with_slot(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slot: Slot,
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
        lengths = self._append(k, v, slot.k, slot.v, slot.length)
        keys = Keys(slot.k, slot.v, lengths=lengths)
        found = self._run(q, keys, Extras(mask, bias, slopes, None, sinks), options)
        if found is None:
            found = functional.attention(
                q, slot.k, slot.v, mask, bias, slopes, sinks, lengths=lengths, **options
            )
        return found, slot.k, slot.v

    def _run(
        self, q: Tensor, keys: Keys, extras: Extras, options: Mapping[str, Any]
    ) -> Tensor | None:
        """Return the output, or None where no kernel takes the operands."""
        if q.device.type == "cpu":
            self._instead("attention on a CPU runs by its reference")
            return None
        form = Form(
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
            key_mask=extras.mask is not None,
            lengths=keys.lengths is not None,
        )
        plan = self._plan(form)
        if plan is None and form.phase == "decode":
            # Few query tokens are also a short prefill, if one that leaves most of a tile empty.
            plan = self._plan(replace(form, phase="prefill"))
        if plan is None:
            if form not in self._plans:
                self._instead(f"no kernel was planned for {form}: it runs by its reference")
            return None
        if extras.bias is not None:
            extras = replace(extras, bias=extras.bias.to(q.dtype))
        decoding = plan.form.phase == "decode"
        run: Callable[..., tuple[Any, ...]] = decode if decoding else prefill
        if plan.kernel == "ascend-triton":
            from graphopt.runtime import ascend

            run = ascend.decode if decoding else ascend.prefill
        options = {"scale": options["scale"], "extras": extras}
        out: Tensor = run(*self._load(plan), q, keys, plan.constants, **options)[0]
        return out

    def _plan(self, form: Form) -> Planned | None:
        for plan in self._plans.get(form, ()):
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

    def _load(self, plan: Planned) -> tuple[Any, ...]:
        if id(plan) not in self._kernels:
            self._kernels[id(plan)] = self._import(plan)
        found: tuple[Any, ...] = self._kernels[id(plan)]
        return found

    def _import(self, plan: Planned) -> tuple[Any, ...]:
        # Imported here: a CPU has no Triton, and needs none.
        if plan.image is not None:
            path = self._code(plan.image)
            assert path is not None
            code = path.read_bytes() + (b"\0" if path.suffix == ".ptx" else b"")
            if plan.kernel == "hopper-cuda":
                from graphopt.runtime.hopper import HopperPrefill

                return (HopperPrefill(code, plan.constants),)
            from graphopt.runtime.volta import decode_kernels, prefill_kernel

            if plan.form.phase == "decode":
                return decode_kernels(code, plan.constants)
            return (prefill_kernel(code, plan.constants),)
        if plan.kernel == "ascend-triton":
            if plan.form.phase == "decode":
                from graphopt.runtime.kernels.ascend_decode import ascend_decode, ascend_merge

                return ascend_decode, ascend_merge
            from graphopt.runtime.kernels.ascend_prefill import ascend_prefill

            return (ascend_prefill,)
        if plan.form.phase == "decode":
            from graphopt.runtime.kernels.decode import attention_decode, attention_merge

            return attention_decode, attention_merge
        from graphopt.runtime.kernels.prefill import attention_prefill

        return (attention_prefill,)

    def _instead(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(reason, stacklevel=4)
