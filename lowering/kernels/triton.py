"""The family in Triton, for NVIDIA GPUs from Ampere on: attention, and the rest of a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from graphopt.lowering.kernels.family import (
    KernelFamily,
    LayerFamily,
    LayerKernels,
    LayerSetup,
    register_family,
    register_layer_family,
    runtime_text,
)
from graphopt.lowering.triton.specialise import specialise
from graphopt.plan import AttentionPlan
from graphopt.plan.base import form_constants, split_size
from graphopt.plan.triton import TritonPlanner, refuses_machine
from graphopt.runtime.expert_tiles import ExpertTiles, FewTokens, ManyTokens, Tiles
from graphopt.runtime.quantised_tiles import (
    FewTiles,
    FrontFigures,
    IntegerTiles,
    PackedTiles,
    QuantisedTiles,
)
from graphopt.runtime.reduction_plan import LinearTiles, ReductionFigures
from graphopt.targets import Target, get_target

_FILES = ("common", "prefill", "decode")
# The functions that run a plan, by its phase.
_ENTRIES = {
    "prefill": ("attention_prefill",),
    "decode": ("attention_decode", "attention_merge"),
}


_OF_CODES = (
    "integer_linear", "packed_linear", "gated_integer_linear", "gated_packed_linear",
    "norm_packed_linear",
)  # fmt: skip
_OF_RANKS = ("all_reduce", "attention_linear_all_reduce", "linear_all_reduce")
_FRONTED = ("transformed_packed_linear",)
# What a kernel in CUDA C++ that is compiled by the machine that runs it takes.
_COMPILED = ("compiled", "driver", "nvrtc", "errors")


def kernel_constants(plan: AttentionPlan, *, ring: int = 0) -> dict[str, Any]:
    """Return every constant of kernels/prefill.py or kernels/decode.py, and the launch options.

    Args:
        ring: Slots of the ring, where the plan's cache is one.
    """
    spec = plan.spec
    first, rest = split_size(spec.head_dim)
    value_first, value_rest = split_size(spec.values)
    if spec.kv_bits == 4:
        # The halves of a head, which lie in the low and in the high bits of its bytes.
        first = rest = spec.head_dim // 2
        value_first = value_rest = spec.values // 2
    return {
        **form_constants(spec, ring=ring),
        "D0": first,
        "D1": rest,
        "V0": value_first,
        "V1": value_rest,
        "OVERLAP": "programmatic-launch" in get_target(plan.target).features,
        **plan.tiles,
    }


@register_family
class TritonFamily(KernelFamily):
    """Kernels that the machine at hand compiles when it runs, emitted for a model's own plans."""

    planner = TritonPlanner()
    launcher = "triton_attention"

    def constants(self, plan: AttentionPlan, *, ring: int = 0) -> dict[str, Any]:
        return kernel_constants(plan, ring=ring)

    def sources(self, plans: Mapping[str, AttentionPlan]) -> dict[str, str]:
        """Return the kernels with all folded that is the same in every plan."""
        served: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for plan in plans.values():
            for entry in _ENTRIES[plan.spec.phase]:
                row = (plan.spec.describe(), self.constants(plan))
                served.setdefault(entry, []).append(row)
        texts = specialise({name: runtime_text(f"kernels/{name}.py") for name in _FILES}, served)
        if any(plan.spec.kv_bits < 16 for plan in plans.values()):
            # As a whole: other kernels of a model read codes too.
            texts["codes"] = runtime_text("kernels/codes.py")
        return {f"{name}.py": text for name, text in texts.items()}


def expert_tiles(target: Target) -> ExpertTiles | None:
    """Return the tiles of the experts' kernels that a target's file has; None where it has none."""
    if target.experts is None:
        return None
    many = tuple(
        ManyTokens(row["tokens"], Tiles(**row["expand"]), Tiles(**row["reduce"]))
        for row in target.experts["many"]
    )
    few = target.experts["few"]
    return ExpertTiles(many, FewTokens(**few["expand"]), FewTokens(**few["reduce"]))


def quantised_tiles(target: Target) -> QuantisedTiles | None:
    """Return the tiles of quantised weights' kernels.

    None where the target's file has none, or its matrix units take no int8.
    """
    table = target.quantised
    multiplies = any(unit.input == "i8" for unit in target.matrix_units)
    if table is None or target.cores is None or not multiplies:
        return None
    packed, integer_packed = (
        tuple(PackedTiles(**row) for row in table[name]) for name in ("packed", "integer_packed")
    )
    return QuantisedTiles(
        target.cores,
        target.limit("shared_bytes_per_block"),
        packed,
        integer_packed,
        IntegerTiles(**table["integer"]),
        tuple(FewTiles(**row) for row in table["few"]),
        None if table["front"] is None else FrontFigures(**table["front"]),
    )


def transforms_in_front(target: Target) -> bool:
    """Return whether products of few tokens may do transforms that stand in front of them."""
    tiles = quantised_tiles(target)
    front = None if tiles is None or not tiles.few else tiles.front
    return front is not None and front.tokens > 0


def reduction_figures(target: Target) -> ReductionFigures | None:
    """Return what sums over ranks are planned by; None where the target's file does not say it."""
    if target.reductions is None or target.cores is None:
        return None
    tiles = tuple(LinearTiles(**row) for row in target.reductions["tiles"])
    return ReductionFigures(**{**target.reductions, "cores": target.cores, "tiles": tiles})


