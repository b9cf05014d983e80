"""Kernel sources with what the plans of a model never use folded away.

The kernels under runtime/kernels do every form of attention; their constants choose. Where a
constant is the same in all plans of a model, the branches it chooses between become the one that
is taken, and parameters, functions and imports that nothing reads any more go with them. What is
left is the source as it was written, comments and layout included, and computes the same.

Only what is understood is folded: conditions that are arithmetic of constants. A condition, a
call or a signature of another kind stays.
"""

from __future__ import annotations

import ast
import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence

from graphopt.lowering.triton.folding import (
    Unknown,
    evaluate,
    folded_expression,
    folded_statement,
    shared_constants,
)
from graphopt.lowering.triton.source_text import (
    import_lines,
    replace_lines,
    tidy,
    with_comments,
    without_arguments,
    without_parameters,
)
from graphopt.lowering.triton.syntax import (
    WIDTH,
    Constants,
    Function,
    arguments_of,
    calls_of,
    constants_of,
    functions_of,
    is_pure,
    is_store,
    names_read,
    parameters_of,
    parsed,
)


def specialise(
    modules: Mapping[str, str], plans: Mapping[str, Sequence[tuple[str, Constants]]]
) -> dict[str, str]:
    """Return the sources of kernels with all folded that is the same in every plan.

    Args:
        modules: Text by name of module. One imports from another by `from .other import name`.
        plans: By the name of a kernel, a description and the constants of each plan that it
            serves. Kernels that serve none are left out.

    Returns:
        Texts by name, without modules in which nothing is left. A kernel takes the parameters
        that it still reads; its module's head says which plans it serves and what was fixed.

    Raises:
        ValueError: Two functions have one name, or a text is not ASCII.
    """
    # A package that is opened is compared with sources made anew. True and 1 are not the same.
    made = tuple(modules.items()), repr({kernel: [*served] for kernel, served in plans.items()})
    if made not in _MADE:
        _MADE[made] = _Specialiser(modules, plans).run()
    return dict(_MADE[made])


_MADE: dict[tuple[tuple[tuple[str, str], ...], str], dict[str, str]] = {}
"""What was made in this process, by what it was made of."""


