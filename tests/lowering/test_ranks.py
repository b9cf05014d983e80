"""Packages for several ranks: their text, what each reads, and what they compute under gloo."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from carved import carved
from emitted import load_file
from families import FEATURES as FEATURES_OF
from families import captured
from hypothesis import given
from hypothesis import strategies as st
from packed_programs import projections, with_packed
from programs import tiny_program
from ranks import run_ranks
from sharded import VOCAB, sharded, sharded_tiny
from tiny_models import save_tiny

from graphopt.backends.opening import open_language_model
from graphopt.backends.placement import place
from graphopt.compiler import CompileOptions, compile_model, emit
from graphopt.errors import GraphoptError, LoweringError, SourceError, UsageError
from graphopt.files.safetensors import SafetensorsWriter, read_header
from graphopt.generate.text_reader import TextReader
from graphopt.ir import Array, Dequantised, Packed, Placement, Program, Weight
from graphopt.ir.attach_policy import with_policies
from graphopt.ir.feed_forward import Split as Neurons
from graphopt.ir.kv_policies import policy_from_dict
from graphopt.ir.parts import rank_part
from graphopt.ir.ranks import rank_program
from graphopt.ir.serialize import program_from_json, program_to_json
from graphopt.lowering.torch import render_model, source_files
from graphopt.lowering.torch.ranks import tensor_splits
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.pass_manager.pipeline import DEFAULT_RECIPE, Pipeline
from graphopt.runtime import ranks
from graphopt.runtime.package_digest import differences, package_digest
from graphopt.runtime.split_weights import own_part
from graphopt.support.quantities import format_bytes

pytestmark = pytest.mark.filterwarnings("ignore:attention on a CPU")

FEATURES: dict[str, dict[str, Any]] = {
    "biases": {"bias": True, "norm": "layer", "tied": False, "window": 3, "sinks": True},
    "slopes": {"alibi": True, "softcap": 2.0},
    "one key head": {"kv_heads": 1, "layers": 3},
}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def emit_both(
    program: Program, folder: Path, target: str = "cpu", count: int = 2
) -> tuple[Path, Path]:
    """Emit a program for ranks and for one device; return their folders."""
    folders = folder / "ranks", folder / "one"
    for made, out in zip((sharded(program, count), program), folders, strict=True):
        emit(made, out, target=target, emit=("torch",), dtype="float32")
    return folders


def computed(folder: Path) -> dict[str, Any]:
    """Return what a package computes, of a text read whole, in steps, and gone on from."""
    module = load_file(folder / "model.py")
    model = module.load(device="cpu")
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    logits, _ = model(ids, mask)
    first, cache = model(ids[:, :5], mask[:, :5])
    second, cache = model(ids[:, 5:], mask, cache=cache)
    found = {
        "logits": logits, "steps": torch.cat((first, second), 1),
        "tokens": module.generate(model, [PROMPT, PROMPT[:3]], 8),
        "heads": next(iter(cache[0])).shape[1],
        "elements": sum(p.numel() for p in model.parameters()),
        "beyond": [refusal(model, id) for id in (-1, logits.shape[-1], 2**31 - 1)],
    }  # fmt: skip
    if hasattr(module, "arena_for"):
        arena = module.arena_for(model)
        assert found["tokens"] == module.generate(model, [PROMPT, PROMPT[:3]], 8, arena=arena)
        assert arena.bytes
    if hasattr(module, "Decoder"):
        decoder = module.Decoder(model, 24)
        found["decoded"] = [decoder.start(PROMPT), *(decoder.step() for _ in range(5))]
    return found


def refusal(model: Any, token: int) -> str:
    """Return the kind of error that a model has for a token behind one that it knows."""
    try:
        model(torch.tensor([[3, token]]))
    except Exception as error:
        return type(error).__name__
    return "none"


def computed_by_ranks(rank: int, folders: list[Path]) -> list[dict[str, Any]]:
    torch.manual_seed(rank)  # which nothing depends on
    return [computed(folder) for folder in folders]


def tiny(**features: Any) -> Program:
    return tiny_program(cache=True, vocab=VOCAB, **features)


def check_packages(folders: Sequence[tuple[Path, Path]], count: int = 2) -> list[dict[str, Any]]:
    """Compare packages for ranks with those for one device; return what the first rank found."""
    by_rank = run_ranks(computed_by_ranks, [split for split, _ in folders], ranks=count)
    for number, (_, one) in enumerate(folders):
        first, *others = (found[number] for found in by_rank)
        alone = computed(one)
        largest = float(alone["logits"].abs().max())
        for name in ("logits", "steps"):
            # Sums of parts are rounded in another order, a few dozen times over.
            assert float((first[name] - alone[name]).abs().max()) < 1e-5 * largest, (one, name)
            assert all(torch.equal(first[name], other[name]) for other in others), one
        for name in ("tokens", "decoded"):
            assert first.get(name) == alone.get(name), one
            assert all(other.get(name) == first.get(name) for other in others), one
        # No rank takes an id that none has a row for as one of another's, nor waits for an answer.
        for row in (alone, first, *others):
            assert set(row["beyond"]) <= {"IndexError", "RuntimeError"}, one
        assert first["elements"] < (0.1 + 1 / count) * alone["elements"], one
    return by_rank[0]


@pytest.mark.slow
def test_ranks_compute_what_one_device_does(tmp_path: Path) -> None:
    programs = {name: tiny(**features) for name, features in FEATURES.items()}
    codes = Packed(bits=4, group=8)
    programs["codes"] = with_packed(tiny(hidden=64, ffn=64), projections(codes))
    # Rows of codes do not split into two parts of 97.
    programs["whole head"] = whole_head()
    folders = [emit_both(program, tmp_path / name) for name, program in programs.items()]
    for name, program in {"kernels": tiny(head_dim=32), "codes": programs["codes"]}.items():
        folders.append(emit_both(program, tmp_path / "ampere" / name, "ampere"))
    found = check_packages(folders)
    assert [row["heads"] for row in found[:3]] == [1, 1, 1]
    assert "decoded" in found[-1] and "decoded" in found[-2]


def whole_head() -> Program:
    program = tiny_program(cache=True, vocab=97, tied=False)
    return with_packed(
        program, lambda name: Packed(bits=4, group=8) if name == "lm_head.weight" else None
    )


def test_logits_of_a_whole_head_are_those_of_the_first_rank() -> None:
    assert "return agreed(self.head(x)), cache" in render_model(sharded(whole_head()))
    for program in (sharded_tiny(), sharded(tiny_program(cache=True, vocab=97))):
        assert "agreed" not in render_model(program)


def family_program(family: str) -> Program:
    _, program = captured(family)
    for name in DEFAULT_RECIPE.split(","):
        program = make_pass(name, {}).run(program, Context()).program
    return program


@pytest.mark.parametrize(
    "families",
    [pytest.param(["gpt2"], marks=pytest.mark.slow),
     pytest.param(sorted(FEATURES_OF.values()), marks=pytest.mark.exhaustive)],
    ids=["one", "features"],
)  # fmt: skip
def test_families_under_ranks(families: list[str], tmp_path: Path) -> None:
    check_packages([emit_both(family_program(name), tmp_path / name) for name in families])


@pytest.mark.exhaustive
def test_four_ranks_of_which_two_share_a_key_head(tmp_path: Path) -> None:
    program = tiny(bias=True, sinks=True)
    folders = [emit_both(program, tmp_path / name, name, count=4) for name in ("cpu", "ampere")]
    assert [row["heads"] for row in check_packages(folders, 4)] == [1, 1]


@pytest.mark.slow
def test_passes_in_front_of_it(tmp_path: Path) -> None:
    """Divided feed-forward parts, on the CPU and by kernels, and policies of the cache."""
    experts = carved(tiny(ffn=64), Neurons(shared=16, experts=4, active=2))
    policy = policy_from_dict({"kind": "ema", "page": 4, "pages": 3, "sink": 1, "local": 1})
    selecting = with_policies(tiny(), {"kv.1": policy}, {})
    check_packages(
        [
            emit_both(experts, tmp_path / "experts"),
            emit_both(experts, tmp_path / "kernels", "ampere"),
            emit_both(selecting, tmp_path / "policies"),
            emit_both(selecting, tmp_path / "policies_kernels", "ampere"),
        ]
    )


def test_the_text_is_that_of_every_rank() -> None:
    program = sharded_tiny()
    text = render_model(program)
    saved = program_from_json(json.loads(json.dumps(program_to_json(program))), {})
    assert text == render_model(saved)
    for line in (
        "x_1 = x + all_reduce(linear(merge_heads(a), self.o_proj))",
        "RANKS = 2  # that run it together: torchrun --nproc-per-node 2 model.py",
        '    "layers.*.self_attn.o_proj.weight": Split(axis=1),',
        "    torchrun --nproc-per-node 2 model.py 1 2 3 --new 16",
        "            (like.new_zeros(batch, heads, 0, k), like.new_zeros(batch, heads, 0, v))",
    ):
        assert line in text, line
    assert "[(1, 8, 8)] * 2" in text  # a key head of two, in each layer
    files = [name for name in source_files(program, "cpu") if name.startswith("ranks/")]
    assert files == [
        f"ranks/{name}.py"
        for name in ("__init__", "package_digest", "rank_watch", "ranks", "split_weights")
    ]
    assert "ranks" not in render_model(tiny_program(cache=True))
    assert "Needs torch and safetensors, and model.safetensors and ranks beside" in text


@pytest.mark.slow
def test_a_compile_verifies_what_kernels_are_lowered_to(tmp_path: Path) -> None:
    recipe = Pipeline.parse("shard{tp=2}").within_default()
    options = CompileOptions(target="hopper", emit=("torch",), recipe=recipe)
    report = compile_model(str(save_tiny(tmp_path / "source")), tmp_path / "out", options)
    found = {entry.name: entry.verification for entry in report.passes}
    assert found["shard"] == found["defer-residual-adds"] == found["fuse-layer-ops"] == "passed"
    text = (tmp_path / "out" / "model.py").read_text(encoding="utf-8")
    assert "a, present = cached_attention_by_rows(" in text
    assert "attention_linear_all_reduce(a, self.o_proj)" in text
    assert "linear_all_reduce(act_mul(gate, up" in text
    for name in ("attention_linear_all_reduce", "linear_all_reduce", "cached_attention_by_rows"):
        assert f"{name} = kernels.{name}" in text
    assert report.artifact is not None
    assert any("torchrun --nproc-per-node 2" in line for line in report.artifact.usage)


def test_the_report_says_what_a_rank_holds(tmp_path: Path) -> None:
    program = sharded_tiny()
    report = emit(program, tmp_path / "out", emit=("torch",))
    own = sum(t.numel * 4 for w in rank_program(program, 0).weights for t in w.tensors())
    assert report.artifact is not None
    (note,) = [n.reason for n in report.artifact.notes if n.where == "ranks"]
    assert note.startswith(f"split over 2 devices, each of which holds {format_bytes(own)} of ")


def test_what_has_another_reader_is_not_written_over() -> None:
    program = sharded_tiny()
    block = program.functions["block"]
    down = next(node for node in block.nodes if node.outputs[0].name == "down")
    block.results[0] = block.add("add", [block.results[0], down.output]).output
    text = render_model(program)
    assert "all_reduce(down.clone())" in text
    assert "all_reduce(linear(merge_heads(a), self.o_proj))" in text


def test_layers_that_are_split_otherwise_have_entries_of_their_own() -> None:
    program = sharded_tiny()
    name = "layers.1.mlp.up_proj.weight"
    placement = Placement(("cuda:0", "cuda:1"), 0, sections=2)
    weight = program.weights[name]
    program.weights.replace(Weight(name, weight.producer, weight.checkpoint, placement=placement))
    text = render_model(program)
    assert f'"{name}": Split(axis=0, sections=2)' in text
    assert '"layers.0.mlp.up_proj.weight": Split(axis=0)' in text
    assert '"layers.*.mlp.gate_proj.weight": Split(axis=0)' in text


class Watched:
    """An open safetensors file that counts the elements it is asked for."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.read = tensors, 0

    def get_tensor(self, name: str) -> torch.Tensor:
        self.read += self.tensors[name].numel()
        return self.tensors[name]

    def get_slice(self, name: str) -> Any:
        return WatchedSlice(self, self.tensors[name])


