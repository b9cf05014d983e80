"""Chat templates: what they write is what transformers has them write, and what they may take."""

from __future__ import annotations

import time
from typing import Any

import pytest
from sampling import slow_but
from tiny_models import CHAT_TEMPLATE, byte_tokenizer

from graphopt.errors import SourceError, UsageError
from graphopt.generate import encode_prompt
from graphopt.runtime import chat
from graphopt.runtime.chat import chat_text
from graphopt.sources.windows import prompt_ids

TURNS = (
    "{{- bos_token }}\n{% for message in messages -%}\n"
    "  {%- if message['role'] == 'assistant' -%}{% continue %}{%- endif %}\n"
    "{{ '<' + message.role + '>\n' + message.content | trim }}</turn>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<model>\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools is none and documents is not defined or true %}{{ eos_token }}{% endif %}"
    "{% generation %}{{ {'b': [1, 'é<'], 'a': none} | tojson }}{% endgeneration %}"
    "{% set ns = namespace(found=false) %}{% for m in messages %}{% set ns.found = true %}"
    "{% endfor %}{{ ns.found }}{{ strftime_now('%Y')[:2] }}{{ dict(a=1).a }}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TURNS, TOOLS])
@pytest.mark.parametrize(
    "prompt", slow_but(["hi", "  two\nlines é {{ bos_token }} ", "日本"], "hi")
)
def test_a_template_writes_what_transformers_has_it_write(template: str, prompt: str) -> None:
    tokenizer = byte_tokenizer(begin=["<s>"])
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": prompt}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert chat_text(template, turns, tokenizer.special_tokens_map) == expected
    ids = encode_prompt(tokenizer, prompt)
    assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    # A template that writes the first token itself does not get a second one.
    start = tokenizer.bos_token_id
    assert ids.count(start) == (template is TURNS) + prompt.count("<s>")
    assert encode_prompt(tokenizer, prompt, raw=True) == prompt_ids(tokenizer, prompt)
    assert encode_prompt(tokenizer, prompt, raw=True)[0] == start


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no users') }}", "no users"),
        ("{% if %}", "Expected an expression"),
        ("{{ 'a' * 10**10 }}", "1024 MiB of memory"),
        ("{% for i in range(9) %}{{ 'abcd' * 2**16 }}{% endfor %}", "more than 1048576 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "undefined|unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "undefined|unsafe"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_what_a_template_may_not_do_is_said(template: str, said: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(SourceError, match=rf"template cannot be applied: .*({said}).*--raw"):
        encode_prompt(tokenizer, "hi")


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
    ],
)
def test_a_template_without_end_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"seconds": 1, "bytes": 2**28, "characters": 99}
    monkeypatch.setattr(chat, "CHAT_LIMITS", limits)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"longer than 1 s|256 MiB of memory"):
        chat_text(template, [{"role": "user", "content": "hi"}], {})
    # Twice the limit, and what starting a process takes on a busy machine.
    assert time.monotonic() - began < 30


def test_of_several_templates_the_default_one_is_used() -> None:
    tokenizer: Any = byte_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ 1 }}"}
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == "<user>hi</user>"
    tokenizer.chat_template = {"other": CHAT_TEMPLATE, "tool_use": "{{ 1 }}"}
    with pytest.raises(SourceError, match=r"template cannot be applied: .*--raw"):
        encode_prompt(tokenizer, "hi")


def test_prompts_that_are_no_text() -> None:
    with pytest.raises(UsageError, match="not valid Unicode"):
        encode_prompt(byte_tokenizer(), "a\ud800")
    # A tokenizer that puts something before a text does not make an empty prompt one.
    with pytest.raises(UsageError, match="prompt is empty"):
        encode_prompt(byte_tokenizer(begin=["<s>"]), "")


def test_a_template_that_reads_parts_gets_a_text_as_one() -> None:
    """As LLaVA's does; whatever else a template leaves out of a text stays out."""
    parts = (
        "{% for m in messages %}{{ m.role }}: {% for part in m.content | "
        "selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %};{% endfor %}"
    )
    turns = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "you"}]
    assert chat_text(parts, turns, {}) == "user:  hi ;assistant: you;"
    fails = "{{ messages[0].role }}{% if messages[0].content is not string %}{{ 1 / 0 }}{% endif %}"
    assert chat_text(fails, turns, {}) == "user"
