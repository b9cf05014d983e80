"""Keys in the host's memory on a GPU: streams, graphs with the host in them, and equal results."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from emitted import load_file
from placed_keys import answers, plain
from programs import tiny_program

import graphopt as go
from graphopt.ir import Program
from graphopt.ir.host_placement import with_hosts
from graphopt.ir.kv_host import HostShare
from graphopt.plan.measure_host import measure_host
from graphopt.targets import all_targets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*was not compiled", "ignore:no kernel was planned"),
]
ROOM, BATCH, LENGTHS = 1400, 2, (1101, 700)
SIZES = {"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 64, "cache": True, "layers": 3}
SHARES = {
    "all computed": (0, 0), "all copied": (0, ROOM), "both": (0, ROOM // 2),
    "a front too": (300, 500), "a long front": (1200, 0),
}  # fmt: skip


def target_here() -> str:
    here = torch.cuda.get_device_capability()
    able = [
        (target.compute_capability, name)
        for name, target in all_targets().items()
        if target.compute_capability
        and target.compute_capability <= here
        and "triton" in target.kernels
    ]
    return max(able)[1]


def emitted(program: Program, folder: Path) -> tuple[Any, Any]:
    go.emit(program, folder, target=target_here(), emit=("torch",))
    module = load_file(folder / "model.py")
    return module, module.load(folder)


@pytest.mark.parametrize("shares", SHARES)
def test_answers_are_those_of_keys_on_the_device(shares: str, tmp_path: Path) -> None:
    program = tiny_program(**SIZES)
    share = HostShare(ROOM, BATCH, *SHARES[shares])
    placed = with_hosts(program, dict.fromkeys(program.states, share))
    module, model = emitted(placed, tmp_path / "out")
    tokens, logits = answers(plain(module, model, ROOM, BATCH), 97, LENGTHS)
    decoder_class = type("Placed", (module.Decoder,), {"piece": 256, "chunk": 300})
    decoder = decoder_class(model, ROOM, BATCH)
    _, own_logits = answers(decoder, 97, LENGTHS, tokens)
    eps = torch.finfo(logits.dtype).eps
    # Two dozen roundings to 16 bits on the way through, most of them averaged out.
    error = float((own_logits.float() - logits.float()).abs().max())
    assert error <= 24 * eps * float(logits.float().abs().max())
    assert decoder.graphs and decoder.kv.records
    assert not own_logits.isnan().any()
    # Steps of two numbers of pieces, of which the second is recorded with a step on its way.
    texts = [[3 + i % 90 for i in range(decoder.kv.granule - 4)], list(range(5, 40))]
    one_by_one = [decoder.start(texts), *(decoder.step() for _ in range(9))]
    new = decoder_class(model, ROOM, BATCH)
    for again in (decoder, new):
        assert [again.start(texts), *again.steps(9)] == one_by_one
    assert len(new.graphs) == 2


def test_a_decoder_leaves_no_memory_behind(tmp_path: Path) -> None:
    program = tiny_program(**SIZES)
    share = HostShare(ROOM, BATCH, 300, 500)
    module, model = emitted(
        with_hosts(program, dict.fromkeys(program.states, share)), tmp_path / "o"
    )

    def decoded() -> int:
        """The bytes that are allocated once a decoder is gone."""
        decoder = module.Decoder(model, ROOM, BATCH)
        decoder.start([[5, 6, 7], [8, 9]])
        decoder.step()
        del decoder
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    gc.collect()
    gc.disable()
    try:
        # The first one leaves what libraries keep of a stream: a workspace of cuBLAS.
        before = decoded()
        for _ in range(3):
            assert decoded() <= before
    finally:
        gc.enable()


def test_the_host_is_measured() -> None:
    measured = measure_host(torch.device("cuda"), keys=8192, layers=2)
    assert measured.link_beside <= 1.2 * measured.link
    assert min(measured.attention, measured.attention_beside, measured.memory) > 0
    assert measured.call < 1e-2 and measured.device == torch.cuda.get_device_name()
