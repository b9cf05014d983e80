"""Generation: the tokens, where it stops, what is drawn, and text that comes in whole letters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from emitted import load_file
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import tiny_program
from tiny_models import VOCAB, byte_tokenizer, save_tiny, tiny_model
from torch import Tensor

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.errors import SourceError, UsageError
from graphopt.evaluate.perplexity import perplexity
from graphopt.execute.interpreter import complete_inputs
from graphopt.execute.language_model import LanguageModel
from graphopt.generate import (
    PieceDecoder,
    Sampling,
    encode_prompt,
    end_tokens,
    generate,
    generate_ids,
    pick_token,
    token_odds,
)
from graphopt.sources.generation import GenerationSettings

pytestmark = pytest.mark.oldest


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


@pytest.mark.slow
def test_a_text_that_crosses_the_original_length_is_read_again(
    tmp_path: Path,
) -> None:
    """LongRoPE: keys in the cache have the frequencies of short texts (transformers' Phi-3).

    The reference has no cache: with one, transformers 5.17 reads a text again by its last token
    alone.
    """
    entries: dict[str, Any] = {
        "head_dim": None, "pad_token_id": 0, "original_max_position_embeddings": 12,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 4.0, 9.0, 16.0], "original_max_position_embeddings": 12,
        },
    }  # fmt: skip
    folder = save_tiny(tmp_path / "tiny", "phi3", **entries)
    prompt = byte_tokenizer()("the quick")["input_ids"]
    assert len(prompt) < 12
    reference: Any = tiny_model("phi3", **entries)
    expected = reference.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=VOCAB + 1,
        use_cache=False,
    )[0, len(prompt) :].tolist()  # fmt: skip
    go.compile_model(str(folder), tmp_path / "out", go.CompileOptions(emit=("torch",)))
    model = open_language_model(str(tmp_path / "out"))
    assert model.rotary_switch == 12
    step, read = model.step, []

    def recording(inputs: Mapping[str, Tensor], cache: Any) -> Any:
        read.append(inputs["input_ids"].shape[1])
        return step(inputs, cache)

    model.step = recording  # type: ignore[method-assign]
    assert list(generate_ids(model, prompt, stop=set(), max_new_tokens=20)) == expected
    alone = [1] * (12 - len(prompt))
    assert read == [len(prompt), *alone, 13, *[1] * (20 - len(alone) - 2)]
    emitted = load_file(tmp_path / "out" / "model.py")
    made = emitted.generate(emitted.load(tmp_path / "out"), [prompt, prompt[:4]], 20)
    assert made[0] == expected
    for first in (11, 12, 13):  # a prompt as long as the length, and one token to either side
        text = (prompt * 3)[:first]
        assert emitted.generate(emitted.load(tmp_path / "out"), text, 6) == list(
            generate_ids(model, text, stop=set(), max_new_tokens=6)
        )


@pytest.mark.slow
def test_genai_reads_a_text_again_where_its_own_rule_does(tmp_path: Path) -> None:
    """The rule for models of type phi3: at 4,097 tokens, whatever the config says."""
    og = pytest.importorskip("onnxruntime_genai")
    entries: dict[str, Any] = {
        "head_dim": None, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1,
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 8192, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 40.0, 90.0, 160.0], "original_max_position_embeddings": 4096,
        },
    }  # fmt: skip
    folder = save_tiny(tmp_path / "tiny", "phi3", **entries)
    go.compile_model(str(folder), tmp_path / "out", go.CompileOptions(emit=("onnx",), verify=False))
    text = torch.randint(3, VOCAB, (4090,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = list(
        generate_ids(open_language_model(str(folder)), text, stop=set(), max_new_tokens=16)
    )
    model = og.Model(str(tmp_path / "out" / "onnx"))
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=4090 + 16, do_sample=False)
    generator = og.Generator(model, options)
    generator.append_tokens(text)
    while len(generator.get_sequence(0)) < 4090 + 16 and not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[4090:].tolist() == expected


def test_dynamic_scaling_has_more_positions_than_the_config_says() -> None:
    script = Script([])
    script.config = {
        "max_position_embeddings": 10,
        "rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.5}},
    }
    assert script.positions == 25 and script.rotary_switch is None


@pytest.mark.slow
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


@pytest.mark.parametrize("config", [{"vocab_size": 3}, {"text_config": {"vocab_size": 3}}])
def test_a_token_beyond_the_vocabulary_is_refused(config: dict[str, Any]) -> None:
    model = Script([1])
    model.config = config
    with pytest.raises(SourceError, match="gives the id 3, and the model knows 3 tokens"):
        list(generate_ids(model, [1, 3], stop=set()))
    with pytest.raises(SourceError, match="gives the id"):
        perplexity(model, byte_tokenizer(), "the quick brown fox", seqlen=4)


def test_tokens_go_through_the_cache_one_by_one() -> None:
    model = Script([7, 8, 9])
    assert list(generate_ids(model, [1, 2], stop=set(), max_new_tokens=3)) == [7, 8, 9]
    assert model.steps == [[1, 2], [7], [8]]


@pytest.mark.slow
def test_an_artifact_for_a_gpu_decodes_in_its_own_cache(tmp_path: Path) -> None:
    """Greedy and drawn tokens are those of the program, and no step copies the cache."""
    program = tiny_program(cache=True, head_dim=32)
    go.emit(program, tmp_path / "out", target="ampere", emit=("torch",))
    model = open_language_model(str(tmp_path / "out"))
    rooms: list[int] = []
    start = model.start_text
    model.start_text = lambda room: rooms.append(room) or start(room)  # type: ignore[method-assign,func-returns-value]
    plain = open_language_model(str(tmp_path / "out"), "program")
    for sampling in (Sampling(), Sampling(0.8, seed=3), Sampling(repetition_penalty=1.4)):
        made = [
            list(generate_ids(m, [1, 2, 3], stop=set(), max_new_tokens=6, sampling=sampling))
            for m in (model, plain)
        ]
        assert made[0] == made[1] and len(made[0]) == 6
    assert rooms == [9, 9, 9]
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
    said: list[str] = []
    assert list(generate_ids(model, [1, 2], stop=set(), say=said.append)) == [7, 8]
    (sentence,) = said
    assert "takes texts of 4 tokens, and the prompt has 2: at most 2 follow" in sentence
    model.steps = []
    assert list(generate_ids(model, [1, 2], stop=set(), max_new_tokens=2, say=said.append))
    assert len(said) == 1
    model.steps, model.length = [], 5
    assert list(generate_ids(model, [1, 2], stop=set())) == [7, 8, 9]
    model.length = None
    with pytest.raises(UsageError, match="The prompt has 4 tokens"):
        generate_ids(model, [1, 2, 3, 4], stop=set())


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"temperature": -1.0}, "a temperature of 0 or more, not -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "a top-p above 0 and at most 1, not 0"),
        ({"top_p": 1.5}, "a top-p above 0 and at most 1, not 1.5"),
        ({"top_k": -1}, "a top-k of 0 or more, not -1"),
        ({"repetition_penalty": float("nan")}, "a repetition penalty above 0, not nan"),
        ({"max_new_tokens": 0}, "at least one new token, not 0"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options: dict[str, Any], needed: str) -> None:
    with pytest.raises(UsageError, match=f"Generation needs {needed}"):
        generate(Script([1]), byte_tokenizer(), "say", **options)


def test_end_tokens_of_tokenizer_and_configs() -> None:
    model, tokenizer = Script([]), byte_tokenizer()
    assert end_tokens(model, tokenizer) == {258}
    model.config = {"eos_token_id": [3, 4]}
    assert end_tokens(model, tokenizer) == {3, 4, 258}
    model.generation = {"bos_token_id": 1}
    assert end_tokens(model, tokenizer) == {3, 4, 258}
    # What a generation config states is all that ends a text, as in transformers.
    model.generation = {"eos_token_id": [5, 6]}
    assert end_tokens(model, tokenizer) == {5, 6}


@pytest.mark.slow
def test_sampling_draws_from_the_nucleus() -> None:
    logits = torch.tensor([0.2, 0.5, 0.05, 0.25]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(temperature: float, top_p: float) -> list[float]:
        sampling = Sampling(temperature, top_p=top_p)
        draws = [pick_token(logits, sampling, generator) for _ in range(2000)]
        return [draws.count(token) / 2000 for token in range(4)]

    # Five standard deviations of 2000 draws are 0.056 at most.
    assert shares(1.0, 1.0) == pytest.approx([0.2, 0.5, 0.05, 0.25], abs=0.056)
    assert shares(1.0, 0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.056)
    assert shares(0.5, 1.0) == pytest.approx([0.1159, 0.7246, 0.0072, 0.1812], abs=0.056)
    assert shares(1.0, 0.3) == [0, 1, 0, 0]
    assert pick_token(logits, Sampling(), generator) == 1


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
@settings(deadline=None, max_examples=60)
def test_tokens_are_drawn_as_transformers_draws_them(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    steps: list[Any] = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    scores = logits[None] * 1
    for step in steps:
        scores = step(torch.zeros(1, 1, dtype=torch.long), scores)
    got = token_odds(logits, Sampling(temperature, top_k, top_p, min_p))
    torch.testing.assert_close(got, scores.softmax(-1)[0], rtol=1e-9, atol=1e-12)


def test_greedy_tokens_under_a_repetition_penalty_equal_transformers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    prompt = byte_tokenizer()("the the the")["input_ids"]
    reference: Any = tiny_model()
    expected = reference.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=VOCAB + 1,
        repetition_penalty=1.7,
    )[0, len(prompt) :].tolist()  # fmt: skip
    model = open_language_model(str(folder))
    made = [
        list(generate_ids(model, prompt, stop=set(), max_new_tokens=12, sampling=sampling))
        for sampling in (Sampling(), Sampling(repetition_penalty=1.7))
    ]
    assert made[1] == expected != made[0]


STATED = GenerationSettings(do_sample=True, temperature=0.6, top_k=20, top_p=0.9, min_p=0.1)


@pytest.mark.parametrize(
    ("settings", "asked", "expected"),
    [
        (GenerationSettings(), {}, Sampling()),
        (GenerationSettings(), {"temperature": 0.5, "seed": 4}, Sampling(0.5, 50, seed=4)),
        (GenerationSettings(), {"top_p": 0.5}, Sampling(1.0, 50, 0.5)),
        (GenerationSettings(), {"top_k": 0}, Sampling(1.0, 0)),
        # Stated, but not asked for.
        (GenerationSettings(temperature=0.6, top_k=3), {}, Sampling()),
        (GenerationSettings(top_k=3), {"temperature": 0.5}, Sampling(0.5, 3)),
        (STATED, {}, Sampling(0.6, 20, 0.9, 0.1)),
        (STATED, {"top_k": 5, "seed": 9}, Sampling(0.6, 5, 0.9, 0.1, seed=9)),
        (STATED, {"temperature": 0.0}, Sampling()),
        (STATED, {"greedy": True}, Sampling()),
        (GenerationSettings(do_sample=True, temperature=0.0), {}, Sampling()),
        (GenerationSettings(do_sample=True, top_p=0.0), {}, Sampling(1.0, 50, 1e-9)),
        (GenerationSettings(repetition_penalty=1.2), {"greedy": True},
         Sampling(repetition_penalty=1.2)),
    ],
)  # fmt: skip
def test_what_a_user_gives_comes_before_what_the_model_states(
    settings: GenerationSettings, asked: dict[str, Any], expected: Sampling
) -> None:
    assert Sampling.of(settings, **asked) == expected


def test_the_settings_are_said() -> None:
    assert str(Sampling()) == "greedy decoding"
    assert str(Sampling(0.6, 20, 0.9, 0.1, 1.1, 4)) == (
        "sampling: temperature 0.6, top-k 20, top-p 0.9, min-p 0.1, repetition penalty 1.1, seed 4"
    )
    assert str(Sampling(1.0)) == "sampling: temperature 1, top-k all, top-p 1, seed 0"
    assert str(Sampling(repetition_penalty=1.1)) == "greedy decoding, repetition penalty 1.1"
    with pytest.raises(UsageError, match="Greedy decoding draws nothing"):
        Sampling.of(STATED, greedy=True, top_p=0.5)


def test_seed_repeats_the_text(tmp_path: Path) -> None:
    model = open_language_model(str(save_tiny(tmp_path / "tiny")))

    def text(seed: int) -> list[int]:
        return list(
            generate_ids(
                model, [1, 2], stop=set(), max_new_tokens=8, sampling=Sampling(2.0, seed=seed)
            )
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
