"""The weights of a learned policy as a file: safetensors under the names of the published form.

The published checkpoints hold the same tensors, pickled: with torch,
`save_file(torch.load(PATH, weights_only=True), OUT, metadata)` makes one of these of it, where
`metadata` is what `PredictorCheckpoint.metadata` gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from graphopt.errors import SourceError, UsageError
from graphopt.ir.kv_policies.attention_cnn import weight_shapes
from graphopt.ir.kv_policies.base import KVHeads
from graphopt.ir.kv_policies.predictor import Predictor

FORMAT = "graphopt kv-policy predictor 2"
"""With two channels a first one was shown probabilities, not their averages."""

_LARGEST = 2**20
"""Bytes; a checkpoint has 20 to 30 thousand."""


@dataclass(frozen=True)
class PredictorCheckpoint:
    """The weights of a predictor, and what they were trained for.

    Attributes:
        weights: fp32, by the names of `weight_shapes`.
        page: Tokens of a page.
        group: Query heads of a KV head, over which rows were pooled.
        history: Rows that a prediction is made of.
        channels: Of the network's input.
        about: What the training told: the model, its text's digest, recalls.
    """

    weights: Mapping[str, Tensor]
    page: int
    group: int
    history: int
    channels: int
    about: Mapping[str, Any]

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        return {"format": FORMAT, "predictor": json.dumps(numbers), "about": json.dumps(self.about)}

    def write(self, path: Path) -> None:
        """Write the file."""
        held = {name: x.detach().float().contiguous() for name, x in self.weights.items()}
        path.write_bytes(safetensors.torch.save(held, self.metadata))

    def policy(self, policy: Predictor, heads: KVHeads, where: str) -> Predictor:
        """Return a predictor with these weights.

        Args:
            policy: Its budget and its calibration are kept.
            heads: Of the attention.
            where: What the checkpoint is called in messages.

        Raises:
            UsageError: The weights were trained for another page or head layout, or for another
                form of the network.
        """
        group = heads.query_heads // heads.key_heads
        for what, own, asked in (
            ("pages of {} tokens", self.page, policy.budget.page),
            ("{} query heads a KV head", self.group, group),
            ("{} rows of history", self.history, policy.history),
            ("{} channels", self.channels, policy.channels),
        ):
            if own != asked:
                raise UsageError(
                    f"The KV policy checkpoint {where} was trained for {what.format(own)}, and "
                    f"here there are {what.format(asked)}.",
                    "Give the policy the numbers of the checkpoint, or train one for this model: "
                    "`graphopt train-kv-policy`.",
                )
        return policy.with_weights(self.weights)


SHIPPED = {"demo": "predictor_demo.safetensors"}
"""Models of which a checkpoint lies beside this file. The demo's was trained on `valid.txt` of
WikiText-2 by `graphopt train-kv-policy demo --windows 12 --steps 4000 --seconds 150 --device cuda`.
"""

_NUMBERS = ("page", "group", "history", "channels")


def read_checkpoint(spec: str) -> PredictorCheckpoint:
    """Return the checkpoint of a file, or the one that ships for a model of `SHIPPED`.

    Raises:
        SourceError: There is no such file, or it is no checkpoint of a predictor.
    """
    path, remedy = Path(spec).expanduser(), "`graphopt train-kv-policy` writes one."
    if spec in SHIPPED and not path.exists():
        path = Path(__file__).with_name(SHIPPED[spec])
    if not path.is_file():
        raise SourceError(f"There is no KV policy checkpoint {spec!r}.", remedy)
    if path.stat().st_size > _LARGEST:
        raise SourceError(
            f"{spec!r} is no KV policy checkpoint: it has {path.stat().st_size:,} bytes.", remedy
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise ValueError("its metadata does not say so")
        numbers = json.loads(metadata["predictor"])
        values = {name: numbers[name] for name in _NUMBERS}
        if not all(type(value) is int for value in values.values()):
            raise ValueError(f"its numbers are {values}")
        shapes = weight_shapes(values["channels"])
        if {name: tuple(x.shape) for name, x in weights.items()} != shapes:
            raise ValueError(f"its tensors are not those of {values['channels']} channels")
        if not all(bool(x.isfinite().all()) for x in weights.values()):
            raise ValueError("its weights are not finite")
        about = json.loads(metadata.get("about", "{}"))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(f"{spec!r} is no KV policy checkpoint: {error}.", remedy) from error
    weights = {name: x.to(torch.float32) for name, x in weights.items()}
    return PredictorCheckpoint(weights, **values, about=about)
