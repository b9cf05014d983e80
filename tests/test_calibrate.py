"""Calibration text: windows of a file, and what a model writes itself."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from trained import book, trained_program

from graphopt.calibration import text as calibrate
from graphopt.calibration import writer as writers
from graphopt.calibration.text import calibration_windows, sample_windows, text_windows
from graphopt.calibration.writer import EmittedWriter, InterpretedWriter, make_writer
from graphopt.errors import PassError
from graphopt.pass_manager.contract import Context
from graphopt.pass_manager.probe import PROBE_TEXT
from graphopt.passes.insert_kv_cache import InsertKVCache

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return trained_program(tmp_path_factory, layers=4)


def written(model, count, length, **options):
    text = text_windows(model, book()[:4000], 64)
    return text, sample_windows(model, text, count, length, device=CPU, **options)


@pytest.mark.slow
def test_the_text_is_pieces_that_begin_in_the_given_one(model, monkeypatch):
    monkeypatch.setattr(calibrate, "PASSAGE", 32)
    text, made = written(model, 3, 80)
    assert made.shape == (3, 80)
    joined = text.flatten().tolist()
    known = {tuple(joined[i : i + 16]) for i in range(len(joined) - 15)}
    flat = made.flatten().tolist()
    for start in range(0, 3 * 80 - 16, 32):
        assert tuple(flat[start : start + 16]) in known
    assert torch.equal(made, written(model, 3, 80)[1])
    assert not torch.equal(made, written(model, 3, 80, seed=1)[1])


@pytest.mark.slow
def test_tokens_come_as_often_as_the_model_says(model):
    cached = InsertKVCache().run(model.copy(), Context()).program
    writer = InterpretedWriter(cached, CPU, torch.float32, 0)
    prompts = text_windows(model, book()[:400], 16)[:1].expand(4000, 16)
    probabilities = torch.softmax(writer.start(prompts[:1], 17)[0], -1)
    drawn = writer.write(prompts, 17, lambda count: True)[:, 16]
    share = torch.bincount(drawn, minlength=len(probabilities)) / len(drawn)
    # Four standard deviations of a share of 4000 draws.
    assert bool(
        (
            (share - probabilities).abs()
            <= 4 * (probabilities * (1 - probabilities) / 4000).sqrt() + 1e-3
        ).all()
    )


@pytest.mark.filterwarnings("ignore:attention on a CPU")
def test_the_emitted_model_writes_what_the_interpreter_writes(model, monkeypatch):
    monkeypatch.setattr(writers, "takes_kernels", lambda *_: True)
    cached = InsertKVCache().run(model.copy(), Context()).program
    prompts = text_windows(model, book()[:400], 16)[:3]
    texts = [
        kind(cached, CPU, torch.float32, 0).write(prompts, 40, lambda count: True)
        for kind in (InterpretedWriter, EmittedWriter, partial(EmittedWriter, with_kernels=True))
    ]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
    # A second batch, of another size, in the same writer.
    writer = EmittedWriter(cached, CPU, torch.float32, 0)
    writer.write(prompts[:2], 20, lambda count: True)
    assert writer.write(prompts, 40, lambda count: True).shape == (3, 40)


@pytest.mark.parametrize(
    ("seconds", "with_kernels"), [(None, False), (12.0, False), (15.0, False), (16.0, True)]
)
def test_a_model_that_writes_for_long_compiles_kernels_first(
    seconds, with_kernels, model, monkeypatch
):
    def emitted(*_, with_kernels):
        return SimpleNamespace(decoder=with_kernels)

    monkeypatch.setattr(writers, "EmittedWriter", emitted)
    monkeypatch.setattr(writers, "InterpretedWriter", lambda *_: SimpleNamespace(decoder=None))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    made = make_writer(model, torch.device("cuda"), 0, seconds)
    assert made.decoder is with_kernels


@pytest.mark.parametrize(
    ("seconds", "tokens"), [(0.0, 0), (14.0, 0), (17.0, 32), (40.0, 55), (64.0, 79), (90.0, 80)]
)
def test_seconds_end_the_writing_where_it_is(model, seconds, tokens, monkeypatch):
    """Of a clock that tells of a second for each token, and of passages of 80 tokens, 16 given."""
    ticks = itertools.count()
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: float(next(ticks)))
    length, count = 80, 4
    _, made = written(model, count, length, seconds=seconds)
    # Passages of which less was written than given are none.
    assert len(made) == count * tokens // length


def test_a_model_whose_logits_are_no_numbers_writes_nothing(model, monkeypatch):
    step = InterpretedWriter.step
    monkeypatch.setattr(InterpretedWriter, "step", lambda *a: step(*a) * float("nan"))
    with pytest.raises(PassError, match="logits that are no numbers: it writes no text"):
        written(model, 1, 24)


def test_without_a_text_the_model_writes_one_for_all_passes(model):
    context = Context(PROBE_TEXT, built_in=True)
    first = calibration_windows(model, context, 32)
    assert first.shape[1] == 32 and first.numel() == context.written.numel()
    assert first.numel() == 16 * 128  # the model takes no more
    other = calibration_windows(model, context, 64)
    assert torch.equal(first.flatten(), other.flatten())


def test_a_text_that_was_given_is_taken_as_it_is(model):
    context = Context(book()[:640])
    assert torch.equal(
        calibration_windows(model, context, 64), text_windows(model, context.text, 64)
    )
    assert context.written is None
    with pytest.raises(PassError, match=r"has \d\d tokens, and a window takes 100"):
        calibration_windows(model, Context(book()[:80]), 100)
