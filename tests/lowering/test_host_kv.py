"""Emitted models some of whose keys lie in the host's memory: the answers of those with none there.

Here the host is also the device: the C++ kernel attends, and copies are made when they are waited
for, or at once. tests/test_gpu_host.py has streams and graphs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from emitted import load_file
from families import LISTED, captured, sampled
from late_copies import LateCopies
from placed_keys import answers, inner, plain
from programs import tiny_program
from sampling import slow_but
from torch import Tensor

import graphopt as go
from graphopt.errors import LoweringError, VerifyError
from graphopt.ir import KVLayout, Program
from graphopt.ir.host_placement import reason_to_stay, with_hosts
from graphopt.ir.kv_host import HostShare, piece_tokens, prefill_chunk
from graphopt.ir.parse import parse_program
from graphopt.ir.relayout import with_layouts
from graphopt.lowering.torch.lowered_kernels import LoweredKernels, lower_attentions
from graphopt.lowering.torch.passes import lower
from graphopt.runtime import host_attention, host_step
from graphopt.storage.artifact import load_program

if torch.cuda.is_available():
    pytest.skip("tests/test_gpu_host.py runs them on the device", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:attention on a CPU", "ignore:no kernel was")
ROOM, BATCH, LENGTHS = 100, 2, (41, 23)
SHARES = {
    "all computed": (0, 0),
    "all copied": (0, ROOM),
    "both": (0, ROOM // 2),
    "a front too": (29, 40),
    "a long front": (90, 0),
}
"""Tokens at the front that stay on the device, and tokens that are copied to it."""


@pytest.fixture(autouse=True)
def nothing_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoweredKernels, "compile", lambda self: {})


def emitted(program: Program, folder: Path) -> tuple[ModuleType, Any]:
    go.emit(program, folder, target="hopper", emit=("torch",), dtype="float32")
    module = load_file(folder / "model.py")
    return module, module.load(folder, dtype=torch.float32, device="cpu")


def placeable(program: Program) -> list[str]:
    return [
        call.caches[cache.slot]
        for call in program.calls
        for cache in program.functions[call.function].caches
        if reason_to_stay(program, call, cache) is None
    ]


def placed(program: Program, resident: int, streamed: int) -> Program:
    share = HostShare(ROOM, BATCH, resident, streamed)
    return with_hosts(program, dict.fromkeys(placeable(program), share))


def check(
    module: ModuleType, model: Any, vocab: int, piece: int = 16, chunk: int = 16, **own: Any
) -> Any:
    """Compare with all keys on the device; return the decoder that has some on the host."""
    tokens, logits = answers(plain(module, model, ROOM, BATCH), vocab, LENGTHS)
    decoder_class = type("Placed", (module.Decoder,), {"piece": piece, "chunk": chunk, **own})
    decoder = decoder_class(model, ROOM, BATCH)
    own_tokens, own_logits = answers(decoder, vocab, LENGTHS)
    # Sums in other orders, layer behind layer, in fp32.
    assert float((own_logits - logits).abs().max()) <= 1e-4 * max(1.0, float(logits.abs().max()))
    assert own_tokens == tokens
    return decoder


@pytest.mark.parametrize("shares", slow_but(SHARES, "all copied", "a long front"))
def test_answers_are_those_of_keys_on_the_device(shares: str, tmp_path: Path) -> None:
    program = placed(tiny_program(cache=True), *SHARES[shares])
    module, model = emitted(program, tmp_path / "out")
    check(module, model, 97)
    check(module, model, 97, piece=64, chunk=1000)


def test_a_decoder_that_is_given_its_tokens_answers_alike(tmp_path: Path) -> None:
    """As the tests on a GPU give them, where a rounding may make another token the likeliest."""
    module, model = emitted(placed(tiny_program(cache=True), 29, 40), tmp_path / "out")
    tokens, logits = answers(plain(module, model, ROOM, BATCH), 97, LENGTHS)
    again, same = answers(plain(module, model, ROOM, BATCH), 97, LENGTHS, tokens)
    assert again == tokens and torch.equal(same, logits)
    other = [[1, 2] for _ in tokens]
    assert not torch.equal(
        answers(plain(module, model, ROOM, BATCH), 97, LENGTHS, other)[1], logits
    )


@pytest.mark.parametrize("shares", ["both", "a front too"])
def test_steps_that_are_run_to_be_recorded(
    shares: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run in front of a recording wrote is written again, and all else is put back."""
    module, model = emitted(placed(tiny_program(cache=True), *SHARES[shares]), tmp_path / "out")
    bounds: list[int] = []

    def record(advance: Any, device: torch.device, pool: Any) -> tuple[Any, None]:
        decoder = advance.__self__
        advance()
        own = getattr(decoder, "kv", None)
        recorded = None if own is None else own.step.bound

        def replay() -> None:
            advance()
            # A graph reads the pieces that it was recorded with.
            if own is not None:
                bounds.append(own.step.bound)
                assert own.step.bound == recorded

        return SimpleNamespace(replay=replay, pool=lambda: (0, 1)), None

    monkeypatch.setattr(inner(module, "decoder"), "record", record)
    decoder = check(module, model, 97, _records=lambda self: True)
    # Of 41 to 58 tokens behind the prompts, and of 23.
    assert len(decoder.graphs) == len(set(bounds)) == 3


