"""Pictures and prompts as a model takes them, by transformers' processor of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import SourceError, UsageError, first_line
from graphopt.ir.graph import Program
from graphopt.sources.tokenizer import encode, private_copy
from graphopt.support.boundary import out_of_memory
from graphopt.support.plain import shown
from graphopt.vision.picture_rows import open_picture

_FILES = ("processor_config.json", "preprocessor_config.json")


class Processor:
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
        self.program = program
        folder = None if program.tokenizer is None else Path(program.tokenizer)
        if folder is None or not any((folder / name).is_file() for name in _FILES):
            raise SourceError(
                f"{program.name} has no processor ({_FILES[0]}), which makes pixels of pictures.",
                "Put the processor's files that belong to the model into its folder.",
            )
        self._processor = _load(folder)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the processor."""
        return self._processor.tokenizer

    @property
    def image_token(self) -> str:
        """What stands in a prompt for a picture."""
        token = getattr(self._processor, "image_token", None)
        if isinstance(token, str):
            return token
        assert self.program.vision is not None
        return str(self.tokenizer.convert_ids_to_tokens(self.program.vision.image_token))

    def inputs(self, prompt: str, images: Sequence[Path], where: str = "") -> dict[str, Tensor]:
        """Return what transformers' model takes for a prompt with pictures, of one text.

        The prompt is put into the chat template where the model has one. Otherwise, or where it
        has image tokens itself, it is taken as it is.

        Args:
            where: Named in messages.

        Raises:
            UsageError: A prompt without a template has not one image token for each picture.
            SourceError: A picture cannot be read, or the processor fails.
        """
        pictures = [open_picture(path) for path in images]
        text, token, place = prompt, self.image_token, f"{where}: " if where else ""
        count = prompt.count(token)
        template = getattr(self._processor, "chat_template", None) or self.tokenizer.chat_template
        if count == 0 and template:
            text = self._asked(prompt, len(images))
            count = text.count(token) or len(images)
        if count != len(images):
            raise UsageError(
                f"{place}the prompt has {count} image tokens, and {len(images)} pictures go with "
                "it.",
                f"Put {shown(token)} where each picture stands.",
            )
        try:
            made = self._processor(images=pictures or None, text=[text], return_tensors="pt")
        except Exception as error:
            if out_of_memory(error):
                raise
            raise SourceError(
                f"{place}the processor of {self.program.name} cannot take this: "
                f"{first_line(error)}.",
                "Try the same with transformers' AutoProcessor.",
            ) from error
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    def _asked(self, prompt: str, pictures: int) -> str:
        content: list[dict[str, str]] = [{"type": "image"}] * pictures
        content = [*content, {"type": "text", "text": prompt}]
        try:
            return str(
                self._processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
        except Exception as error:  # a template is code of its own and raises what it likes
            raise SourceError(
                f"The chat template of {self.program.name} cannot be applied to pictures: "
                f"{first_line(error)}.",
                f"Put {shown(self.image_token)} into the prompt, which is then taken as it is.",
            ) from error

    def with_answer(self, inputs: dict[str, Tensor], answer: str) -> tuple[dict[str, Tensor], int]:
        """Return the inputs of a prompt with an answer behind it, and how many tokens that has.

        Raises:
            SourceError: The tokenizer makes no tokens of the answer.
        """
        ids = torch.tensor([encode(self.tokenizer, answer, special=False)], dtype=torch.long)
        if not ids.numel():
            raise SourceError(f"The answer {shown(answer)} has no tokens.", "Give a longer one.")
        length, longer = inputs["input_ids"].shape[1], dict(inputs)
        for name, value in inputs.items():
            if name == "input_ids":
                longer[name] = torch.cat((value, ids), 1)
            elif value.shape == (1, length) and not value.is_floating_point():
                # Masks go on with ones, and kinds of tokens with that of text.
                kind = 1 if name == "attention_mask" else 0
                longer[name] = torch.cat((value, torch.full_like(ids, kind)), 1)
        return longer, ids.shape[1]


def _load(folder: Path) -> Any:
    from transformers import AutoProcessor

    with private_copy(folder) as name:
        try:
            return AutoProcessor.from_pretrained(
                name, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            if out_of_memory(error):
                raise
            said = first_line(error).replace(name, str(folder))
            raise SourceError(
                f"The processor in {folder} cannot be loaded: {said}.",
                "Install what it names; reading pictures needs Pillow (the extra `vision`).",
            ) from error
