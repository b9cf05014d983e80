"""What passes declare, read without importing what they run.

A pass is one file, and what it runs needs torch, which takes seconds to import. Its name, its
options and its docstring need nothing of that. So the statements that make up the declaration are
taken out of the module's source and run alone: the class without its methods, and the imports and
constants that its options mention. What cannot be read in this way is imported, which is slower
and gives the same.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from graphopt.errors import GraphoptError, UsageError, first_line
from graphopt.support.boundary import is_own_module
from graphopt.support.inputs import read_utf8, shown_path

ENTRY_POINTS = "graphopt.passes"
"""The entry point group by which distributions, this one too, name modules that hold passes."""

MAX_PLUGIN_BYTES = 2**22
"""How long the file of a pass may be."""

_DECORATOR = "register_pass"
_PROPERTIES = frozenset({"name", "exact", "reads_weights", "requires"})
"""Class variables that belong to a declaration; others say how a pass runs."""


@dataclass(frozen=True)
class Declaration:
    """A pass as its module declares it.

    Attributes:
        module: Name of the module that registers the pass.
        declared: The pass's class without its methods: a dataclass of its options, with its
            docstring and `name`, `exact`, `reads_weights` and `requires`. None where only an
            import of the module can tell.
        file: The module's file where the user named that, and no import path leads to it.
    """

    module: str
    declared: type[Any] | None
    file: Path | None = None

    def load(self) -> None:
        """Import the module, which registers its passes.

        Raises:
            UsageError: The module is not graphopt's own and cannot be imported.
        """
        if self.module in sys.modules:
            return
        try:
            if self.file is None:
                importlib.import_module(self.module)
            else:
                _run_file(self.module, self.file)
        except GraphoptError:
            raise
        except Exception as error:
            if is_own_module(self.module):
                raise
            where = self.module if self.file is None else shown_path(self.file)
            raise UsageError(
                f"{where} cannot be imported: {type(error).__name__}: {first_line(error)}.",
                "Mend it; --debug prints the traceback.",
            ) from error


def _run_file(module: str, file: Path) -> None:
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    # Dataclasses look up their annotations in the module of that name.
    sys.modules[module] = made
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[module]
        raise


def declarations() -> Iterator[Declaration]:
    """Yield what the modules named by entry points declare, without importing them.

    An entry point names a module, or a package of which every module may hold passes.

    Raises:
        UsageError: An entry point names a module that is not there.
    """
    for point in metadata.entry_points(group=ENTRY_POINTS):
        for spec in _modules(point):
            yield from _declared_in(spec)


def declared_in_file(file: Path) -> list[Declaration]:
    """Return what a Python file declares, without running what it runs.

    Raises:
        UsageError: It cannot be read, is no Python, or registers no pass.
    """
    source = read_utf8(file, MAX_PLUGIN_BYTES, error=UsageError)
    shown = shown_path(file)
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        reason = error.msg if isinstance(error, SyntaxError) else first_line(error)
        raise UsageError(
            f"{shown}{line}: this is not Python: {reason}.",
            "--plugin takes the Python file of a pass.",
        ) from error
    resolved = file.resolve()
    # Two files may have one name, and a file any: the module's name is made of its whole path.
    module = "graphopt_plugin_" + re.sub(r"\W", "_", str(resolved.with_suffix("")))
    declared = list(_declared_by(source, module, resolved))
    if not declared:
        raise UsageError(
            f"{shown} registers no pass.",
            "Put @graphopt.register_pass above a class that derives from graphopt.Pass; "
            "docs/passes.md shows one.",
        )
    return declared


def _modules(point: metadata.EntryPoint) -> Iterator[ModuleSpec]:
    """Yield the module that an entry point names, and those below it if it is a package."""
    try:
        found = importlib.util.find_spec(point.module)
    except Exception as error:  # a plugin's own package is imported, and may raise anything
        raise _unusable(point, first_line(error)) from error
    if found is None:
        raise _unusable(point, "there is no such module")
    left = [found]
    while left:
        spec = left.pop()
        yield spec
        folders = spec.submodule_search_locations
        for item in iter_modules(folders) if folders is not None else ():
            below = PathFinder.find_spec(f"{spec.name}.{item.name}", folders)
            if below is not None:
                left.append(below)


def _unusable(point: metadata.EntryPoint, why: str) -> UsageError:
    return UsageError(
        f"The entry point {point.name!r} of {ENTRY_POINTS} names {point.module}, which cannot be "
        f"used: {why}.",
        "Mend or uninstall the distribution that brings it.",
    )


def _declared_in(spec: ModuleSpec) -> Iterator[Declaration]:
    get_source = getattr(spec.loader, "get_source", None)
    source = get_source(spec.name) if get_source is not None else None
    if source is None:
        yield Declaration(spec.name, None)
    elif _DECORATOR in source:
        yield from _declared_by(source, spec.name, None)


def _declared_by(source: str, module: str, file: Path | None) -> Iterator[Declaration]:
    """Yield what the source of a module declares."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        yield Declaration(module, None, file)
        return
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef) and _registers(statement):
            yield Declaration(module, _run(tree, statement, module), file)


