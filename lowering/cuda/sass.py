"""Machine code for Volta as instructions: what `nvdisasm -hex` prints, parsed.

The encoding of what steers an instruction (stall cycles, scoreboards) is that of Jia et al.,
"Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking" (arXiv 1804.06826), §2.1.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from graphopt.errors import LoweringError

# CUDA 13 refuses sm_70: 'CUDA architecture "SM70" is deprecated'.
_LAST_MAJOR = 12

_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SECOND_HALF = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_LABEL = re.compile(r"^(\.L_\w+):")
_SECTION = re.compile(r"^\s*\.section\s+(?:\.text\.(\w+))?")
_REGISTERS = re.compile(r"SHI_REGISTERS=(\d+)")
_NOBODY = 7  # the number of no scoreboard


@dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
        guard: Predicate it runs under, such as `!P0`; empty where it always does.
        opcode: With its modifiers, such as `LDS.U.128`.
        operands: The rest of it, as text.
        stall: Cycles before the warp's next instruction.
        writes, reads: Scoreboard that is released when the result is there, and when the
            operands have been read; None without.
        waits: Scoreboards that must be released before it starts.
    """

    guard: str
    opcode: str
    operands: str
    stall: int
    writes: int | None
    reads: int | None
    waits: tuple[int, ...]

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Listing:
    """The machine code of a kernel.

    Attributes:
        registers: How many registers a thread has.
        labels: Label -> index of the instruction that follows it.
    """

    name: str
    registers: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def count(self, pattern: str) -> int:
        """Return how many opcodes begin with what the regular expression describes."""
        return sum(bool(re.match(pattern, i.opcode)) for i in self.instructions)

    def target(self, index: int) -> int | None:
        """Return the index of the instruction a branch goes to, or None if it is no branch."""
        found = re.search(r"`\((\.L_\w+)\)", self.instructions[index].operands)
        if self.instructions[index].name != "BRA" or found is None:
            return None
        return self.labels[found[1]]

    def main_loop(self) -> range:
        """Return the indices of the loop with the most matrix instructions.

        Raises:
            LoweringError: No loop has any.
        """
        loops = [
            range(start, index + 1)
            for index in range(len(self.instructions))
            if (start := self.target(index)) is not None and start < index
        ]

        def products(loop: range) -> int:
            return sum(self.instructions[i].name == "HMMA" for i in loop)

        best = max(loops, key=products, default=range(0))
        if not products(best):
            raise LoweringError(f"{self.name} has no loop with matrix instructions.", "")
        return best


def parse_sass(text: str) -> dict[str, Listing]:
    """Return the kernels in what `nvdisasm -hex -c` printed, by name.

    Raises:
        LoweringError: It was printed without -hex.
    """
    found: dict[str, Listing] = {}
    for name, section in _sections(text):
        registers = _REGISTERS.search(section)
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        lines = section.splitlines()
        for line, after in zip(lines, [*lines[1:], ""], strict=True):
            if label := _LABEL.match(line):
                labels[label[1]] = len(instructions)
            elif match := _LINE.match(line):
                high = _SECOND_HALF.match(after)
                if high is None:
                    raise LoweringError(
                        f"{name}: no encoding below {line.strip()!r}.", "Print it with -hex."
                    )
                instructions.append(_instruction(match, int(high[1], 16) >> 41))
        found[name] = Listing(
            name, int(registers[1]) if registers else 0, tuple(instructions), labels
        )
    return found


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every kernel."""
    name, lines = "", list[str]()
    for line in text.splitlines():
        if section := _SECTION.match(line):
            if name:
                yield name, "\n".join(lines)
            name, lines = section[1] or "", []
        lines.append(line)
    if name:
        yield name, "\n".join(lines)


def _instruction(match: re.Match[str], control: int) -> Instruction:
    """Return an instruction from its line and its 21 bits of control, lowest first: 4 of stall
    cycles, 1 to yield, 3 and 3 of a scoreboard to write and to read, 6 of those to wait for."""
    writes, reads = control >> 5 & 7, control >> 8 & 7
    return Instruction(
        guard=match[1] or "",
        opcode=match[2],
        operands=match[3],
        stall=control & 15,
        writes=None if writes == _NOBODY else writes,
        reads=None if reads == _NOBODY else reads,
        waits=tuple(i for i in range(6) if control >> 11 + i & 1),
    )


@dataclass(frozen=True)
class Usage:
    """What a kernel takes, as ptxas says.

    Attributes:
        registers: How many registers a thread has.
        spilled: Bytes a thread stores to and loads from local memory for want of registers.
        shared: Bytes of shared memory of a block beside what is asked for at the launch.
    """

    registers: int
    spilled: int
    shared: int


def usage(log: str) -> dict[str, Usage]:
    """Return what each kernel takes, from what `ptxas -v` said."""
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    found: dict[str, Usage] = {}
    for name, stores, loads, registers, rest in re.findall(pattern, log, re.DOTALL):
        shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", rest)
        spilled = int(stores) + int(loads)
        found[name] = Usage(int(registers), spilled, int(shared[1]) if shared else 0)
    return found


def disassemble(cubin: bytes, nvdisasm: str) -> dict[str, Listing]:
    """Return the kernels of some machine code, by name.

    Raises:
        LoweringError: The disassembler refuses it.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [nvdisasm, "-hex", "-c", str(path)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise LoweringError(f"{nvdisasm} failed: {done.stderr.strip()}.", "")
    return parse_sass(done.stdout)


@cache
def find_nvdisasm(*places: str) -> str:
    """Return a disassembler that knows sm_70: one of CUDA 12.

    Args:
        places: Files to try first. Then come the search path and the installed Triton, whose
            releases 3.0 to 3.6 hold one.

    Raises:
        LoweringError: There is none.
    """
    candidates = [*places, shutil.which("nvdisasm")]
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or ()) if triton else ():
        candidates.append(str(Path(folder) / "backends" / "nvidia" / "bin" / "nvdisasm"))
    newer = ""
    for path in candidates:
        if path is None or not Path(path).is_file():
            continue
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        release = re.search(r"release (\d+)\.(\d+)", done.stdout)
        if release and int(release[1]) <= _LAST_MAJOR:
            return path
        if release:
            newer = f"; {path} is of CUDA {release[1]}.{release[2]}, which no longer knows it"
    raise LoweringError(
        f"There is no nvdisasm for sm_70 here{newer}.",
        "Take the one of Triton 3.1.0: pip download --no-deps triton==3.1.0, then "
        "unzip -j triton-3.1.0*.whl '*/nvdisasm', and put it on the PATH.",
    )
