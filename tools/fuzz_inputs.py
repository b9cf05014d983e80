"""Throw damaged inputs of every format at every command, and see what becomes of it.

    python tools/fuzz_inputs.py --seed 0 --count 2000 --out fuzz.json

A try (`fuzz_tries.py`) is good inputs with one damaged (`fuzz_mutations.py`), or odd values
on the command line, and one command that runs in a forked process with limits of time and
memory. It may succeed, or end with exactly one sentence on stderr; a traceback, a bug's exit code,
a crash, a hang, a memory beyond the limit, a file changed outside the output folder, a connection
or a program started is a failure. The same seed and number give the same try: `--only NUMBER`.

Memory is what is resident in all processes of a try together, looked at every hundredth of a second
and, of each one, at its end. Address space is limited as well, so that a try that would take more
is refused for it; the result counts these under `short_of_memory`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import functools
import gc
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fuzz_tries import Try, base_inputs, prepare

TIME_LIMIT = 30.0
"""Seconds that a try may compute. By the clock it may take four times that, so that a machine on
which other things run does not make hangs; a try that waits for something is found all the same."""

MEMORY_LIMIT = 4 * 2**30

# In the forked process --------------------------------------------------------------------------

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MAY_START = {sys.executable}
"""Chat templates are rendered by an interpreter of their own, with limits."""


UNHARMED = ("/dev/null", "/proc/self/clear_refs")
"""The last resets the peak of resident memory, which reports state."""


def watch(allowed: tuple[str, ...], notes: list[str]) -> None:
    """Write down, from now on, what Python code does outside the allowed folders."""

    def inside(path: Any) -> bool:
        if isinstance(path, int):
            return True
        text = os.fsdecode(path)
        text = text if text in UNHARMED else os.path.realpath(text)
        return text.startswith(allowed) or text in UNHARMED

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & WRITING:
            if not inside(args[0]):
                notes.append(f"opened {os.fsdecode(args[0])!r} for writing")
        elif event in (
            "os.remove",
            "os.rename",
            "os.mkdir",
            "os.rmdir",
            "os.symlink",
            "os.link",
            "os.truncate",
            "os.chmod",
            "shutil.rmtree",
        ):
            if event != "shutil.rmtree" and any(isinstance(a, int) and a > 2 for a in args[1:]):
                return  # relative to a folder, as rmtree does, which has an event of its own
            bad = [str(a) for a in args[:2] if isinstance(a, str | bytes | Path) and not inside(a)]
            if event == "os.mkdir" and os.path.isdir(args[0]):
                return  # nothing to make
            # The target of a link may lie anywhere that is read.
            if bad and not (event in ("os.symlink", "os.link") and len(bad) == 1):
                notes.append(f"{event} {bad}")
        elif event == "subprocess.Popen":
            if str(args[0]) not in MAY_START:
                notes.append(f"started {args[0]!r}")
        elif event in ("os.system", "os.exec", "os.posix_spawn", "socket.connect"):
            notes.append(f"{event} {args[:2]!r:.200}")

    sys.addaudithook(hook)


def as_nobody_special() -> None:
    """Give up what lets root read files whose mode says that nobody may."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None).capset(header, nothing)


