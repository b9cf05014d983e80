"""Tokenizers made of GGUF vocabularies, against an encoder that merges naively, and damaged."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CHAT_TEMPLATE
from transformers import AutoTokenizer
from vocabularies import KINDS, NORMAL, SPECIAL, file_of, ranked, scored

from graphopt.errors import SourceError
from graphopt.sources.gguf import tokenizer as conversion
from graphopt.sources.gguf.container import GgufFile
from graphopt.sources.gguf.encoder import Encoder, byte_letters, merged
from graphopt.sources.gguf.splitting import SPLITTINGS
from graphopt.sources.gguf.tokenizer import gguf_tokenizer
from graphopt.sources.gguf.vocabulary import read_vocabulary

pytestmark = pytest.mark.oldest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))


def converted(file: GgufFile) -> Any:
    """The tokenizer of a file as transformers loads it, which `gguf_tokenizer` has checked."""
    folder = gguf_tokenizer(file, read_vocabulary(file))
    assert folder is not None
    return AutoTokenizer.from_pretrained(folder)


LETTERS = [*"abcde hlox.,'1239\n\t(☃é日🙂\x00"]
WORDS = [*LETTERS, "  ", "   ", "[user]", "</s>", "the ", "\r\n"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=60).map("".join)


@pytest.mark.parametrize("prefix", [True, False, None])
def test_merges_by_score(prefix: bool | None) -> None:
    file = file_of(scored(), add_space_prefix=prefix)
    vocabulary, tokenizer = read_vocabulary(file), converted(file)
    assert vocabulary is not None and vocabulary.space_prefix == (prefix is not False)
    encoder = Encoder(vocabulary)

    @given(TEXTS)
    @settings(max_examples=150, deadline=None)
    def check(text: str) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == encoder.encode(text)[1:]
        if not any(special in text for special in SPECIAL):
            assert tokenizer.decode(ids) == text

    check()


@pytest.mark.slow
@pytest.mark.parametrize("pre", {rule: pre for pre, rule in SPLITTINGS.items()}.values())
def test_merges_by_rank(pre: str) -> None:
    file = file_of(ranked(), pre=pre)
    vocabulary, tokenizer = read_vocabulary(file), converted(file)
    assert vocabulary is not None
    encoder = Encoder(vocabulary)

    @given(TEXTS)
    @settings(max_examples=25, deadline=None)
    def check(text: str) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        wanted = encoder.encode(text)
        assert ids == wanted[1 if vocabulary.add_bos else 0 :]
        assert tokenizer.decode(ids) == text

    check()


CUTS: dict[str, tuple[str, list[str]]] = {
    "gpt-2": ("I'll x12  3\n\n!a", ["I", "'ll", " x", "12", " ", " 3", "\n", "\n", "!", "a"]),
    "default": ("a1234$b", ["a", "123", "4", "$", "b"]),
    "falcon": ("a1234`b", ["a", "123", "4", "`", "b"]),
    "smollm": ("a 12", ["a", " ", "1", "2"]),
    "llama-bpe": ("I'LL x1234  !?\n\na", ["I", "'LL", " x", "123", "4", " ", " !?\n\n", "a"]),
    "qwen2": ("x12\r\n a", ["x", "1", "2", "\r\n", " a"]),
    "tekken": ("CamelCase HTTPServer12", ["Camel", "Case", " HTTPServer", "1", "2"]),
    "gpt-4o": ("CamelCase don't 1234/\n", ["Camel", "Case", " don't", " ", "123", "4", "/\n"]),
    "deepseek-v3": ("日本a_b 1234", ["日本", "a", "_b", " ", "123", "4"]),
    "deepseek-coder": ("a\n\nb 12", ["a", "\n", "\n", "b", " ", "1", "2"]),
    "qwen35": ("e\u0301a 12", ["e\u0301a", " ", "1", "2"]),
}


@pytest.mark.parametrize("pre", CUTS)
def test_splitting_rules(pre: str) -> None:
    """The cuts that the rules are known by, written by hand."""
    text, pieces = CUTS[pre]
    tokenizer = converted(file_of(ranked(), pre=pre)).backend_tokenizer
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    found = [
        bytes(letters[c] for c in piece).decode()
        for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)
    ]
    assert found == pieces


@pytest.mark.slow
@given(st.text("abc", max_size=12), st.dictionaries(
    st.tuples(st.text("abc", min_size=1, max_size=3), st.text("abc", min_size=1, max_size=3)),
    st.integers(0, 4), max_size=12,
))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_merging_against_the_definition(text: str, ranks: dict[tuple[str, str], int]) -> None:
    """The best pair first, of equals the leftmost, one at a time."""
    symbols = list(text)
    while places := [
        (ranks[pair], place)
        for place, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks
    ]:  # fmt: skip
        _, place = min(places)
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    assert merged(list(text), lambda a, b: ranks.get((a, b))) == symbols


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_put_around_a_text(kind: str) -> None:
    """As the file says, and as the kind of vocabulary has it where the file says nothing.

    transformers' own `add_bos_token` is false beside any tokenizer.json; onnxruntime-genai reads it
    in the configuration.
    """
    vocabulary = scored() if kind == "llama" else ranked()
    for bos, eos in itertools.product([None, True, False], repeat=2):
        file = file_of(vocabulary, add_bos_token=bos, add_eos_token=eos)
        tokenizer = converted(file)
        adds_bos = kind == "llama" if bos is None else bos
        for ids in (tokenizer("a")["input_ids"], tokenizer(" a", "a")["input_ids"]):
            assert (ids[0] == 1, ids[-1] == 2) == (adds_bos, bool(eos))
        config = json.loads((Path(tokenizer.name_or_path) / "tokenizer_config.json").read_text())
        assert (config["add_bos_token"], config["add_eos_token"]) == (adds_bos, bool(eos))
    without = converted(file_of(vocabulary, bos_token_id=None, add_bos_token=True))
    assert without("")["input_ids"] == [] and without.bos_token is None


def test_bos_by_the_rule_of_splitting() -> None:
    """llama.cpp adds it for Llama 3's rule and Tekken's where a file says nothing."""
    for pre in SPLITTINGS:
        vocabulary = read_vocabulary(file_of(ranked(), pre=pre))
        llama3 = ("llama-bpe", "llama-v3", "llama3", "falcon3", "pixtral", "midm-2.0", "lfm2")
        assert vocabulary is not None
        assert vocabulary.add_bos == (pre in (*llama3, "tekken")), pre


def test_special_tokens_and_ends() -> None:
    file = file_of(scored(), padding_token_id=(1 << 32) - 1, eot_token_id=4, eom_token_id=-1)
    vocabulary, tokenizer = read_vocabulary(file), converted(file)
    assert vocabulary is not None
    # The end that is stated, the one that is stated as a turn's, and one known by its text.
    assert vocabulary.ends == [2, 3, 4]
    assert tokenizer.pad_token is None and tokenizer.unk_token == "<unk>"
    for number, token in enumerate(SPECIAL):
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [number]
        assert tokenizer.decode([number]).strip() == token.strip()
    assert tokenizer.decode([3, 4], skip_special_tokens=True) == "[user]"


def test_phi3_tokens_take_white_space_along() -> None:
    file = file_of(scored(), token_type=[*KINDS[:5], NORMAL, NORMAL, *scored()["token_type"][7:]])
    file.metadata["general.name"] = "Phi3 mini"
    assert converted(file)("</s> \n[user]\n a", add_special_tokens=False)["input_ids"][:2] == [2, 4]


def test_chat_template() -> None:
    file = file_of(scored())
    file.metadata["tokenizer.chat_template"] = CHAT_TEMPLATE
    file.metadata["tokenizer.chat_template.tool_use"] = "unused"
    messages = [{"role": "user", "content": "hi"}]
    assert converted(file).apply_chat_template(messages, tokenize=False) == "<user>hi</user>"
    for template, message in (("caf\udce9", "is not UTF-8 text"), (7, "should be a valid string")):
        file.metadata["tokenizer.chat_template"] = template
        with pytest.raises(SourceError, match=rf"'tokenizer\.chat_template' is .*{message}"):
            read_vocabulary(file)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_wrong_conversion_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a Gemma file's came out as single letters under some releases of the packages."""
    file = file_of(scored() if kind == "llama" else ranked())
    monkeypatch.setattr(conversion, "_bpe", functools.partial(_without_merges, conversion._bpe))
    with pytest.raises(SourceError, match=r"not converted rightly: piece \d+ of .* should be '.+'"):
        gguf_tokenizer(file, read_vocabulary(file))
    assert not list((conversion.cache_folder() / "tokenizers").glob("*"))


