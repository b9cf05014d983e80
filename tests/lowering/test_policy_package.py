"""Torch packages whose caches have policies: their tokens and logits are the interpreter's."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from emitted import load_file
from programs import tiny_program

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.execute.interpreter import Runner
from graphopt.generate import generate_ids
from graphopt.ir import Program
from graphopt.ir.attach_policy import with_policies
from graphopt.ir.kv_policies import POLICIES, KVHeads, policy_from_dict
from graphopt.ir.kv_policies.attention_cnn import new_weights
from graphopt.lowering.torch import TorchEmitter
from graphopt.lowering.torch.lowered_kernels import LoweredKernels, lower_attentions
from graphopt.lowering.torch.passes import lower, lowering_passes

pytestmark = pytest.mark.filterwarnings(
    "ignore:attention on a CPU", "ignore:no kernel was planned", "ignore:pages of"
)

BUDGET = {"page": 4, "pages": 3, "sink": 1, "local": 1}


def attached(kind: str, head_dim: int = 8, sinks: bool = True, **options: Any) -> Program:
    """Return a program of three layers, the first of which reads all keys."""
    program = tiny_program(cache=True, layers=3, sinks=sinks, head_dim=head_dim)
    policy = policy_from_dict({"kind": kind, **BUDGET, **options})
    weights = new_weights(2, seed=1) if policy.weight_types(KVHeads(2, 4, 8, 8)) else {}
    return with_policies(program, dict.fromkeys([*program.states][1:], policy), weights)


def texts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 97, (n,), generator=generator).tolist() for n in lengths]


def interpreted(program: Program, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Return the likeliest tokens behind prompts of unequal length, by the program."""
    runner, longest = Runner(program), max(map(len, prompts))
    pads = [longest - len(text) for text in prompts]
    new = torch.tensor([[0] * pad + text for pad, text in zip(pads, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    past, made = None, []
    for _ in range(count):
        (logits,), past = runner.run({"input_ids": new, "attention_mask": mask}, past)
        new = logits[:, -1:].argmax(-1)
        mask = torch.cat((mask, mask.new_ones(len(prompts), 1)), 1)
        made.append(new)
    return torch.cat(made, 1).tolist()


def package(program: Program, folder: Any, target: str = "cpu") -> Any:
    go.emit(program, folder / "out", target=target, emit=("torch",), dtype="float32")
    return load_file(folder / "out" / "model.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(POLICIES))
def test_tokens_are_the_interpreters(kind, tmp_path):
    program = attached(kind)
    module = package(program, tmp_path)
    model = module.load(tmp_path / "out", dtype=torch.float32)
    prompts = texts([21, 9, 14])
    wanted = interpreted(program, prompts, 24)
    assert module.generate(model, prompts, 24) == wanted
    (alone,) = interpreted(program, prompts[:1], 24)
    assert module.generate(model, prompts[0], 24) == alone
    if kind != "dense":
        plain = interpreted(tiny_program(cache=True, layers=3, sinks=True), prompts, 24)
        assert plain != wanted  # it does leave something out


def test_logits_are_the_interpreters_step_by_step(tmp_path):
    program = attached("ema", calibrate_every=3)
    module = package(program, tmp_path)
    model = module.load(tmp_path / "out", dtype=torch.float32)
    runner, past, cache = Runner(program), None, None
    ids = torch.tensor(texts([40]))
    for start, stop in itertools.pairwise([0, 17, *range(18, 30), 34, *range(35, 41)]):
        step = ids[:, start:stop]
        mask = torch.ones(1, stop, dtype=torch.long)
        (wanted,), past = runner.run({"input_ids": step, "attention_mask": mask}, past)
        with torch.no_grad():
            found, cache = model(step, cache=cache)
        # Some hundred roundings in fp32 of logits of order 1.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    for kept, name in zip(cache[1:], [*program.states][1:], strict=True):
        for mine, theirs in zip(kept.state, past[name].state, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_the_file_says_what_the_policy_is(tmp_path):
    program = attached("quest")
    package(program, tmp_path)
    root = tmp_path / "out"
    text = (root / "model.py").read_text()
    fields = '{"kind": "quest", "page": 4, "pages": 3, "sink": 1, "local": 1}'
    assert f"self.policy = policy_of({fields})" in " ".join(text.split()).replace("( {", "({")
    assert "Needs torch and safetensors, and model.safetensors and policies beside" in " ".join(
        text.split()
    )
    names = {path.relative_to(root).as_posix() for path in root.rglob("*.py")}
    assert {"policies/kv_policies/quest.py", "policies/functional.py"} <= names
    for name in names:
        assert "graphopt." not in (root / name).read_text().split('"""', 2)[2]


def test_generate_opens_the_package(tmp_path):
    """Its code is what graphopt writes, policies too; a changed file is refused."""
    program = attached("quest")
    package(program, tmp_path)
    (prompt,) = texts([30])
    (wanted,) = interpreted(program, [prompt], 12)
    model = open_language_model(str(tmp_path / "out"), backend="torch")
    assert list(generate_ids(model, prompt, stop=set(), max_new_tokens=12)) == wanted
    path = tmp_path / "out" / "policies" / "kv_policies" / "quest.py"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(go.GraphoptError, match=r"quest\.py is not the file that graphopt writes"):
        open_language_model(str(tmp_path / "out"), backend="torch")
    trusted = open_language_model(str(tmp_path / "out"), backend="torch", trust_remote_code=True)
    assert list(generate_ids(trusted, prompt, stop=set(), max_new_tokens=12)) == wanted


def test_the_program_itself_generates(tmp_path):
    program = attached("quest")
    (prompt,) = texts([30])
    go.emit(program, tmp_path / "out", emit=("torch",), dtype="float32")
    model = open_language_model(str(tmp_path / "out"), backend="program")
    assert (
        list(generate_ids(model, prompt, stop=set(), max_new_tokens=12))
        == interpreted(program, [prompt], 12)[0]
    )


# Packages for GPUs, run here by their reference and by interpreted kernels -----------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), [
    ("sink-local", {}), ("quest", {}), ("page-range", {}), ("key-codes", {}), ("snapkv", {}),
    ("ema", {"calibrate_every": 3}), ("predictor", {}), ("oracle", {}),
])  # fmt: skip
@pytest.mark.parametrize("target", ["ampere", "ascend910b"])
def test_a_decoder_gives_the_interpreters_tokens(kind, options, target, tmp_path, monkeypatch):
    """Prompts of unequal length, padded behind, in caches of fixed room; and the next ones."""
    monkeypatch.setattr(LoweredKernels, "compile", lambda self: {})
    program = attached(kind, **options)
    module = package(program, tmp_path, target)
    model = module.load(tmp_path / "out", dtype=torch.float32, device="cpu")
    prompts = texts([21, 9, 14])
    decoder = module.Decoder(model, 48, 3)
    for given in (prompts, texts([4, 6, 1])):
        made = [decoder.start(given)]
        made += [decoder.step() for _ in range(19)]
        rows = [list(row) for row in zip(*made, strict=True)]
        # Texts begin with their first page, whatever is beside them.
        assert rows == [interpreted(program, [text], 20)[0] for text in given]
    # A cache that grows gives the same.
    ids = torch.tensor(prompts[:1])
    cache, grown = None, []
    for _ in range(20):
        with torch.no_grad():
            logits, cache = model(ids, cache=cache)
        ids = logits[:, -1:].argmax(-1)
        grown.append(int(ids))
    assert grown == interpreted(program, prompts[:1], 20)[0]


def test_for_a_gpu_without_kernels_of_ours_policies_are_in_plain_torch(tmp_path):
    program = attached("quest")
    go.emit(program, tmp_path / "out", target="any-gpu", emit=("torch",))
    names = {path.name for path in (tmp_path / "out").rglob("*.py")}
    assert "policy_attention.py" in names and not names & {"kv_selection.py", "decoder.py"}
    module = load_file(tmp_path / "out" / "model.py")
    prompts = texts([21])
    made = module.generate(module.load(tmp_path / "out", device="cpu"), prompts, 8)
    assert made == interpreted(program, prompts, 8)
    assert TorchEmitter().fallbacks(program, "any-gpu") == [
        ("every layer", "attention by its reference: any-gpu has no attention kernels of ours")
    ]


@pytest.mark.parametrize("kind", ["quest", "ema", "predictor"])
def test_a_decoder_reads_further_tokens_at_once(kind, tmp_path, monkeypatch):
    """As the program does: all keys are read, and what policies remember is made anew."""
    monkeypatch.setattr(LoweredKernels, "compile", lambda self: {})
    program = attached(kind)
    module = package(program, tmp_path, "ampere")
    model = module.load(tmp_path / "out", dtype=torch.float32, device="cpu")
    prompts, further = texts([21, 9, 14]), texts([4, 7, 2])
    decoder = module.Decoder(model, 48, 3)
    made = [decoder.start(prompts), *(decoder.step() for _ in range(4)), decoder.extend(further)]
    made += [decoder.step() for _ in range(6)]
    assert decoder.held == [21 + 4 + 4 + 6, 9 + 4 + 7 + 6, 14 + 4 + 2 + 6]
    for row, (prompt, more) in enumerate(zip(prompts, further, strict=True)):
        runner, past, wanted = Runner(program), None, []
        given = [prompt, *[None] * 4, more, *[None] * 6]
        for new in given:
            ids = torch.tensor([new or [wanted[-1]]])
            (logits,), past = runner.run({"input_ids": ids}, past)
            wanted.append(int(logits[0, -1].argmax()))
        assert [tokens[row] for tokens in made] == wanted


def test_further_tokens_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(LoweredKernels, "compile", lambda self: {})
    module = package(attached("ema"), tmp_path, "ampere")
    decoder = module.Decoder(module.load(tmp_path / "out", device="cpu"), 12)
    with pytest.raises(ValueError, match="the cache is empty: start with a prompt"):
        decoder.extend([1, 2])
    decoder.start([1] * 9)
    with pytest.raises(ValueError, match="13 tokens in a cache of 12"):
        decoder.extend([1, 2, 3, 4])
    with pytest.raises(ValueError, match="a text that gets no token"):
        decoder.extend([])
    decoder.extend([5])
    assert (decoder.used, decoder.count.steps) == (10, 1)  # a single token is a step
    decoder.extend([5, 6])
    assert (decoder.used, decoder.count.steps) == (12, 0)


def test_kernels_are_planned_for_what_a_policy_selects():
    program = attached("ema", head_dim=32, calibrate_every=4)
    lowered = lower(program, "hopper")
    assert [str(state.layout) for state in lowered.states.values()] == [
        "contiguous", "paged(page=4)", "paged(page=4)",
    ]  # fmt: skip
    kernels = lower_attentions(lowered, "hopper")
    assert kernels is not None
    decode = {
        (plan.spec.selected_blocks, plan.spec.lse, plan.spec.page_max)
        for plan in kernels.plans
        if plan.spec.phase == "decode" and plan.spec.kv == "paged"
    }
    assert decode == {(False, False, False), (True, True, True), (False, True, True)}
    assert not kernels.refused


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("offload", [False, True], ids=["device", "host"])
def test_triton_kernels_read_what_is_selected(offload, tmp_path, monkeypatch):
    """Interpreted: the kernels that a GPU would run, on the program's own tokens."""
    monkeypatch.setattr(LoweredKernels, "compile", lambda self: {})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    program = with_policies(
        tiny_program(cache=True, head_dim=32, layers=1),
        {"kv.0": policy_from_dict({"kind": "ema", **BUDGET, "calibrate_every": 3})},
    )
    go.emit(program, tmp_path / "out", target="ampere", emit=("torch",))
    module = load_file(tmp_path / "out" / "model.py")
    dispatcher, ran = type(module.kernels.DISPATCHER), []
    load = dispatcher._load

    def noted(self: Any, plan: Any) -> Any:
        ran.append((plan.key.phase, plan.key.selected_blocks, plan.key.page_max))
        return load(self, plan)

    for name, instead in (
        ("_on_device", staticmethod(lambda q: True)), ("_runs_here", lambda self: True),
        ("_load", noted),
    ):  # fmt: skip
        monkeypatch.setattr(dispatcher, name, instead)
    model = module.load(tmp_path / "out", dtype=torch.float16, device="cpu")
    inside = importlib.import_module(module.Decoder.__mro__[1].__module__)
    monkeypatch.setattr(inside, "refuse_offload", lambda device: None)
    decoder = module.Decoder(model, 40, 2, offload=offload)
    prompts, count = texts([18, 11]), 6
    rows = [stepwise(program, text, count) for text in prompts]
    decoder.start(prompts)
    for step in range(count):
        logits = torch.stack([row[step] for row in rows])
        # Two dozen roundings to f16 on the way through, logits of order 1.
        torch.testing.assert_close(decoder.logits.float(), logits, rtol=0, atol=24 * 2.0**-11)
        decoder.step(logits.argmax(-1).tolist())
    assert set(ran) == {
        ("prefill", False, False), ("decode", True, True), ("decode", False, True),
    }  # fmt: skip


def stepwise(program: Program, text: list[int], count: int) -> list[torch.Tensor]:
    """Return the logits [vocab] behind a text and the likeliest tokens behind it, one by one."""
    runner, past, ids, made = Runner(program), None, torch.tensor([text]), []
    for _ in range(count):
        (logits,), past = runner.run({"input_ids": ids}, past)
        made.append(logits[0, -1])
        ids = made[-1].argmax().view(1, 1)
    return made


def test_the_pipeline_verifies_that_states_lie_in_pages():
    program = attached("ema", head_dim=32, calibrate_every=4)
    lowered, report = go.Pipeline(lowering_passes("ampere")).run(program)
    entry = report.passes[-1]
    assert (entry.name, entry.changed, entry.verification) == ("plan-kernels", 2, "passed")
    assert str(lowered) == str(lower(program, "ampere"))


# Keys in host memory ------------------------------------------------------------------------------


def offloading(program: Program, folder: Any, monkeypatch: Any, capacity: int, batch: int) -> Any:
    """Return a decoder with its keys in host memory, on a CPU, which a user is refused."""
    monkeypatch.setattr(LoweredKernels, "compile", lambda self: {})
    module = package(program, folder, "ampere")
    decoder = module.Decoder.__mro__[1]
    inside = importlib.import_module(decoder.__module__)
    monkeypatch.setattr(inside, "refuse_offload", lambda device: None)
    model = module.load(folder / "out", dtype=torch.float32, device="cpu")
    return module.Decoder(model, capacity, batch, offload=True)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), [
    ("sink-local", {}), ("quest", {}), ("ema", {"calibrate_every": 3}), ("predictor", {}),
])  # fmt: skip
def test_a_decoder_with_keys_in_host_memory_gives_the_programs_tokens(
    kind, options, tmp_path, monkeypatch
):
    """Prompts of unequal length, steps that read all, further tokens, and other texts behind."""
    program = attached(kind, sinks=False, **options)
    decoder = offloading(program, tmp_path, monkeypatch, 60, 3)
    for lengths in ((21, 9, 14), (4, 6, 30)):
        prompts, further = texts([*lengths]), texts([4, 7, 2])
        made = [decoder.start(prompts), *(decoder.step() for _ in range(7))]
        made += [decoder.extend(further), *(decoder.step() for _ in range(6))]
        for row, (prompt, more) in enumerate(zip(prompts, further, strict=True)):
            runner, past, wanted = Runner(program), None, []
            for new in [prompt, *[None] * 7, more, *[None] * 6]:
                ids = torch.tensor([new or [wanted[-1]]])
                (logits,), past = runner.run({"input_ids": ids}, past)
                wanted.append(int(logits[0, -1].argmax()))
            assert [tokens[row] for tokens in made] == wanted
    offload = decoder.offload
    assert offload.layers == [1, 2] and int(offload.kv.pages_moved) > 0
    assert (int(offload.kv.layers_moved) > 0) == (kind in ("ema", "predictor"))
    # Nothing is on its way behind a step, which a recording could not wait for.
    assert all(layer.fetched is layer.staged is None for layer in offload.kv._layers)


def test_keys_in_host_memory_need_a_gpu_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(LoweredKernels, "compile", lambda self: {})
    module = package(attached("ema", sinks=False), tmp_path, "ampere")
    model = module.load(tmp_path / "out", dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="for a GPU, which reads pinned memory"):
        module.Decoder(model, 48, offload=True)
    inside = importlib.import_module(module.Decoder.__mro__[1].__module__)
    monkeypatch.setattr(inside, "refuse_offload", lambda device: None)
    offload = importlib.import_module(inside.__name__.replace("policy_decoder", "kv_offload"))
    monkeypatch.setattr(offload, "free_bytes", lambda device: 100)
    needed = 2 * 2 * 48 * 16 * 4  # layers, key heads, tokens, keys and values, bytes
    with pytest.raises(Exception, match=rf"take {needed:,} bytes .* of host memory"):
        module.Decoder(model, 48, offload=True)


def test_opening_with_keys_in_host_memory_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(LoweredKernels, "compile", lambda self: {})
    package(attached("ema", sinks=False), tmp_path, "ampere")
    with pytest.raises(go.GraphoptError, match=r"--offload.*the model runs on the CPU"):
        open_language_model(str(tmp_path / "out"), "torch", device="cpu", offload=True)
    model = open_language_model(str(tmp_path / "out"), "torch", device="cpu")
    # As it would be on a GPU; the package itself refuses as well.
    model._running._facts = replace(model._running._facts, offload=True)
    with pytest.raises(go.GraphoptError, match="Keys cannot lie in host memory: keys in host"):
        model.start_text(20)


def test_sinks_with_keys_in_host_memory_are_refused(tmp_path, monkeypatch):
    decoder = offloading(attached("ema"), tmp_path, monkeypatch, 48, 1)
    with pytest.raises(ValueError, match="sinks with keys in host memory"):
        decoder.start([1, 2, 3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("kind", ["sink-local", "quest", "ema", "predictor"])
def test_on_a_gpu_keys_in_host_memory_give_the_programs_logits(kind, tmp_path):
    options = {"calibrate_every": 3} if kind in ("ema", "predictor") else {}
    program = attached(kind, head_dim=32, sinks=False, **options)
    go.emit(program, tmp_path / "out", target="ampere", emit=("torch",))
    module = load_file(tmp_path / "out" / "model.py")
    model = module.load(tmp_path / "out")
    count, decoders = 12, [module.Decoder(model, 48, 2, offload=here) for here in (False, True)]
    # What was recorded for one pair of texts runs with others.
    for prompts in (texts([21, 14]), texts([9, 26])):
        rows = [stepwise(program, text, count) for text in prompts]
        made: list[list[torch.Tensor]] = []
        for decoder in decoders:
            decoder.start(prompts)
            made.append([decoder.logits.float().cpu()])
            for step in range(count - 1):
                decoder.step([int(row[step].argmax()) for row in rows])
                made[-1].append(decoder.logits.float().cpu())
        # Roundings to 16 bits can tell two pages of nearly one score apart otherwise than fp32
        # does, so that host and device are compared with each other.
        for one, other in zip(*made, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=24 * 2.0**-11)
        first = torch.stack([row[0] for row in rows])
        torch.testing.assert_close(made[1][0], first, rtol=0, atol=24 * 2.0**-11)
        for decoder in decoders:
            one_by_one = [decoder.start(prompts), *(decoder.step() for _ in range(count))]
            # One records its turns with a step on its way.
            new = module.Decoder(model, 48, 2, offload=decoder.offload is not None)
            for again in (decoder, new):
                assert [again.start(prompts), *again.steps(count)] == one_by_one
            assert len(new.graphs) == new.period
    assert all(len(decoder.graphs) == decoder.period for decoder in decoders)