def _registers(statement: ast.ClassDef) -> bool:
    return any(_is_registration(decorator) for decorator in statement.decorator_list)


def _is_registration(decorator: ast.expr) -> bool:
    """True for `@register_pass` and `@graphopt.register_pass`."""
    name = decorator.attr if isinstance(decorator, ast.Attribute) else decorator
    return name == _DECORATOR or (isinstance(name, ast.Name) and name.id == _DECORATOR)


def _run(tree: ast.Module, statement: ast.ClassDef, module: str) -> type[Any] | None:
    """Run the statements of one declaration; None where they cannot stand alone."""
    bare = _without_methods(statement)
    kept: list[ast.stmt] = [*_needed(tree, bare), bare]
    program = ast.fix_missing_locations(ast.Module(kept, type_ignores=[]))
    scope = ModuleType(module).__dict__
    try:
        # Annotations are evaluated here, whatever the module says: it is not there to look into.
        exec(compile(program, module, "exec", dont_inherit=True), scope)
    except Exception:
        return None
    declared: type[Any] = scope[statement.name]
    return declared


def _without_methods(statement: ast.ClassDef) -> ast.ClassDef:
    body = [item for number, item in enumerate(statement.body) if _declares(item, number)]
    decorators = [item for item in statement.decorator_list if not _is_registration(item)]
    bare = ast.ClassDef(
        statement.name, statement.bases, statement.keywords, body or [ast.Pass()], decorators
    )
    # Python 3.12 has lists of type parameters, which passes have none of.
    bare.type_params = []  # type: ignore[attr-defined,unused-ignore]
    return bare


def _declares(item: ast.stmt, number: int) -> bool:
    """True for the docstring, the options, and the properties of a pass."""
    if isinstance(item, ast.Expr):
        return number == 0
    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
        of_class = "ClassVar" in ast.unparse(item.annotation)
        return not of_class or item.target.id in _PROPERTIES
    return isinstance(item, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id in _PROPERTIES for target in item.targets
    )


def _needed(tree: ast.Module, bare: ast.ClassDef) -> list[ast.stmt]:
    """Return the statements that bind the names which a class mentions, in their order."""
    bound: dict[str, tuple[int, ast.stmt]] = {}
    for number, item in enumerate(tree.body):
        for name, binding in _bindings(item):
            bound.setdefault(name, (number, binding))
    kept: dict[str, tuple[int, ast.stmt]] = {}
    left: list[ast.AST] = [bare]
    while left:
        for node in ast.walk(left.pop()):
            if isinstance(node, ast.Name) and node.id in bound and node.id not in kept:
                kept[node.id] = bound[node.id]
                left.append(bound[node.id][1])
    order = sorted({id(item): (number, item) for number, item in kept.values()}.values(),
                   key=lambda pair: pair[0])  # fmt: skip
    return [item for _, item in order]


def _bindings(item: ast.stmt) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the names that a statement binds, each with a statement that binds no other import."""
    if isinstance(item, ast.Import):
        for alias in item.names:
            yield alias.asname or alias.name.split(".")[0], ast.Import([alias])
    elif isinstance(item, ast.ImportFrom):
        for alias in item.names:
            yield alias.asname or alias.name, ast.ImportFrom(item.module, [alias], item.level)
    elif isinstance(item, ast.FunctionDef | ast.ClassDef):
        yield item.name, item
    elif isinstance(item, ast.Assign | ast.AnnAssign):
        targets = item.targets if isinstance(item, ast.Assign) else [item.target]
        for target in targets:
            for node in ast.walk(target):
                if isinstance(node, ast.Name):
                    yield node.id, item
