"""Throw damaged inputs of every format at every command, and see what becomes of it.

    python tools/fuzz_inputs.py --seed 0 --count 2000 --out fuzz.json

A try (`fuzz_tries.py`) is good inputs with one damaged (`fuzz_mutations.py`), or odd values
on the command line, and one command that runs in a forked process with limits of time and
memory. It may succeed, or end with exactly one sentence on stderr; a traceback, a bug's exit code,
a crash, a hang, a memory beyond the limit, a file changed outside the output folder, a connection
or a program started is a failure. The same seed and number give the same try: `--only NUMBER`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fuzz_tries import Try, base_inputs, prepare

TIME_LIMIT = 30.0
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
    allowed = tuple(f"{folder}/{name}" for name in ("out", ".out"))
    watch((*allowed, str(state)), notes)
    import torch

    from graphopt.cli import app

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


def tree(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return what lies in a working folder beside the outputs, and when it was changed."""
    found: dict[str, tuple[Any, ...]] = {}
    for place, folders, files in os.walk(folder):
        at = Path(place).relative_to(folder)
        if at == Path():
            folders[:] = [name for name in folders if not name.startswith(("out", ".out"))]
        for name in [*folders, *files]:
            status = os.lstat(Path(place) / name)
            size = status.st_size if not os.path.isdir(Path(place) / name) else 0
            found[str(at / name)] = (size, status.st_mode, status.st_mtime_ns if size else 0)
    return found


def run(attempt: Try, folder: Path) -> None:
    """Run a try in a forked process and fill in what came of it."""
    state = folder.parent / "state"
    before = tree(folder)
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
    peak, hung = 0, False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > TIME_LIMIT:
            hung = True
            os.killpg(pid, signal.SIGKILL)
            done, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.01)
    peak = usage.ru_maxrss * 1024
    with os.fdopen(reader, "rb") as file:
        answer = file.read()
    attempt.seconds, attempt.peak_bytes = time.monotonic() - started, peak
    said = (state / "stderr").read_text(errors="replace") if (state / "stderr").exists() else ""
    printed = (state / "stdout").read_text(errors="replace") if (state / "stdout").exists() else ""
    attempt.said = said[-3000:]
    changed = {k for k, v in tree(folder).items() ^ before.items()}
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", type=int, nargs="+", help="these tries alone, with --debug")
    parser.add_argument("--out", type=Path, help="JSON with every failure, and counts")
    parser.add_argument(
        "--work", type=Path, help="folder for the tries; a temporary one by default"
    )
    args = parser.parse_args()
    import onnxruntime  # noqa: F401  (imported once, for every fork)
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
    os.environ["HF_HUB_OFFLINE"] = "1"
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work = work.resolve()
        state = work / "state"
        for name in ("tmp", "cache"):
            (state / name).mkdir(parents=True, exist_ok=True)
        (state / "yes").write_text("y\n" * 1000)
        os.environ["GRAPHOPT_CACHE"] = str(state / "cache")
        # Made in this process, so that what is imported and traced for the first time, which takes
        # most of a small compile, is there in every fork.
        shutil.rmtree(work / "base", ignore_errors=True)
        base_inputs(work / "base")
        gc.collect()
        gc.freeze()
        numbers = args.only or range(args.count)
        counts: collections.Counter[str] = collections.Counter()
        failures: list[Try] = []
        worst = {"seconds": 0.0, "peak_bytes": 0}
        for number in numbers:
            folder = work / "try"
            shutil.rmtree(folder, ignore_errors=True)
            attempt = prepare(args.seed, number, work / "base", folder)
            if args.only is not None:
                attempt.command.append("--debug")
            run(attempt, folder)
            counts[attempt.outcome.split(":")[0]] += 1
            if counts.total() % 100 == 0:
                print(f"after {counts.total()}: {dict(counts)}", flush=True)
            worst = {name: max(value, getattr(attempt, name)) for name, value in worst.items()}
            if attempt.outcome not in ("done", "refused"):
                failures.append(attempt)
                print(f"{number}: {attempt.damaged}: {' '.join(attempt.command)[:200]!r}")
                print(f"    {signature(attempt)}", flush=True)
            if args.only is not None:
                print(f"{attempt.outcome}: {attempt.command}\n{attempt.said}")
    kinds = collections.Counter(signature(attempt) for attempt in failures)
    found = {
        "seed": args.seed,
        "count": len(numbers),
        "outcomes": dict(counts),
        **worst,
        "kinds": dict(kinds.most_common()),
        "failures": [asdict(a) for a in failures],
    }
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in found.items() if key != "failures"}, indent=1))
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
