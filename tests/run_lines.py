"""The lines that `compile` prints, run in this process as a shell would run them."""

from __future__ import annotations

import contextlib
import io
import runpy
import shlex
import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from command_line import runner
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedTokenizerFast

from graphopt.cli.commands import app

PROMPT = "Hello"
SPECIAL = ("<pad>", "<s>", "</s>")
COMPARED = 16
"""Tokens of an answer: later ones may hang on the last bit of a logit."""


def ascii_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are all text: letters of ASCII, and pairs of them.

    The special tokens come first, as in the configs of `families`.
    """
    letters = [chr(code) for code in range(33, 127)] + ["\u0120"]
    pairs = [(first, second) for first in "aeiou" for second in string.ascii_letters]
    tokens = [*SPECIAL, *letters, *(a + b for a, b in pairs)][:vocabulary]
    assert len(tokens) == vocabulary
    merges = [pair for pair in pairs if "".join(pair) in tokens]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1],
        eos_token=SPECIAL[2], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def greedy_answer(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return what transformers answers to the prompt, up to the first token that is no text."""
    ids = tokenizer(PROMPT)["input_ids"]
    made = model.generate(  # type: ignore[operator]
        torch.tensor([ids]), do_sample=False, max_new_tokens=COMPARED, use_cache=False
    )[0, len(ids) :].tolist()
    stated = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = {*range(len(SPECIAL)), *(stated if isinstance(stated, list) else [stated])}
    end = next((place for place, token in enumerate(made) if token in ends), len(made))
    return str(tokenizer.decode(made[:end]))


def run(line: str) -> str:
    """Run a line as it was printed; return what it writes to stdout."""
    command = shlex.split(line, comments=True)
    if command[0] == "graphopt":
        done = runner().invoke(app, command[1:])
        assert done.exit_code == 0, f"{line}: {done.stderr}"
        return done.stdout
    assert command[0] == "python", line
    if command[1] == "-c":
        code = command[2]
        return _printed(["-c", *command[3:]], lambda: exec(code, {"__name__": "__main__"}))
    return _printed(command[1:], lambda: runpy.run_path(command[1], run_name="__main__"))


def _printed(arguments: Sequence[str], work: Callable[[], object]) -> str:
    written, given = io.StringIO(), sys.argv
    sys.argv = list(arguments)
    try:
        with contextlib.redirect_stdout(written):
            work()
    finally:
        sys.argv = given
    return written.getvalue()


def save_tokenizer(model: nn.Module, folder: Path) -> PreTrainedTokenizerFast:
    """Put a tokenizer that has text for every token of a model beside it, and return it."""
    tokenizer = ascii_tokenizer(model.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
    tokenizer.save_pretrained(folder)
    return tokenizer
