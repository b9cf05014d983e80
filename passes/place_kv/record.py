"""What `place-kv` tells: what lies where, and why."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.passes.place_kv.room import RESERVE
from graphopt.report.pictures import facts_table, sentences, table
from graphopt.report.record import Record
from graphopt.support.quantities import format_bytes


@dataclass(frozen=True)
class LayerPlace:
    """Where the keys of one layer lie.

    Attributes:
        state: Its name.
        way: `device`, `host`, `streamed` or `split`.
        resident, streamed, computed: Tokens of a text on the device, copied to it in each step, and
            attended to by the host's processors.
        seconds: What its attention is predicted to take in a step.
        others: The same of the ways that were not chosen.
    """

    state: str
    way: str
    resident: int
    streamed: int
    computed: int
    seconds: float
    others: dict[str, float]


class PlacedKV(Record):
    """What lies where, and why.

    Attributes:
        method: Of the plan.
        target: Whose figures it is made by.
        measured: Where the host's figures were measured; "" for the target's own.
        gpu: Bytes of the GPU.
        weights, activations, other, buffers: Bytes of it for weights, for what a part of a prompt
            computes, for keys that cannot lie elsewhere, and for pieces on their way.
        room: Bytes that are left to keys.
        context, batch: Tokens of a text, and texts.
        device, host: Bytes of keys on either side.
        moved, read: Bytes that a step copies to the device, and that the host's processors read.
        seconds: What a step is predicted to take.
        streamed_seconds: The same with all of these keys on the host, copied in every step.
        layers: Of each layer.
    """

    method: str
    target: str
    measured: str
    gpu: int
    weights: int
    activations: int
    other: int
    buffers: int
    room: int
    context: int
    batch: int
    device: int
    host: int
    moved: int
    read: int
    seconds: float
    streamed_seconds: float
    layers: list[LayerPlace]

    def _placed(self) -> list[LayerPlace]:
        return [layer for layer in self.layers if layer.way != "device"]

    def line(self) -> str:
        placed = self._placed()
        texts = "one text" if self.batch == 1 else f"{self.batch} texts"
        of = f"{texts} of {self.context:,} tokens"
        if not placed:
            return f"all keys of {of} fit the GPU: {format_bytes(self.device)}"
        faster = self.streamed_seconds / self.seconds
        return (
            f"{len(placed)} of {len(self.layers)} layers have keys on the host, "
            f"{format_bytes(self.host)} for {of}; {self.batch / self.seconds:.3g} tokens/s "
            f"predicted, {faster:.2f} times as many as with all of them copied in every step"
        )

    def card(self) -> str:
        facts = facts_table([
            ("GPU", format_bytes(self.gpu)),
            ("left to the driver", format_bytes(RESERVE)),
            ("weights", format_bytes(self.weights)),
            ("computing a part of a prompt", format_bytes(self.activations)),
            ("keys that stay", format_bytes(self.other) if self.other else ""),
            ("pieces on their way", format_bytes(self.buffers)),
            ("room for keys", format_bytes(self.room)),
            ("keys on the GPU", format_bytes(self.device)),
            ("keys on the host", format_bytes(self.host)),
            ("copied to the GPU for a token", format_bytes(self.moved)),
            ("read by the host for a token", format_bytes(self.read)),
        ])  # fmt: skip
        names = {
            "device": "on the GPU", "host": "the host attends", "streamed": "copied in every step",
            "split": "divided",
        }  # fmt: skip
        rows = [
            (
                layer.state, names[layer.way], f"{layer.resident:,}", f"{layer.streamed:,}",
                f"{layer.computed:,}", f"{1e3 * layer.seconds:,.2f} ms",
                ", ".join(f"{names[n]} {1e3 * s:,.2f} ms" for n, s in layer.others.items()) or "–",
            )
            for layer in self.layers
        ]  # fmt: skip
        heads = (
            "keys of", "how", "tokens on the GPU", "tokens copied", "tokens of the host", "a step",
            "otherwise",
        )  # fmt: skip
        figures = f"By figures that were measured: {self.measured}." if self.measured else (
            f"By the figures of {self.target}.toml."
        )  # fmt: skip
        return sentences([f"{self.line()}.", figures]) + facts + table(heads, rows, heads[2:6])
