"""What a decoding step costs with a KV policy and without, by the figures of a target.

A step of one layer reads keys and values, of all tokens or of the selected pages; with a policy it
also reads and writes the policy's state, and launches more kernels. All of that takes time in
proportion to bytes or to kernels, and a predictor's convolutions in proportion to operations:

    dense   =  2 launches + KV / bandwidth
    policy  = (2 + n) launches + selected KV / bandwidth + state / bandwidth + operations / flops

n is the number of kernels of `select` and `observe`. A calibration step is dense and pays for the
policy's state too; its share of the steps is 1 / `calibrate_every`. Where keys and values lie in
host memory, what is read crosses the link to the device first: all of it where no policy selects,
else the pages that the step before did not have. Pages that do not depend on the step's query are
copied while the step in front computes (`needs_query`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from graphopt.errors import UsageError
from graphopt.ir.kv_policies import KVHeads, KVPolicy
from graphopt.targets import DecodeFigures, Target

KERNELS = {
    "dense": 0, "sink-local": 1, "snapkv": 1, "last-row": 2, "ema": 2, "quest": 3,
    "page-range": 3, "key-codes": 3, "predictor": 5,
}  # fmt: skip
"""Kernels of `select` and `observe` of the policies that have them; others run in torch."""

TORCH_OPS = 40
"""Ops of `select` and `observe` in torch, each of which launches a kernel."""

PASSES = 10
"""How often torch reads or writes what `select` makes of tokens: codes of 32,768 take it 23 ms on a
CPU core, ten times as long as the bandwidth in the target's file allows for one pass."""

PREDICTED_ROWS = 6
"""Rows that a step of a predictor's convolutions computes: the new one, and two at each edge."""


@dataclass(frozen=True)
class StepCosts:
    """The time of one layer's attention in one decoding step, with a policy and without.

    Attributes:
        dense: Seconds of a step that reads all keys.
        attention: Seconds of a step that reads the selected pages.
        selection: Seconds of `select` and `observe`.
        transfer: Seconds that a step waits for pages out of host memory.
        calibration: Seconds that dense steps add, as a mean over the steps.
        dense_bytes, policy_bytes: Keys and values read by a step, state not counted.
    """

    dense: float
    attention: float
    selection: float
    transfer: float
    calibration: float
    dense_bytes: int
    policy_bytes: int

    @property
    def policy(self) -> float:
        """Seconds of a step with the policy, as a mean over the steps."""
        return self.attention + self.selection + self.transfer + self.calibration

    @property
    def worth_it(self) -> bool:
        """Whether a step with the policy takes less time than one that reads all keys."""
        return self.policy < self.dense

    def sentence(self) -> str:
        """Return the verdict and what it comes from, as a sentence for people."""
        parts = {
            "reading selected pages": self.attention,
            "selecting": self.selection,
            "waiting for host memory": self.transfer,
            "calibration": self.calibration,
        }
        listed = ", ".join(
            f"{name} {_microseconds(seconds)}" for name, seconds in parts.items() if seconds
        )
        verdict = "saves" if self.worth_it else "does not pay: it costs"
        times = f"{self.dense / self.policy:.2f} times as fast as reading all keys"
        return (
            f"The policy {verdict} {_microseconds(abs(self.dense - self.policy))} of "
            f"{_microseconds(self.dense)} a layer and step ({times}: {listed})."
        )


def step_costs(
    policy: KVPolicy,
    heads: KVHeads,
    context: int,
    target: Target,
    *,
    batch: int = 1,
    offloaded: bool = False,
    turnover: float = 1.0,
) -> StepCosts:
    """Predict the time of a decoding step of one layer, with the policy and without.

    Args:
        heads: Those of the layer; `dtype` is what keys and values are kept in.
        context: Tokens of each row, the step's own included.
        batch: Rows.
        offloaded: Whether keys and values lie in pinned host memory.
        turnover: The share of the selected pages that the step before did not select, which is
            what crosses the link to the host. 1 is the most there can be.

    Raises:
        UsageError: The target's file has no figures for it (`[decode]`), or no link to a host's
            memory where keys are offloaded.
    """
    figures = decode_figures(target)
    pages = -(-context // policy.budget.page)
    read = min(policy.budget.pages, pages) if policy.kind != "dense" else pages
    size = torch.empty(0, dtype=heads.dtype).element_size()
    token = batch * heads.key_heads * (heads.k_dim + heads.v_dim) * size
    dense_bytes = token * context
    policy_bytes = min(token * read * policy.budget.page, dense_bytes)

    def attention(moved: int) -> float:
        return 2 * figures.launch + moved / figures.bandwidth

    selection = _selection(policy, heads, pages, target, batch)
    dense, sparse = attention(dense_bytes), attention(policy_bytes)
    whole = dense
    transfer = 0.0
    if offloaded:
        link = _host_link(target)
        whole = max(dense, dense_bytes / link)
        transfer = turnover * policy_bytes / link
        if not policy.needs_query:
            # It is brought while the step in front computes: only what is left is waited for.
            transfer = max(0.0, transfer - sparse - selection)
    every = policy.calibrate_every
    dense_share = 0.0 if every is None else 1 / every
    calibration = dense_share * (whole - sparse - transfer)
    return StepCosts(whole, sparse, selection, transfer, calibration, dense_bytes, policy_bytes)


def decode_figures(target: Target) -> DecodeFigures:
    """Return what a target's file says about decoding.

    Raises:
        UsageError: It says nothing.
    """
    if target.decode is None:
        raise UsageError(
            f"{target.name}.toml has no [decode], by which the cost of a KV policy is predicted.",
            "Add bandwidth, launch and flops, with their sources, or attach the policy without "
            "asking whether it pays.",
        )
    return target.decode


def _host_link(target: Target) -> float:
    if target.host_link is None:
        raise UsageError(
            f"{target.name}.toml states no host.link, by which offloaded keys reach the device.",
            "Add it, with its source, or keep the keys on the device.",
        )
    return target.host_link


def _selection(policy: KVPolicy, heads: KVHeads, pages: int, target: Target, batch: int) -> float:
    """Return the seconds of `select` and `observe`."""
    figures = decode_figures(target)
    by_kernels = "triton" in target.kernels and policy.kind in KERNELS
    launches = KERNELS[policy.kind] if by_kernels else TORCH_OPS
    if policy.kind == "dense":
        return 0.0
    state = sum(
        math.prod(map(int, shape)) * torch.empty(0, dtype=dtype).element_size()
        for shape, dtype in policy.state_types(heads, pages, batch).values()
    )
    weights = sum(math.prod(map(int, shape)) for shape, _ in policy.weight_types(heads).values())
    operations = 2 * weights * PREDICTED_ROWS * batch * heads.key_heads * pages
    if not by_kernels:
        # Each op reads and writes scores of all pages.
        state += TORCH_OPS * batch * heads.key_heads * pages * 4
        state += PASSES * batch * heads.key_heads * pages * policy.numbers_of_page(heads) * 4
    return launches * figures.launch + state / figures.bandwidth + operations / figures.flops


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f} µs"
