"""Changing a kernel's source as text, so that its comments and layout stay."""

from __future__ import annotations

import ast
import itertools
import re
import textwrap
from collections.abc import Sequence

from graphopt.lowering.triton.syntax import WIDTH, Function, arguments_of, name_of, parsed


def with_comments(lines: list[str], first: int) -> int:
    """Return the first of the comment lines that stand right above a line, as far in as it."""
    indent = len(lines[first]) - len(lines[first].lstrip())
    while first and lines[first - 1].startswith(" " * indent + "#"):
        first -= 1
    return first


def replace_lines(
    lines: list[str], function: Function, node: ast.stmt, made: list[str], gone: set[ast.stmt]
) -> None:
    """Put lines in place of a statement; the comment above goes with one that is left out.

    Args:
        gone: Statements of the function that were left out already. This one joins them if it is.
    """
    first = node.lineno - 1
    if not made:
        first = with_comments(lines, first)
        suite = _suite_of(function, node)
        if suite and all(other is node or other in gone for other in suite):
            made = [" " * node.col_offset + "pass"]
        gone.add(node)
    lines[first : node.end_lineno] = made


def _suite_of(function: Function, node: ast.stmt) -> list[ast.stmt]:
    """Return the statements among which a statement stands."""
    suites = [function.body]
    for suite in suites:
        if node in suite:
            return suite
        # The list grows while it is walked over.
        inner = (getattr(each, field, []) for each in suite for field in ("body", "orelse"))
        suites.extend(inner)
    return []


def reflowed(suite: str, indent: str) -> list[str]:
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


def import_lines(head: str, names: Sequence[str]) -> list[str]:
    """Return the lines of an import, in parentheses where one line is too short for it."""
    line = f"{head} {', '.join(names)}"
    if len(line) <= WIDTH:
        return [line]
    return [f"{head} (", *(f"    {name}," for name in names), ")"]


def without_arguments(text: str, function: Function, unread: Sequence[str]) -> str | None:
    """Return a module's text with calls that no longer pass parameters; None if one is unclear."""
    rows = text.split("\n")
    lines = list(rows)
    calls: list[tuple[ast.stmt, ast.Call]] = []
    for statement in ast.walk(parsed(text)):
        if isinstance(statement, ast.stmt):
            for call in ast.iter_child_nodes(statement):
                if isinstance(call, ast.Call) and name_of(call.func) == function.name:
                    calls.append((statement, call))
    everywhere = [n for n in ast.walk(parsed(text)) if isinstance(n, ast.Call)]
    if len(calls) != sum(name_of(call.func) == function.name for call in everywhere):
        return None
    # From the last to the first: lines in front keep their numbers.
    for statement, call in sorted(calls, key=lambda pair: pair[0].lineno, reverse=True):
        given = arguments_of(function, call)
        plain = call.lineno == statement.lineno and call.end_lineno == statement.end_lineno
        if given is None or call.keywords or not plain:
            return None
        values = [value for name, value in given.items() if name not in unread]
        if any(value.lineno != value.end_lineno for value in values):
            return None
        kept = [rows[value.lineno - 1][value.col_offset : value.end_col_offset] for value in values]
        first, end = lines[call.lineno - 1], lines[(call.end_lineno or 0) - 1]
        tail = end[call.end_col_offset :].split("#")[0].rstrip()
        head = first[: call.func.end_col_offset]
        lines[statement.lineno - 1 : statement.end_lineno] = _bracketed(head, kept, tail)
    return "\n".join(lines)


def without_parameters(text: str, name: str, unread: Sequence[str]) -> str:
    """Return a module's text with a function that lacks parameters."""
    function = next(
        node for node in parsed(text).body if isinstance(node, Function) and node.name == name
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


def tidy(text: str) -> str:
    """Return a text with as many blank lines as its layout asks for."""
    text = re.sub(r"\n{3,}(?=[ \t])", "\n\n", text)
    opened = r"^([ ]*(?:if|elif|else|for|while|with|def|\)).*:(?:[ ]*#.*)?\n)\n+(?=[ \t])"
    text = re.sub(opened, r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"\n{4,}", "\n\n\n", text)
    return text.strip("\n") + "\n"
