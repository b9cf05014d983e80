"""Measure decoding with keys and values in host memory, beside all of them on the device.

    python tools/bench_kv_offload.py --out benchmarks/kv_offload.json

A model of Llama-3.1-8B's shape with random weights and a random cache of 65,536 tokens decodes one
text: with the cache on the device (`device`), with all of it in host memory and read in full
(`full`), and with a policy whose pages are brought ahead (`ema`), calibration steps included. What
crosses the link is counted, and stands beside the closed form. A token is one CUDA graph each time,
with a policy one for each turn of the layers that read all. The pages on the device are compared
with those of the host at the end; the run ends with exit status 1 where one differs.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.functional import rope, rope_table
from graphopt.ir.kv_policies import Ema, Filled, KVHeads, PageBudget, Scoring, State
from graphopt.lowering.kernels import get_family, plan_attention
from graphopt.plan import AttentionSpec
from graphopt.runtime import kv_policy
from graphopt.runtime.attention import Keys
from graphopt.runtime.kv_offload import OffloadedKV, host_bytes, offloaded_step, page_bytes
from graphopt.support.recorded import record
from graphopt.targets import get_target

LAYERS, HIDDEN, INNER, VOCAB = 32, 4096, 14336, 128256
HEADS, GROUPS, WIDTH = 32, 8, 128
PAGE, SINK, LOCAL = 16, 4, 8
DTYPE, DEVICE = torch.bfloat16, torch.device("cuda")
KV = KVHeads(GROUPS, HEADS, WIDTH, WIDTH, DTYPE)
SCORING = Scoring(WIDTH**-0.5)
WARM_UP = 3


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE) * scale


def recorded(work: Callable[[int], None], turns: int = 1) -> Callable[[], None]:
    """Return steps that take turns, each a CUDA graph of what `work` does when given its number."""
    for turn in range(turns):
        work(turn)
    graphs: list[torch.cuda.CUDAGraph] = []
    for turn in range(turns):
        pool = graphs[0].pool() if graphs else None
        graph, _ = record(functools.partial(work, turn), runs=0, pool=pool)
        graph.replay()
        graphs.append(graph)
    order = itertools.cycle(graphs)
    return lambda: next(order).replay()


class Layers:
    """A decoder without its attention: what runs in front of it and behind, layer by layer.

    Attributes:
        hidden: [1, 1, HIDDEN], written in place.
        position: int64 [1], the token's.
    """

    def __init__(self) -> None:
        def weight(outputs: int, inputs: int) -> Tensor:
            return random(outputs, inputs, scale=inputs**-0.5)

        both = (HEADS + 2 * GROUPS) * WIDTH
        self.qkv = [weight(both, HIDDEN) for _ in range(LAYERS)]
        self.out = [weight(HIDDEN, HEADS * WIDTH) for _ in range(LAYERS)]
        self.gate_up = [weight(2 * INNER, HIDDEN) for _ in range(LAYERS)]
        self.down = [weight(HIDDEN, INNER) for _ in range(LAYERS)]
        self.embedding, self.head = random(VOCAB, HIDDEN), weight(VOCAB, HIDDEN)
        self.hidden = random(1, 1, HIDDEN)
        self.position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        self.frequencies = 500000.0 ** (-torch.arange(0, WIDTH, 2, device=DEVICE) / WIDTH)

    def before(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's query, key and value."""
        x = F.rms_norm(self.hidden, (HIDDEN,))
        heads = F.linear(x, self.qkv[layer]).view(1, 1, -1, WIDTH).transpose(1, 2)
        cos, sin = rope_table(self.position[None], self.frequencies)
        q, k, v = heads.split((HEADS, GROUPS, GROUPS), 1)
        q, k = (rope(x, cos, sin) for x in (q, k))
        return q, k, v.contiguous()

    def behind(self, layer: int, attended: Tensor) -> None:
        """Add the attention's result and what the gated layer makes of it."""
        self.hidden += F.linear(attended.transpose(1, 2).reshape(1, 1, -1), self.out[layer])
        gate, up = F.linear(F.rms_norm(self.hidden, (HIDDEN,)), self.gate_up[layer]).chunk(2, -1)
        self.hidden += F.linear(F.silu(gate) * up, self.down[layer])

    def next_token(self) -> None:
        logits = F.linear(F.rms_norm(self.hidden, (HIDDEN,)), self.head)
        self.hidden.copy_(F.embedding(logits.argmax(-1), self.embedding))
        self.position += 1


