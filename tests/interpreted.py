"""Triton's interpreter without work whose result it does not use.

It swaps the functions of Triton's language for its own before a kernel starts, and again in front
of every function that the kernel calls: a walk over a thousand names, to swap what is swapped
already. Behind every sum of integers it computes whether there was an overflow, and looks at the
answer only when it debugs. And it writes the table of NumPy's types anew each time it reads it.
Results are those of the interpreter as it is, to the bit (`test_triton_attention.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any


class _Swapped:
    """What is swapped while a kernel runs, until the interpreter restores it."""

    modules: frozenset[int] = frozenset()

    def __init__(self, scope: Any) -> None:
        self.scope = scope

    def restore(self) -> None:
        _Swapped.modules = frozenset()
        self.scope.restore()


@functools.cache
def leave_out_idle_work() -> list[tuple[Any, str, Any]]:
    """Change the interpreter of this process; return what was changed, as for `setattr`."""
    from triton import language
    from triton.runtime import interpreter

    swap, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
    known = {id(language), id(language.core)}
    types: dict[tuple[type, str], Any] = {}

    @functools.cache
    def modules_of(function: Any) -> frozenset[int]:
        used = (id(value) for value in function.__globals__.values() if inspect.ismodule(value))
        return frozenset(used) & known

    def swap_once(function: Any) -> _Swapped | None:
        modules, started = modules_of(function), bool(_Swapped.modules)
        if started and modules <= _Swapped.modules:
            return None
        scope = swap(function)
        _Swapped.modules |= modules
        # Only what a kernel's start has swapped is restored; the interpreter forgets the rest.
        return None if started else _Swapped(scope)

    def type_of(dtype: Any) -> Any:
        key = type(dtype), dtype.name
        if key not in types:
            types[key] = numpy_type(dtype)
        return types[key]

    builder = interpreter.interpreter_builder
    before = [
        (interpreter, "_patch_lang", swap),
        (interpreter, "_get_np_dtype", numpy_type),
        (builder, "options", builder.options),
    ]
    interpreter._patch_lang, interpreter._get_np_dtype = swap_once, type_of
    assert not builder.options.debug  # else it would look
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    return before
