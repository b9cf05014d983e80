"""Presses that are KV policies, beside kvpress's own, in an environment that has kvpress.

    python -m venv kvpress-env
    kvpress-env/bin/pip install kvpress==0.5.5 sympy pydantic safetensors
    PYTHONPATH=FOLDER-WITH-graphopt kvpress-env/bin/python tools/check_kvpress.py

kvpress needs a transformers below 5.3, so that it cannot be installed beside graphopt's. FOLDER is
where `graphopt` lies as an installed package, such as the site-packages of its own environment.
Ends with 1 where something differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import transformers
from kvpress import BasePress, SnapKVPress, StreamingLLMPress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from graphopt.errors import UsageError
from graphopt.integrations.kvpress_press import PolicyPress
from graphopt.ir.kv_policies import Ema, ExpectedAttention, PageBudget, Quest, SinkLocal, SnapKV

TOKENS, KEPT = 128, 32


def tiny() -> LlamaForCausalLM:
    """Return a random Llama of two layers, four heads over two."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def kept(model: LlamaForCausalLM, press: BasePress, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the keys of each layer that a press keeps of a prompt, in an order of their own."""
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache)
    return [layer.keys.sort(2).values for layer in cache.layers]


def main() -> None:
    model = tiny()
    ids = torch.randint(5, 120, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    ratio = 1 - KEPT / TOKENS
    by_token = PageBudget(page=1, pages=KEPT, sink=4, local=8)
    votes = PageBudget(page=1, pages=KEPT, sink=0, local=1)
    failed = 0

    def check(what: str, holds: bool) -> None:
        nonlocal failed
        failed += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {what}", flush=True)

    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for what, policy, press in (
        ("sink-local by tokens keeps what StreamingLLMPress keeps", SinkLocal(by_token),
         StreamingLLMPress(ratio, n_sink=4)),
        ("snapkv by tokens keeps what SnapKVPress keeps", SnapKV(votes, window=8, kernel=5),
         SnapKVPress(ratio, window_size=8, kernel_size=5)),
    ):  # fmt: skip
        pairs = zip(kept(model, PolicyPress(policy), ids), kept(model, press, ids), strict=True)
        check(what, all(torch.equal(one, other) for one, other in pairs))
    for page in (1, 8, 16):
        for kind in (SinkLocal, SnapKV, ExpectedAttention):
            budget = PageBudget(page, pages=KEPT // page, sink=0, local=1)
            for tokens in (TOKENS, TOKENS - 3):
                keys = kept(model, PolicyPress(kind(budget)), ids[:, :tokens])
                wanted = KEPT - (-tokens % page)
                check(
                    f"{kind.kind} in pages of {page} keeps {wanted} of {tokens} tokens",
                    all(x.shape == (1, 2, wanted, 16) for x in keys),
                )
    everything = PageBudget(8, pages=TOKENS, sink=0, local=1)
    whole = _tokens(model, ids, PolicyPress(SnapKV(everything)))
    check("a budget of everything generates what the model does", whole == _tokens(model, ids))
    for policy in (Quest(by_token), Ema(by_token)):
        check(f"{policy.kind} is refused", _refused(lambda policy=policy: PolicyPress(policy)))
    sys.exit(bool(failed))


def _tokens(
    model: LlamaForCausalLM, ids: torch.Tensor, press: BasePress | None = None
) -> list[int]:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if press is None:
        return model.generate(ids, **options)[0].tolist()
    with press(model):
        return model.generate(ids, **options)[0].tolist()


def _refused(make: Callable[[], object]) -> bool:
    try:
        make()
    except UsageError:
        return True
    return False


if __name__ == "__main__":
    main()
