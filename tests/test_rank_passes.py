"""Passes shared by two ranks make what one process makes, and the same on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_passes import CASES, agreed, prepare, run_cases, run_rank
from ranks import run_ranks
from torch import Tensor

pytestmark = pytest.mark.slow

SAMPLED = [
    "prune", "fuse", "fuse as published", "solve", "carve by layer", "tune", "merge experts",
    "round", "transform", "transform in closed form", "too few windows",
]  # fmt: skip
ROUNDED = ("round", "round scaled", "tune codes", "transform", "transform and distil")
"""Cases of codes: one that lies between two becomes either, and those behind it make up for it."""
BY_THE_CLOCK = "fuse by the clock"

ROUNDING = 1e-3
"""How far a weight may be off that is solved for, by norms. Sums of some 300 tokens in fp32, added
in another order, differ by 2^-24 sqrt(300) or 1e-6 of themselves. Solving with a ridge of 1e-4 of
the mean power of 48 features has a condition of up to 5e5, and rounding, which favours none of the
directions, is magnified by its root."""

TRAINED = 1.2e-4
"""The same of a weight that is trained. Adam moves an element by the sign of its gradient at first;
where that is within rounding of 0, in a share d = 1e-6 of the elements, ranks may move it the other
way. That is 2 sqrt(d) of a step's norm, which is at most 1e-2 of a weight's, in each of six."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    prepare(root)
    return root


@pytest.fixture(scope="module")
def sampled(folder: Path) -> tuple[Any, Any, Any]:
    """What one process, the first of two ranks and the second make of the sampled cases."""
    return both(folder, SAMPLED)


@pytest.fixture(scope="module")
def others(folder: Path) -> tuple[Any, Any, Any]:
    """The same of all other cases."""
    return both(folder, [name for name in CASES if name not in SAMPLED])


def both(folder: Path, names: list[str]) -> tuple[Any, Any, Any]:
    return (run_cases(folder, names), *run_ranks(run_rank, folder, names, group=False, limit=300))


def apart(one: Tensor, two: Tensor) -> float:
    """Return the norm of a difference as a share of the first one's."""
    return float((one.double() - two.double()).norm() / one.double().norm().clamp(min=1e-30))


def check(name: str, made: tuple[Any, Any, Any]) -> None:
    alone, first, second = (ran[name] for ran in made)
    assert first["digest"] == second["digest"]
    assert alone["weights"].keys() == first["weights"].keys()
    assert [p["changed"] for p in alone["passes"]] == [p["changed"] for p in first["passes"]]
    told, theirs = alone["passes"][-1]["details"], first["passes"][-1]["details"]
    if name in ROUNDED or name == BY_THE_CLOCK:
        check_alike(name, told, theirs)
        return
    limit = TRAINED if name.startswith("fuse") else ROUNDING
    for key, value in alone["weights"].items():
        other = first["weights"][key]
        if value.is_floating_point():
            assert apart(value, other) <= limit, key
        else:
            assert torch.equal(value, other), key
    for trained, also in zip(told.get("training", []), theirs.get("training", []), strict=True):
        # What the loss is of has a relative error of 1e-6, as above.
        assert trained["steps"] == also["steps"]
        losses, other_losses = (torch.tensor(t["checks"])[:, 1] for t in (trained, also))
        torch.testing.assert_close(losses, other_losses, rtol=1e-4, atol=0)
        # Or there would be nothing to compare.
        assert min(losses) < losses[0] or not name.startswith("fuse")


def check_alike(name: str, told: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Hold what is not the same number for number to the same quality."""
    if name == BY_THE_CLOCK:
        (trained,), (also,) = told["training"], theirs["training"]
        assert trained["steps"] > 3 and also["steps"] > 3
        assert also["checks"][-1][1] < also["checks"][0][1]
        return
    if "blocks" in told and "stream" in told["blocks"][0]:
        pairs = [
            (b["stream"], o["stream"])
            for b, o in zip(told["blocks"], theirs["blocks"], strict=True)
        ]
        # In the first block no code is off, unless two are as near as rounding.
        assert pairs[0][1] == pytest.approx(pairs[0][0], rel=0.02)
        assert all(o == pytest.approx(b, rel=0.3) for b, o in pairs)
    elif "blocks" in told:
        for block, other in zip(told["blocks"], theirs["blocks"], strict=True):
            assert other["before"] == pytest.approx(block["before"], rel=0.1)
            assert other["after"] == pytest.approx(block["after"], rel=0.1)
        assert theirs["blocks"][0]["before"] == pytest.approx(told["blocks"][0]["before"], rel=1e-3)
    else:
        values = [[step["value"] for step in d["perplexity"]] for d in (told, theirs)]
        assert values[1] == pytest.approx(values[0], rel=0.05)


@pytest.mark.parametrize("name", SAMPLED)
def test_two_ranks_make_what_one_process_makes(name: str, sampled: tuple[Any, Any, Any]) -> None:
    check(name, sampled)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in CASES if name not in SAMPLED])
def test_so_they_do_with_every_option(name: str, others: tuple[Any, Any, Any]) -> None:
    check(name, others)


def test_the_same_blocks_go_by_the_same_scores(sampled: tuple[Any, Any, Any]) -> None:
    alone, first, _ = (ran["prune"]["passes"][-1]["details"] for ran in sampled)
    assert alone["order"] == first["order"] and len(alone["order"]) == 2
    for scores, others in zip(alone["scores"], first["scores"], strict=True):
        assert others == pytest.approx(scores, rel=1e-4)


def test_what_was_rounded_differently_is_the_first_rank_s() -> None:
    (first, theirs), (second, mine) = run_ranks(agreed, 1e-6, group=False)
    assert first == second and len(first) == 1 and theirs == mine
    (first, theirs), (second, mine) = run_ranks(agreed, 0.0, group=False)
    assert first == second == [] and theirs == mine


@pytest.mark.exhaustive
def test_ranks_that_decide_otherwise_are_found() -> None:
    first, second = run_ranks(agreed, 0.5, group=False)
    assert first == second and "hold different programs: weight" in first
    first, second = run_ranks(agreed, 0.0, 1, group=False)
    assert first == second and "they have another structure" in first
