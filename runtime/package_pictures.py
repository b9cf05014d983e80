"""What a package of a model that sees is given of prompts with pictures.

Tower and projector are transformers' own. Their weights lie in the package as they were in the
model's source; `program.json` says in which file and where.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import GraphoptError, SourceError
from graphopt.runtime.picture_prompts import PicturePrompts
from graphopt.runtime.picture_tower import Tower
from graphopt.support.meta_parameters import parameters_on_meta

_DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip


class Pictures:
    """Makes embeddings of prompts with pictures.

    Args:
        model: The package's, which makes embeddings of token ids. The tower runs where it does.
        folder: The package.
    """

    Error = GraphoptError
    """What is raised of pictures, prompts and files that do not fit."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder

    def embeddings(self, input_ids: Tensor, **given: Tensor) -> dict[str, Tensor]:
        """Return what `generate`, and `Model.forward`, take of texts with pictures.

        Args:
            input_ids: int64 [B, S], the shorter texts padded in front.
            given: What transformers' processor makes beside: `attention_mask`, pixels and sizes.

        Returns:
            `inputs_embeds` [B, S, D], `attention_mask` [B, S], `position_ids` [B, S] or [3, B, S],
            and where the model takes it `pictures` [B, S].

        Raises:
            UsageError: Texts have other numbers of image tokens than their pictures have.
            SourceError: The weights of the tower are not in the package.
        """
        device = self.tower.device
        moved = {name: value.to(device) for name, value in given.items()}
        made = self.tower.inputs(input_ids.to(device), **moved)
        del made["input_ids"]
        return made

    def prompt(
        self, text: str, images: Sequence[str | Path], *, raw: bool = False
    ) -> dict[str, Tensor]:
        """Return what `embeddings` does for one prompt about pictures in files.

        It is put into the chat template where the model has one. Otherwise, or where it has image
        tokens itself, it is taken as it is.

        Args:
            raw: Take it as it is in any case.

        Raises:
            UsageError: It has another number of image tokens than there are pictures.
            SourceError: A picture cannot be read, or there is no processor.
        """
        given = self.prompts.inputs(text, [Path(path) for path in images], raw=raw)
        return self.embeddings(**given)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the processor."""
        return self.prompts.tokenizer

    @functools.cached_property
    def prompts(self) -> PicturePrompts:
        """The processor of the package's folder."""
        from transformers import AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(
                str(self.folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise SourceError(
                f"{self.folder} has no processor that transformers loads: {error}.",
                "Put the processor's files that belong to the model there.",
            ) from error
        return PicturePrompts(processor, self._saved["vision"]["image_token"], self.folder.name)

    @functools.cached_property
    def tower(self) -> Tower:
        """The tower, projector and merging of the package's model."""
        from transformers import AutoConfig, AutoModelForImageTextToText

        saved, vision = self._saved, self._saved["vision"]
        # Code of a checkpoint is nothing that a package runs.
        entries = {name: value for name, value in saved["config"].items() if name != "auto_map"}
        with parameters_on_meta():
            module = AutoModelForImageTextToText.from_config(
                AutoConfig.for_model(**entries), dtype=torch.float32, trust_remote_code=False
            )
        like = next(p for p in self.model.parameters() if p.is_floating_point())
        names = [weight["name"] for weight in vision["carried"]]
        return Tower(
            module.eval(),
            {name: self._read(name, saved["storage"][name]) for name in names},
            self.model.token_rows,
            image_token=vision["image_token"],
            axes=vision["sections"] is not None,
            both_ways=vision["both_ways"],
            dtype=like.dtype,
            device=like.device,
        )

    @functools.cached_property
    def _saved(self) -> dict[str, Any]:
        path = self.folder / "program.json"
        try:
            saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SourceError(
                f"{path} is missing, which says where the weights of the tower are.",
                "Take the folder as a whole.",
            ) from error
        return saved

    def _read(self, name: str, place: Mapping[str, Any]) -> Tensor:
        """Return a weight from where it lies."""
        root = self.folder.resolve()
        path = (root / place["file"]).resolve()
        dtype, shape = _DTYPES[place["dtype"]], place["shape"]
        size = math.prod(shape) * dtype.itemsize
        if not path.is_relative_to(root) or not path.is_file() or place["transposed"]:
            raise SourceError(
                f"{place['file']} in {self.folder} does not hold {name}.",
                "Compile the model again.",
            )
        with path.open("rb") as file:
            file.seek(place["offset"])
            data = bytearray(file.read(size))
        if len(data) != size:
            raise SourceError(
                f"{path} is truncated: {name} should be in it.", "Compile the model again."
            )
        return torch.frombuffer(data, dtype=dtype).reshape(shape)