def attention(heads: int, groups: int, **fields: Any) -> Callable[..., Any]:
    """Return what runs the attention of one token by the kernel that is planned for it."""
    spec = AttentionSpec(
        head_dim=WIDTH, heads=heads, kv_heads=groups, dtype="bf16", phase="decode", kv_lens=True,
        **fields,
    )  # fmt: skip
    plan = plan_attention(spec, get_target("hopper"))
    run = get_family(plan.kernel).load(plan)
    return lambda q, keys: run(q, keys, scale=SCORING.scale)


def seconds_a_token(step: Callable[[], None], tokens: int) -> float:
    """Return the mean time of a token, after some to warm up."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(tokens):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / tokens


# The three ways -----------------------------------------------------------------------------------


def room_for(context: int, tokens: int, turns: int = 1) -> int:
    """Return the tokens of a cache: steps run as they are and recorded before they are timed."""
    return context + tokens + WARM_UP + 2 * turns + 2


def step_of(model: Layers, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Run a token through all layers; `attend` is given the layer, q, k and v."""
    for layer in range(LAYERS):
        model.behind(layer, attend(layer, *model.before(layer)))
    model.next_token()


def on_device(model: Layers, context: int, tokens: int) -> dict[str, Any]:
    """Decode with keys and values on the device."""
    room = room_for(context, tokens)
    caches = [(random(1, GROUPS, room, WIDTH), random(1, GROUPS, room, WIDTH))
              for _ in range(LAYERS)]  # fmt: skip
    run = attention(HEADS, GROUPS)
    model.position.fill_(context)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for cache, new in zip(caches[layer], (k, v), strict=True):
            cache.index_copy_(2, model.position, new)
        lens = (model.position + 1).to(torch.int32)
        return run(q, Keys(*caches[layer], kv_lens=lens))[0]

    return {"seconds": seconds_a_token(recorded(lambda _: step_of(model, attend)), tokens)}


def offloaded(policy: Ema, context: int, tokens: int) -> tuple[OffloadedKV, list[State]]:
    """Return a random cache in host memory, and what the policy remembers of each layer."""
    assert policy.calibrate_every is not None
    room = room_for(context, tokens, policy.calibrate_every)
    kv = OffloadedKV(LAYERS, 1, KV, room, page=PAGE, read=policy.budget.pages, device=DEVICE)
    states = []
    for layer in range(LAYERS):
        keys = [random(1, GROUPS, context, WIDTH) for _ in range(2)]
        kv.fill(layer, *keys)
        state = policy.init(random(1, HEADS, policy.history, WIDTH), *keys, None, SCORING)
        longer = kv.pages - state["probability"].shape[2]
        state["probability"] = F.pad(state["probability"], (0, longer), value=-1.0)
        states.append(state)
    return kv, states


