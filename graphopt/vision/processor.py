"""Pictures and prompts as a model takes them, by transformers' processor of the model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from graphopt.errors import SourceError, UsageError
from graphopt.ir.graph import Program
from graphopt.runtime.picture_prompts import PicturePrompts
from graphopt.sources.processor import read_processor
from graphopt.sources.tokenizer import PROCESSOR_FILES, encode
from graphopt.support.plain import shown


class Processor(PicturePrompts):
    """The processor of a program's model.

    Raises:
        UsageError: The program is a model of text alone.
        SourceError: There is no processor beside the model, or transformers cannot load it.
    """

    def __init__(self, program: Program) -> None:
        if program.vision is None:
            raise UsageError(
                f"{program.name} is a model of text alone and takes no pictures.",
                "Give a vision-language model, or leave the pictures out.",
            )
        folder = None if program.tokenizer is None else Path(program.tokenizer)
        if folder is None or not any((folder / name).is_file() for name in PROCESSOR_FILES):
            raise SourceError(
                f"{program.name} has no processor ({PROCESSOR_FILES[0]}), which makes pixels of "
                "pictures.",
                "Put the processor's files that belong to the model into its folder.",
            )
        super().__init__(read_processor(folder), program.vision.image_token, program.name)

    def with_answer(self, inputs: dict[str, Tensor], answer: str) -> tuple[dict[str, Tensor], int]:
        """Return the inputs of a prompt with an answer behind it, and how many tokens that has.

        Raises:
            SourceError: The tokenizer makes no tokens of the answer.
            UsageError: It makes image tokens of it.
        """
        ids = torch.tensor([encode(self.tokenizer, answer, special=False)], dtype=torch.long)
        if not ids.numel():
            raise SourceError(f"The answer {shown(answer)} has no tokens.", "Give a longer one.")
        if bool((ids == self._image_id).any()):
            token = str(self.tokenizer.convert_ids_to_tokens(self._image_id))
            raise UsageError(
                f"The answer {shown(answer)} has an image token, and pictures stand in prompts.",
                f"Leave {shown(token)} out of answers.",
            )
        length, longer = inputs["input_ids"].shape[1], dict(inputs)
        for name, value in inputs.items():
            if name == "input_ids":
                longer[name] = torch.cat((value, ids), 1)
            elif value.shape == (1, length) and not value.is_floating_point():
                # Masks go on with ones, and kinds of tokens with that of text.
                kind = 1 if name == "attention_mask" else 0
                longer[name] = torch.cat((value, torch.full_like(ids, kind)), 1)
        return longer, ids.shape[1]
