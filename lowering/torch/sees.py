"""Embeddings of pictures in the place of token ids: what `Model.forward` has for them."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.errors import UsageError
from graphopt.ir.context import rotary_switch
from graphopt.ir.graph import Program, resolve_attrs
from graphopt.ir.ops.attention import ATTENTIONS, BIAS, SELECTED
from graphopt.ir.ranks import is_sharded
from graphopt.ir.sighted import rows_width


@dataclass(frozen=True)
class Sees:
    """How a model takes embeddings.

    Attributes:
        width: D, the features of one.
        axes: Positions have three axes where there are pictures.
        both_ways: The tokens of one picture see each other both ways.
    """

    width: int
    axes: bool
    both_ways: bool

    @classmethod
    def of(cls, program: Program) -> Sees | None:
        """Return how a program takes them; None where its package takes token ids alone."""
        if program.vision is None or why_ids_alone(program) is not None:
            return None
        vision = program.vision
        return cls(rows_width(program), vision.sections is not None, vision.both_ways)

    def parameters(self) -> list[str]:
        """Return the parameters of `forward`."""
        kind = "Tensor | None = None,"
        names = ["inputs_embeds", *(["pictures"] if self.both_ways else [])]
        return [f"        {name}: {kind}" for name in names]

    def about(self) -> list[str]:
        """Return what the docstring of `forward` says of them."""
        pad = " " * 12
        lines = [
            f"{pad}inputs_embeds: [B,S,{self.width}] in the place of `input_ids`: what `tower` "
            "makes of text",
            f"{pad}    and pictures, or `token_rows` of text.",
        ]
        if self.axes:
            lines.append(f"{pad}    `position_ids` then are [3,B,S], in time, height and width.")
        if self.both_ways:
            lines += [
                f"{pad}pictures: int64 [B,P+S], which picture each token belongs to, negative for "
                "none;",
                f"{pad}    by default there is none.",
            ]
        return lines

    def checks(self, rows: str) -> list[str]:
        """Return the statements of `forward` that bring either of the two to embeddings.

        Args:
            rows: The module that makes embeddings of token ids.
        """
        lines = [
            "given = input_ids if inputs_embeds is None else inputs_embeds",
            "if given is None or (input_ids is not None and inputs_embeds is not None):",
            '    raise ValueError("give either input_ids or inputs_embeds")',
            "B, S = given.shape[:2]",
            "if 0 in (B, S):",
            '    raise ValueError(f"a prompt of [{B}, {S}] tokens: give a text, and a token of '
            'each")',
            "if inputs_embeds is None:",
            f"    inputs_embeds = self.{rows}(input_ids)",
            "else:",
            f"    if inputs_embeds.shape[2:] != ({self.width},):",
            "        raise ValueError(",
            '            f"inputs_embeds is {[*inputs_embeds.shape]}: this model takes '
            f'[B,S,{self.width}]"',
            "        )",
        ]
        if self.axes:
            lines += [
                "    if position_ids is None:",
                "        raise ValueError(",
                '            "inputs_embeds without position_ids: this model takes [3,B,S], in '
                'time, height "',
                '            "and width, which the tower gives"',
                "        )",
            ]
        lines += [
            "    like = next(p for p in self.parameters() if p.is_floating_point())",
            "    inputs_embeds = inputs_embeds.to(like.dtype)",
        ]
        if self.axes:
            lines += [
                "if position_ids is not None and position_ids.shape not in ((B, S), (3, B, S)):",
                "    raise ValueError(",
                '        f"position_ids is {[*position_ids.shape]}: this model takes [3,{B},{S}], '
                'or "',
                '        f"[{B},{S}] for text"',
                "    )",
            ]
        if self.both_ways:
            lines += [
                "if pictures is not None and (pictures.dim() != 2 or pictures.shape[1] < S):",
                "    raise ValueError(",
                '        f"pictures is {[*pictures.shape]}: give [B,P+S], a number for each token"',
                "    )",
            ]
        return lines


def why_ids_alone(program: Program) -> str | None:
    """Return why the package of a model that sees takes token ids alone; None where it does not.

    A model of text has none either.
    """
    if program.vision is None:
        return None
    if is_sharded(program):
        return "pictures have no form in a package for several ranks"
    if rotary_switch(program) is not None:
        return "pictures have no form where frequencies change with the length of the text"
    if not any("attention_mask" in call.args for call in program.calls):
        return "pictures have no form where no mask tells padding from text"
    try:
        rows_width(program)
    except UsageError as error:
        return error.message.removesuffix(".")
    return _one_way(program) if program.vision.both_ways else None


def _one_way(program: Program) -> str | None:
    """Return why tokens of a picture cannot see each other both ways; None where they can."""
    if any(state.host is not None for state in program.states.values()):
        return "pictures that are seen both ways have no form with keys in the host's memory"
    for call in program.calls:
        for node in program.functions[call.function].nodes:
            if node.op not in ATTENTIONS:
                continue
            attrs, where = resolve_attrs(node, call), call.path or call.function
            odd = [key for key in ("chunk", "lse", "page_max") if attrs.get(key)]
            if node.op != "attention" or odd:
                what = f"an attention with {odd[0]}" if odd else f"its {node.op}"
                return f"{where}: pictures that are seen both ways have no form in {what}"
            given = node.operand(BIAS) is not None or node.operand(SELECTED) is not None
            if given or not attrs["causal"]:
                return f"{where}: pictures that are seen both ways need an attention that is causal"
    return None