class _Specialiser:
    """The texts on their way, changed one place at a time and parsed anew after each."""

    def __init__(
        self, modules: Mapping[str, str], plans: Mapping[str, Sequence[tuple[str, Constants]]]
    ) -> None:
        self.texts = dict(modules)
        names = [function.name for _, function, _ in self._functions()]
        # Functions are told apart by name; the parser's offsets are bytes.
        if len(set(names)) < len(names) or not all(text.isascii() for text in modules.values()):
            raise ValueError("kernel modules need ASCII texts and functions of different names")
        self.plans = {kernel: served for kernel, served in plans.items() if served}
        self.fixed = {
            kernel: shared_constants(c for _, c in served) for kernel, served in self.plans.items()
        }
        self.taken = {made.name: parameters_of(made) for _, made, _ in self._functions()}
        self.state: tuple[str, ...] = ()
        self.environments: dict[str, Constants] = {}

    def run(self) -> dict[str, str]:
        steps = (self._remove_function, self._fold, self._remove_assignment,
                 self._remove_parameter, self._remove_name)  # fmt: skip
        while any(step() for step in steps):
            pass
        return {
            name: self._head(name) + tidy(text)
            for name, text in self.texts.items()
            if any(module == name for module, *_ in self._functions())
        }

    # What there is ----------------------------------------------------------------------------

    def _functions(self) -> list[tuple[str, Function, list[ast.AST]]]:
        """Return every function: its module, itself and its nodes."""
        return [(name, *found) for name, text in self.texts.items() for found in functions_of(text)]

    def _calls(self, callee: str) -> list[tuple[str, Function, ast.Call]]:
        return [
            (name, *call)
            for name, text in self.texts.items()
            for call in calls_of(text).get(callee, ())
        ]

    def _environment(self, function: Function) -> Constants:
        """Return the constants of a function that are the same wherever it runs."""
        state = tuple(self.texts.values())
        if state != self.state:
            self.state, self.environments = state, {}
        if function.name not in self.environments:
            self.environments[function.name] = {}  # for itself, should it call itself
            self.environments[function.name] = self._constants(function)
        return self.environments[function.name]

    def _constants(self, function: Function) -> Constants:
        if function.name in self.plans:
            found = self.fixed[function.name]
        else:
            calls = self._calls(function.name)
            if not calls or self._mentions(function.name) != len(calls):
                return {}
            found = shared_constants(
                self._passed(function, caller, call) for _, caller, call in calls
            )
        # Functions are told apart by name: one module has it.
        (constant,) = (
            of_text[function.name]
            for of_text in map(constants_of, self.texts.values())
            if function.name in of_text
        )
        return {name: found[name] for name in found if name in constant}

    def _mentions(self, name: str) -> int:
        """Return how often a function's name is read, in whatever way."""
        return sum(names_read(text)[name] for text in self.texts.values())

    def _passed(self, function: Function, caller: Function, call: ast.Call) -> Constants:
        given = arguments_of(function, call)
        if given is None:
            return {}
        known, found = self._environment(caller), {}
        for name, value in given.items():
            try:
                found[name] = evaluate(value, known)
            except Unknown:
                continue
        return found

    # Steps: each changes one place and returns whether it found one -----------------------------

    def _remove_function(self) -> bool:
        """Remove all functions of a module that nothing reads: each text is parsed anew."""
        for name, text in self.texts.items():
            lines = text.split("\n")
            for function, _ in reversed(functions_of(text)):
                if function.name not in self.plans and not self._mentions(function.name):
                    decorators = [node.lineno for node in function.decorator_list]
                    first = with_comments(lines, min([function.lineno, *decorators]) - 1)
                    del lines[first : function.end_lineno]
            changed = "\n".join(lines)
            if changed != text:
                self.texts[name] = changed
                return True
        return False

    def _fold(self) -> bool:
        for name, text in self.texts.items():
            folded = self._folded(text)
            if folded != text:
                self.texts[name] = folded
                return True
        return False

    def _folded(self, text: str) -> str:
        """Return a text with folded what is decided, from its end to its beginning.

        Lines in front of what was folded keep their numbers; what lies around it waits for the
        next step.
        """
        changed, untouched = text, text.count("\n") + 2
        for function, nodes in reversed(functions_of(text)):
            known = self._environment(function)
            gone: set[ast.stmt] = set()
            choices = [node for node in nodes if isinstance(node, ast.If | ast.IfExp)]
            for node in sorted(choices, key=lambda n: (n.lineno, n.col_offset), reverse=True):
                assert node.end_lineno is not None
                if node.end_lineno >= untouched:
                    continue
                if isinstance(node, ast.If):
                    folded = folded_statement(changed, function, node, known, gone)
                else:
                    folded = folded_expression(changed, function, node, known)
                if folded is None:
                    continue
                if _parses(folded):
                    changed, untouched = folded, node.lineno
                else:
                    gone.difference_update([node])
        return changed

    def _remove_assignment(self) -> bool:
        for name, text in self.texts.items():
            lines = text.split("\n")
            for function, nodes in reversed(functions_of(text)):
                _remove_assignments(lines, function, nodes)
            changed = "\n".join(lines)
            if changed != text:
                self.texts[name] = changed
                return True
        return False

    def _remove_parameter(self) -> bool:
        for name, function, nodes in self._functions():
            read = {node.id for node in nodes if isinstance(node, ast.Name)}
            arguments = function.args
            plain = not (
                arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg
                or arguments.kwarg or arguments.defaults
            )  # fmt: skip
            unread = [arg.arg for arg in arguments.args if arg.arg not in read]
            if not plain or not unread:
                continue
            calls = self._calls(function.name)
            if self._mentions(function.name) != len(calls):
                continue
            changed = dict(self.texts)
            for module in {module for module, _, _ in calls}:
                text = without_arguments(changed[module], function, unread)
                if text is None:
                    break
                changed[module] = text
            else:
                changed[name] = without_parameters(changed[name], function.name, unread)
                self.texts = changed
                return True
        return False

    def _remove_name(self) -> bool:
        """Remove what a module imports or defines at its top and nobody reads."""
        imported = {
            alias.name
            for text in self.texts.values()
            for node in parsed(text).body
            if isinstance(node, ast.ImportFrom) and node.level
            for alias in node.names
        }
        for name, text in self.texts.items():
            tree = parsed(text)
            read = set(names_read(text))
            for node in tree.body:
                made: list[str] | None = None
                if isinstance(node, ast.ImportFrom) and node.level:
                    if any(alias.asname is not None for alias in node.names):
                        continue
                    kept = [alias.name for alias in node.names if alias.name in read]
                    if len(kept) < len(node.names):
                        made = import_lines(f"from .{node.module} import", kept) if kept else []
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    if node.target.id not in read | imported:
                        made = []
                if made is not None:
                    lines = text.split("\n")
                    first = node.lineno - 1
                    if not made:
                        first = with_comments(lines, first)
                    lines[first : node.end_lineno] = made
                    self.texts[name] = "\n".join(lines)
                    return True
        return False

    def _head(self, module: str) -> str:
        """Return the comment in front of a module."""
        served: dict[tuple[str, ...], list[Function]] = {}
        for name, function, _ in self._functions():
            if name == module and function.name in self.plans:
                described = dict.fromkeys(line for line, _ in self.plans[function.name])
                served.setdefault(tuple(described), []).append(function)
        rows: list[str] = []
        for lines, kernels in served.items():
            rows.append(f"{' and '.join(k.name for k in kernels)}: for the model's plans")
            rows += itertools.chain.from_iterable(_indented(line) for line in lines)
            for kernel in kernels:
                fixed = self.fixed[kernel.name]
                gone = [p for p in self.taken[kernel.name] if p not in parameters_of(kernel)]
                same = ", ".join(f"{p}={fixed[p]}" for p in gone if p in fixed)
                if same:
                    rows += _indented(f"In {kernel.name} fixed, since the same in all: {same}")
        if not rows:
            rows = ["What the kernels of this folder call, as far as the model's plans need it."]
        return "".join(f"# {row}\n" for row in rows)


def _remove_assignments(lines: list[str], function: Function, nodes: Sequence[ast.AST]) -> None:
    """Remove what a function assigns to names that nobody reads, from its end to its beginning."""
    names = [node for node in nodes if isinstance(node, ast.Name)]
    read = {node.id for node in names if not is_store(node)}
    gone: set[ast.stmt] = set()
    assignments = [node for node in nodes if isinstance(node, ast.Assign)]
    for node in sorted(assignments, key=lambda node: node.lineno, reverse=True):
        if len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name | ast.Tuple):
            continue
        targets = [n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
        unread = [target for target in targets if target not in read and target != "_"]
        if unread and len(unread) == len(targets) and is_pure(node.value):
            replace_lines(lines, function, node, [], gone)
        elif unread and len(targets) > 1 and node.lineno == node.targets[0].end_lineno:
            line = lines[node.lineno - 1]
            for target in unread:
                line = re.sub(rf"\b{target}\b", "_", line, count=1)
            lines[node.lineno - 1] = line


def _parses(text: str) -> bool:
    """Return whether a text is Python: where its layout is unheard of, folding it may not be."""
    try:
        parsed(text)
    except SyntaxError:
        return False
    return True


def _indented(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH - 2, initial_indent="  ", subsequent_indent="    ")