class WatchedSlice:
    def __init__(self, file: Watched, value: torch.Tensor) -> None:
        self.file, self.value = file, value

    def get_shape(self) -> list[int]:
        return list(self.value.shape)

    def __getitem__(self, place: Any) -> torch.Tensor:
        found = self.value[place]
        self.file.read += found.numel()
        return found


@given(
    devices=st.sampled_from([2, 4]), axis=st.sampled_from([0, 1, None]),
    sections=st.sampled_from([1, 2, 3]), copies=st.sampled_from([1, 2]),
    bits=st.sampled_from([0, 2, 3, 4, 8]), zeros=st.booleans(), encoded=st.sampled_from([0, 1]),
)  # fmt: skip
def test_a_rank_reads_its_part_alone(
    devices: int, axis: int | None, sections: int, copies: int, bits: int, zeros: bool, encoded: int
) -> None:
    names = tuple(f"cuda:{rank}" for rank in range(devices))
    if axis is None:
        placement = Placement(names, summed=not bits)
    else:
        placement = Placement(names, axis, sections, copies if devices > copies else 1)
    shape = (placement.parts * sections * 3, placement.parts * sections * 5)
    value = torch.randn(shape)
    producer = Array(value)
    if bits:
        # One group in each part of a section, so that zero points begin within a byte.
        shape = (shape[0] * 8, shape[1]) if encoded == 0 else (shape[0], shape[1] * 8)
        encoding = Packed(bits=bits, group=8, axis=encoded, symmetric=not zeros)
        generator = torch.Generator().manual_seed(0)
        parts: dict[str, Any] = {}
        for suffix, (size, dtype) in encoding.stored(shape, torch.float32).items():
            made = torch.randint(0, 256, size, generator=generator)
            parts[suffix] = Array(made.to(dtype))
        producer = Dequantised(encoding, **parts)
    program = Program("split")
    program.weights.add(Weight("w", producer, placement=placement))
    splits = dict(tensor_splits(program))
    whole = {t.name: t.producer.load() for t in program.weights["w"].tensors()}
    for rank in range(devices):
        wanted = rank_part(producer, placement, rank).tensors()
        for name, tensor in whole.items():
            file = Watched({name: tensor})
            own = own_part(file, name, splits[name], rank, devices)
            assert torch.equal(own, wanted[name.removeprefix("w").removeprefix(".")].load())
            if not splits[name].bits and axis is not None:
                assert file.read == own.numel()


