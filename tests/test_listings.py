"""What `graphopt passes` and `graphopt targets` print, and what a machine is said to lack."""

from __future__ import annotations

import dataclasses
import io
import json
from importlib import metadata
from types import SimpleNamespace

import pytest
from command_line import runner
from rich.console import Console

from graphopt.cli.commands import app
from graphopt.cli.listings import print_pass, print_pass_list, print_targets
from graphopt.cli.pass_table import pass_table
from graphopt.pass_manager.contract import declared_passes
from graphopt.pass_manager.description import describe_passes, option_meanings
from graphopt.report.records import PassEntry
from graphopt.targets import all_targets, get_target, here
from graphopt.targets.here import fits, missing_here


class Machine:
    """What a test says is installed, in place of this machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packages: dict[str, str] = {}
        self.gpus: set[tuple[int, int]] = set()
        self.toolkit: tuple[int, int] | None = None
        monkeypatch.setattr(here.metadata, "version", self._version)
        monkeypatch.setattr(here.ctypes, "CDLL", self._library)

    def _version(self, name: str) -> str:
        if name not in self.packages:
            raise metadata.PackageNotFoundError(name)
        return self.packages[name]

    def _library(self, name: str) -> object:
        if name == "libcuda.so.1" and self.gpus:
            return SimpleNamespace(
                cuInit=lambda flags: 0, cuDeviceGetCount=self._count, cuDeviceGet=self._device,
                cuDeviceGetAttribute=self._attribute,
            )  # fmt: skip
        if name == "libnvrtc.so.12" and self.toolkit:
            return SimpleNamespace(nvrtcVersion=self._nvrtc)
        raise OSError(name)

    def _count(self, count) -> int:
        count._obj.value = len(self.gpus)
        return 0

    def _device(self, device, number: int) -> int:
        device._obj.value = number
        return 0

    def _attribute(self, part, attribute: int, device) -> int:
        part._obj.value = sorted(self.gpus)[device.value][attribute - 75]
        return 0

    def _nvrtc(self, major, minor) -> int:
        assert self.toolkit is not None
        major._obj.value, minor._obj.value = self.toolkit
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def lacking(name: str) -> dict[str, str]:
    return {lack.what: lack.purpose for lack in missing_here(get_target(name))}


@pytest.mark.parametrize(
    ("version", "wanted", "is_in"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.9", ">=2.11", False),
        ("2.11.0", ">=2.7,<2.11", False),
        ("2.10.1", ">=2.7,<2.11", True),
        ("12.9.86", ">=12,<13", True),
        ("13.0", ">=12,<13", False),
        ("3.6.0.post1", ">=3.6", True),
        ("1", "as torch", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, wanted: str, is_in: bool) -> None:
    assert fits(version, wanted) == is_in


def test_a_bare_machine_lacks_everything_and_is_told_how_to_get_it(machine: Machine) -> None:
    assert lacking("volta") == {
        "nvrtc >=12,<13": "emit",
        "torch >=2.7,<2.11": "run",
        "a GPU of compute capability 7.0": "run",
    }
    assert lacking("hopper")["nvrtc >=12"] == "emit" and lacking("hopper")["triton >=3.6"] == "run"
    for target in all_targets().values():
        for lack in missing_here(target):
            assert lack.remedy and lack.found == ""
    told = [str(lack) for lack in missing_here(get_target("volta"))]
    assert told[0] == "to emit: nvrtc >=12,<13 (pip install 'graphopt[cuda]')"


def test_the_right_machine_lacks_nothing(machine: Machine) -> None:
    machine.packages = {"nvidia-cuda-nvrtc-cu12": "12.9.86", "torch": "2.13.0", "triton": "3.9.0"}
    machine.gpus = {(9, 0)}
    assert missing_here(get_target("hopper")) == missing_here(get_target("ampere")) == []
    (torch,) = missing_here(get_target("volta"))  # whose GPUs newer wheels have no code for
    assert torch.found == "2.13.0" and "and here is 2.13.0" in str(torch)


def test_a_gpu_of_another_generation(machine: Machine) -> None:
    machine.packages = {"nvidia-cuda-nvrtc": "13.0.48", "torch": "2.13.0", "triton": "3.9.0"}
    machine.gpus = {(8, 6), (10, 0)}
    assert missing_here(get_target("ampere")) == []
    (gpu,) = missing_here(get_target("hopper"))  # wgmma is of one generation
    assert gpu.what == "a GPU of compute capability 9.0" and "8.6" in gpu.found
    assert "10.0" in gpu.found
    nvrtc, _ = missing_here(get_target("volta"))
    assert nvrtc.found == "13.0.48"
    machine.toolkit = (12, 4)  # beside it, from a CUDA toolkit
    assert [lack.what for lack in missing_here(get_target("volta"))] == ["torch >=2.7,<2.11"]


def test_targets_as_json_say_what_is_missing(machine: Machine) -> None:
    data = json.loads(runner().invoke(app, ["targets", "volta", "--json"]).stdout)
    assert [lack["purpose"] for lack in data[0]["missing"]] == ["emit", "run", "run"]
    assert data[0]["emit"] == {"nvrtc": ">=12,<13"}


# At 80 columns -----------------------------------------------------------------------------------


def printed(show, *arguments, **options) -> list[str]:
    text = io.StringIO()
    show(Console(file=text, width=80, highlight=False, markup=False), *arguments, **options)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def test_no_line_is_longer_and_the_last_column_alone_wraps(machine: Machine) -> None:
    targets = list(all_targets().values())
    missing = {target.name: missing_here(target) for target in targets}
    lists = [
        printed(print_targets, targets, missing, full=False),
        printed(print_targets, targets, missing, full=True),
        printed(print_pass_list, describe_passes()),
        *(printed(print_pass, item) for item in describe_passes()),
    ]
    for lines in lists:
        assert max(map(len, lines)) <= 80
    for name in ("volta", "ascend910b"):
        (line,) = [line for line in lists[0] if line.startswith(name)]
        assert get_target(name).title in line and get_target(name).isa in line
    for name in declared_passes():
        assert any(line.startswith(f"{name} ") for line in lists[2]), name


def test_every_option_has_a_line_with_meaning_default_and_range() -> None:
    lines = printed(print_pass, describe_passes("prune-blocks")[0])
    text = " ".join(" ".join(lines).split())
    assert "Legality:" in text and "Options:" not in text
    # A rule is broken for this terminal, and goes on below its own text.
    (rule,) = [number for number, line in enumerate(lines) if line.startswith("  2. ")]
    assert len(lines[rule]) > 60 and lines[rule + 1].startswith("     ")
    assert (
        "ratio none The share of the blocks to take out, rounded up. [above 0 and below 1]" in text
    )
    assert "windows 2; 8 on GPUs" in text and "[kl, mi, ppl, bi, angular]" in text
    assert "iterative true Whether" in text and "[bool]" in text


def test_every_option_of_every_pass_has_a_meaning() -> None:
    for name, declared in declared_passes().items():
        if not declared.__module__.startswith("graphopt.passes."):
            continue
        (item,) = describe_passes(name)
        meanings = {option["name"]: option["meaning"] for option in item["options"]}
        assert meanings.keys() == option_meanings(declared).keys(), name
        for option, meaning in meanings.items():
            assert meaning.endswith(".") and len(meaning) > 10, (name, option)


def test_the_table_of_passes_fits_a_narrow_terminal() -> None:
    names = ["common-subexpression-elimination", "dead-code-elimination", "prune-blocks"]
    entries = [
        PassEntry(
            name, {}, True, matched=12345, changed=12345, parameters_before=134_500_000,
            parameters_after=113_400_000, verification="measured", max_abs_logit_delta=1.2e-05,
            kl=0.00098, perplexity_before=20.0, perplexity_after=50000.0, seconds=1234.5,
        )
        for name in names
    ]  # fmt: skip
    lines = printed(lambda console: console.print(pass_table(entries, console.width)))
    assert max(map(len, lines)) <= 80
    rows = [" ".join(line.split()) for line in lines]
    assert rows[2] == "common-subexpression- 12345 12345 113.4M 1.2e-05 0.00098 2.5e+03 1234.5"
    assert rows[3] == "elimination (-15.7%)"
    wide = io.StringIO()
    Console(file=wide, width=140).print(pass_table(entries, 140))
    (line,) = [line for line in wide.getvalue().splitlines() if names[0] in line]
    assert "113.4M (-15.7%)" in line and len(wide.getvalue().splitlines()) == 4
    for width in range(80, 141):  # no figure is cut in any terminal
        lines = io.StringIO()
        Console(file=lines, width=width).print(pass_table(entries, width))
        assert "…" not in lines.getvalue(), width


def test_a_gpu_without_kernels_is_said_to_have_none():
    text = io.StringIO()
    bare = dataclasses.replace(get_target("hopper"), kernels=())
    print_targets(Console(file=text, width=100), [get_target("cpu"), bare],
                  {"cpu": [], "hopper": []}, full=False)  # fmt: skip
    assert text.getvalue().count("attention by its reference: no kernels of ours") == 1