def child(command: list[str], folder: Path, result: int) -> None:
    """Run a command with its output in files, and write what was noted to a descriptor."""
    os.setsid()
    os.chdir(folder)
    state = folder.parent / "state"
    os.dup2(os.open(state / "stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(os.open(state / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(state / "yes", os.O_RDONLY), 0)  # whoever asks gets consent
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_LIMIT, now + MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ |= {
        "GRAPHOPT_CACHE": str(state / "cache"),
        "TMPDIR": str(state / "tmp"),
        "COLUMNS": "9999",
    }
    tempfile.tempdir = str(state / "tmp")
    notes: list[str] = []
    watch((*outputs(command, folder), str(state)), notes)
    as_nobody_special()
    import torch

    from graphopt.cli.commands import app

    # A fork must make torch's pool of threads anew, which two threads at once cannot.
    torch.set_num_threads(1)
    code: Any = 1
    try:
        app(command, standalone_mode=True, prog_name="graphopt")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 99
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os.write(result, json.dumps({"code": code, "notes": notes[:5]}).encode())
    os._exit(0)


# In the parent ----------------------------------------------------------------------------------


def outputs(command: list[str], folder: Path) -> list[str]:
    """Return what the paths begin with that a command may write to.

    An output folder that is named may be written where there is none, or one that graphopt made.
    """
    places = [folder / "out"]
    for option, value in itertools.pairwise(command):
        if option in ("-o", "--out", "--dump-ir") and "\x00" not in value:
            place = Path(os.path.realpath(folder / value))
            with contextlib.suppress(OSError):
                if not place.exists() or (place / "manifest.json").exists():
                    places.append(place)
    return [str(path) for place in places for path in (place, place.parent / f".{place.name}")]


def tree(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return what lies in a working folder beside the outputs, and when it was changed."""
    found: dict[str, tuple[Any, ...]] = {}
    for place, folders, files in os.walk(folder):
        at = Path(place).relative_to(folder)
        for name in [*folders, *files]:
            status = os.lstat(Path(place) / name)
            size = status.st_size if not os.path.isdir(Path(place) / name) else 0
            found[str(at / name)] = (size, status.st_mode, status.st_mtime_ns if size else 0)
    return found


def used(pid: int) -> tuple[int, float]:
    """Return the bytes that a process and those that it started hold, and seconds they computed."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()
        # Behind the name, which may hold spaces: its own time, and that of those that ended.
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0, 0.0
    others = [used(int(number)) for number in children]
    own = int(pages[1]) * resource.getpagesize() if pages else 0
    seconds = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    return own + sum(held for held, _ in others), seconds + sum(took for _, took in others)


def remove(folder: Path) -> None:
    """Delete the folder of a try, and folders in it that may not be read."""
    for place, folders, _ in os.walk(folder):
        for name in folders:
            if not os.path.islink(Path(place) / name):
                os.chmod(Path(place) / name, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def run(attempt: Try, folder: Path) -> None:
    """Run a try in a forked process and fill in what came of it."""
    state = folder.parent / "state"
    before, written = tree(folder), tuple(outputs(attempt.command, folder))
    reader, writer = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            child(attempt.command, folder, writer)
        finally:
            os._exit(98)
    os.close(writer)
    peak, seconds, hung = 0, 0.0, False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        held, seconds = used(pid)
        peak = max(peak, held)
        if seconds > TIME_LIMIT or time.monotonic() - started > 4 * TIME_LIMIT:
            hung = True
            os.killpg(pid, signal.SIGKILL)
            done, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.01)
    peak = max(peak, usage.ru_maxrss * 1024)
    with os.fdopen(reader, "rb") as file:
        answer = file.read()
    seconds = max(seconds, usage.ru_utime + usage.ru_stime)
    attempt.seconds, attempt.peak_bytes = seconds, peak
    said = (state / "stderr").read_text(errors="replace") if (state / "stderr").exists() else ""
    printed = (state / "stdout").read_text(errors="replace") if (state / "stdout").exists() else ""
    attempt.said = said[-3000:]
    changed = {
        name
        for name, _ in tree(folder).items() ^ before.items()
        if not f"{folder}/{name}".startswith(written)
    }
    if hung:
        attempt.outcome = "hang"
    elif not answer:
        attempt.outcome = f"crash: {status}"
    else:
        found = json.loads(answer)
        attempt.notes = found["notes"]
        attempt.outcome = judge(found["code"], said)
        if found["notes"]:
            attempt.outcome = "outside: " + found["notes"][0]
    if peak > MEMORY_LIMIT:
        attempt.outcome = f"memory: {peak}"
    if changed - {"."}:
        attempt.outcome = f"outside: changed {sorted(changed)[:3]}"
    if "\x1b" in said or ("\x1b" in printed and attempt.command[0] != "generate"):
        attempt.outcome = "escape sequences on the terminal"


def judge(code: Any, said: str) -> str:
    """Return "done", "refused", or what is wrong with the end of a command."""
    if "Traceback" in said or code in (70, 98, 99):
        return "traceback"
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if code == 0:
        return "done" if not errors else "an error, and exit code 0"
    if code == 2 and any("Usage:" in line for line in lines):
        return "refused"  # by the parser of the command line
    if code in (1, 2) and len(errors) == 1 and lines.index(errors[0]) >= len(lines) - 2:
        if len(errors[0]) > 1200:
            return "a sentence without end"
        return "refused"
    return f"no sentence (exit code {code})"


def signature(attempt: Try) -> str:
    """Return what failures of one kind have in common: the last line that was said."""
    lines = [line for line in attempt.said.splitlines() if line.strip()]
    said = re.sub(r"[0-9]+", "N", lines[-2] if len(lines) > 1 else "")
    return f"{attempt.outcome[:60]}: {said[:160]}"


@dataclass
class Found:
    """What came of the tries so far.

    Attributes:
        outcomes: How many ended how.
        commands: How many there were of each command.
        failures: Those that did not end as they should.
        short_of_memory: The numbers of those that were refused memory.
        seconds, peak_bytes: The largest of any.
    """

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    commands: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[Try] = field(default_factory=list)
    short_of_memory: list[int] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0

    def add(self, attempt: Try) -> None:
        self.outcomes[attempt.outcome.split(":")[0]] += 1
        self.commands[attempt.command[0]] += 1
        self.seconds = max(self.seconds, attempt.seconds)
        self.peak_bytes = max(self.peak_bytes, attempt.peak_bytes)
        if "does not suffice" in attempt.said:
            self.short_of_memory.append(attempt.number)
            print(f"{attempt.number}: short of memory: {attempt.damaged}: {attempt.command}"[:300])
        if attempt.outcome not in ("done", "refused"):
            self.failures.append(attempt)
            print(f"{attempt.number}: {attempt.damaged}: {' '.join(attempt.command)[:200]!r}")
            print(f"    {signature(attempt)}")
        if self.outcomes.total() % 100 == 0:
            print(f"after {self.outcomes.total()}: {dict(self.outcomes)}")
        sys.stdout.flush()

    def to_json(self) -> dict[str, Any]:
        kinds = collections.Counter(signature(attempt) for attempt in self.failures)
        return {
            "outcomes": dict(self.outcomes),
            "commands": dict(self.commands.most_common()),
            "seconds": round(self.seconds, 2),
            "peak_bytes": self.peak_bytes,
            "short_of_memory": self.short_of_memory,
            "kinds": dict(kinds.most_common()),
            "failures": [asdict(attempt) for attempt in self.failures],
        }


def one(seed: int, number: int, work: Path, *, debug: bool = False) -> Try:
    """Run one try, in a folder of this process's own."""
    place = work / f"worker-{os.getpid()}"
    for name in ("tmp", "cache"):
        (place / "state" / name).mkdir(parents=True, exist_ok=True)
    (place / "state" / "yes").write_text("y\n" * 1000)
    remove(place / "try")
    attempt = prepare(seed, number, work / "base", place / "try")
    if debug:
        attempt.command.append("--debug")
    run(attempt, place / "try")
    return attempt


def warm_up(work: Path) -> None:
    """Make the good inputs in this process, so that every fork has what that imports and traces."""
    import onnxruntime  # noqa: F401
    import torch
    import transformers

    import graphopt.capture
    import graphopt.compiler
    import graphopt.evaluate
    import graphopt.generate
    import graphopt.inspection
    import graphopt.lowering.onnx
    import graphopt.lowering.torch
    import graphopt.sources.gguf  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["GRAPHOPT_CACHE"] = str(work / "cache")
    base_inputs(work / "base")
    gc.collect()
    gc.freeze()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="tries at a time")
    parser.add_argument("--only", type=int, nargs="+", help="these tries alone, with --debug too")
    parser.add_argument("--out", type=Path, help="JSON with every failure, and counts")
    args = parser.parse_args()
    found = Found()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        warm_up(work)
        if args.only is not None:
            for number in args.only:
                attempt = one(args.seed, number, work)
                found.add(attempt)
                told = one(args.seed, number, work, debug=True)
                print(f"{attempt.outcome}: {attempt.command}\n{told.said}")
        else:
            throw = functools.partial(one, args.seed, work=work)
            with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
                for attempt in pool.imap_unordered(throw, range(args.count)):
                    found.add(attempt)
        for place in work.glob("worker-*"):
            remove(place)
    result = {"seed": args.seed, "count": found.outcomes.total(), **found.to_json()}
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "failures"}, indent=1))
    return int(bool(found.failures))


if __name__ == "__main__":
    raise SystemExit(main())