# How ranks begin, and how they end.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a package for two ranks."""
    emit(sharded_tiny(), tmp_path / "out", emit=("torch",))
    return tmp_path / "out"


@pytest.mark.exhaustive
def test_torchrun_runs_it_and_the_first_rank_prints(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    prompt = [str(token) for token in PROMPT]
    done = subprocess.run(
        [*command, "--nproc-per-node=2", str(folder / "model.py"), *prompt, "--new", "6"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    emit(tiny_program(cache=True, vocab=VOCAB), tmp_path / "one", emit=("torch",))
    alone = load_file(tmp_path / "one" / "model.py")
    expected = alone.generate(alone.load(), PROMPT, 6)
    assert done.stdout == " ".join(map(str, expected)) + "\n"


def test_a_process_that_is_alone_is_told_how_to_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["model.py", "1"])
    with pytest.raises(SystemExit) as ended:
        load_file(folder / "model.py").main()
    assert ended.value.code == 2
    assert f"torchrun --nproc-per-node 2 {folder / 'model.py'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("world", "device", "gpus", "message"),
    [("3", "cpu", 0, r"there are 3 ranks, and .* split over 2: .*--nproc-per-node 2.*shard{tp=3}"),
     ("1", "cpu", 0, "there are 1 ranks"),
     ("2", "cuda:1", 2, r"cuda:1 is one device, and this model is split over 2: say cuda"),
     ("2", "cuda", 0, r"2 ranks on .* torch finds 0 of cuda"),
     ("4", "cuda", 3, r"4 ranks on .* torch finds 3 of cuda.*--device cpu")],
)  # fmt: skip
def test_ranks_that_cannot_run_it_are_refused(
    world: str, device: str, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, world)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ranks.RankError, match=message):
        ranks.join(4 if world == "4" else 2, device, tmp_path, tmp_path)


