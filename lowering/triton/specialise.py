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
import functools
import itertools
import operator
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Constants = Mapping[str, Any]
Function = ast.FunctionDef

WIDTH = 100
_OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.USub: operator.neg,
}  # fmt: skip
# Calls without effect, of `tl` and of Python: an assignment of one that nobody reads can go.
_PURE = {"arange", "cdiv", "full", "load", "max", "maximum", "min", "minimum", "num_programs",
         "program_id", "to", "where", "zeros"}  # fmt: skip


class _Unknown(Exception):
    """A value that hangs on more than constants."""


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
    return _Specialiser(modules, plans).run()


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> ast.Module:
    """Return the tree of a text, which nobody changes."""
    return ast.parse(text)


@functools.lru_cache(maxsize=256)
def _read(text: str) -> Counter[str]:
    """Return how often each name is read in a text; what is imported under another, too."""
    nodes = list(ast.walk(_parsed(text)))
    found = Counter(n.id for n in nodes if isinstance(n, ast.Name) and not _is_store(n))
    found.update(n.name for n in nodes if isinstance(n, ast.alias) and n.asname is not None)
    return found


@functools.lru_cache(maxsize=256)
def _walked(text: str) -> list[tuple[Function, list[ast.AST]]]:
    """Return the functions of a text, each with all its nodes."""
    return [(f, list(ast.walk(f))) for f in _parsed(text).body if isinstance(f, Function)]


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
        self.fixed = {kernel: _same(c for _, c in served) for kernel, served in self.plans.items()}
        self.taken = {made.name: _parameters(made) for _, made, _ in self._functions()}
        self.state: tuple[str, ...] = ()
        self.environments: dict[str, Constants] = {}

    def run(self) -> dict[str, str]:
        steps = (self._remove_function, self._fold, self._remove_assignment,
                 self._remove_parameter, self._remove_name)  # fmt: skip
        while any(step() for step in steps):
            pass
        return {
            name: self._head(name) + _tidy(text)
            for name, text in self.texts.items()
            if any(module == name for module, *_ in self._functions())
        }

    # What there is ----------------------------------------------------------------------------

    def _functions(self) -> list[tuple[str, Function, list[ast.AST]]]:
        """Return every function: its module, itself and its nodes."""
        return [(name, *found) for name, text in self.texts.items() for found in _walked(text)]

    def _calls(self, callee: str) -> list[tuple[str, Function, ast.Call]]:
        return [
            (name, function, node)
            for name, function, nodes in self._functions()
            for node in nodes
            if isinstance(node, ast.Call) and _name(node.func) == callee
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
            found = _same(self._passed(function, caller, call) for _, caller, call in calls)
        constant = {
            arg.arg
            for arg in function.args.args
            if arg.annotation is not None and "constexpr" in ast.unparse(arg.annotation)
        }
        names = (node for node in ast.walk(function) if isinstance(node, ast.Name))
        stored = {node.id for node in names if _is_store(node)}
        return {name: found[name] for name in found if name in constant - stored}

    def _mentions(self, name: str) -> int:
        """Return how often a function's name is read, in whatever way."""
        return sum(_read(text)[name] for text in self.texts.values())

    def _passed(self, function: Function, caller: Function, call: ast.Call) -> Constants:
        given = _arguments(function, call)
        if given is None:
            return {}
        known, found = self._environment(caller), {}
        for name, value in given.items():
            try:
                found[name] = _evaluate(value, known)
            except _Unknown:
                continue
        return found

    # Steps: each changes one place and returns whether it found one -----------------------------

    def _remove_function(self) -> bool:
        for name, function, _ in self._functions():
            if function.name not in self.plans and not self._mentions(function.name):
                decorators = [node.lineno for node in function.decorator_list]
                lines = self.texts[name].split("\n")
                first = _with_comments(lines, min([function.lineno, *decorators]) - 1)
                assert function.end_lineno is not None
                self.texts[name] = "\n".join(lines[:first] + lines[function.end_lineno :])
                return True
        return False

    def _fold(self) -> bool:
        for name, function, nodes in self._functions():
            known = self._environment(function)
            for node in nodes:
                text = None
                if isinstance(node, ast.If):
                    text = _folded_statement(self.texts[name], function, node, known)
                elif isinstance(node, ast.IfExp):
                    text = _folded_expression(self.texts[name], function, node, known)
                if text is not None and _parses(text):
                    self.texts[name] = text
                    return True
        return False

    def _remove_assignment(self) -> bool:
        for name, function, nodes in self._functions():
            names = [node for node in nodes if isinstance(node, ast.Name)]
            read = {node.id for node in names if not _is_store(node)}
            for node in nodes:
                if not isinstance(node, ast.Assign) or len(node.targets) != 1:
                    continue
                targets = [n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
                unread = [target for target in targets if target not in read and target != "_"]
                if isinstance(node.targets[0], ast.Name | ast.Tuple) and unread:
                    lines = self.texts[name].split("\n")
                    if len(unread) == len(targets) and _is_pure(node.value):
                        _replace_lines(lines, function, node, [])
                    elif len(targets) > 1 and node.lineno == node.targets[0].end_lineno:
                        line = lines[node.lineno - 1]
                        for target in unread:
                            line = re.sub(rf"\b{target}\b", "_", line, count=1)
                        lines[node.lineno - 1] = line
                    else:
                        continue
                    self.texts[name] = "\n".join(lines)
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
                text = _without_arguments(changed[module], function, unread)
                if text is None:
                    break
                changed[module] = text
            else:
                changed[name] = _without_parameters(changed[name], function.name, unread)
                self.texts = changed
                return True
        return False

    def _remove_name(self) -> bool:
        """Remove what a module imports or defines at its top and nobody reads."""
        imported = {
            alias.name
            for text in self.texts.values()
            for node in _parsed(text).body
            if isinstance(node, ast.ImportFrom) and node.level
            for alias in node.names
        }
        for name, text in self.texts.items():
            tree = _parsed(text)
            read = set(_read(text))
            for node in tree.body:
                made: list[str] | None = None
                if isinstance(node, ast.ImportFrom) and node.level:
                    if any(alias.asname is not None for alias in node.names):
                        continue
                    kept = [alias.name for alias in node.names if alias.name in read]
                    if len(kept) < len(node.names):
                        made = _import_lines(f"from .{node.module} import", kept) if kept else []
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    if node.target.id not in read | imported:
                        made = []
                if made is not None:
                    lines = text.split("\n")
                    first = node.lineno - 1
                    if not made:
                        first = _with_comments(lines, first)
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
                gone = [p for p in self.taken[kernel.name] if p not in _parameters(kernel)]
                same = ", ".join(f"{p}={fixed[p]}" for p in gone if p in fixed)
                if same:
                    rows += _indented(f"In {kernel.name} fixed, since the same in all: {same}")
        if not rows:
            rows = ["What the kernels of this folder call, as far as the model's plans need it."]
        return "".join(f"# {row}\n" for row in rows)


def _parses(text: str) -> bool:
    """Return whether a text is Python: where its layout is unheard of, folding it may not be."""
    try:
        _parsed(text)
    except SyntaxError:
        return False
    return True


def _indented(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH - 2, initial_indent="  ", subsequent_indent="    ")


# Values -------------------------------------------------------------------------------------------


def _same(constants: Iterator[Constants]) -> dict[str, Any]:
    """Return what is the same in all; True and 1 are not."""
    first, *rest = constants
    return {
        name: value
        for name, value in first.items()
        if all(name in other and repr(other[name]) == repr(value) for other in rest)
    }


def _evaluate(node: ast.expr, known: Constants) -> Any:
    """Return the value of an expression over constants.

    Raises:
        _Unknown: It hangs on more than them.
    """
    match node:
        case ast.Constant(value=bool() | int() | float()):
            return node.value
        case ast.Name() if node.id in known:
            return known[node.id]
        case ast.UnaryOp() if type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](_evaluate(node.operand, known))
        case ast.BinOp() if type(node.op) in _OPERATIONS:
            return _calculate(node.op, node.left, node.right, known)
        case ast.Compare(ops=[op]) if type(op) in _OPERATIONS:
            return _calculate(op, node.left, node.comparators[0], known)
        case ast.UnaryOp(op=ast.Not()):
            return not _holds(node.operand, known)
    raise _Unknown


def _calculate(op: ast.AST, left: ast.expr, right: ast.expr, known: Constants) -> Any:
    try:
        return _OPERATIONS[type(op)](_evaluate(left, known), _evaluate(right, known))
    except ZeroDivisionError:
        raise _Unknown from None


def _holds(test: ast.expr, known: Constants) -> bool:
    """Return whether a condition holds; `and` and `or` where that is known whatever the rest is.

    Raises:
        _Unknown: It hangs on more than constants.
    """
    if not isinstance(test, ast.BoolOp):
        return bool(_evaluate(test, known))
    ends = isinstance(test.op, ast.Or)
    unknown = False
    for value in test.values:
        try:
            if _holds(value, known) == ends:
                return ends
        except _Unknown:
            unknown = True
    if unknown:
        raise _Unknown
    return not ends


def _arguments(function: Function, call: ast.Call) -> dict[str, ast.expr] | None:
    """Return the arguments of a call by parameter; None where that is not plain to see."""
    if any(isinstance(arg, ast.Starred) for arg in call.args):
        return None
    given = dict(zip(_parameters(function), call.args, strict=False))
    for keyword in call.keywords:
        if keyword.arg is None:
            return None
        given[keyword.arg] = keyword.value
    return given


def _parameters(function: Function) -> list[str]:
    return [arg.arg for arg in function.args.args]


def _name(node: ast.expr) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _is_store(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _is_pure(node: ast.expr) -> bool:
    """Return whether an expression has no effect but its value."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            called = part.func.attr if isinstance(part.func, ast.Attribute) else _name(part.func)
            if called not in _PURE:
                return False
        elif isinstance(part, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
            return False
    return True


# Folding ------------------------------------------------------------------------------------------


def _folded_statement(text: str, function: Function, node: ast.If, known: Constants) -> str | None:
    """Return the text with an `if` without the branches that are never taken, if there are any."""
    lines = text.split("\n")
    branches = _branches(lines, node)
    if branches is None:
        return None
    kept: list[tuple[list[str], list[str]]] = []
    for header, test, suite in branches:
        try:
            taken = test is None or _holds(test, known)
        except _Unknown:
            kept.append((header, suite))
            continue
        if taken:
            kept.append(([], suite))
            break
    if len(kept) == len(branches) and all(
        bool(header) == (test is not None)
        for (header, _), (_, test, _) in zip(kept, branches, strict=True)
    ):
        return None
    if any(isinstance(n, ast.Constant) and n.lineno != n.end_lineno for n in ast.walk(node)):
        return None  # a string over several lines cannot move to the left
    indent = " " * node.col_offset
    made: list[str] = []
    for number, (header, suite) in enumerate(kept):
        if number == 0 and not header:
            made = _reflowed(textwrap.dedent("\n".join(suite)), indent)
        elif not header:
            made += [f"{indent}else:", *suite]
        else:
            keyword = "if" if number == 0 else "elif"
            made += [re.sub(r"^(\s*)(?:el)?if\b", rf"\1{keyword}", header[0]), *header[1:], *suite]
    _replace_lines(lines, function, node, made)
    return "\n".join(lines)


def _branches(
    lines: list[str], node: ast.If
) -> list[tuple[list[str], ast.expr | None, list[str]]] | None:
    """Return header, test and lines of each branch; None where the layout is another."""
    found: list[tuple[list[str], ast.expr | None, list[str]]] = []
    chain, start = node, node.lineno - 1
    if not lines[start].lstrip().startswith("if "):
        return None  # an `elif`, which goes with its `if`
    while True:
        assert chain.test.end_lineno is not None and chain.end_lineno is not None
        colon = chain.test.end_lineno - 1
        while not re.search(r":\s*(#.*)?$", lines[colon]):
            colon += 1
            if colon >= chain.body[0].lineno - 1:
                return None  # on one line
        end = chain.body[-1].end_lineno
        assert end is not None
        following = chain.orelse[0] if chain.orelse else None
        if following is None:
            found.append(
                (lines[start : colon + 1], chain.test, lines[colon + 1 : chain.end_lineno])
            )
            return found
        elif_line = lines[following.lineno - 1].lstrip().startswith("elif ")
        stop = following.lineno - 1
        while not elif_line and lines[stop].strip() != "else:":
            stop -= 1
            if stop < end:
                return None
        found.append((lines[start : colon + 1], chain.test, lines[colon + 1 : stop]))
        if not elif_line:
            found.append((lines[stop : stop + 1], None, lines[stop + 1 : chain.end_lineno]))
            return found
        assert isinstance(following, ast.If)
        chain, start = following, stop


def _folded_expression(
    text: str, function: Function, node: ast.IfExp, known: Constants
) -> str | None:
    """Return the text with a conditional expression replaced by the side that is always taken."""
    try:
        side = node.body if _holds(node.test, known) else node.orelse
    except _Unknown:
        return None
    statement = _statement_of(function, node)
    if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.Return | ast.For):
        return None
    # Elsewhere its neighbours may bind closer than what it is replaced by.
    alone = node is getattr(statement, "value", None)
    argument = any(isinstance(part, ast.Call) and node in part.args for part in ast.walk(statement))
    if node.lineno != node.end_lineno or not (alone or argument):
        return None
    lines = text.split("\n")
    line = lines[node.lineno - 1]
    made = line[side.col_offset : side.end_col_offset]
    lines[node.lineno - 1] = line[: node.col_offset] + made + line[node.end_col_offset :]
    return "\n".join(lines)


def _statement_of(function: Function, node: ast.AST) -> ast.stmt | None:
    """Return the innermost statement around a node."""
    around = [
        statement
        for statement in ast.walk(function)
        if isinstance(statement, ast.stmt) and any(part is node for part in ast.walk(statement))
    ]
    return around[-1] if around else None


# Text ---------------------------------------------------------------------------------------------


def _with_comments(lines: list[str], first: int) -> int:
    """Return the first of the comment lines that stand right above a line, as far in as it."""
    indent = len(lines[first]) - len(lines[first].lstrip())
    while first and lines[first - 1].startswith(" " * indent + "#"):
        first -= 1
    return first


def _replace_lines(lines: list[str], function: Function, node: ast.stmt, made: list[str]) -> None:
    """Put lines in place of a statement; the comment above goes with one that is left out."""
    first = node.lineno - 1
    if not made:
        first = _with_comments(lines, first)
        suites = [
            suite
            for part in ast.walk(function)
            for field in ("body", "orelse")
            if isinstance(suite := getattr(part, field, None), list) and node in suite
        ]
        if any(len(suite) == 1 for suite in suites):
            made = [" " * node.col_offset + "pass"]
    lines[first : node.end_lineno] = made


def _reflowed(suite: str, indent: str) -> list[str]:
    """Return the lines of a suite further to the left, each statement on one line if it fits."""
    lines = suite.split("\n")
    for node in reversed(list(ast.walk(ast.parse(suite)))):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.Expr | ast.Return):
            joined = _joined(lines[node.lineno - 1 : node.end_lineno])
            if joined is not None and len(indent) + len(joined) <= WIDTH:
                lines[node.lineno - 1 : node.end_lineno] = [joined]
    return [indent + line if line else line for line in lines]


def _joined(lines: list[str]) -> str | None:
    """Return a wrapped statement on one line; None where it is to stay as it is."""
    if len(lines) == 1 or any("#" in line or '"""' in line for line in lines):
        return None
    joined = lines[0]
    for before, line in itertools.pairwise(lines):
        if before.endswith(",") and line.lstrip()[0] in ")]}":
            return None  # laid out on purpose
        opens, closes = before[-1] in "([{", line.lstrip()[0] in ")]}"
        joined += line.strip() if opens or closes else f" {line.strip()}"
    # Parentheses were there to wrap the line alone.
    target, sign, value = joined.partition("= ")
    if value.startswith("(") and value.endswith(")"):
        inner = value[1:-1]
        try:
            if ast.dump(ast.parse(inner)) == ast.dump(ast.parse(value)):
                return f"{target}{sign}{inner}"
        except SyntaxError:
            pass
    return joined


def _bracketed(head: str, items: Sequence[str], tail: str) -> list[str]:
    """Return `head(items)tail` on one line, or the items on one of their own, or on several."""
    indent = head[: len(head) - len(head.lstrip())] + "    "
    listed = ", ".join(items)
    if len(f"{head}({listed}){tail}") <= WIDTH:
        return [f"{head}({listed}){tail}"]
    if len(indent + listed) <= WIDTH:
        return [f"{head}(", indent + listed, f"{indent[4:]}){tail}"]
    return [
        f"{head}(",
        *textwrap.wrap(f"{listed},", WIDTH, initial_indent=indent, subsequent_indent=indent),
        f"{indent[4:]}){tail}  # fmt: skip",
    ]


def _import_lines(head: str, names: Sequence[str]) -> list[str]:
    line = f"{head} {', '.join(names)}"
    if len(line) <= WIDTH:
        return [line]
    return [f"{head} (", *(f"    {name}," for name in names), ")"]


def _without_arguments(text: str, function: Function, unread: Sequence[str]) -> str | None:
    """Return a module's text with calls that no longer pass parameters; None if one is unclear."""
    lines = text.split("\n")
    calls: list[tuple[ast.stmt, ast.Call]] = []
    for statement in ast.walk(_parsed(text)):
        if isinstance(statement, ast.stmt):
            for call in ast.iter_child_nodes(statement):
                if isinstance(call, ast.Call) and _name(call.func) == function.name:
                    calls.append((statement, call))
    everywhere = [n for n in ast.walk(_parsed(text)) if isinstance(n, ast.Call)]
    if len(calls) != sum(_name(call.func) == function.name for call in everywhere):
        return None
    # From the last to the first: lines in front keep their numbers.
    for statement, call in sorted(calls, key=lambda pair: pair[0].lineno, reverse=True):
        given = _arguments(function, call)
        plain = call.lineno == statement.lineno and call.end_lineno == statement.end_lineno
        if given is None or call.keywords or not plain:
            return None
        kept = [
            ast.get_source_segment(text, value) or ""
            for name, value in given.items()
            if name not in unread
        ]
        if any("\n" in part for part in kept):
            return None
        first, end = lines[call.lineno - 1], lines[(call.end_lineno or 0) - 1]
        tail = end[call.end_col_offset :].split("#")[0].rstrip()
        head = first[: call.func.end_col_offset]
        lines[statement.lineno - 1 : statement.end_lineno] = _bracketed(head, kept, tail)
    return "\n".join(lines)


def _without_parameters(text: str, name: str, unread: Sequence[str]) -> str:
    """Return a module's text with a function that lacks parameters."""
    function = next(
        node for node in _parsed(text).body if isinstance(node, Function) and node.name == name
    )
    lines = text.split("\n")
    first = function.lineno - 1
    end = next(n for n in itertools.count(first) if re.search(r"\):(\s*#.*)?$", lines[n])) + 1
    by_line: dict[int, list[ast.arg]] = {}
    for arg in function.args.args:
        by_line.setdefault(arg.lineno - 1, []).append(arg)
    last = max(by_line)
    wide = first not in by_line and lines[last].split("#")[0].rstrip().endswith(",")
    if wide:
        # One parameter or a few to a line, with a comment behind them.
        before = len(lines)
        for number in sorted(by_line, reverse=True):
            args = by_line[number]
            kept = [arg for arg in args if arg.arg not in unread]
            if not kept:
                del lines[number]
            elif len(kept) < len(args):
                listed = ", ".join(lines[number][a.col_offset : a.end_col_offset] for a in kept)
                behind = lines[number][args[-1].end_col_offset :]
                lines[number] = lines[number][: args[0].col_offset] + listed + behind
        end -= before - len(lines)
        wide = any("#" in line for line in lines[first:end])
        kept_texts = [line.strip().rstrip(",") for line in lines[first + 1 : end - 1]]
        if not wide and len(one := _bracketed(f"def {name}", kept_texts, ":")) == 1:
            lines[first:end] = one
    else:
        kept_texts = [
            lines[arg.lineno - 1][arg.col_offset : arg.end_col_offset]
            for arg in function.args.args
            if arg.arg not in unread
        ]
        lines[first:end] = _bracketed(f"def {name}", kept_texts, ":")
    for decorator in function.decorator_list:
        row = decorator.lineno - 1
        for gone in unread:
            lines[row] = re.sub(rf'"{gone}", |, "{gone}"|"{gone}"', "", lines[row])
        lines[row] = lines[row].replace("(do_not_specialize=[])", "")
    return "\n".join(lines)


def _tidy(text: str) -> str:
    """Return a text with as many blank lines as its layout asks for."""
    text = re.sub(r"\n{3,}(?=[ \t])", "\n\n", text)
    opened = r"^([ ]*(?:if|elif|else|for|while|with|def|\)).*:(?:[ ]*#.*)?\n)\n+(?=[ \t])"
    text = re.sub(opened, r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"\n{4,}", "\n\n\n", text)
    return text.strip("\n") + "\n"