def _without_merges(build: Any, vocabulary: Any, merges: Any, **entries: Any) -> Any:
    return build(vocabulary, [], **entries)


def test_the_cache_holds_the_releases_of_the_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of(ranked())
    vocabulary = read_vocabulary(file)
    first = gguf_tokenizer(file, vocabulary)
    assert gguf_tokenizer(file, vocabulary) == first
    monkeypatch.setattr(conversion, "version", lambda package: "9.9.9")
    assert gguf_tokenizer(file, vocabulary) != first


DAMAGED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"tokens": []}, r"'tokenizer\.ggml\.tokens' is \[\]"),
    ("llama", {"tokens": None}, r"'tokenizer\.ggml\.tokens' is missing"),
    ("llama", {"tokens": "abc"}, r"'tokenizer\.ggml\.tokens' is 'abc'"),
    ("llama", {"tokens": ["a", 7]}, r"'tokenizer\.ggml\.tokens\.1' is 7"),
    ("llama", {"tokens": ["a", "b\udcff"]}, r"number 1 is not UTF-8 text"),
    ("llama", {"tokens": ["a", "b", "a"]}, r"the tokens 0 and 2 are both 'a'"),
    ("llama", {"scores": [1.0]}, r"has \d+ tokens and 1 values of scores"),
    ("llama", {"scores": None}, r"no scores"),
    ("llama", {"scores": [-1e3] * len(scored()["tokens"])}, r"all its pieces have one score"),
    ("llama", {"token_type": [1]}, r"1 values of token_type"),
    ("llama", {"token_type": "1"}, r"token_type' is '1'"),
    ("llama", {"bos_token_id": 10**6}, r"its bos token is number 1000000 of \d+"),
    ("llama", {"bos_token_id": -7}, r"bos_token_id' is -7"),
    ("llama", {"bos_token_id": "1"}, r"bos_token_id' is '1'"),
    ("llama", {"add_bos_token": 1}, r"add_bos_token' is 1"),
    ("llama", {"remove_extra_whitespaces": True}, r"remove_extra_whitespaces' is True, which may"),
    ("llama", {"of_next_year": True}, r"of_next_year' is True, which may change"),
    ("llama", {"model": "t5"}, r"of the kind 't5', which is not read"),
    ("llama", {"model": 7}, r"of the kind 7, which is not read"),
    ("gpt2", {"merges": None}, r"no list of merges"),
    ("gpt2", {"merges": ["ab"]}, r"merge 0 is 'ab' and should be two pieces"),
    ("gpt2", {"merges": ["a "]}, r"merge 0 is 'a '"),
    ("gpt2", {"pre": "gollum"}, r"the rule 'gollum', which is not supported"),
    ("gpt2", {"pre": 3}, r"tokenizer\.ggml\.pre' is 3"),
]


