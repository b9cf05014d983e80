"""Conversations: what a model reads of each turn, and that it answers as if it read all of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import tiny_program
from tiny_models import VOCAB, byte_tokenizer, save_tiny, tiny_model
from torch import Tensor

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.errors import SourceError, UsageError
from graphopt.execute.language_model import LanguageModel, load_tokenizer
from graphopt.generate import Conversation, Sampling, read_prompts
from graphopt.generate.text_reader import SPARE_TOKENS, TextReader

ROLES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USERS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ m.content | trim }};{% endfor %}"
)
END = 258


def tokenizer_with(template: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


class Says(LanguageModel):
    """Says given texts, one a turn, and records what it is given to read."""

    backend = "program"

    def __init__(self, *answers: str) -> None:
        self.name, self.config, self.tokenizer = "script", {}, None
        ids = [token for text in answers for token in [*byte_tokenizer()(text)["input_ids"], END]]
        self.script, self.read = iter(ids), []
        self.config = {"eos_token_id": END}

    def start(self, batch: int) -> Any:
        return []

    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        ids = inputs["input_ids"][0].tolist()
        assert inputs["position_ids"][0].tolist() == list(range(len(cache), len(cache) + len(ids)))
        self.read.append(ids)
        logits = torch.zeros(1, len(ids), VOCAB)
        logits[0, -1, next(self.script)] = 9.0
        return logits, [*cache, *ids]

    def texts(self) -> list[str]:
        """What was read at once, where that was more than a token."""
        return [byte_tokenizer().decode(ids) for ids in self.read if len(ids) > 1]


def test_a_later_turn_reads_what_is_new() -> None:
    model = Says("one two", "the end")
    conversation = Conversation(model, tokenizer_with(ROLES), system="be calm")
    assert "".join(conversation.answer("hi")) == "one two"
    assert "".join(conversation.answer("and?")) == "the end"
    # The end token was never read, and the text goes on behind the answer.
    assert model.texts() == [
        "<system>be calm</><user>hi</><assistant>",
        "</><user>and?</><assistant>",
    ]
    assert [m["content"] for m in conversation.messages] == [
        "be calm", "hi", "one two", "and?", "the end",
    ]  # fmt: skip
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be calm"}]


def test_a_template_that_rewrites_an_answer_has_the_whole_text_read() -> None:
    model = Says(" spaces ", "x")
    conversation = Conversation(model, tokenizer_with(USERS))
    assert "".join(conversation.answer("hi")) == " spaces "
    assert "".join(conversation.answer("and?")) == "x"
    assert model.texts() == ["hi;", "hi;spaces;and?;"]


def test_an_answer_that_is_ended_belongs_to_the_conversation() -> None:
    model = Says("one two three", "x")
    conversation = Conversation(model, tokenizer_with(ROLES))
    heard: list[str] = []
    for piece in conversation.answer("hi", lambda: len(heard) == 3):
        heard.append(piece)
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(heard)}
    model.script = iter([*byte_tokenizer()("x")["input_ids"], END])
    assert "".join(conversation.answer("and?")) == "x"
    # The last letter was read to choose the one that was not said.
    assert model.texts()[1] == "</><user>and?</><assistant>"


def test_a_step_that_is_interrupted_has_the_whole_text_read_again() -> None:
    model = Says("one", "two")
    conversation = Conversation(model, tokenizer_with(ROLES))
    answer = conversation.answer("hi")
    assert next(answer) == "o"
    step = model.step

    def interrupted(inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        raise KeyboardInterrupt

    model.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        next(answer)
    model.step, model.script = step, iter([*byte_tokenizer()("two")["input_ids"], END])  # type: ignore[method-assign]
    assert "".join(conversation.answer("and?")) == "two"
    assert model.texts()[-1] == "<user>hi</><assistant>o</><user>and?</><assistant>"


def test_without_a_template_each_prompt_is_continued_by_itself() -> None:
    model = Says("one", "two")
    conversation = Conversation(model, tokenizer_with(None))
    assert not conversation.has_turns
    assert "".join(conversation.answer("hi")) == "one"
    assert "".join(conversation.answer("hello")) == "two"
    assert model.texts() == ["hi", "hello"] and conversation.messages == []


@pytest.mark.parametrize(("template", "raw"), [(None, False), (ROLES, True)])
def test_a_system_prompt_needs_a_template(template: str | None, raw: bool) -> None:
    with pytest.raises(UsageError, match=r"system prompt has its place in a chat template"):
        Conversation(Says(), tokenizer_with(template), system="be calm", raw=raw)


def test_a_template_without_a_system_prompt_says_so() -> None:
    conversation = Conversation(Says("x"), tokenizer_with(USERS), system="be calm")
    with pytest.raises(SourceError, match=r"no system role.*Leave --system out"):
        conversation.answer("hi")


def test_a_conversation_that_is_too_long_stays_as_it_was() -> None:
    model = Says("one", "two")
    model.length = 40
    conversation = Conversation(model, tokenizer_with(ROLES))
    assert "".join(conversation.answer("hi")) == "one"
    with pytest.raises(UsageError, match="takes texts of 40"):
        conversation.answer("and then?")
    assert len(conversation.messages) == 2


@pytest.mark.parametrize("answer", ["", "日本"])
def test_any_answer_can_be_followed(answer: str) -> None:
    model = Says(answer, "x")
    conversation = Conversation(model, tokenizer_with(ROLES))
    assert "".join(conversation.answer("hi")) == answer
    assert "".join(conversation.answer("and?")) == "x"


def test_drawn_answers_differ_within_a_conversation_and_repeat_in_the_next() -> None:
    class Even(Says):
        def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
            logits = torch.zeros(1, inputs["input_ids"].shape[1], 256)
            return logits, [*cache, *inputs["input_ids"][0].tolist()]

    def turns() -> list[list[str]]:
        conversation = Conversation(
            Even(), tokenizer_with(ROLES), sampling=Sampling(1.0, seed=3), max_new_tokens=8
        )
        found = []
        for _ in range(2):
            found.append(["".join(conversation.answer("hi")) for _ in range(2)])
            conversation.reset()
        return found

    first, second = turns()
    assert first == second and first[0] != first[1]


def _expected(reference: Any, tokenizer: Any, messages: list[dict[str, str]], count: int) -> str:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    made = reference.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=count, eos_token_id=END
    )[0, len(ids) :]
    return str(tokenizer.decode(made, skip_special_tokens=True))


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LanguageModel]:
    """Open a tiny model in a form: its folder, or an output folder with every form."""
    root = tmp_path_factory.mktemp("chat")
    source = save_tiny(root / "source", max_position_embeddings=512)
    tokenizer_with(ROLES).save_pretrained(source)
    go.compile_model(
        str(source), root / "out", go.CompileOptions(emit=("torch", "onnx", "hf"), verify=False)
    )

    def open_form(form: str) -> LanguageModel:
        if form in ("source", "hf"):
            return open_language_model(str(source if form == "source" else root / "out" / "hf"))
        return open_language_model(str(root / "out"), form)  # type: ignore[arg-type]

    return open_form


@pytest.mark.slow
@pytest.mark.parametrize("form", ["source", "program", "torch", "onnx", "hf"])
def test_every_form_answers_every_turn_as_transformers_does(
    form: str, forms: Callable[[str], LanguageModel]
) -> None:
    model = forms(form)
    tokenizer = load_tokenizer(model)
    reference = tiny_model(max_position_embeddings=512)
    conversation = Conversation(model, tokenizer, system="be calm", max_new_tokens=10)
    messages = [{"role": "system", "content": "be calm"}]
    for prompt in ("the quick", "brown", "fox"):
        messages.append({"role": "user", "content": prompt})
        answer = "".join(conversation.answer(prompt))
        assert answer == _expected(reference, tokenizer, messages, 10)
        messages.append({"role": "assistant", "content": answer})


@pytest.mark.slow
def test_a_cache_of_fixed_room_is_made_anew_where_a_conversation_outgrows_it(
    tmp_path: Path,
) -> None:
    program = tiny_program(cache=True, head_dim=32)
    go.emit(program, tmp_path / "out", target="ampere", emit=("torch",))
    model, plain = (open_language_model(str(tmp_path / "out"), b) for b in ("torch", "program"))  # type: ignore[arg-type]
    rooms: list[int] = []
    start = model.start_text
    model.start_text = lambda room: rooms.append(room) or start(room)  # type: ignore[method-assign,func-returns-value]
    reader, reference = TextReader(model), TextReader(plain)
    for text, room in (([1, 2, 3], 5), ([1, 2, 3, 4, 5], 5), ([1, 2, 3, 4, 5, 6, 7], 9)):
        got, want = reader.next_logits(text, room), reference.next_logits(text, room)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert rooms == [5, 9 + SPARE_TOKENS]


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\r\n\n two \u2028 x\n", encoding="utf-8", newline="")
    assert read_prompts(path) == ["one", " two \u2028 x"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('"a\\nb"\n{"prompt": "c", "id": 3}\n', encoding="utf-8")
    assert read_prompts(lines) == ["a\nb", "c"]
    for content, message in (
        ("\n", "is empty"),
        ("{", "line 1.*is not valid JSON"),
        ('{"text": "a"}', "line 1, holds no prompt"),
        (json.dumps(""), "line 1, holds no prompt"),
    ):
        lines.write_text(content)
        with pytest.raises(SourceError, match=message):
            read_prompts(lines)