def _expert_setup(target: Target) -> LayerSetup | None:
    tiles = expert_tiles(target)
    if tiles is None:
        return None
    rows = [f"        {row!r}," for row in tiles.many]
    return LayerSetup(
        {
            "expert_tiles": ("ExpertTiles", "FewTokens", "ManyTokens", "Tiles"),
            "moe": ("ExpertKernels",),
        },
        ("moe",),
        (
            "EXPERTS = ExpertTiles(",
            "    many=(",
            *rows,
            "    ),",
            f"    expand_few={tiles.expand_few!r},",
            f"    reduce_few={tiles.reduce_few!r},",
            ")",
            "moe = ExpertKernels(EXPERTS).moe",
        ),
    )


def _quantised_setup(target: Target) -> LayerSetup | None:
    tiles = quantised_tiles(target)
    if tiles is None:
        return None
    rows = {
        name: [f"        {row!r}," for row in getattr(tiles, name)]
        for name in ("packed", "integer_packed", "few")
    }
    return LayerSetup(
        {
            "quantised_tiles": ("FewTiles", "IntegerTiles", "PackedTiles", "QuantisedTiles"),
            "quantised_linear": ("QuantisedKernels",),
        },
        _OF_CODES,
        (
            "QUANTISED = QuantisedTiles(",
            f"    cores={tiles.cores},",
            f"    shared_bytes={tiles.shared_bytes},",
            *(line for name in rows for line in (f"    {name}=(", *rows[name], "    ),")),
            f"    integer={tiles.integer!r},",
            ")",
            "_LINEARS = QuantisedKernels(QUANTISED)",
            *(f"{name} = _LINEARS.{name}" for name in _OF_CODES),
        ),
    )


def _transform_setup(target: Target) -> LayerSetup | None:
    shared = target.limits.get("shared_bytes_per_block")
    if shared is None:
        return None
    return LayerSetup(
        {"transforms": ("TransformKernels",)},
        ("transformed",),
        (f"transformed = TransformKernels(shared_bytes={shared}).transformed",),
    )


def _front_setup(target: Target) -> LayerSetup | None:
    tiles = quantised_tiles(target)
    if tiles is None or tiles.front is None:
        return None
    return LayerSetup(
        {"transformed_linear": ("TransformedLinears",)},
        ("transformed_packed_linear",),
        (
            f"_FRONTED = TransformedLinears(_LINEARS, transformed, tokens={tiles.front.tokens})",
            "transformed_packed_linear = _FRONTED.transformed_packed_linear",
        ),
    )


def _reduction_setup(target: Target) -> LayerSetup | None:
    figures = reduction_figures(target)
    if figures is None:
        return None
    rows = [
        f"    {field.name}={getattr(figures, field.name)!r},"
        for field in dataclasses.fields(figures)
    ]
    return LayerSetup(
        {"reduction_plan": ("LinearTiles", "ReductionFigures"), "reductions": ("RankReductions",)},
        _OF_RANKS,
        (
            "REDUCTIONS = ReductionFigures(",
            *rows,
            ")",
            "_SUMS = RankReductions(REDUCTIONS)",
            *(f"{name} = _SUMS.{name}" for name in _OF_RANKS),
        ),
    )


register_layer_family(
    LayerFamily(
        "triton",
        (
            LayerKernels(
                module="fused",
                files=("block", "packed_kv"),
                functions=("rms_norm", "add_rms_norm", "rope", "rope_pair", "act_mul"),
                cache_writer="append_kv",
            ),
            LayerKernels(
                module="moe",
                files=("experts",),
                functions=("moe", "route", "top_k_gating"),
                needed_by=frozenset({"experts", "moe"}),
                helpers=("expert_tiles",),
                setup=_expert_setup,
            ),
            LayerKernels(
                module="quantised_linear",
                files=("codes", "packed_linear", "integer_linear"),
                functions=_OF_CODES,
                classes=("QuantisedWeight",),
                needed_by=frozenset(
                    {"integer_linear", "packed_linear", "norm_packed_linear", *_FRONTED}
                ),
                helpers=(
                    "quantised_tiles",
                    "packed_codes",
                    "packed_few",
                    "quantised_launch",
                    *_COMPILED,
                ),
                sources=("activations.cu", "packed_front.cu", "hopper_packed_few.cu"),
                setup=_quantised_setup,
            ),
            LayerKernels(
                module="transforms",
                files=("transform",),
                functions=("transformed",),
                needed_by=frozenset({"transformed", *_FRONTED}),
                helpers=("kronecker", "wgmma", *_COMPILED),
                sources=("activations.cu", "hopper_transform.cu"),
                setup=_transform_setup,
            ),
            LayerKernels(
                module="transformed_linear",
                files=(),
                functions=_FRONTED,
                needed_by=frozenset(_FRONTED),
                setup=_front_setup,
            ),
            LayerKernels(
                module="reductions",
                files=("peer_sums", "persistent_linear"),
                functions=_OF_RANKS,
                needed_by=frozenset(_OF_RANKS),
                helpers=(
                    "attention_rows",
                    "peer_memory",
                    "peer_reduce",
                    "peer_linear",
                    "reduction_plan",
                ),
                setup=_reduction_setup,
            ),
        ),
        refuses=refuses_machine,
    )
)
