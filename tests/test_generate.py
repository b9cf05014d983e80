"""Generation: the tokens, where it stops, what is drawn, and text that comes in whole letters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import tiny_program
from tiny_models import VOCAB, byte_tokenizer, save_tiny, tiny_model
from torch import Tensor

import graphopt as go
from graphopt.errors import SourceError, UsageError
from graphopt.evaluate import LanguageModel, open_language_model
from graphopt.generate import (
    PieceDecoder,
    encode_prompt,
    end_tokens,
    generate,
    generate_ids,
    pick_token,
)
from graphopt.ir.execute import complete_inputs


class Script(LanguageModel):
    """Says a fixed list of tokens, whatever it is asked, and records how it was called."""

    backend = "program"

    def __init__(self, tokens: list[int]) -> None:
        self.name, self.config, self.tokenizer = "script", {}, None
        self.tokens = tokens
        self.steps: list[list[int]] = []

    def start(self, batch: int) -> Any:
        return 0

    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        ids = inputs["input_ids"]
        assert inputs["attention_mask"].shape == (1, cache + ids.shape[1])
        assert inputs["position_ids"][0].tolist() == list(range(cache, cache + ids.shape[1]))
        self.steps.append(ids[0].tolist())
        logits = torch.zeros(1, ids.shape[1], VOCAB)
        logits[0, -1, self.tokens[len(self.steps) - 1]] = 9.0
        return logits, cache + ids.shape[1]


def test_greedy_tokens_equal_transformers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    prompt = byte_tokenizer()("the quick")["input_ids"]
    reference: Any = tiny_model()
    expected = reference.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=VOCAB + 1
    )
    model = open_language_model(str(folder))
    got = list(generate_ids(model, prompt, stop=set(), max_new_tokens=12))
    assert got == expected[0, len(prompt) :].tolist()


def test_tokens_go_through_the_cache_one_by_one() -> None:
    model = Script([7, 8, 9])
    assert list(generate_ids(model, [1, 2], stop=set(), max_new_tokens=3)) == [7, 8, 9]
    assert model.steps == [[1, 2], [7], [8]]


def test_an_artifact_for_a_gpu_decodes_in_its_own_cache(tmp_path: Path) -> None:
    """Greedy and drawn tokens are those of the program, and no step copies the cache."""
    program = tiny_program(cache=True, head_dim=32)
    go.emit(program, tmp_path / "out", target="ampere", emit=("torch",))
    model = open_language_model(str(tmp_path / "out"))
    rooms: list[int] = []
    start = model.start_text
    model.start_text = lambda room: rooms.append(room) or start(room)  # type: ignore[method-assign,func-returns-value]
    plain = open_language_model(str(tmp_path / "out"), "program")
    for options in ({}, {"temperature": 0.8, "seed": 3}):
        made = [
            list(generate_ids(m, [1, 2, 3], stop=set(), max_new_tokens=6, **options))  # type: ignore[arg-type]
            for m in (model, plain)
        ]
        assert made[0] == made[1] and len(made[0]) == 6
    assert rooms == [9, 9]
    cache = model.start_text(9)
    logits, same = model.step(complete_inputs({"input_ids": torch.tensor([[1, 2, 3]])}), cache)
    assert same is cache and cache.used == 3 and logits.shape == (1, 1, 97)
    assert list(generate_ids(model, [1], stop=set(), max_new_tokens=1)) != []


def test_end_token_is_not_part_of_the_text() -> None:
    model = Script([7, 5, 9])
    assert list(generate_ids(model, [1], stop={5})) == [7]
    assert len(model.steps) == 2


def test_positions_end_the_text() -> None:
    model = Script([7, 8, 9])
    model.config = {"n_positions": 4}
    assert list(generate_ids(model, [1, 2], stop=set())) == [7, 8]
    with pytest.raises(UsageError, match="The prompt has 4 tokens"):
        generate_ids(model, [1, 2, 3, 4], stop=set())


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}]
)
def test_options_out_of_range_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="Generation needs"):
        generate_ids(Script([1]), [1], stop=set(), **options)


def test_end_tokens_of_tokenizer_and_config() -> None:
    model, tokenizer = Script([]), byte_tokenizer()
    assert end_tokens(model, tokenizer) == {258}
    model.config = {"eos_token_id": [3, 4]}
    assert end_tokens(model, tokenizer) == {3, 4, 258}


def test_sampling_draws_from_the_nucleus() -> None:
    logits = torch.tensor([0.2, 0.5, 0.05, 0.25]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(temperature: float, top_p: float) -> list[float]:
        draws = [pick_token(logits, temperature, top_p, generator) for _ in range(2000)]
        return [draws.count(token) / 2000 for token in range(4)]

    # Five standard deviations of 2000 draws are 0.056 at most.
    assert shares(1.0, 1.0) == pytest.approx([0.2, 0.5, 0.05, 0.25], abs=0.056)
    assert shares(1.0, 0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.056)
    assert shares(0.5, 1.0) == pytest.approx([0.1159, 0.7246, 0.0072, 0.1812], abs=0.056)
    assert shares(1.0, 0.3) == [0, 1, 0, 0]
    assert pick_token(logits, 0.0, 1.0, generator) == 1


def test_seed_repeats_the_text(tmp_path: Path) -> None:
    model = open_language_model(str(save_tiny(tmp_path / "tiny")))

    def text(seed: int) -> list[int]:
        return list(
            generate_ids(model, [1, 2], stop=set(), max_new_tokens=8, temperature=2.0, seed=seed)
        )

    assert text(1) == text(1) != text(2)


@given(text=st.text(max_size=30))
@settings(deadline=None)
def test_pieces_join_to_the_text_and_hold_whole_characters(text: str) -> None:
    tokenizer = byte_tokenizer()
    decoder = PieceDecoder(tokenizer)
    pieces = [decoder.add(token) for token in tokenizer(text)["input_ids"]]
    pieces.append(decoder.finish())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_unfinished_character_comes_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    decoder = PieceDecoder(tokenizer)
    pieces = [decoder.add(token) for token in tokenizer("a日")["input_ids"][:-1]]
    assert pieces == ["a", "", ""] and decoder.finish() == "\ufffd"


def test_generate_streams_text() -> None:
    tokenizer = byte_tokenizer()
    model = Script([*tokenizer("the 日本!")["input_ids"], 258])
    assert list(generate(model, tokenizer, "say")) == ["the", " ", "日", "本", "!"]


def test_chat_template_is_applied_unless_raw() -> None:
    tokenizer = byte_tokenizer(chat=True)
    chat = encode_prompt(tokenizer, "hi")
    assert tokenizer.decode(chat) == "<user>hi</user>"
    assert encode_prompt(tokenizer, "hi", raw=True) == tokenizer("hi")["input_ids"]
    assert encode_prompt(byte_tokenizer(), "hi") == tokenizer("hi")["input_ids"]


def test_prompt_refusals() -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        encode_prompt(byte_tokenizer(), "")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(SourceError, match=r"template cannot be applied: no users.*--raw"):
        encode_prompt(tokenizer, "hi")
