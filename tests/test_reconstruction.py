"""Least-squares reconstruction against brute-force least squares, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from programs import tiny_program

from graphopt.calibration import reconstruction, time_for_fits
from graphopt.calibration.reconstruction import reconstruct_behind_cuts
from graphopt.execute.block_runner import BlockRunner
from graphopt.execute.hidden_states import BlockStep
from graphopt.ir.blocks import find_blocks, remove_blocks, sub_blocks
from graphopt.training.distillation_data import HiddenStateCache
from graphopt.training.losses import relative_mse

CPU = torch.device("cpu")
IDS = torch.randint(0, 97, (40, 16), generator=torch.Generator().manual_seed(3))


def behind(program, block):
    blocks = find_blocks(program)
    student = BlockRunner(program, blocks[0].position, blocks[block].position + 1, {}, CPU)
    return HiddenStateCache(student, IDS).rows(range(len(IDS)))


def cut(program, *indices):
    pruned = program.copy()
    remove_blocks(pruned, indices)
    return pruned


def test_the_stream_comes_nearer_to_the_dense_models_at_the_cut_and_behind_it():
    dense = tiny_program(layers=6)
    pruned = cut(dense, 2, 3)
    places = ((1, 3), (2, 4), (3, 5))
    before = [relative_mse(behind(pruned, i), behind(dense, j)) for i, j in places]
    reconstructions, skipped = reconstruct_behind_cuts(pruned, dense, IDS)
    after = [relative_mse(behind(pruned, i), behind(dense, j)) for i, j in places]
    assert not skipped
    # The block in front of the cut and those behind it: attention and feed-forward of each.
    assert [reconstruction.where for reconstruction in reconstructions] == [
        f"layers.{layer}: {kind}" for layer in (1, 4, 5) for kind in ("attention", "ffn")
    ]
    assert all(reconstruction.after <= reconstruction.before for reconstruction in reconstructions)
    assert all(float(b) < 0.9 * float(a) for a, b in zip(before, after, strict=True))


def test_what_lies_in_front_of_the_cut_stays_bit_for_bit():
    dense = tiny_program(layers=5)
    pruned = cut(dense, 3)
    reconstruct_behind_cuts(pruned, dense, IDS)
    changed = {w.name for w in pruned.weights if w.producer is not dense.weights[w.name].producer}
    assert changed and all(name.startswith(("layers.2.", "layers.4.")) for name in changed)
    projections = set()
    for block in find_blocks(pruned)[2:]:
        call = pruned.calls[block.position]
        function = pruned.functions[call.function]
        slots = {value: slot for slot, value in function.weights.items()}
        for part in sub_blocks(function, block.stream):
            projections.add(call.weights[slots[part.term.node.inputs[1]]])
    assert changed <= projections


def test_a_model_from_which_nothing_is_missing_is_left_as_it_is():
    dense = tiny_program(layers=3)
    copy = dense.copy()
    assert reconstruct_behind_cuts(copy, dense, IDS) == ([], [])


def test_the_first_and_the_last_block_may_be_missing():
    dense = tiny_program(layers=4)
    pruned = cut(dense, 0, 3)
    reconstructions, _ = reconstruct_behind_cuts(pruned, dense, IDS)
    assert [reconstruction.where.split(":")[0] for reconstruction in reconstructions] == [
        "layers.1"
    ] * 2 + ["layers.2"] * 2
    plain = relative_mse(behind(cut(dense, 0, 3), 1), behind(dense, 3))
    assert float(relative_mse(behind(pruned, 1), behind(dense, 3))) < float(plain)


def test_a_weight_with_two_users_is_left_alone_with_the_reason():
    dense = tiny_program(layers=4)
    calls = [dense.calls[block.position] for block in find_blocks(dense)]
    function = dense.functions[calls[0].function]
    (slot,) = {
        slot
        for slot, value in function.weights.items()
        if value is sub_blocks(function, 0)[-1].term.node.inputs[1]
    }
    calls[3].weights[slot] = calls[2].weights[slot]
    pruned = cut(dense, 1)
    _, skipped = reconstruct_behind_cuts(pruned, dense, IDS)
    assert [(where, "other places" in why) for where, why in skipped] == [
        ("layers.2: ffn", True),
        ("layers.3: ffn", True),
    ]


def test_blocks_for_which_no_time_is_left_are_left_as_they_are_and_named():
    dense = tiny_program(layers=4)
    pruned = cut(dense, 2)
    reconstructions, skipped = reconstruct_behind_cuts(pruned, dense, IDS, until=0.0)
    assert not reconstructions
    assert skipped == [("layers.1 and what is behind it", "the time for it was over")]
    assert all(w.producer is dense.weights[w.name].producer for w in pruned.weights)


class Ticks:
    """A clock of the ranks that goes on by what a run of a block and a fit are said to take."""

    world = 1

    def __init__(self, monkeypatch, run, fits):
        self.now, self.fits = 100.0, iter(fits)
        monkeypatch.setattr(time_for_fits, "here", lambda: self)
        advance, solve = BlockStep.advance, reconstruction.reconstruct

        def advancing(*args, **kwargs):
            self.now += run
            return advance(*args, **kwargs)

        def solving(*args, **kwargs):
            self.now += next(self.fits)
            return solve(*args, **kwargs)

        monkeypatch.setattr(BlockStep, "advance", advancing)
        monkeypatch.setattr(reconstruction, "reconstruct", solving)

    def clock(self):
        return self.now


@pytest.mark.parametrize(
    ("fits", "seconds", "done", "left_out"),
    [([1, 1, 1], 60, 3, ""),
     # The third of three that take 20 s each would end 10 s behind the 50 s that there are.
     ([20, 20], 50, 2, "layers.5 and what is behind it: it would have taken about 20 s of"),
     # The slowest one before decides.
     ([20, 2], 41, 2, "layers.5 and what is behind it: it would have taken about 20 s of"),
     # A fit that took the time for all of them is the last one.
     ([70], 50, 1, "layers.2 and what is behind it: the time for it was over"),
     # Behind the last cut there is nothing to be left out.
     ([1, 1, 70], 60, 3, "")],
)  # fmt: skip
def test_no_fit_is_begun_that_would_not_be_done_in_time(fits, seconds, done, left_out, monkeypatch):
    dense = tiny_program(layers=9)
    pruned, free = cut(dense, 1, 4, 7), cut(dense, 1, 4, 7)
    expected, _ = reconstruct_behind_cuts(free, dense, IDS, cuts_only=True)
    ticks = Ticks(monkeypatch, run=0.001, fits=fits)
    until = ticks.now + seconds
    outcomes, skipped = reconstruct_behind_cuts(pruned, dense, IDS, cuts_only=True, until=until)
    assert outcomes == expected[:done]
    said = " ".join(f"{where}: {why}" for where, why in skipped)
    assert said.startswith(left_out) and bool(said) == bool(left_out)
    assert ticks.now < until or 70 in fits
    for weight in pruned.weights:  # what was solved for is what it is with time enough
        layer = weight.name.split(".")[1]
        same = torch.equal(weight.load(), free.weights[weight.name].load())
        assert same or layer not in [o.where.split(".")[1].split(":")[0] for o in outcomes]


def test_the_first_fit_is_judged_by_runs_of_blocks(monkeypatch):
    dense = tiny_program(layers=4)
    pruned = cut(dense, 2)
    # Three runs of blocks in front of it leave a second; a fit has some tenth of their operations.
    ticks = Ticks(monkeypatch, run=30.0, fits=[])
    _, skipped = reconstruct_behind_cuts(pruned, dense, IDS, until=ticks.now + 91)
    ((where, why),) = skipped
    assert where == "layers.1: attention and what is behind it"
    assert why.startswith("it would have taken about")
    assert all(w.producer is dense.weights[w.name].producer for w in pruned.weights)


def test_the_last_projections_in_front_of_cuts_can_be_solved_for_alone():
    dense = tiny_program(layers=7)
    pruned = cut(dense, 2, 3, 5)
    reconstructions, skipped = reconstruct_behind_cuts(pruned, dense, IDS, cuts_only=True)
    assert not skipped
    assert [outcome.where for outcome in reconstructions] == ["layers.1: ffn", "layers.4: ffn"]
    changed = {w.name for w in pruned.weights if w.producer is not dense.weights[w.name].producer}
    assert {name.split(".")[1] for name in changed} == {"1", "4"}
    # Blocks 0 1 4 6 are left: behind the second stands what stood behind the fourth.
    for ours, theirs in ((1, 3), (2, 5)):
        plain = relative_mse(behind(cut(dense, 2, 3, 5), ours), behind(dense, theirs))
        assert float(relative_mse(behind(pruned, ours), behind(dense, theirs))) < 0.9 * float(plain)


def test_without_a_block_in_front_of_the_cut_the_one_behind_it_is_solved_for():
    dense = tiny_program(layers=4)
    pruned = cut(dense, 0)
    reconstructions, _ = reconstruct_behind_cuts(pruned, dense, IDS, cuts_only=True)
    assert [outcome.where for outcome in reconstructions] == ["layers.1: ffn"]
