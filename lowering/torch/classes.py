"""A function of the program as a class, and the text of that class."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence

from graphopt.ir.dead_code import remove_dead
from graphopt.ir.encoding import Packed
from graphopt.ir.graph import Call, Function
from graphopt.ir.types import Dim, Type
from graphopt.lowering.torch.body import BodyPrinter
from graphopt.lowering.torch.packed import init_statement
from graphopt.lowering.torch.text import WIDTH, prose, quoted, sizes_of, wrap, wrap_def

Shapes = Sequence[tuple[Dim, ...]]

_KINDS = {"device": "torch.device", "pictures": "Tensor | None"}
"""Types of what a body needs besides its parameters, where it is no size."""


class ModuleClass:
    """One function as an `nn.Module`.

    Args:
        name: The name of the class.
        function: The function.
        calls: Its calls.
        arguments: For every call, the types of its arguments.
        results: For every call, the types of its results.
        optional: Numbers of the parameters that may be None.
        packed: Encodings of the weights that are packed, by slot.
        both_ways: See `BodyPrinter`.

    Attributes:
        body: The printed `forward`.
    """

    def __init__(
        self,
        name: str,
        function: Function,
        calls: Sequence[Call],
        arguments: Sequence[Sequence[Type]],
        results: Sequence[Sequence[Type]],
        optional: Collection[int] = (),
        packed: Mapping[str, Packed] | None = None,
        *,
        both_ways: bool = False,
    ) -> None:
        self.name = name
        self.calls = calls
        self.arguments = arguments
        self.results = results
        self.optional = optional
        self.packed = dict(packed or {})
        live = function.clone()
        remove_dead(live)
        self.function = live
        where = calls[0].path or function.name
        codes = [slot for slot in live.weights if slot in self.packed]
        self.body = BodyPrinter(live, where, codes, both_ways=both_ways)

    def signature(self) -> tuple[object, ...]:
        """Return what calls of two classes must have in common to be made by one statement."""
        caches, results = len(self.function.caches), len(self.function.results)
        return caches, results, sorted(self.body.options.items()), self.body.needs

    def lines(self) -> list[str]:
        """Return the text of the class."""
        lines = [f"class {self.name}(nn.Module):", f'    """{self._uses()}"""', ""]
        lines += wrap_def("__init__", self._init_params(), "None", 4)
        lines.append("        super().__init__()")
        for slot, attribute in self.body.attributes.items():
            text = f"self.{attribute} = weights[{quoted(slot)}]"
            if slot in self.packed:
                text = init_statement(attribute, [slot], self.packed[slot])
            lines += wrap(text, 8)
        for attribute, slots in self.body.packs.items():
            if slots[0] in self.packed:
                lines += wrap(init_statement(attribute, slots, self.packed[slots[0]]), 8)
                continue
            parts = ", ".join(f"weights[{quoted(slot)}]" for slot in slots)
            lines += wrap(f"self.{attribute}, self.{sizes_of(attribute)} = pack({parts})", 8)
        for attribute in self.body.options.values():
            lines.append(f"        self.{attribute} = {attribute}")
        for node, attribute in self.body.policies.items():
            lines += wrap(f"self.{attribute} = {self.body.policy_text(node)}", 8)
        lines.append("")
        texts = self.body.results()
        lines += wrap_def("forward", self._params(), self._returns(), 4)
        lines += self._shapes()
        for statement in self.body.statements:
            lines += wrap(statement, 8)
        lines += wrap(f"return {', '.join(texts)}" if texts else "return ()", 8)
        return lines

    def _uses(self) -> str:
        paths = [prose(path) for path in (self.calls[0].path, self.calls[-1].path)]
        where = f": {' to '.join(dict.fromkeys(paths))}" if all(paths) else ""
        count = len(self.calls)
        return f"Called {'once' if count == 1 else f'{count} times'}{where}."

    def _init_params(self) -> list[str]:
        params = ["self", "weights: dict[str, Tensor]"]
        if self.body.options:
            params.append("*")
        for name, attribute in self.body.options.items():
            values = [call.attrs[name] for call in self.calls]
            kinds = sorted({"None" if v is None else type(v).__name__ for v in values})
            kinds.sort(key=lambda kind: kind == "None")
            params.append(f"{attribute}: {' | '.join(kinds)}")
        return params

    def _params(self) -> list[str]:
        kinds = [
            "Tensor | None" if i in self.optional else "Tensor"
            for i in range(len(self.body.params))
        ]
        given = zip(self.body.params, kinds, strict=True)
        params = ["self", *(f"{name}: {kind}" for name, kind in given)]
        sizes = [f"{name}: {_KINDS.get(name, 'int')}" for name in self.body.needs]
        pasts = [f"{past}: KV | None = None" for past in self.body.pasts.values()]
        return [*params, *sizes, *pasts]

    def _returns(self) -> str:
        absent = [v.node is not None and v.node.op == "no_addend" for v in self.function.results]
        kinds = ["None" if none else "Tensor" for none in absent]
        kinds += ["KV"] * len(self.function.caches)
        return kinds[0] if len(kinds) == 1 else f"tuple[{', '.join(kinds) or '()'}]"

    def _shapes(self) -> list[str]:
        """Return a docstring with the shapes of what goes in and comes out."""
        taken = [
            f"{name} {_shape([types[index].shape for types in self.arguments])}"
            for index, name in enumerate(self.body.params)
        ]
        made = [
            _shape([types[index].shape for types in self.results])
            for index in range(len(self.function.results))
        ]
        text = f"{', '.join(taken)} -> {', '.join(made)}" if made else ", ".join(taken)
        text = text.strip() or "Nothing"
        rows = textwrap.wrap(text, WIDTH - 14, break_long_words=False, break_on_hyphens=False)
        rows[0] = f'"""{rows[0]}'
        rows[-1] += '."""'
        return [f"        {row}" for row in rows]


def _shape(shapes: Shapes) -> str:
    """Return a shape as the printed program has it; `*` where calls differ."""
    if len({len(shape) for shape in shapes}) > 1:
        return "[...]"
    sizes = [
        prose(str(column[0]).replace(" ", "")) if all(size == column[0] for size in column) else "*"
        for column in zip(*shapes, strict=True)
    ]
    return f"[{','.join(sizes)}]"
