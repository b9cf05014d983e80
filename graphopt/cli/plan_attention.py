"""`graphopt plan-attention`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, cast

import typer

from graphopt.cli import console as ui
from graphopt.cli.completion import complete_target
from graphopt.cli.shared import Json, errors_as_sentences, print_json


@dataclass(frozen=True)
class AttentionFlags:
    """The options of `graphopt plan-attention`."""

    target: Annotated[
        str, typer.Option(help="See 'graphopt targets'.", autocompletion=complete_target)
    ]
    head_dim: Annotated[int, typer.Option(help="Size of a query or key head.")]
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32
    kv_heads: Annotated[int | None, typer.Option(help="Key heads; all heads by default.")] = None
    value_dim: Annotated[int | None, typer.Option(help="Size of a value head.")] = None
    dtype: Annotated[str, typer.Option(help="f16 or bf16.")] = "f16"
    phase: Annotated[str, typer.Option(help="prefill or decode.")] = "prefill"
    causal: Annotated[bool, typer.Option(help="See keys up to the query's place.")] = True
    align: Annotated[str, typer.Option(help="bottom-right or top-left.")] = "bottom-right"
    window: Annotated[int | None, typer.Option(help="Keys a query sees.")] = None
    chunk: Annotated[int | None, typer.Option(help="Length of the chunks of keys.")] = None
    softcap: Annotated[float | None, typer.Option(help="Bound of the scores.")] = None
    kv: Annotated[str, typer.Option(help="contiguous, ring or paged.")] = "contiguous"
    page: Annotated[int | None, typer.Option(help="Tokens of a page.")] = None
    kv_bits: Annotated[int, typer.Option(help="Bits of a cached element.")] = 16
    also: Annotated[
        str,
        typer.Option(
            "--with",
            help="Comma-separated: sinks, alibi, padding_mask, bias, varlen, kv_lens, "
            "selected_blocks, lse, page_max.",
        ),
    ] = ""


@errors_as_sentences
def plan_attention_command(flags: AttentionFlags, as_json: Json = False) -> None:
    """Show which kernel a target runs an attention with, and by which inequalities."""
    from graphopt.errors import unknown_name
    from graphopt.lowering.kernels import plan_attention
    from graphopt.plan import AttentionSpec
    from graphopt.targets import get_target

    switches = [f.name for f in dataclasses.fields(AttentionSpec) if f.default is False]
    wanted = [name.strip() for name in flags.also.split(",") if name.strip()]
    for name in wanted:
        if name not in switches:
            raise unknown_name("feature", name, switches)
    for name, value, known in (
        ("phase", flags.phase, ("prefill", "decode")),
        ("alignment", flags.align, ("bottom-right", "top-left")),
        ("cache", flags.kv, ("contiguous", "ring", "paged")),
    ):
        if value not in known:
            raise unknown_name(name, value, known)
    given = dataclasses.asdict(flags)
    del given["target"], given["also"]
    given["kv_heads"] = flags.kv_heads or flags.heads
    spec = AttentionSpec(**given, **cast(Any, dict.fromkeys(wanted, True)))
    plan = plan_attention(spec, get_target(flags.target))
    if as_json:
        print_json(dataclasses.asdict(plan))
    else:
        ui.stdout().print("\n".join(plan.lines()), soft_wrap=True)