@pytest.mark.parametrize("family", sampled(LISTED, quick=()))
def test_families(family: str, tmp_path: Path) -> None:
    program, _ = go.Pipeline.default().run(captured(family)[1], go.RunOptions(verify=False))
    names = placeable(program)
    if not names:
        pytest.skip("nothing of it can lie on the host: see test_what_stays_is_said")
    module, model = emitted(placed(program, 20, 30), tmp_path / "out")
    check(module, model, 128)


def test_softcaps_and_sinks(tmp_path: Path) -> None:
    program = placed(tiny_program(cache=True, softcap=2.0, sinks=True, kv_heads=1), 10, 30)
    module, model = emitted(program, tmp_path / "out")
    check(module, model, 97)


@functools.cache
def with_codes(bits: int) -> Program:
    """A program whose keys and values are rounded in front of each attention."""
    program = tiny_program(hidden=64, head_dim=32)
    recipe = f"canonicalise,quantize{{kv={bits},method=rtn}},insert-kv-cache"
    return go.Pipeline.parse(recipe).run(program, go.RunOptions(verify=False))[0]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_codes(bits: int, tmp_path: Path) -> None:
    """Of 8 bits the host's kernel reads them; those of 4 are copied."""
    program = with_codes(bits)
    module, model = emitted(placed(program, 20, 30 if bits == 8 else 80), tmp_path / "out")
    assert model.kv_bits == [bits] * 2
    check(module, model, 97)


