"""What a decoding step costs with a KV policy, and when that is less than without."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from graphopt.errors import UsageError
from graphopt.ir.kv_policies import Dense, Ema, KeyCodes, KVHeads, PageBudget, Quest, SinkLocal
from graphopt.plan.kv_policy import KERNELS, step_costs
from graphopt.targets import DecodeFigures, get_target

LLAMA = KVHeads(8, 32, 128, 128, torch.bfloat16)
DEMO = KVHeads(3, 9, 64, 64)
HOPPER = get_target("hopper")
ROUND = dataclasses.replace(HOPPER, decode=DecodeFigures(1e12, 1e-6, 1e12), host_link=1e10)


def budget(tokens: int, page: int = 16) -> PageBudget:
    return PageBudget.of(page, tokens, page, 2 * page)


def test_the_closed_form():
    """64K tokens of 4 KiB each: 256 MiB; a quarter of them, and Quest's two rows a page."""
    costs = step_costs(Quest(budget(16384)), LLAMA, 65536, ROUND)
    assert costs.dense_bytes == 2**28 and costs.policy_bytes == 2**26
    assert costs.dense == pytest.approx(2e-6 + 2**28 / 1e12)
    assert costs.attention == pytest.approx(2e-6 + 2**26 / 1e12)
    state = 2 * 8 * 4096 * 128 * 2
    assert costs.selection == pytest.approx(KERNELS["quest"] * 1e-6 + state / 1e12)
    assert costs.transfer == costs.calibration == 0
    assert costs.policy == pytest.approx(costs.attention + costs.selection)


def test_calibration_bounds_what_is_saved():
    """With every fifth step dense a policy is less than five times as fast, however small."""
    for context in (2**15, 2**20):
        costs = step_costs(Ema(budget(64), calibrate_every=5), LLAMA, context, HOPPER)
        assert costs.dense / costs.policy < 5
        assert costs.policy == pytest.approx(
            costs.dense / 5 + 4 / 5 * costs.attention + costs.selection
        )


def test_offloaded_keys_cross_the_link():
    policy = SinkLocal(budget(8192))
    quest = Quest(policy.budget)
    on_device, offloaded = (
        step_costs(quest, LLAMA, 65536, ROUND, offloaded=away, turnover=0.5)
        for away in (False, True)
    )
    assert offloaded.dense == pytest.approx(2**28 / 1e10)
    assert on_device.transfer == 0
    assert offloaded.transfer == pytest.approx(2**25 / 2 / 1e10)
    # What needs no query is brought ahead, while the step in front computes.
    ahead = step_costs(policy, LLAMA, 65536, ROUND, offloaded=True, turnover=0.5)
    assert ahead.transfer == pytest.approx(2**25 / 2 / 1e10 - ahead.attention - ahead.selection)
    assert step_costs(policy, LLAMA, 65536, ROUND, offloaded=True, turnover=0).transfer == 0


def test_a_longer_context_pays_and_a_short_one_does_not():
    for target, heads, short, long in ((HOPPER, LLAMA, 1024, 65536),
                                       (get_target("cpu"), DEMO, 512, 8192)):  # fmt: skip
        policy = Ema(budget(256))
        assert not step_costs(policy, heads, short, target).worth_it
        assert step_costs(policy, heads, long, target).worth_it


def test_a_budget_of_everything_never_pays():
    policy = Quest(budget(65536))
    for context in (100, 4096, 65536):
        costs = step_costs(policy, LLAMA, context, HOPPER)
        assert not costs.worth_it and costs.policy_bytes == costs.dense_bytes
        assert "does not pay" in costs.sentence()
    dense = step_costs(Dense(budget(64)), LLAMA, 4096, HOPPER)
    assert dense.policy == dense.dense


def test_what_the_file_does_not_state_is_asked_for():
    with pytest.raises(UsageError, match=r"volta\.toml has no \[decode\]"):
        step_costs(Quest(budget(64)), LLAMA, 4096, get_target("volta"))
    with pytest.raises(UsageError, match=r"cpu\.toml states no host\.link"):
        step_costs(Quest(budget(64)), LLAMA, 4096, get_target("cpu"), offloaded=True)


def test_codes_are_read_by_kernels_and_unpacked_in_torch():
    """Torch makes 32 bits of each two, ten times over: more than reading all keys takes."""
    policy = KeyCodes(budget(4096, page=4))
    state = 8 * 65536 * 32 + 8 * 96 * 8 + 2 * 8 * 128 * 4
    on_gpu = step_costs(policy, LLAMA, 65536, ROUND)
    assert on_gpu.selection == pytest.approx(KERNELS["key-codes"] * 1e-6 + state / 1e12)
    assert on_gpu.worth_it and not step_costs(policy, LLAMA, 65536, get_target("cpu")).worth_it
