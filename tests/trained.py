"""A small Llama that has learnt to spell, for what says nothing on random weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import byte_tokenizer, tiny_model

from graphopt.capture import capture
from graphopt.ir.graph import Program

LENGTH = 96
RATE = 8e-3


PEOPLE = ("the miller", "her sister", "an old sailor", "the young clerk", "my neighbour")
ACTS = ("counted", "painted", "carried home", "forgot", "sold", "looked for", "mended")
THINGS = ("boats", "lanterns", "apples", "letters", "clocks", "red chairs", "baskets of salt")
PLACES = ("by the river", "in the market", "behind the church", "on the hill", "at the harbour")


def book(sentences: int = 1200) -> str:
    """Return a text with structure at several ranges; the same on every machine.

    A sentence's second half says again who, what, and one more than how many.
    """
    choose = random.Random(0)
    lines = []
    for _ in range(sentences):
        who, act, thing, place = map(choose.choice, (PEOPLE, ACTS, THINGS, PLACES))
        count = choose.randrange(2, 98)
        lines.append(
            f"{place.capitalize()}, {who} {act} {count} {thing}; "
            f"the day after, {who} {act} {count + 1} {thing} {choose.choice(PLACES)}."
        )
    return "\n".join(lines)


def save_trained(folder: Path, layers: int, steps: int = 100, **changes: Any) -> Path:
    """Train a Llama on `book`, with a fixed seed, and write it with its tokenizer.

    Args:
        changes: Entries of the config that differ from what is usual here.
    """
    config = {
        "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": layers, "head_dim": 12,
        "tie_word_embeddings": True, "initializer_range": 0.05,
    }  # fmt: skip
    model = tiny_model(**(config | changes))
    torch.manual_seed(0)
    model.init_weights()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02 if "o_proj" in name or "down" in name else 0.08)
    ids = torch.tensor(byte_tokenizer()(book(), verbose=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - step / steps)
        starts = torch.randint(len(ids) - LENGTH, (8,), generator=generator)
        batch = ids[starts[:, None] + torch.arange(LENGTH)]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


_PROGRAMS: dict[int, Program] = {}


def trained_program(folders: pytest.TempPathFactory, layers: int) -> Program:
    """Return the program of a trained Llama, trained once; whoever changes it takes a copy."""
    if layers not in _PROGRAMS:
        _PROGRAMS[layers] = capture(str(save_trained(folders.mktemp("trained"), layers)))
    return _PROGRAMS[layers]