def test_gpus_that_ranks_share_and_gpus_out_of_reach(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    properties = {"cuda:0": "a", "cuda:1": "b"}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda one: SimpleNamespace(uuid=properties[str(one)])
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    joined: Any = SimpleNamespace(device=torch.device("cuda:0"))
    joined.gathered = lambda own: [own, own]
    with pytest.raises(ranks.RankError, match=r"ranks 0 and 1 have one device: 2 ranks on .* 1 of"):
        ranks._check_devices(joined)
    joined.gathered = lambda own: [own, (own[0], "b")]
    ranks._check_devices(joined)
    said = "cuda:0 and cuda:1 do not reach each other's memory: NCCL goes through the host's"
    assert said in capsys.readouterr().err


def joined_with_others(rank: int, folders: list[Path]) -> str:
    try:
        load_file(folders[rank] / "model.py").load()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "joined"


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["weight", "source"])
def test_ranks_with_different_packages_are_refused(
    changed: str, folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    if changed == "weight":
        emit(sharded_tiny(seed=1), other, emit=("torch",), force=True)
        names = "tensor embed.weight of model.safetensors, .* and .* more"
    else:
        path = other / "ranks" / "split_weights.py"
        path.write_text(path.read_text() + "\n")
        names = "ranks/split_weights.py; give all of them copies of one folder"
    said = run_ranks(joined_with_others, [folder, other])
    assert said[0] == said[1]
    assert re.match(f"RankError: rank 1 has another package than rank 0: {names}", said[0]), said


def test_a_digest_sees_code_and_weights_and_nothing_else(folder: Path) -> None:
    before = package_digest(folder, folder)
    assert {"model.py", "ranks/ranks.py"} <= set(before)
    (folder / "report.json").write_text("{}")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "run.py").write_text("pass")
    assert differences([before, package_digest(folder, folder)]) == {}
    tensors = {"a": ((4, 1000), torch.float32), "b": ((1,), torch.int64)}
    digests = []
    for middle in (0.0, 1.0):
        with SafetensorsWriter(folder / "model.safetensors", tensors) as writer:
            value = torch.zeros(4, 1000)
            value[2, 10] = middle
            writer.write("a", value)
            writer.write("b", torch.tensor([7]))
        digests.append(package_digest(folder, folder))
    assert differences(digests) == {1: ["tensor a of model.safetensors"]}