@pytest.mark.parametrize("shares", ["both", "a front too"])
def test_what_is_copied_late_is_waited_for(
    shares: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, model = emitted(placed(tiny_program(cache=True), *SHARES[shares]), tmp_path / "out")
    monkeypatch.setattr(inner(module, "host_kv"), "copies_on", lambda device: LateCopies())
    check(module, model, 97)


def test_nobody_waiting_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(LateCopies):
        def wait(self, copied: int) -> None:
            pass

    module, model = emitted(placed(tiny_program(cache=True), *SHARES["both"]), tmp_path / "out")
    monkeypatch.setattr(inner(module, "host_kv"), "copies_on", lambda device: Never())
    with pytest.raises(AssertionError):
        check(module, model, 97)


def test_pieces_come_in_turn_through_two_buffers(tmp_path: Path) -> None:
    module, model = emitted(placed(tiny_program(cache=True), 0, ROOM), tmp_path / "out")
    decoder = check(module, model, 97)
    before = decoder.kv.pieces.bytes_moved
    decoder.step()
    used = -(-(decoder.used - 1) // 16)
    token = 2 * 2 * 8 * 4
    assert decoder.kv.pieces.bytes_moved - before == 2 * used * 16 * BATCH * token


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with what to install; in torch, and loudly, where that was allowed."""
    module, model = emitted(
        placed(tiny_program(cache=True), *SHARES["a front too"]), tmp_path / "out"
    )
    monkeypatch.setenv("CXX", "no-such-compiler")
    inner(module, "host_attention").host_kernel.cache_clear()
    with pytest.raises(Exception, match=r"no C\+\+ compiler.*GRAPHOPT_HOST_ATTENTION=torch"):
        module.Decoder(model, ROOM, BATCH)
    monkeypatch.setenv("GRAPHOPT_HOST_ATTENTION", "torch")
    with pytest.warns(UserWarning, match="ATTENTION ON THE HOST RUNS IN TORCH"):
        check(module, model, 97)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8])
def test_codes_without_a_compiler(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = with_codes(bits)
    module, model = emitted(placed(program, 20, 30), tmp_path / "out")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("GRAPHOPT_HOST_ATTENTION", "torch")
    inner(module, "host_attention").host_kernel.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(module, model, 97)


def test_more_than_was_planned_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, model = emitted(placed(tiny_program(cache=True), 10, 30), tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"2 texts of 101 tokens: .* placed for 2 of 100;.*place-kv"
    ):
        module.Decoder(model, ROOM + 1, BATCH)
    with pytest.raises(ValueError, match=r"3 texts of 100 tokens"):
        module.Decoder(model, ROOM, BATCH + 1)
    monkeypatch.setattr(inner(module, "host_kv"), "free_bytes", lambda device: 1000)
    with pytest.raises(
        Exception, match=r"take 131,072 bytes .* of host memory, and 1.0 kB are free"
    ):
        module.Decoder(model, ROOM, BATCH)


def test_the_generate_of_the_package(tmp_path: Path) -> None:
    program = tiny_program(cache=True)
    module, model = emitted(placed(program, 10, 30), tmp_path / "placed")
    other, dense = emitted(program, tmp_path / "dense")
    ids = [[5, 6, 7, 8], [9, 10]]
    assert module.generate(model, ids, 12) == other.generate(dense, ids, 12)
    assert not hasattr(module, "arena_for")


def test_a_model_for_the_cpu_leaves_places_out(tmp_path: Path) -> None:
    program = placed(tiny_program(cache=True), 10, 30)
    made = go.emit(program, tmp_path / "out", target="cpu", emit=("torch",))
    assert made.artifact is not None
    assert any("places are left out" in entry.reason for entry in made.artifact.notes)
    module = load_file(tmp_path / "out" / "model.py")
    assert module.generate(module.load(), [5, 6, 7], 4)


@pytest.mark.parametrize("form", ["onnx", "hf"])
def test_other_forms_have_no_place_for_them(form: str, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="no place for keys in the host's memory"):
        go.emit(placed(tiny_program(cache=True), 10, 30), tmp_path / "out", emit=(form,))


# The program --------------------------------------------------------------------------------------


def test_shares_are_printed_saved_and_compared(tmp_path: Path) -> None:
    program = placed(tiny_program(cache=True), 10, 30)
    line = "contiguous placed(cpu) host(context=100, batch=2, resident=10, streamed=30)"
    assert str(program).count(line) == 2
    assert str(parse_program(str(program))) == str(program)
    go.emit(program, tmp_path / "out", target="hopper", emit=("torch",))
    assert load_program(tmp_path / "out").states["kv.1"].host == HostShare(100, 2, 10, 30)
    assert with_hosts(program, {}).states["kv.0"].placement is None


@pytest.mark.parametrize(
    ("share", "message"),
    [((0, 1, 0, 0), "numbers from 1"), ((9, 1, -1, 3), "shares from 0"),
     ((9, 1, 9, 0), "some tokens in host memory"), ((9, 1, 4, 6), "no more than there are")],
)  # fmt: skip
def test_shares_that_are_none(share: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HostShare(*share)


def test_rings_and_pages_are_not_divided() -> None:
    paged = with_layouts(tiny_program(cache=True), {"kv.0": KVLayout("paged", 4)})
    with pytest.raises(VerifyError, match="should be contiguous"):
        with_hosts(paged, {"kv.0": HostShare(9, 1, 0, 0)})


def test_pieces_are_some_dozens_and_not_large() -> None:
    for tokens in (1, 255, 256, 4096, 65536, 524288, 10**7):
        for batch in (1, 3, 16, 400):
            piece = piece_tokens(tokens, batch)
            assert piece % 256 == 0 and piece >= 256 and piece * batch <= max(8192, 256 * batch)
            assert prefill_chunk(batch) * batch <= max(2048, 64 * batch)
    share = HostShare(1000, 1, 100, 300)
    assert [share.streamed_pieces(n) for n in (0, 1, 3, 9)] == [0, 0, 1, 3]
    assert share.computed == 600


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_part_has_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as they were emitted, interpreted: none is missing, in 16 bits."""
    program = tiny_program(
        cache=True, hidden=64, head_dim=32, layers=1, softcap=2.0, sinks=True
    )  # fmt: skip
    go.emit(placed(program, 29, 40), tmp_path / "out", target="ampere", emit=("torch",))
    module = load_file(tmp_path / "out" / "model.py")
    exact, model = (
        module.load(tmp_path / "out", dtype=dtype, device="cpu")
        for dtype in (torch.float32, torch.float16)
    )
    decoder_class = type("Placed", (module.Decoder,), {"piece": 16, "chunk": 24})

    def logits(of: Any) -> Tensor:
        decoder, found = decoder_class(of, ROOM, BATCH), []
        for texts in ([list(range(3, 44)), list(range(9, 39))], [[5], [6]], [[7, 8, 9], [10]]):
            (decoder.extend if decoder.used else decoder.start)(texts)
            found.append(decoder.logits.float().clone())
        return torch.stack(found)

    expected = logits(exact)
    dispatcher, ran = type(module.kernels.DISPATCHER), set()
    load = dispatcher._load

    def noted(self: Any, plan: Any) -> Any:
        ran.add((plan.key.phase, plan.key.causal, plan.key.lse))
        return load(self, plan)

    for name, stand_in in (
        ("_on_device", staticmethod(lambda q: True)), ("_runs_here", lambda self: True),
        ("_load", noted),
    ):  # fmt: skip
        monkeypatch.setattr(dispatcher, name, stand_in)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = logits(model)
    assert {("prefill", True, False), ("prefill", True, True), ("prefill", False, True)} < ran
    assert ("decode", False, True) in ran
    # Two dozen roundings to f16 on the way through, most of them averaged out.
    assert float((found - expected).abs().max()) <= 24 * 2.0**-11 * float(expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_parts_of_codes_are_planned(bits: int) -> None:
    """Of a step's own keys before they are codes, and of codes in front of them."""
    share = HostShare(ROOM, BATCH, 20, 30)
    program = with_codes(bits)
    program = with_hosts(program, dict.fromkeys(program.states, share))
    lowered = lower_attentions(lower(program, "hopper"), "hopper")
    assert lowered is not None and not lowered.refused
    parts = {
        (plan.spec.phase, plan.spec.causal, plan.spec.kv_lens, plan.spec.kv_bits)
        for plan in lowered.plans
        if plan.spec.lse
    }
    assert parts == {
        ("prefill", True, False, 16), ("prefill", False, True, bits), ("decode", False, True, bits)
    }  # fmt: skip


def test_a_stream_calls_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver gets the stream, the address of the function, and that of the job."""
    called: list[Any] = []

    class Driver:
        @staticmethod
        def cuLaunchHostFunc(stream: Any, function: Any, data: Any) -> int:
            called.append(stream.value)
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.value)(data)
            return 0

    class Stream:
        cuda_stream = 2**40 + 5

    monkeypatch.setattr(host_step, "cuda_driver", Driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 9, 16), torch.randn(1, 1, 9, 16)
    out, lse, job = torch.empty(1, 2, 1, 16), torch.empty(1, 2, 1), host_attention.Job()
    lens = torch.tensor([9], dtype=torch.int32)
    host_attention.fill_job(job, q, k[None], v[None], lens, out, lse, width=16, scale=0.25)
    host_step.run_job(job, torch.device("cuda"))
    assert called == [2**40 + 5]
    expected = host_attention.host_attention(q, k, v, lens, scale=0.25, causal=False)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
