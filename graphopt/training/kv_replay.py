"""KV policies run over recorded traces of attention: what they would have read, and its recall.

The texts are those of the dense model: what a policy leaves out does not change what comes next.
So policies are compared on equal terms, in little time; what they do to a model is measured by
`graphopt.evaluate.kv_policy`.

Layout letters as in `graphopt.training.kv_traces`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir.kv_policies import KVPolicy, Scoring
from graphopt.ir.kv_policies.pages import all_pages, put_pages
from graphopt.support.progress import Progress, silent
from graphopt.training.kv_traces import PageTraces


@torch.no_grad()
def pages_read(
    policy: KVPolicy,
    traces: PageTraces,
    dense_steps: int,
    *,
    progress: Progress = silent,
    what: str = "replaying",
) -> Tensor:
    """Return which pages each step of some traces reads: bool [L, B, G, S, N].

    Args:
        policy: One that knows of the past by what it observes, and by nothing else.
        dense_steps: How many steps at the front are dense, so that the policy has seen as much as
            after a prompt.
    """
    layers, texts, groups, steps, pages = traces.probs_LBGSN.shape
    rows, device = layers * texts, traces.probs_LBGSN.device
    probs_BGSN = traces.probs_LBGSN.flatten(0, 1)
    # What it remembers of an empty prompt is displaced by the dense steps.
    empty = torch.zeros(rows, groups, traces.first, 1, device=device)
    tail = empty[:, :, : min(policy.history, traces.first)]
    room = pages * policy.budget.page - traces.first
    real = torch.nn.functional.pad(torch.ones(rows, traces.first, device=device), (0, room))
    empty = torch.nn.functional.pad(empty, (0, 0, 0, room))
    state = policy.init(tail, empty, empty, real, Scoring(1.0))
    layer = torch.arange(layers, device=device).repeat_interleave(texts)
    every = policy.calibrate_every
    read_BGSN = torch.zeros(rows, groups, steps, pages, dtype=torch.bool, device=device)
    for step in range(steps):
        lengths = traces.lengths(step, rows)
        everything = all_pages(policy.budget.page, lengths).expand(-1, groups, -1)
        dense = torch.full((rows,), step < dense_steps, device=device)
        if every is not None:
            dense = dense | ((step + 1 + layer) % every == 0)
        named = everything
        if step >= dense_steps:
            selected = policy.select(state, None, None, lengths, Scoring(1.0))
            selected = selected.expand(-1, groups, -1)
            nothing = torch.zeros_like(everything, dtype=torch.bool)
            chosen = put_pages(nothing, selected, torch.ones_like(selected))
            named = everything.masked_fill(~(chosen | dense[:, None, None]), -1)
        read_BGSN[:, :, step] = named >= 0
        probs = probs_BGSN[:, :, step].float()
        state = policy.observe(state, named, probs, empty[:, :, :1], lengths)
        progress(what, step + 1, steps)
    return read_BGSN.unflatten(0, (layers, texts))


def recall(read_LBGSN: Tensor, traces: PageTraces, dense_steps: int, every: int | None) -> float:
    """Return the mean share of the attention mass that lies in the pages that were read.

    Steps that read all pages do not count.
    """
    layers, _, _, steps, _ = read_LBGSN.shape
    mass = traces.mass_LBGSN.float()
    share = (mass * read_LBGSN).sum(-1) / mass.sum(-1)
    step, layer = (torch.arange(count, device=mass.device) for count in (steps, layers))
    counts = (step >= dense_steps).expand(layers, -1)
    if every is not None:
        counts = counts & ((step + 1 + layer[:, None]) % every != 0)
    counts = counts[:, None, None].expand_as(share)
    return float(share[counts].double().mean())