def until_one_ends(rank: int, folder: Path, how: str) -> None:
    """Take steps of which the second rank makes three; what the others say goes to a file."""
    os.dup2(os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY), 2)
    module = load_file(folder / "model.py")
    try:
        for number, _ in enumerate(module.steps(module.load(), [[1, 2, 3]], 60)):
            if rank == 1 and number == 3:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("what it said last")
    except (RuntimeError, ValueError) as error:
        # As at the end of a process that an exception ends, which these processes are not.
        sys.last_value = error
        atexit._run_exitfuncs()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "reason"),
    [("kill", -9, "rank 1 has ended without a word"), ("fail", 1, "rank 1 failed: ValueError: wh")],
)  # fmt: skip
def test_all_ranks_end_when_one_does(how: str, code: int, reason: str, folder: Path) -> None:
    with pytest.raises(AssertionError, match=f"rank 0: died with 1\nrank 1: died with {code}"):
        run_ranks(until_one_ends, folder, how)
    assert f"rank 0 ends: {reason}" in (folder / "0.txt").read_text()


# As graphopt opens it.


@pytest.mark.slow
def test_graphopt_runs_the_ranks_itself(folder: Path, tmp_path: Path) -> None:
    emit(tiny_program(cache=True, vocab=VOCAB), tmp_path / "one", emit=("torch",))
    model, alone = open_language_model(str(folder)), open_language_model(str(tmp_path / "one"))
    assert model.placement == "torch on 2 ranks on the CPU"
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    largest = float(alone.logits(ids).abs().max())
    assert float((model.logits(ids) - alone.logits(ids)).abs().max()) < 1e-5 * largest
    apart = model.log_likelihoods(ids) - alone.log_likelihoods(ids)
    assert float(apart.abs().max()) < 1e-5 * largest
    readers, text = [TextReader(one) for one in (model, alone)], list(PROMPT)
    for _ in range(4):
        here, there = (reader.next_logits(text, 20) for reader in readers)
        assert float((here - there).abs().max()) < 1e-5 * largest
        text.append(int(there.argmax()))
    with pytest.raises(GraphoptError, match="give a text, and a token of each"):
        model.logits(ids[:, :0])
    (torchrun,) = [p for p in psutil.Process().children() if "torch.distributed.run" in p.cmdline()]
    torchrun.children()[-1].kill()
    started = time.monotonic()
    with pytest.raises(GraphoptError, match=r"have ended: rank \d ends: rank \d has ended without"):
        model.logits(ids)
    assert time.monotonic() - started < 60


