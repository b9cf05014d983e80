"""The text of the class that holds all modules and runs them: the calls of a program."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from graphopt.errors import LoweringError
from graphopt.ir.graph import Call, Node, Program, unique_name
from graphopt.ir.sighted import EMBEDS, PICTURES
from graphopt.ir.types import B, S
from graphopt.lowering.torch.cache_text import CacheText
from graphopt.lowering.torch.classes import ModuleClass
from graphopt.lowering.torch.flow import CallRun, Carried, Flow, find_runs
from graphopt.lowering.torch.loop_arguments import LoopArguments
from graphopt.lowering.torch.packed import stored_slots
from graphopt.lowering.torch.sees import Sees
from graphopt.lowering.torch.text import (
    ATTRIBUTES,
    WIDTH,
    identifier,
    literal,
    quoted,
    wrap,
)

_INPUTS = ("input_ids", "attention_mask", "position_ids")
_SEEN = (EMBEDS, PICTURES)
# What `forward` has as variables, but for the values of the program.
_LOCALS = (*_INPUTS, *_SEEN, "cache", "i", "last", "layer")
_LOOP_VARIABLES = ("table", "tables", "place")


class ModelClass:
    """The class `Model`.

    Args:
        program: What it runs.
        classes: The class of every function.
        unmasked: A model without padding runs without a mask, instead of one of ones.
        with_kernels: It runs by kernels of a target, with caches of every layout.
        agreed: All ranks take the first one's logits.
        sees: What takes embeddings of pictures, where the program does.

    Attributes:
        last_alone: Whether `forward` may be asked for the logits of one token of each text alone.

    Raises:
        LoweringError: The program has an input that a language model does not have.
    """

    def __init__(
        self,
        program: Program,
        classes: Mapping[str, ModuleClass],
        *,
        unmasked: bool = False,
        with_kernels: bool = False,
        agreed: bool = False,
        sees: Sees | None = None,
    ) -> None:
        odd = [name for name in program.inputs if name not in _INPUTS]
        if odd or "input_ids" not in program.inputs:
            raise LoweringError(
                f"{program.name}: its inputs are {', '.join(program.inputs)}.",
                f"A torch artifact takes {', '.join(_INPUTS)}; leave torch out of --emit.",
            )
        self.program = program
        self.classes = classes
        self.unmasked, self.agreed, self.sees = unmasked, agreed, sees
        self._given = "input_ids" if sees is None else EMBEDS
        self.caches = CacheText(program, with_kernels=with_kernels)
        self.flow = Flow(program)
        signatures = {name: made.signature() for name, made in classes.items()}
        self.runs = find_runs(self.flow, program, lambda a, b: signatures[a] == signatures[b])
        self.states = {name: number for number, name in enumerate(program.states)}
        self.modules = self._module_names()
        self.last_alone = with_kernels and self._last_is_by_token()
        self._names = {value: name for name, value in self.flow.inputs.items()}
        if sees is not None:
            self._names[self.flow.results[0][0]] = EMBEDS
        self._hints = self._loop_hints()

    def lines(self) -> list[str]:
        """Return the text of the class."""
        modules = [
            self._module(run, name) for run, name in zip(self.runs, self.modules, strict=True)
        ]
        return [
            "class Model(nn.Module):",
            '    """The whole model; its weights are named as in `model.safetensors`."""',
            "",
            *self.caches.layouts(),
            "    def __init__(self, weights: dict[str, Tensor]) -> None:",
            "        super().__init__()",
            *(line for module in modules for line in module),
            "",
            *self.caches.empty_cache(),
            "",
            *self._forward(),
        ]

    def _class(self, number: int) -> ModuleClass:
        return self.classes[self.program.calls[number].function]

    def _module_names(self) -> list[str]:
        """Return the attribute that holds the module, or the list of modules, of every run."""
        taken = {*ATTRIBUTES, "empty_cache"}
        names: list[str] = []
        repeated = Counter(call.function for call in self.program.calls)
        for run in self.runs:
            call = self.program.calls[run.first]
            wanted = call.function
            if len(run.calls) > 1:
                wanted = "layers"
            elif repeated[call.function] > 1 and call.path:
                wanted = ".".join(call.path.split(".")[-2:])
            name = unique_name(identifier(wanted, ()), taken)
            taken.add(name)
            names.append(name)
        return names

    # --- the modules ---

    def _module(self, run: CallRun, name: str) -> list[str]:
        """Return the statement that makes the module of a call, or the list of a loop."""
        calls = [self.program.calls[number] for number in run.calls]
        kinds = [self._class(number).name for number in run.calls]
        varying = LoopArguments(len(calls), kinds)
        callee = varying.add("kind", kinds)
        arguments = [self._weights(run, calls, varying)]
        for option, attribute in self._class(run.first).body.options.items():
            values = [literal(call.attrs[option]) for call in calls]
            arguments.append(f"{attribute}={varying.add(attribute, values)}")
        made = f"{callee}({', '.join(arguments)})"
        if len(calls) == 1:
            return wrap(f"self.{name} = {made}", 8)
        loop = varying.loop()
        whole = f"{made} {loop}"
        head = f"        self.{name} = nn.ModuleList("
        if len(head) + len(whole) < WIDTH:
            return [f"{head}{whole})"]
        if 12 + len(whole) <= WIDTH:
            return [head, f"            {whole}", "        )"]
        return [head, *wrap(made, 12), *wrap(loop, 12), "        )"]

    def _weights(self, run: CallRun, calls: Sequence[Call], varying: LoopArguments) -> str:
        """Return the weights of a call by slot: those under one prefix, and the others by name."""
        used = [
            stored_slots(self.program, call, self._class(number).function.weights)
            for number, call in zip(run.calls, calls, strict=True)
        ]
        prefixes = [_prefix(weights) for weights in used]
        odd: dict[str, None] = {}
        for weights, prefix in zip(used, prefixes, strict=True):
            odd.update((s, None) for s, name in weights.items() if name != f"{prefix}{s}")
        under = ""
        if any(slot not in odd for weights in used for slot in weights):
            text = varying.add_names("prefix", prefixes)
            under = "weights" if text == '""' else f"under({text}, weights)"
        others: list[str] = []
        for slot in odd:
            first = next(weights[slot] for weights in used if slot in weights)
            names = [weights.get(slot, first) for weights in used]
            others.append(f"{quoted(slot)}: weights[{varying.add_names('name', names)}]")
        if not under:
            return f"{{{', '.join(others)}}}"
        return f"{under} | {{{', '.join(others)}}}" if others else under

    # --- the calls ---

    def _last_is_by_token(self) -> bool:
        """Return whether the last call computes each token by itself, of values of tokens."""
        run = self.runs[-1]
        made = self._class(run.first)
        types = made.arguments[made.calls.index(self.program.calls[run.first])]
        tokens = all(kind.shape[:2] == (B, S) and len(kind.shape) == 3 for kind in types)
        alone = run.first == run.last and not made.function.caches and not made.body.needs
        return tokens and alone and all(map(_is_by_token, made.function.nodes))

    def _forward(self) -> list[str]:
        tokens = "P+S" if self.states else "S"
        lines = [
            "    def forward(",
            "        self,",
            f"        input_ids: Tensor{'' if self.sees is None else ' | None = None'},",
            "        attention_mask: Tensor | None = None,",
            "        position_ids: Tensor | None = None,",
            "        cache: list[KV] | None = None,",
            *(["        last: Tensor | None = None,"] if self.last_alone else []),
            *([] if self.sees is None else self.sees.parameters()),
            "    ) -> tuple[Tensor, list[KV]]:",
            '        """Return the logits [B,S,vocab], and the cache with the new tokens in it.',
            "",
            "        Args:",
            "            input_ids: int64 [B,S].",
            f"            attention_mask: int64 [B,{tokens}], 0 at padding; all ones by default.",
            "            position_ids: int64 [B,S]; by default how many real tokens precede each.",
            self._about_cache(),
            *([_ABOUT_LAST] if self.last_alone else []),
            *([] if self.sees is None else self.sees.about()),
            '        """',
            *(f"        {line}" for line in self._defaults()),
        ]
        statements: list[str] = []
        for run, name in zip(self.runs, self.modules, strict=True):
            if run.first == 0 and self.sees is not None:
                continue  # its rows are made where none are given
            if run is self.runs[-1] and self.last_alone:
                statements += self._at_last(run)
            statements += self._run(run, name)
        logits = self._names[self.flow.output]
        result = logits
        if statements and statements[-1].startswith(f"        {logits} = "):
            result = statements.pop().partition(" = ")[2]
        if self.agreed:
            result = f"agreed({result})"
        for statement in statements:
            body = statement.lstrip()
            lines += wrap(body, len(statement) - len(body))
        return [*lines, *wrap(f"return {result}, {'cache' if self.states else '[]'}", 8)]

    def _at_last(self, run: CallRun) -> list[str]:
        """Return the statements that leave one token of each text of what a run reads."""
        names = list(dict.fromkeys(self._names[value] for value in self.flow.args[run.first]))
        read = ", ".join(f"at(last, {name})" for name in names)
        return [
            "        if last is not None:",
            f"            {', '.join(names)} = {read}",
        ]

    def _about_cache(self) -> str:
        what = "From the step before, with P tokens; None for an empty one. It is not changed."
        return f"            cache: {what if self.states else 'Ignored: this model has none.'}"

    def _defaults(self) -> list[str]:
        """Return the statements that complete the inputs."""
        needs = {need for made in self.classes.values() for need in made.body.needs}
        read = {name for name, value in self.flow.inputs.items() if value.uses}
        masked = bool(read & {"attention_mask", "position_ids"})
        lines = [
            "B, S = input_ids.shape",
            "if 0 in (B, S):",
            '    raise ValueError(f"input_ids is [{B}, {S}]: give a text, and a token of each")',
        ]
        if self.sees is not None:
            lines = self.sees.checks(self.modules[0])
        if self.states:
            lines.append("cache = list(cache or self.empty_cache(B))")
        always = "P" in needs or (masked and not self.unmasked)
        if self.states and always:
            lines += self.caches.past_tokens()
        elif "P" in needs:
            lines.append("P = 0")
        if masked and not self.unmasked:
            tokens = "P + S" if self.states else "S"
            lines += [
                "if attention_mask is None:",
                f"    attention_mask = torch.ones(B, {tokens}, dtype=torch.long, "
                f"device={self._given}.device)",
            ]
        if "position_ids" in read:
            counted = "(attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -S:]"
            lines.append("if position_ids is None:")
            if self.unmasked:
                past, end = ("P", "P + S") if self.states else ("0", "S")
                told = self.caches.past_tokens() if self.states and not always else []
                lines += [
                    "    if attention_mask is None:",
                    *(f"        {line}" for line in told),
                    f"        position_ids = torch.arange({past}, {end}, "
                    f"device={self._given}.device).expand(B, S)",
                    "    else:",
                    f"        position_ids = {counted}",
                ]
            else:
                lines.append(f"    position_ids = {counted}")
        return lines

    def _loop_hints(self) -> dict[Carried, str]:
        """Return names for what a loop carries: those of the layers' own parameters."""
        hints: dict[Carried, str] = {}
        for run in self.runs:
            params = self._class(run.first).body.params
            places = [*run.lead, *([None] * len(run.varying[0] if run.varying else ())), *run.tail]
            for item, param in zip(places, params, strict=True):
                if isinstance(item, int):
                    hints.setdefault(run.initial[item], param)
                    hints[self.flow.results[run.last][item]] = param
        return hints

    def _fresh(self, value: Carried, run: CallRun) -> str:
        """Return a variable for a value that `run` makes: one whose value is not needed."""
        # A loop reads these again and again.
        tables = [value for row in run.varying for value in row]
        read = [*run.fixed, *run.initial.values(), *tables] if len(run.calls) > 1 else []
        taken = {
            name
            for other, name in self._names.items()
            if other.last_use > run.last or other.made == run.last or other in read
        }
        wanted = self._hints.get(value) or re.sub(r"(?<=[A-Za-z])\d+$", "", value.name)
        name = identifier(wanted, ())
        return unique_name(f"{name}_" if name in (*_LOCALS, *_LOOP_VARIABLES) else name, taken)

    def _run(self, run: CallRun, module: str) -> list[str]:
        """Return the statements of one run, not yet broken into lines."""
        varying = LoopArguments(len(run.calls), _LOCALS)
        tables = self._tables(run, varying)
        fixed = {item: self._names[item] for item in run.fixed}
        lines = self._start(run)
        final = self.flow.results[run.last]
        before, after = (
            [self._names[final[item]] if isinstance(item, int) else fixed[item] for item in items]
            for items in (run.lead, run.tail)
        )
        own = {"device": f"{self._given}.device"}
        sizes = [own.get(need, need) for need in self._class(run.first).body.needs]
        slots = self._cache_items(run, varying)
        for value in final:
            if value.uses and value not in self._names:
                self._names[value] = self._fresh(value, run)
        targets = [*(self._names.get(value, "_") for value in final), *slots]
        assigned = f"{', '.join(targets)} = " if targets else ""
        arguments = ", ".join([*before, *tables, *after, *sizes, *slots])
        if len(run.calls) == 1:
            return [*lines, f"        {assigned}self.{module}({arguments})"]
        return [
            *lines,
            f"        for {varying.over(f'self.{module}')}:",
            f"            {assigned}layer({arguments})",
        ]

    def _start(self, run: CallRun) -> list[str]:
        """Name what a loop carries; return the statements that set it before the loop."""
        lines: list[str] = []
        used: set[str] = set()
        for item, value in run.initial.items():
            name = self._names[value]
            if name in used or name in (*_INPUTS, *_SEEN) or value.last_use > run.first:
                name = self._fresh(self.flow.results[run.last][item], run)
                lines.append(f"        {name} = {self._names[value]}")
            used.add(name)
            self._names[self.flow.results[run.last][item]] = name
        return lines

    def _tables(self, run: CallRun, varying: LoopArguments) -> list[str]:
        """Return the argument that differs from call to call of a loop."""
        rows = [[self._names[value] for value in row] for row in run.varying]
        if not any(rows):
            return []
        if all(len(row) == 1 for row in rows):
            return [varying.add("table", [row[0] for row in rows])]
        tuples = [f"({', '.join(row)}{',' if len(row) == 1 else ''})" for row in rows]
        return [f"*{varying.add('tables', tuples)}"]

    def _cache_items(self, run: CallRun, varying: LoopArguments) -> list[str]:
        """Return the items of `cache` that a call reads and replaces."""
        places: list[list[int]] = []
        for number in run.calls:
            call, caches = self.program.calls[number], self._class(number).function.caches
            places.append([self.states[call.caches[cache.slot]] for cache in caches])
        return [f"cache[{varying.add_place(list(column))}]" for column in zip(*places, strict=True)]


# Ops that compute each token by itself, whatever their attributes are.
_BY_TOKEN = frozenset(
    {
        "add", "add_rms_norm", "all_gather", "fused_linear", "integer_linear", "layer_norm",
        "linear", "mul", "packed_linear", "rms_norm", "scale", "softcap", "tanh", "transformed",
    }
)  # fmt: skip
_ABOUT_LAST = (
    "            last: int64 [B], the token of each text whose logits are wanted; all by default."
)


def _is_by_token(node: Node) -> bool:
    if node.op == "aten.slice.Tensor":
        return bool(node.attrs["args"][1] == 2)
    return node.op in _BY_TOKEN


def _prefix(weights: Mapping[str, str]) -> str:
    """Return what most weight names of a call have in front of the slot."""
    found = Counter(
        name[: len(name) - len(slot)] for slot, name in weights.items() if name.endswith(slot)
    )
    return found.most_common(1)[0][0] if found else ""
