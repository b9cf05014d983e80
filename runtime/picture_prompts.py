"""Prompts with pictures as a model takes them, by transformers' processor of the model.

It goes into packages of models that see.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from graphopt.errors import SourceError, UsageError, first_line
from graphopt.support.boundary import out_of_memory
from graphopt.support.plain import shown

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What pictures are read from, as Pillow calls it: others call programs, or are seldom met."""

MAX_PIXELS = 64 * 2**20
"""The largest picture that is opened; towers scale them to a megapixel or so."""


class PicturePrompts:
    """A processor of transformers, for one text at a time.

    Args:
        processor: The processor.
        image_token: The id of a token of a picture.
        name: The model's, for messages.
    """

    def __init__(self, processor: Any, image_token: int, name: str) -> None:
        self._processor, self._image_id, self.name = processor, image_token, name

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
        return str(self.tokenizer.convert_ids_to_tokens(self._image_id))

    def inputs(
        self, prompt: str, images: Sequence[Path], where: str = "", *, raw: bool = False
    ) -> dict[str, Tensor]:
        """Return what transformers' model takes for a prompt with pictures, of one text.

        The prompt is put into the chat template where the model has one. Otherwise, or where it
        has image tokens itself, it is taken as it is.

        Args:
            where: Named in messages.
            raw: Take the prompt as it is, whatever template there is.

        Raises:
            UsageError: A prompt without a template has not one image token for each picture.
            SourceError: A picture cannot be read, or the processor fails.
        """
        pictures = [open_picture(path) for path in images]
        text, token, place = prompt, self.image_token, f"{where}: " if where else ""
        count = prompt.count(token)
        template = getattr(self._processor, "chat_template", None) or self.tokenizer.chat_template
        if count == 0 and template and not raw:
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
                f"{place}the processor of {self.name} cannot take this: {first_line(error)}.",
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
                f"The chat template of {self.name} cannot be applied to pictures: "
                f"{first_line(error)}.",
                f"Put {shown(self.image_token)} into the prompt, which is then taken as it is.",
            ) from error


def open_picture(path: Path) -> Any:
    """Return a picture in RGB, as Pillow has it; of several in a file the first.

    Raises:
        UsageError: Pillow is not installed.
        SourceError: The file is no picture in one of `FORMATS`, damaged, or too large.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(
            "Reading pictures needs Pillow, which is not installed.",
            "Install graphopt with the extra `vision`, or `pip install pillow`.",
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage that Pillow reads past
            with Image.open(path, formats=FORMATS) as picture:
                width, height = picture.size
                if width * height <= MAX_PIXELS:
                    return picture.convert("RGB")
    except Exception as error:  # decoders have assorted errors for damaged files
        if out_of_memory(error):
            raise
        raise SourceError(
            f"{path} cannot be read as a picture: {first_line(error)}.",
            "Give a PNG, JPEG, WebP, GIF or BMP file.",
        ) from error
    raise SourceError(
        f"{path} has {width} x {height} pixels, more than the {MAX_PIXELS} that are read.",
        "Scale it down.",
    )