def test_a_rank_of_another_run_starts_no_ranks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
    for name, value in (names | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"is a rank already.*--nproc-per-node 2 .*model\.py"):
        open_language_model(str(folder))


def test_changed_code_of_ranks_is_not_run(folder: Path) -> None:
    path = folder / "ranks" / "ranks.py"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(SourceError, match=r"ranks/ranks\.py is not the file that graphopt writes"):
        open_language_model(str(folder))


@pytest.mark.exhaustive
def test_a_rank_that_cannot_load_its_part_says_why(folder: Path) -> None:
    """The second rank's part of a weight holds what the first one never reads."""
    place = read_header(folder / "model.safetensors")["layers.1.mlp.up_proj.weight"]
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(place.offset + place.nbytes - 4)
        file.write(np.float32("nan").tobytes())
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        open_language_model(str(folder))


def test_where_ranks_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place("cpu", "torch", 10**9, ranks=2).sentence("torch") == "torch on 2 ranks on the CPU"
    monkeypatch.setattr("graphopt.backends.placement.usable_device", torch.device)
    monkeypatch.setattr("graphopt.backends.placement.found_gpu", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("graphopt.backends.placement.describe_device", str)
    free = {0: 10e9, 1: 4e9}
    monkeypatch.setattr("graphopt.backends.placement.free_bytes", lambda one: free[one.index])
    assert place("auto", "torch", 6 * 10**9, ranks=2).device == torch.device("cuda")
    small = place("auto", "torch", 8 * 10**9, ranks=2)
    assert small.device.type == "cpu"
    assert small.why == "4.0 GB of weights a rank, and 4.0 GB are free on cuda:1"
    assert "split over 4 devices, and torch finds 2" in place("auto", "torch", 1, ranks=4).why
    with pytest.raises(UsageError, match=r"split over 2 devices, and 'cuda:1' is one"):
        place("cuda:1", "torch", 1, ranks=2)
    with pytest.raises(GraphoptError, match=r"split over 4 devices, and torch finds 2 of 'cuda'"):
        place("cuda", "torch", 1, ranks=4)


def test_other_forms_are_for_one_device(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"torch one alone runs so\. Give --emit torch"):
        emit(sharded_tiny(), tmp_path / "out", emit=("torch", "onnx"))
    program = sharded_tiny()
    program.states["kv.0"].placement = Placement(("cpu",))
    with pytest.raises(LoweringError, match=r"State 'kv\.0' is placed\(cpu\), and other parts"):
        emit(program, tmp_path / "out", emit=("torch",))
