"""What a pass says of its work, compared with the programs before and after it."""

from __future__ import annotations

from graphopt.errors import VerifyError
from graphopt.ir.graph import Program
from graphopt.ir.imprint import Imprint
from graphopt.pass_manager.contract import Pass, PassResult

_KEPT = ("config", "generation", "tokenizer", "max_length", "outputs", "checkpoint_dtype")
"""What of a program an exact pass leaves as it is: others read the results by it."""


def check_claims(item: Pass, result: PassResult, imprint: Imprint, before: Program) -> None:
    """Compare what a pass says it did with what it did.

    Args:
        imprint: The imprint of `before`, taken before the pass ran.

    Raises:
        VerifyError: It wrote to the program it got a copy of; it changed something and says it did
            not, or the other way round; it is exact and changed what an exact pass leaves alone;
            or what it states of the result is not so.
    """
    after = result.program
    bug = f"Leave {item.name!r} out of the recipe. To its developer: "
    harmed = imprint.difference(before)
    if harmed is not None:
        raise VerifyError(
            f"Pass {item.name!r} changed the program that it got a copy of: {harmed}.",
            f"{bug}put a new weight in place of an old one, and clone what a tensor is made of "
            "before writing into it.",
        )
    found = imprint.difference(after)
    if result.changed == 0 and found is not None:
        raise VerifyError(
            f"Pass {item.name!r} says that it changed nothing, but {found}.",
            f"{bug}count every place that is rewritten in PassResult.changed, or return the "
            "program as it was.",
        )
    if result.changed != 0 and found is None:
        raise VerifyError(
            f"Pass {item.name!r} says that it changed {result.changed} places, but the program "
            "is as it was.",
            f"{bug}PassResult.changed counts places that were rewritten, matched ones not.",
        )
    if item.exact:
        _check_contract(item.name, before, after, bug)
    untrue = None if result.statement is None else result.statement.check(before, after)
    if untrue is not None:
        raise VerifyError(
            f"Pass {item.name!r} did not do what it states: {untrue}.",
            f"{bug}PassResult.statement must describe the program that is returned.",
        )


def _check_contract(name: str, before: Program, after: Program, bug: str) -> None:
    for key in _KEPT:
        if getattr(before, key) != getattr(after, key):
            raise VerifyError(
                f"Pass {name!r} is exact but changed the program's {key.replace('_', ' ')}.",
                f"{bug}give the pass exact = False, or leave that alone.",
            )
    if list(before.inputs) != list(after.inputs):
        raise VerifyError(
            f"Pass {name!r} is exact but changed which inputs the program has.",
            f"{bug}inputs are the program's contract with runtimes; read or not, they stay.",
        )
