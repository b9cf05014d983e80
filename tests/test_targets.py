"""What a target's file may say, and what a wrong one is answered."""

from __future__ import annotations

import dataclasses
import json
import re
from importlib import resources
from pathlib import Path

import pytest
import torch
from command_line import runner

import graphopt as go
from graphopt import targets
from graphopt.cli.commands import app
from graphopt.errors import UsageError
from graphopt.execute.interpreter import Runner
from graphopt.lowering.kernels import (
    get_layer_family,
    plain_gpu,
    plan_attention,
    portable_gpu,
)
from graphopt.lowering.kernels.triton import expert_tiles, kernel_constants
from graphopt.lowering.torch import TorchEmitter
from graphopt.memory.analysis.link import default_link
from graphopt.memory.cost import newest_roofline
from graphopt.plan import AttentionSpec
from graphopt.targets import all_targets, broken_targets, get_target, newest_gpu, register_target

HOPPER = (resources.files(targets) / "hopper.toml").read_text(encoding="utf-8")
TURING = HOPPER.replace('isa = "sm_90"', 'isa = "sm_75"').replace('"wgmma", ', "")
SPEC = AttentionSpec(head_dim=64, heads=8, kv_heads=2)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(targets, "_REGISTERED", {})


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Return a folder that stands for that of the targets, with all of them."""
    for entry in resources.files(targets).iterdir():
        if entry.name.endswith((".toml", ".json")):
            (tmp_path / entry.name).write_bytes(entry.read_bytes())
    monkeypatch.setattr(targets.resources, "files", lambda package: tmp_path)
    targets._own_files.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    targets._own_files.cache_clear()


def changed(old: str, new: str, text: str = HOPPER) -> str:
    assert old in text
    return text.replace('name = "hopper"', 'name = "mine"').replace(old, new)


def test_every_file_in_the_folder_is_a_target():
    assert broken_targets() == {}
    for target in all_targets().values():
        assert (expert_tiles(target) is None) == (target.experts is None)
        for family in target.layer_kernels:
            assert get_layer_family(family).refuses(target) is None


WRONG = {
    "a misspelt key": ("bandwidth = 3350e9", "bandwith = 3350e9",
        "the entry 'bandwith' is 3350000000000.0, and no such entry is known. Did you mean "
        "'bandwidth'?"),
    "a misspelt key of a table": ("[experts.few]\nexpand = { rows", "[experts.few]\nexpand = { row",
        "the entry 'experts.few.expand.rows' is missing"),
    "no dtypes": ('dtypes = ["f32", "f16", "bf16"]\n', "", "the entry 'dtypes' is missing"),
    "a word for a number": ("bandwidth = 3350e9", 'bandwidth = "fast"',
        "the entry 'bandwidth' is 'fast', and it should be a valid number"),
    "a number as text": ("cores = 132", 'cores = "132"',
        "the entry 'cores' is '132', and it should be a valid integer"),
    "a size of nothing": ("bytes = 233472", "bytes = 0", "the entry 'memory.0.bytes' is 0, and it"),
    "a boolean for a number": ("warp = 32", "warp = true",
        "the entry 'limits.warp' is True, and it should be a valid integer"),
    "an isa without its line": ('isa = "sm_90"', 'isa = "sm90"',
        "the entry 'isa' is 'sm90', and it should be sm_ and the compute capability"),
    "an isa of another kind": ('isa = "sm_90"', 'isa = "dav-c220"',
        "the entry 'isa' is 'dav-c220', and it should be sm_"),
    "a kind that is none": ('kind = "gpu"', 'kind = "tpu"',
        "the entry 'kind' is 'tpu', and it should be 'cpu', 'gpu' or 'npu'"),
    "a dtype by another name": ('input = "bf16"', 'input = "bfloat16"',
        "the entry 'matrix_unit.1.input' is 'bfloat16', and it should be 'f64', 'f32', 'f16'"),
    "a feature that nothing asks for": ('"wgmma"', '"wmma"',
        "the entry 'features.0' is 'wmma', and it should be 'wgmma' or 'programmatic-launch'"),
    "a figure without a source": ("\ncores = \"NVIDIA", "\ncors = \"NVIDIA",
        "and it should say where these are from: cores"),
    "tiles that end above 0": ("tokens = 0\n", "tokens = 8\n", "and tokens = 0 last"),
    "few tokens in more tiles than one": ("tokens = 8\nrows = 16", "tokens = 9\nrows = 16",
        "it should have tokens up to its columns and warps = 1"),
    "few tokens by two warps": ("columns = 8\nwarps = 1\n", "columns = 8\nwarps = 2\n",
        "it should have tokens up to its columns and warps = 1"),
    "a tile that is no power of two": ("columns = 8\n", "columns = 12\n",
        "the entry 'quantised.packed.0.columns' is 12, and it should be a power of two"),
    "rows without a counter each": ("rows = 16\ncolumns = 8\n", "rows = 8\ncolumns = 8\n",
        "the entry 'quantised.packed.0.rows' is 8, and it should be greater than or equal to 16"),
    "integer products in registers": ("[[quantised.integer_packed]]\n",
        "[[quantised.integer_packed]]\nunroll = 2\ntokens = 16\nrows = 16\ncolumns = 16\n"
        "warps = 1\nstages = 1\nprograms = 1\n[[quantised.integer_packed]]\n",
        "it should have no unroll"),
    "a host without all": ("link_beside = 48e9\n", "",
        "it should have link_beside as well, or link alone"),
    "broken TOML": ("cores = 132", "cores = ", "is not valid TOML: Invalid value (at line"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_with_file_and_entry_and_what_is_expected(name, folder):
    old, new, message = WRONG[name]
    (folder / "mine.toml").write_text(changed(old, new))
    with pytest.raises(UsageError) as error:
        get_target("mine")
    assert str(error.value).startswith("targets/mine.toml")
    assert message in str(error.value) and "docs/add-a-target.md" in error.value.remedy
    assert list(broken_targets()) == ["mine"]
    # The others are as they were.
    assert get_target("hopper").cores == 132 and "mine" not in all_targets()
    with pytest.raises(UsageError) as error:
        register_target(changed(old, new))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [("A100", "architecture: ampere"), ("h100", "architecture: hopper"), ("hoper", "'hopper'"),
     ("cuda", "ampere or "), ("GPU", " or volta")],
)  # fmt: skip
def test_an_unknown_target_may_be_a_card_or_a_kind(name, said):
    with pytest.raises(UsageError, match=f"Unknown target '{name}'") as caught:
        get_target(name)
    assert said in caught.value.remedy


def test_one_broken_file_is_named_and_stops_no_command(folder):
    (folder / "mine.toml").write_text(changed("cores = 132", "cors = 132"))
    (folder / "other.toml").write_text(HOPPER)
    (folder / "gone.toml").symlink_to(folder / "renamed.toml")
    (folder / "latin.toml").write_bytes(b'name = "\xe9"')
    command = runner()
    shown = command.invoke(app, ["targets", "--json"])
    names = {target["name"] for target in json.loads(shown.stdout)}
    assert shown.exit_code == 0 and names == set(all_targets()) and len(names) >= 5
    said = " ".join(shown.stderr.split())
    for line in (
        "warning: targets/gone.toml cannot be read: No such file or directory. Install graphopt",
        "warning: targets/latin.toml is not UTF-8 text",
        "warning: targets/mine.toml: the entry 'cors' is 132, and no such entry is known. Did you "
        "mean 'cores'?",
        "warning: targets/other.toml: the entry 'name' is 'hopper', and it should be as the file",
    ):
        assert line in said
    planned = ["plan-attention", "--head-dim", "64", "--kv-heads", "8", "--target"]
    assert command.invoke(app, [*planned, "hopper"]).exit_code == 0
    refused = command.invoke(app, [*planned, "mine"])
    assert refused.exit_code == 2 and "the entry 'cors' is 132, and no such" in refused.stderr


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("registers_per_thread", "register_per_thread",
         "mine.toml states no limits.registers_per_thread, and its kernels are planned by that. "
         "Add it, with its source. It has 'register_per_thread': is that the one?"),
        ('name = "shared"', 'name = "Shared"', "states no bytes of a memory called 'shared'"),
        ("bytes = 233472\n", "", "states no bytes of a memory called 'shared'"),
    ],
)  # fmt: skip
def test_a_figure_that_a_planner_misses_is_asked_for(old, new, message):
    register_target(changed(old, new))
    alone = dataclasses.replace(get_target("mine"), kernels=("triton",))
    with pytest.raises(UsageError) as error:
        plan_attention(SPEC, alone)
    assert message in str(error.value)


def test_what_a_machine_can_do_stands_in_its_file():
    register_target(changed('features = ["wgmma", "programmatic-launch"]\n', ""))
    plain, hopper = get_target("mine"), get_target("hopper")
    assert plan_attention(SPEC, hopper).kernel == "hopper-cuda"
    plan = plan_attention(SPEC, plain)
    assert plan.kernel == "triton" and not kernel_constants(plan)["OVERLAP"]
    (passed_over,) = plan.passed_over
    assert passed_over == ("hopper-cuda", f"it multiplies by wgmma, which {plain.title} has not")
    only_triton = plan_attention(SPEC, dataclasses.replace(hopper, kernels=("triton",)))
    assert kernel_constants(only_triton)["OVERLAP"]
    # Without `wgmma` nothing keeps Triton from tiles of 64 rows and four warps.
    assert plan.tiles["BLOCK_M"] > only_triton.tiles["BLOCK_M"]


def test_triton_refuses_a_machine_that_is_too_old():
    from programs import tiny_program

    from graphopt.lowering.torch.lowered_kernels import lower_attentions

    register_target(changed("NVIDIA H100 (Hopper)", "an old one", TURING))
    lowered = lower_attentions(tiny_program(cache=True, head_dim=32), "mine")
    assert lowered.plans == []
    why = "Triton compiles for GPUs from sm_80 on, and an old one is sm_75"
    assert all(why in reason for _, reason in lowered.refused) and lowered.refused
    assert lowered.layer_kernels() == []
    ((functions, reason),) = lowered.without_layer_kernels()
    assert "rms_norm" in functions and reason == f"run in plain torch: {why}"


def test_a_gpu_without_kernels_runs_in_plain_torch_which_is_said():
    from programs import tiny_program

    without = changed("NVIDIA H100 (Hopper)", "an old one", TURING)
    without = re.sub("^(layer_)?kernels = .*\\n", "", without, flags=re.MULTILINE)
    register_target(without)
    program = tiny_program(cache=True)
    assert TorchEmitter().fallbacks(program, "mine") == [
        ("every layer", "attention by its reference: mine has no attention kernels of ours")
    ]
    assert TorchEmitter().fallbacks(program, "cpu") == []


def test_models_that_write_are_emitted_for_a_gpu_that_compiles_nothing():
    def taken():
        target = plain_gpu("bf16")
        return target.compute_capability, target.kernels, target.layer_kernels

    assert taken() == ((5, 0), (), ())
    for isa, oldest in (("sm_100", (5, 0)), ("sm_30", (3, 0))):
        without = re.sub("^(layer_)?kernels = .*\n", "", HOPPER, flags=re.MULTILINE)
        without = without.replace('name = "hopper"', f'name = "{isa}"')
        register_target(without.replace('isa = "sm_90"', f'isa = "{isa}"'))
        assert get_target(isa).kernels == () and taken() == (oldest, (), ())
    # Kernels for Volta and some of Hopper's are compiled when they are emitted.
    assert portable_gpu().name == "ampere"
    assert get_target("cpu").compute_capability is None


@pytest.mark.parametrize("with_triton", [True, False])
def test_models_for_a_gpu_that_no_kernel_of_ours_runs_on_are_plain_torch(with_triton, tmp_path):
    """Ops that kernels alone have are not in them; caches have fixed room all the same."""
    from emitted import load_file
    from programs import tiny_program

    if with_triton:
        register_target(changed("NVIDIA H100 (Hopper)", "an old one", TURING))
    program = tiny_program(cache=True, head_dim=32)
    target = "mine" if with_triton else plain_gpu("f16").name
    go.emit(program, tmp_path / "out", target=target, emit=("torch",))
    module = load_file(tmp_path / "out" / "model.py")
    model = module.load(tmp_path / "out", device="cpu")
    text, plain = [5, 6, 7], Runner(program)
    wanted: list[int] = []
    for _ in range(6):
        logits = plain.logits({"input_ids": torch.tensor([text + wanted])})
        wanted.append(int(logits[0, -1].argmax()))
    assert module.generate(model, text, 6) == wanted
    decoder = module.Decoder(model, 10)
    assert [decoder.start(text), *decoder.steps(5)] == wanted
    assert not [file for file in (tmp_path / "out").rglob("*.py") if "tl." in file.read_text()]


def test_the_newest_gpu_that_states_a_figure_stands_for_one():
    def times_and_link():
        roofline, link = newest_roofline(), default_link()
        return roofline.bandwidth, roofline.flops, roofline.flops_32, link.in_bytes

    hopper = get_target("hopper")
    known = (hopper.decode.bandwidth, hopper.flops["bf16"], hopper.flops["f32"], hopper.host_link)
    assert times_and_link() == known
    newer = changed('isa = "sm_90"', 'isa = "sm_100"').replace(
        "bandwidth = 2960e9", "bandwidth = 5"
    )
    whole = newer.index("[host]")
    table = newer[whole : newer.index("[emit]")]
    register_target(newer.replace(table, "[host]\nlink = 7\n").replace("bf16 = 989e12", "bf16 = 6"))
    assert times_and_link() == (5, 6, hopper.flops["f32"], 7)
    assert get_target("mine").host is None and newest_gpu("host") == hopper


def test_no_code_names_a_machine():
    root = Path(__file__).parents[1]
    names = "|".join(name for name in all_targets() if name != "cpu")
    named = re.compile(rf'(?<!launcher = )"({names}|sm_90|sm_80)"')
    code = [p for folder in ("graphopt", "lowering", "passes", "runtime")
            for p in (root / folder).rglob("*.py")]  # fmt: skip
    assert len(code) > 200
    assert not [
        (path.name, found[0]) for path in code for found in named.finditer(path.read_text())
    ]
