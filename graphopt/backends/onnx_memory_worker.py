"""A process that opens an ONNX graph, runs steps of it, and says what memory they took.

It is run by `graphopt.backends.onnx_memory`, reads what to do as JSON from its input, and writes
what it found as JSON. Neither torch nor anything else that takes memory by itself is imported.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from graphopt.backends.onnx_cache import NUMPY_DTYPES, RoomyCache, room_of
from graphopt.backends.onnx_session import session_options, states_of

_PROC = Path("/proc/self")
_RESET_HIGH_WATER_MARK = "5"


def resident() -> dict[str, int]:
    """Return bytes of this process: anonymous, of files, and the most that were resident."""
    found = {}
    for line in (_PROC / "status").read_text(encoding="ascii").splitlines():
        key, _, rest = line.partition(":")
        if key in ("RssAnon", "RssFile", "RssShmem", "VmHWM"):
            found[key] = int(rest.split()[0]) * 1024
    files = found["RssFile"] + found.get("RssShmem", 0)
    return {"anonymous": found["RssAnon"], "files": files, "most": found["VmHWM"]}


class Part:
    """What a piece of work adds to this process, in bytes.

    Attributes:
        before: What was resident.
        peak: Most anonymous bytes above those: the kernel's high-water mark, less the pages of
            files that are resident behind the work.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        gc.collect()
        (_PROC / "clear_refs").write_text(_RESET_HIGH_WATER_MARK, encoding="ascii")
        self.before = resident()
        self.result = work()
        after = resident()
        most = max(after["most"] - after["files"], after["anonymous"])
        self.peak = most - self.before["anonymous"]

    def told(self) -> dict[str, int]:
        """Return its figures; what is still there counts as kept."""
        self.result = None
        gc.collect()
        now = resident()
        kept = {name: now[name] - self.before[name] for name in ("anonymous", "files")}
        return {"peak": self.peak, "kept": kept["anonymous"], "kept_of_files": kept["files"]}


class Steps:
    """Steps of a graph as a language model: prompts from nothing, or tokens behind a cache."""

    def __init__(self, session: Any, work: dict[str, Any]) -> None:
        self.session = session
        self.decodes = work["phase"] == "decode"
        self.batch, self.past = work["batch"], work["seq"] if self.decodes else 0
        self.new = 1 if self.decodes else work["seq"]
        self.inputs = {value.name: value for value in session.get_inputs()}
        self.after = states_of(self.inputs)
        self.outputs = [value.name for value in session.get_outputs()]
        if not self.after:  # the whole text is read in every step
            self.new, self.past = self.new + self.past, 0
        sizes = [size for name in self.after for size in self.inputs[name].shape]
        self.cache: Any = {}
        if any(room_of(size) is not None for size in sizes):
            taken = {name: self.inputs[name] for name in self.after}
            room = self.past + self.new + work["later"]
            self.cache = RoomyCache(taken, self.after, self.batch, room)
            for buffer in self.cache.buffers.values():
                buffer.fill(0)  # pages are resident once they are written
        else:
            # All caches exist before anything is measured, so that none is taken for the session's.
            count = 1 + work["later"] if self.decodes else 1
            self.coming = [self._filled(self.past + more) for more in range(count)]
            self.cache = self.coming.pop(0)

    def _filled(self, past: int) -> dict[str, Any]:
        cache = {}
        for name in self.after:
            value = self.inputs[name]
            rest = [size if isinstance(size, int) else past for size in value.shape[1:]]
            cache[name] = np.empty((self.batch, *rest), NUMPY_DTYPES[value.type])
            cache[name].fill(0)
        return cache

    def prepare(self) -> Callable[[], Any]:
        """Return the next step, whose inputs exist."""
        batch, total = self.batch, self.past + self.new
        known = {
            "input_ids": np.zeros((batch, self.new), np.int64),
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": np.tile(np.arange(self.past, total), (batch, 1)),
        }
        # The decoder of a model that sees takes embeddings, and positions that may have three axes.
        if "inputs_embeds" in self.inputs:
            width = self.inputs["inputs_embeds"].shape[-1]
            known["inputs_embeds"] = np.zeros((batch, self.new, width), np.float32)
            if len(self.inputs["position_ids"].shape) == 3:
                known["position_ids"] = np.tile(known["position_ids"], (3, 1, 1))
        feeds = {name: value for name, value in known.items() if name in self.inputs}
        if isinstance(self.cache, RoomyCache):
            return lambda: self.cache.run(self.session, feeds, ["logits"])
        return lambda: self.session.run(self.outputs, feeds | self.cache)

    def go_on(self) -> None:
        """Make a decoding step's text longer by its token."""
        if not self.decodes:
            return
        if not self.after:
            self.new += 1
            return
        self.past += 1
        if not isinstance(self.cache, RoomyCache) and self.coming:
            self.cache = self.coming.pop(0)


def measure(work: dict[str, Any]) -> dict[str, Any]:
    """Open a session and run a first step and later ones.

    Args:
        work: `path`, `phase`, `batch`, `seq`, `later` (how many steps), `arena` and `pattern`
            (options of the session), and `profile`: how the name of its profile begins, or None.
    """
    options = session_options()
    options.enable_cpu_mem_arena = work["arena"]
    options.enable_mem_pattern = work["pattern"]
    if work["profile"] is not None:
        options.enable_profiling = True
        options.profile_file_prefix = work["profile"]
    opened = Part(
        lambda: onnxruntime.InferenceSession(
            work["path"], options, providers=["CPUExecutionProvider"]
        )
    )
    session = opened.result
    told = [opened.told()]
    steps = Steps(session, work)
    for _ in range(1 + work["later"]):
        part = Part(steps.prepare())
        told.append(part.told())
        steps.go_on()
    profile = session.end_profiling() if work["profile"] is not None else None
    return {
        "version": onnxruntime.__version__,
        "opening": told[0],
        "steps": told[1:],
        "profile": profile,
    }


def main() -> None:
    work = json.load(sys.stdin)
    try:
        found = measure(work)
    except Exception as error:
        # ONNX Runtime's exceptions share no base class of their own.
        found = {"failed": f"{type(error).__name__}: {error}"}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