@pytest.mark.parametrize(("kind", "entries", "message"), DAMAGED)
def test_damaged_vocabularies(kind: str, entries: dict[str, Any], message: str) -> None:
    vocabulary = scored() if kind == "llama" else ranked()
    with pytest.raises(SourceError, match=message) as refusal:
        read_vocabulary(file_of(vocabulary, **entries))
    assert refusal.value.remedy


def test_vocabularies_that_cannot_encode() -> None:
    """Tokens that merging or unknown letters would need are missing."""
    entries = scored()
    kept = [n for n, token in enumerate(entries["tokens"]) if token != "<0x9F>"]
    less = {key: [entries[key][n] for n in kept] for key in ("tokens", "token_type", "scores")}
    file = file_of(entries, **less)
    with pytest.raises(SourceError, match=r"has no token '<0x9F>'|not converted rightly"):
        gguf_tokenizer(file, read_vocabulary(file))
    file = file_of(ranked(), merges=["Ġ notatoken"])
    with pytest.raises(SourceError, match=r"cannot be converted: .*notatoken"):
        gguf_tokenizer(file, read_vocabulary(file))


def test_no_vocabulary() -> None:
    assert read_vocabulary(GgufFile(Path("m.gguf"), {}, {}, "")) is None
    assert read_vocabulary(file_of({"model": "no_vocab"})) is None
