"""What `shard` tells: what was split how, what was left whole, and what is sent."""

from __future__ import annotations

from html import escape

import pydantic

from graphopt.report.pictures import facts_table, sentences, si, table
from graphopt.report.record import Record


class SplitWeights(pydantic.BaseModel):
    """Weights of one role that are split alike.

    Attributes:
        what: The slots' name, such as `self_attn.q_proj.weight`.
        how: `rows`, `columns`, `rows, put together` and so on.
        weights: How many there are.
        bytes_whole, bytes_rank: What they take together, and what a rank has of it.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    what: str
    how: str
    weights: int
    bytes_whole: int
    bytes_rank: int


class LeftWhole(pydantic.BaseModel):
    """Weights of one role of which every rank has a copy.

    Attributes:
        what: The slots' name.
        reason: Why they are not split.
        weights: How many there are.
        bytes: What they take together, on each rank.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    what: str
    reason: str
    weights: int
    bytes: int


class ShardedProgram(Record):
    """How a program lies on its devices.

    Attributes:
        devices: One a rank.
        split: The weights that are split.
        whole: The others.
        attentions: For how many attentions the heads are split, with `key_copies` ranks a key head,
            and for how many they are not: "split", "copied" and "whole".
        padded: Rows of zeros behind tables that the ranks do not divide, by weight.
        weight_bytes: Of all weights; and of one rank's.
        kv_bytes: Of keys and values for one token, in the checkpoint's dtype: of all ranks' heads
            once, and of one rank's.
        collectives: How many of each kind a step runs.
        sent_token, sent_prefill: Bytes that each rank sends in a step of one token, and for a text
            of `prefill` tokens, by the ring algorithm.
        sent_logits: The bytes of `sent_token` for putting logits together; a prefill sends them
            for each token whose logits it gives.
        prefill: Tokens of that text.
        here: How many such devices the machine has that compiled it, where they are fewer; None
            where they are enough, or where it has none.
    """

    devices: list[str]
    split: list[SplitWeights]
    whole: list[LeftWhole]
    attentions: dict[str, int]
    padded: dict[str, int]
    weight_bytes: tuple[int, int]
    kv_bytes: tuple[int, int]
    collectives: dict[str, int]
    sent_token: int
    sent_logits: int
    sent_prefill: int
    prefill: int
    here: int | None = None

    def line(self) -> str:
        whole, own = self.weight_bytes
        left = sum(part.bytes for part in self.whole)
        counts = ", ".join(f"{count} {name}" for name, count in self.collectives.items())
        parts = [
            f"{len(self.devices)} ranks, each {si(own, 'B')} of {si(whole, 'B')} of weights",
            f"{si(self.kv_bytes[1], 'B')} of {si(self.kv_bytes[0], 'B')} of KV a token",
            f"a token sends {si(self.sent_token, 'B')} ({counts})",
        ]
        if left:
            parts.append(f"{si(left, 'B')} left whole")
        if self.here is not None:
            parts.append(f"this machine has {self.here} of {len(self.devices)} devices")
        return "; ".join(part for part in parts if not part.startswith("0 B of 0 B"))

    def card(self) -> str:
        ranks = len(self.devices)
        (weights, own), (keys, own_keys) = self.weight_bytes, self.kv_bytes
        facts = [
            ("ranks", f"{ranks}: {self.devices[0]} to {self.devices[-1]}"),
            ("weights", f"{si(own, 'B')} a rank, of {si(weights, 'B')}"),
            ("keys and values a token", f"{si(own_keys, 'B')} a rank, of {si(keys, 'B')}"),
            ("collectives a step", ", ".join(f"{n} {op}" for op, n in self.collectives.items())),
            ("a rank sends a token", f"{si(self.sent_token, 'B')}, of them "
             f"{si(self.sent_logits, 'B')} for the logits"),
            (f"a rank sends for {self.prefill} tokens", si(self.sent_prefill, "B")),
        ]  # fmt: skip
        told = [f"{rows} rows of zeros stand behind {name}." for name, rows in self.padded.items()]
        if self.here is not None:
            told.append(f"The machine that compiled it has {self.here} of {ranks} devices.")
        return "".join(
            (
                facts_table(facts),
                sentences(told),
                "<h3>Split</h3>",
                table(
                    ["weights", "how", "number", "bytes", "a rank's"],
                    [
                        [escape(p.what), escape(p.how), str(p.weights), si(p.bytes_whole, "B"),
                         si(p.bytes_rank, "B")]
                        for p in self.split
                    ],
                    numbers=("number", "bytes", "a rank's"),
                ),
                "<h3>Left whole</h3>" if self.whole else "",
                table(
                    ["weights", "why", "number", "bytes, on each rank"],
                    [
                        [escape(p.what), escape(p.reason), str(p.weights), si(p.bytes, "B")]
                        for p in self.whole
                    ],
                    numbers=("number", "bytes, on each rank"),
                )
                if self.whole
                else "",
            )
        )  # fmt: skip
