"""Windows of text: what begins each, for tokenizers that say it in different ways."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import tiny_program
from tiny_models import VOCAB, byte_tokenizer, save_tiny
from torch import Tensor
from trained import book
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer

import graphopt as go
from graphopt.calibration.text import calibration_windows, sample_windows, text_windows
from graphopt.errors import PassError, SourceError, UsageError
from graphopt.evaluate.perplexity import perplexity
from graphopt.evaluate.piqa import PiqaRow, piqa_accuracy
from graphopt.execute.language_model import LanguageModel
from graphopt.pass_manager.contract import Context
from graphopt.pass_manager.probe import PROBE_TEXT
from graphopt.pass_manager.verification import make_probe
from graphopt.sources.tokenizer import PROBE, read_tokenizer
from graphopt.sources.windows import TokenText, check_bos, prompt_ids, special_ends
from graphopt.support.per_device import PerDevice

START, SECOND, LAST = 259, 260, 261
SPM = ["<unk>", "<s>", "</s>", "▁", "t", "h", "e", "▁t", "▁th", "▁the"]


def llama(bos: bool, eos: bool) -> LlamaTokenizer:
    """A SentencePiece-like tokenizer, which makes its post-processor of two flags."""
    return LlamaTokenizer(
        vocab={token: index for index, token in enumerate(SPM)},
        merges=[("▁", "t"), ("▁t", "h"), ("▁th", "e")],
        add_bos_token=bos,
        add_eos_token=eos,
    )


def gpt2(bos: bool) -> GPT2Tokenizer:
    vocabulary = {"t": 0, "h": 1, "e": 2, "Ġ": 3, "<|endoftext|>": 4}
    return GPT2Tokenizer(vocab=vocabulary, merges=[], add_bos_token=bos)


class NoSpecials:
    """A tokenizer that cuts a text otherwise once special tokens stand beside it."""

    name_or_path = "here"
    all_special_ids = (7, 8)

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        return {"input_ids": [7, 1, 2, 8] if add_special_tokens else [3, 1, 2]}


@pytest.mark.parametrize(
    ("tokenizer", "ends"),
    [
        (byte_tokenizer, ([], [])),
        (lambda: byte_tokenizer(begin=["<s>"]), ([START], [])),
        (lambda: byte_tokenizer(begin=["<a>", "<b>"], end=["<c>"]), ([START, SECOND], [LAST])),
        (lambda: byte_tokenizer(end=["<c>"]), ([], [START])),
        (lambda: llama(True, False), ([1], [])),
        (lambda: llama(True, True), ([1], [2])),
        (lambda: llama(False, True), ([], [2])),
        (lambda: llama(False, False), ([], [])),
        (lambda: gpt2(True), ([4], [])),
        (lambda: gpt2(False), ([], [])),
        (NoSpecials, ([7], [8])),
    ],
)
def test_a_tokenizer_is_asked_what_it_puts_around_a_text(
    tokenizer: Callable[[], Any], ends: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    made = tokenizer()
    assert special_ends(made) == ends
    if not isinstance(made, NoSpecials):
        made.save_pretrained(tmp_path)
        assert special_ends(AutoTokenizer.from_pretrained(tmp_path)) == ends
        begin, end = ends
        assert begin + prompt_ids(made, "the")[len(begin) :] + end == made("the")["input_ids"]


@given(
    ids=st.lists(st.integers(0, 9), max_size=60),
    begin=st.lists(st.integers(20, 29), max_size=3),
    length=st.integers(1, 12),
)
def test_windows_are_a_beginning_and_the_next_tokens(
    ids: list[int], begin: list[int], length: int
) -> None:
    text = TokenText(torch.tensor(ids, dtype=torch.long), torch.tensor(begin, dtype=torch.long))
    windows = text.windows(length)
    room = length - len(begin)
    if room < 1:
        assert len(windows) == text.count(length) == 0
        return
    assert windows.shape == (len(ids) // room, length)
    assert all(row[: len(begin)] == begin for row in windows.tolist())
    flat = [token for row in windows.tolist() for token in row[len(begin) :]]
    assert flat == ids[: len(flat)]
    assert len(ids) - len(flat) < room
    # The longest window that can be cut holds everything.
    assert not ids or text.count(len(text)) == 1


def test_the_papers_way_cuts_one_tokenisation() -> None:
    tokenizer = byte_tokenizer(begin=["<s>"])
    text = TokenText.of(tokenizer, "the quick brown fox", "first")
    assert text.ids.tolist() == tokenizer("the quick brown fox")["input_ids"]
    assert text.ids[0] == START and len(text.begin) == 0
    # A tokenizer that adds nothing gives the same either way.
    plain = byte_tokenizer()
    for length in (3, 7):
        every, first = (TokenText.of(plain, PROBE_TEXT, bos) for bos in ("every", "first"))  # type: ignore[arg-type]
        assert torch.equal(every.windows(length), first.windows(length))


class Recorder(LanguageModel):
    """Logits that depend on the current token alone; it keeps what it was given."""

    backend = "program"

    def __init__(self, positions: int | None = None) -> None:
        self.name, self.tokenizer = "recorder", None
        self.config = {"n_positions": positions} if positions else {}
        self.table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        self.seen: list[list[int]] = []

    def start(self, batch: int) -> Any:
        return None

    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            self.seen.append(ids[mask.bool()].tolist())
        return self.table[inputs["input_ids"]], None

    def check_causal(self, ids: Tensor) -> None:
        """Its logits are causal, and what shows that is no text to keep."""


@pytest.mark.parametrize("begin", [(), ("<s>",), ("<a>", "<b>")])
@pytest.mark.parametrize("end", [(), ("<c>",)])
def test_perplexity_scores_the_text_of_windows_that_all_begin_alike(
    begin: tuple[str, ...], end: tuple[str, ...]
) -> None:
    model, tokenizer = Recorder(), byte_tokenizer(begin=begin, end=end)
    result = perplexity(model, tokenizer, PROBE_TEXT, windows=3, seqlen=20)
    plain = byte_tokenizer()(PROBE_TEXT)["input_ids"]
    before, room = [START, SECOND][: len(begin)], 20 - len(begin)
    windows = [before + plain[place * room : (place + 1) * room] for place in range(3)]
    assert model.seen == windows
    assert (result.tokens, result.windows, result.begin) == (60, 3, tuple(before))
    logs = model.table.double().log_softmax(-1)
    scored = [
        -float(logs[window[place - 1], window[place]])
        for window in windows
        for place in range(max(len(begin), 1), 20)
    ]
    assert math.log(result.perplexity) == pytest.approx(sum(scored) / len(scored), abs=1e-6)


def test_perplexity_in_the_papers_way() -> None:
    model, tokenizer = Recorder(), byte_tokenizer(begin=["<s>"])
    result = perplexity(model, tokenizer, PROBE_TEXT, windows=2, seqlen=20, bos="first")
    ids = tokenizer(PROBE_TEXT)["input_ids"]
    assert model.seen == [ids[:20], ids[20:40]] and result.begin == ()


def test_windows_without_room_for_text_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(begin=["<a>", "<b>"])
    with pytest.raises(UsageError, match=r"no room for text: .* puts 2 .*--seqlen 3"):
        perplexity(Recorder(), tokenizer, PROBE_TEXT, seqlen=2)
    program = tiny_program(vocab=VOCAB)
    tokenizer.save_pretrained(tmp_path)
    program.tokenizer = str(tmp_path)
    with pytest.raises(PassError, match=r"no room for text: .* puts 2 .*seqlen=3"):
        text_windows(program, PROBE_TEXT, 2)
    with pytest.raises(UsageError, match=r"Unknown way to begin windows 'all'.*every, first"):
        check_bos("all")


def test_questions_keep_their_beginning_however_long_they_are() -> None:
    model, tokenizer = Recorder(positions=24), byte_tokenizer(begin=["<s>"], end=["<c>"])
    rows = [PiqaRow("boil water", ("freeze it", "heat it for a rather long while"), 1)]
    piqa_accuracy(model, tokenizer, rows)
    plain = byte_tokenizer()
    for ids, solution in zip(model.seen, rows[0].solutions, strict=True):
        whole = plain(f"Question: boil water\nAnswer: {solution}")["input_ids"]
        assert ids == [START, *whole[-23:]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> go.Program:
    folder = save_tiny(tmp_path_factory.mktemp("models") / "tiny")
    byte_tokenizer(begin=["<s>"]).save_pretrained(folder)
    return go.capture(str(folder))


@pytest.mark.slow
def test_calibration_text_begins_every_window(model: go.Program) -> None:
    text = book()[:900]
    plain = torch.tensor(byte_tokenizer()(text)["input_ids"])
    context = Context(text)
    windows = calibration_windows(model, context, 32)
    assert context.begin == (START,) and (windows[:, 0] == START).all()
    assert torch.equal(windows[:, 1:].flatten(), plain[: len(windows) * 31])
    papers = Context(text, bos="first")
    windows = calibration_windows(model, papers, 32)
    assert papers.begin == () and (windows == START).sum() == 1
    assert torch.equal(windows.flatten()[1:], plain[: windows.numel() - 1])


def test_text_of_the_models_own_begins_every_window_and_every_piece(
    model: go.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.calibration import text as calibrate
    from graphopt.calibration.writer import InterpretedWriter

    given: list[Tensor] = []
    write = InterpretedWriter.write

    def watched(self: Any, prompts: Tensor, *rest: Any) -> Tensor:
        given.append(prompts)
        return write(self, prompts, *rest)

    monkeypatch.setattr(InterpretedWriter, "write", watched)
    monkeypatch.setattr(calibrate, "PASSAGE", 24)
    text = text_windows(model, book()[:2000], 64)
    made = sample_windows(model, text, 3, 40, begin=(START,), device=torch.device("cpu"))
    assert made.shape == (3, 40) and (made[:, 0] == START).all()
    (prompts,) = given
    # 3 windows of 39 tokens of text in pieces of 23.
    assert len(prompts) == -(-3 * 39 // 23) and (prompts[:, 0] == START).all()
    known = {tuple(row[i : i + 11]) for row in text[:, 1:].tolist() for i in range(53)}
    assert all(tuple(row[1:]) in known for row in prompts.tolist())

    monkeypatch.setattr(calibrate, "WRITTEN", PerDevice((2, 48), (2, 48)))
    context = Context(PROBE_TEXT, built_in=True)
    windows = calibration_windows(model, context, 20)
    assert context.written is not None and len(context.written) == 2 * 47
    assert torch.equal(windows[:, 1:].flatten(), context.written[: windows.numel() * 19 // 20])
    assert (windows[:, 0] == START).all()


@pytest.mark.parametrize("bos", ["every", "first"])
def test_every_text_of_the_probe_begins_so(bos: Any, tmp_path: Path) -> None:
    byte_tokenizer(begin=["<s>"]).save_pretrained(tmp_path)
    probe = make_probe(tiny_program(vocab=VOCAB), PROBE_TEXT, tmp_path, bos=bos)
    assert probe.is_text and probe.begin == ((START,) if bos == "every" else ())
    texts = [
        ids[mask.bool()].tolist()
        for batch in probe.batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert [len(text) for text in texts] == [56, 47, 7, 1]
    plain = byte_tokenizer()(PROBE_TEXT)["input_ids"]
    if bos == "every":
        assert all(text[0] == START for text in texts)
        assert [token for text in texts for token in text[1:]] == plain[: 111 - 4]
    else:
        assert [token for text in texts for token in text] == [START, *plain[:110]]


@pytest.mark.parametrize("bos", ["every", "first"])
def test_the_report_says_how_windows_begin(bos: Any, model: go.Program, tmp_path: Path) -> None:
    calib = tmp_path / "book.txt"
    calib.write_text(book()[:6000])
    recipe = go.Pipeline.parse("prune-blocks{blocks=1,seqlen=32,windows=2}")
    _, report = recipe.run(model, go.RunOptions(calib=calib, bos=bos))
    expected = {"bos": bos, "begin": [START] if bos == "every" else []}
    assert report.windows == expected
    assert json.loads(json.dumps(report.to_json()))["windows"] == expected
    _, silent = go.Pipeline.parse("canonicalise").run(model, go.RunOptions(verify=False))
    assert silent.windows is None


@pytest.mark.parametrize(
    "model",
    [
        {"type": "Unigram", "unk_id": None, "byte_fallback": False},
        {"type": "WordLevel", "unk_token": "[UNK]"},
    ],
)
def test_a_vocabulary_that_lacks_letters_of_a_text(model: dict[str, Any], tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    known = sorted({*PROBE, *"The harbour was quiet.", "▁"})
    units = {letter: number for number, letter in enumerate(known)}
    vocabulary: Any = [[letter, -1.0] for letter in known]
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text()) | {
        "model": model | {"vocab": vocabulary if model["type"] == "Unigram" else units},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "[\\s\\S]"},
            "behavior": "Isolated", "invert": False,
        },
        "decoder": None,
        "added_tokens": [],
    }  # fmt: skip
    path.write_text(json.dumps(saved))
    tokenizer = read_tokenizer(tmp_path)
    assert len(prompt_ids(tokenizer, "The quiet")) == 9
    for run in (TokenText.of, prompt_ids):
        with pytest.raises(SourceError, match=r"The tokenizer in .* cannot encode 'zz': .+\. Put"):
            run(tokenizer, "zz")