def in_full(model: Layers, kv: OffloadedKV, context: int, tokens: int) -> dict[str, Any]:
    """Decode with all keys brought from host memory, each layer while the one in front computes."""
    run = attention(HEADS // GROUPS, 1, kv="paged", page=PAGE)
    model.position.fill_(context)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer + 1 < LAYERS:
            kv.stage(layer + 1)
        kv.append(layer, k, v, model.position)
        keys = kv.all_keys(layer, model.position)
        return kv.from_rows(run(kv.as_rows(q), keys)[0])

    def work(_: int) -> None:
        kv.stage(0)
        step_of(model, attend)

    step, before = recorded(work), kv.bytes_moved
    seconds = seconds_a_token(step, tokens)
    moved = (kv.bytes_moved - before) / (tokens + WARM_UP)
    closed = host_bytes(LAYERS, 1, KV, kv.pages * PAGE, PAGE)
    return {"seconds": seconds, "bytes_a_token": moved, "closed_form": closed}


def with_policy(
    model: Layers,
    kv: OffloadedKV,
    states: list[State],
    policy: Ema,
    context: int,
    tokens: int,
) -> dict[str, Any]:
    """Decode with the pages that a policy selects brought while the token in front computes."""
    slots = kv.pages * PAGE
    selected = {"kv": "paged", "page": PAGE, "lse": True, "page_max": True}
    rows = HEADS // GROUPS
    run_selected = attention(rows, 1, selected_blocks=True, **selected)
    run_all = attention(rows, 1, **selected)
    first = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    model.position.fill_(context)
    here = Filled(first, model.position, slots)
    for layer, state in enumerate(states):
        kv.prefetch(layer, kv_policy.select(policy, state, None, None, here, SCORING))
    kv.settle()
    every = policy.calibrate_every
    assert every is not None
    waiting: list[int] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calibrating = layer in waiting
        run = run_all if calibrating else run_selected
        out, states[layer] = offloaded_step(
            kv, layer, policy, states[layer], (q, k, v), here, SCORING, run,
            calibrating=calibrating,
        )  # fmt: skip
        if calibrating:
            waiting.remove(layer)
            if len(waiting) > 1:
                kv.stage(waiting[1])
        return out

    def work(turn: int) -> None:
        waiting[:] = [layer for layer in range(LAYERS) if (turn + layer) % every == 0]
        for layer in waiting[:2]:
            kv.stage(layer)
        step_of(model, attend)
        kv.settle()

    step = recorded(work, every)
    before, staged = kv.bytes_moved, int(kv.layers_moved)
    seconds = seconds_a_token(step, tokens)
    count = tokens + WARM_UP
    staged = int(kv.layers_moved) - staged
    calibration = staged * host_bytes(1, 1, KV, slots, PAGE) / count
    moved = (kv.bytes_moved - before) / count
    pages = (moved - calibration) / page_bytes(KV, PAGE)
    most = LAYERS * GROUPS * policy.budget.pages
    return {
        "seconds": seconds, "bytes_a_token": moved, "of_calibration": calibration,
        "closed_form_of_calibration": host_bytes(LAYERS, 1, KV, slots, PAGE) / every,
        "turnover": pages / most, "policy": policy.kind, "budget": policy.budget.tokens,
        "calibrate_every": every, "pages_that_differ": pages_that_differ(kv),
    }  # fmt: skip


def pages_that_differ(kv: OffloadedKV) -> int:
    """Return how many of the pages that the next steps read are not those of the host."""
    wrong = 0
    last = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for layer in range(LAYERS):
        keys, own = kv.keys(layer, last), kv.host_of(layer)
        assert keys.selected_blocks is not None and keys.block_table is not None
        listed = keys.selected_blocks[:, 0].clamp(min=0)
        slot = keys.block_table.gather(1, listed).long()
        row = torch.arange(len(listed))[:, None]
        torch.cuda.synchronize()
        for pool, host in zip((keys.k, keys.v), own, strict=True):
            there, expected = pool[slot][:, :, 0].cpu(), host[row, listed.cpu()]
            known = (keys.selected_blocks[:, 0] >= 0).cpu()
            wrong += int(((there != expected).flatten(2).any(2) & known).sum())
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/kv_offload.json"))
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--budget", type=int, default=4096, help="tokens per KV head")
    parser.add_argument("--calibrate", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "command": "python tools/bench_kv_offload.py " + shlex.join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {name: metadata.version(name) for name in ("torch", "triton")},
        "layers": LAYERS, "context": args.context,
    }  # fmt: skip

    def keep(name: str, row: dict[str, Any]) -> None:
        result[name] = row | {"tokens_a_second": 1 / row["seconds"]}
        print(name, json.dumps(result[name]), flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    with torch.no_grad():
        model = Layers()
        keep("on_device", on_device(model, args.context, args.tokens))
        torch.cuda.empty_cache()
        budget = PageBudget.of(PAGE, args.budget, SINK * PAGE, LOCAL * PAGE)
        policy = Ema(budget, calibrate_every=args.calibrate)
        kv, states = offloaded(policy, args.context, args.tokens)
        keep("full", in_full(model, kv, args.context, max(2, args.tokens // 6)))
        keep("ema", with_policy(model, kv, states, policy, args.context, args.tokens))
    result["times_full"] = result["full"]["seconds"] / result["ema"]["seconds"]
    result["times_device"] = result["on_device"]["seconds"] / result["ema"]["seconds"]
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"x{result['times_full']:.2f} of full, x{result['times_device']:.2f} of device")
    if result["ema"]["pages_that_differ"]:
        sys.exit("pages on the device are not those of the host")


if __name__ == "__main__":
    main()
