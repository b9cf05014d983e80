"""Text that passes learn from, as windows of tokens: a file's, or of the model's own making."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.code import import_model
from graphopt.errors import LoweringError, PassError
from graphopt.evaluate.perplexity import of_mean_loss
from graphopt.execute.function_run import CacheContents
from graphopt.execute.interpreter import Runner, resident
from graphopt.execute.language_model import ProgramModel, load_tokenizer
from graphopt.execute.likelihoods import ProgramLikelihoods
from graphopt.ir.dtypes import holds_aten, scoring_dtype
from graphopt.ir.graph import Program
from graphopt.ir.layer_config import decoder_config
from graphopt.ir.picture_inputs import drop_picture_inputs, take_picture_inputs
from graphopt.ir.picture_table import TABLE
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.sources.windows import Bos, TokenText
from graphopt.support.devices import free_bytes
from graphopt.support.per_device import PerDevice
from graphopt.support.progress import Progress, silent
from graphopt.support.ranks import here, sharing

PASSAGE, PROMPT = 512, 16
"""Tokens of a text that a model writes, and how many of them it is given."""

PASSAGES_AT_ONCE = 2048
"""Passages that are written side by side, at most: small models step through few as slowly."""

QUEUED_TOKENS = 16
"""Tokens of a passage after which a GPU is waited for: until then, deadlines do not see it."""

PERPLEXITY_WINDOWS = 2
"""Windows, the last ones, on which perplexity is followed; nothing is learnt from them."""

WRITTEN = PerDevice(cpu=(16, 256), gpu=(64, 2048))
"""Windows that a model writes where no text is given, and their tokens."""


def window_length(program: Program, seqlen: int | PerDevice[int], device: torch.device) -> int:
    """Return the tokens of a window: those asked for, or the default where the model takes them."""
    if not isinstance(seqlen, PerDevice):
        return seqlen
    usual = seqlen.on(device)
    return min(usual, ProgramModel(program).positions or usual)


def text_windows(program: Program, text: str, length: int, bos: Bos = "every") -> Tensor:
    """Return a text as int64 [windows, length] token ids; what is left over is dropped.

    Args:
        bos: Which windows begin with what the tokenizer puts before a text.

    Raises:
        PassError: The text has fewer than `length` tokens, or the model takes fewer.
        SourceError: The model has no tokenizer.
    """
    return _windows(program, _tokens(program, text, bos), length)


def calibration_windows(program: Program, context: Context, length: int) -> Tensor:
    """Return the calibration text of a compile as int64 [windows, length].

    The built-in text has a few hundred tokens. Where it is all there is, the model writes on
    behind beginnings from it. `context.begin` says afterwards what every window begins with.

    Args:
        program: The whole model; it writes for all passes, when the first of them asks.

    Raises:
        PassError: As for `text_windows` and `sample_windows`.
        SourceError: The model has no tokenizer.
    """
    if context.encoded is None:
        context.encoded = _tokens(program, context.text, context.bos)
    text = context.encoded
    context.begin = tuple(text.begin.tolist())
    if not context.built_in:
        return _windows(program, text, length)
    if context.written is None:
        count, tokens = WRITTEN.on(context.device)
        windows = sample_windows(
            program, text.windows(len(text)), count,
            min(tokens, ProgramModel(program).positions or tokens), begin=context.begin,
            device=context.device, seed=context.seed, progress=context.progress,
        )  # fmt: skip
        context.written = windows[:, len(context.begin) :].flatten()
    return _windows(program, TokenText(context.written, text.begin), length)


def _tokens(program: Program, text: str, bos: Bos) -> TokenText:
    return TokenText.of(load_tokenizer(ProgramModel(program)), text, bos)


def _windows(program: Program, text: TokenText, length: int) -> Tensor:
    model = ProgramModel(program)
    model.check_ids([*text.begin.tolist(), *text.ids.tolist()])
    positions = model.positions
    if positions is not None and length > positions:
        raise PassError(
            f"Windows of {length} tokens are longer than the {positions} that the model was made "
            "for.",
            f"Give seqlen={positions} or less.",
        )
    if text.room(length) < 1:
        raise PassError(
            f"Windows of {length} tokens have no room for text: the tokenizer puts "
            f"{len(text.begin)} before it.",
            f"Give seqlen={len(text.begin) + 1} or more.",
        )
    if not text.count(length):
        what, more = "text has", "a longer text with --calib"
        if TABLE in program.weights:
            what, more = "pictures and prompts have", "more pictures with --calib-images"
        raise PassError(
            f"The calibration {what} {len(text)} tokens, and a window takes {length}.",
            f"Give {more}, or seqlen={len(text)} or less.",
        )
    return text.windows(length)


def pick(windows: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` of the windows from random places, in order; all where there are fewer."""
    return pick_apart(windows, count, 0, seed)[0]


def pick_apart(windows: Tensor, count: int, more: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return what `pick` does, and up to `more` other windows, from random places too."""
    if count >= len(windows):
        return windows, windows[:0]
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(windows), generator=generator)
    first, others = places[:count], places[count : count + more]
    return windows[first.sort().values], windows[others.sort().values]


def sample_windows(
    program: Program,
    text: Tensor,
    count: int,
    length: int,
    *,
    begin: Sequence[int] = (),
    device: torch.device,
    seconds: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """Return windows of text that a model writes, each token drawn from its distribution.

    The text is passages of `PASSAGE` tokens, each begun with a few tokens from a random place of a
    given text; many passages are written at once, in bf16 where the device has it. Of several
    ranks the first writes, and all get the same text.

    Args:
        text: int64 [N, S], windows of text to begin with.
        count: How many windows to make.
        length: The number of tokens of a window.
        begin: n ids that each of the given windows begins with. So does each of the new ones, and
            each passage as it is written.
        seconds: Stop after about so many; there are fewer windows then, and passages may be
            shorter; those of which less was written than given are left out.

    Returns:
        int64 [count, length] on the CPU.

    Raises:
        PassError: The model can have no KV cache.
    """
    n = len(begin)
    passage = min(PASSAGE, length)
    prompt = min(PROMPT, (passage - n) // 2, text.shape[1] - n)
    if prompt < 1:
        raise PassError(
            f"Windows of {length} tokens are too short for a model to write text in.",
            f"Give seqlen={n + 2} or more.",
        )

    def write() -> Tensor:
        return _written(
            program, text, count * (length - n), passage, prompt, begin, device, seconds, seed,
            progress,
        )  # fmt: skip

    # One generator draws every token.
    written = here().made_by_first(write)
    return TokenText(written, torch.tensor(begin, dtype=torch.long)).windows(length)


def _written(
    program: Program,
    text: Tensor,
    wanted: int,
    passage: int,
    prompt: int,
    begin: Sequence[int],
    device: torch.device,
    seconds: float | None,
    seed: int,
    progress: Progress,
) -> Tensor:
    """Return what a model writes, int64 [wanted], fewer where the seconds are over.

    Args:
        passage, prompt: Tokens of a passage, and how many of them the text gives.
    """
    begun, n = time.perf_counter(), len(begin)
    least = n + 2 * prompt  # of a passage that is kept
    deadline = math.inf if seconds is None else begun + seconds
    first = torch.tensor(begin, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    writer = _writer(program, device, seed)
    most = writer.at_once(passage, n + prompt)
    passages: list[Tensor] = []
    done = 0
    while done < wanted and time.perf_counter() < deadline:
        part = min(most, -(-(wanted - done) // (passage - n)))
        rows = torch.randint(len(text), (part,), generator=generator)
        places = n + torch.randint(text.shape[1] - n - prompt + 1, (part,), generator=generator)
        prompts = text[rows[:, None], places[:, None] + torch.arange(prompt)]
        prompts = torch.cat([first.expand(part, n), prompts], 1)

        def tell(step: int, done: int = done, part: int = part) -> bool:
            now = time.perf_counter()
            text_share = (done + part * (step - n)) / wanted
            share = max(text_share, (now - begun) / max(deadline - begun, 1e-9))
            progress("writing text", int(min(share, 1.0) * 1000), 1000)
            return now < deadline

        made = writer.write(prompts, passage, tell)
        if made.shape[1] < least:
            break
        passages.append(made[:, n:].flatten())
        done += len(passages[-1])
    progress("writing text", 1000, 1000)
    return torch.cat([text.new_empty(0), *passages])[:wanted]


def _writer(program: Program, device: torch.device, seed: int) -> _Writer:
    tokens = None if program.vision is None else program.vision.tokens
    if not program.states:
        if tokens is not None:  # masks of pictures are laid out for texts without a past
            program = program.copy()
            drop_picture_inputs(program)
        result = make_pass("insert-kv-cache", {}).run(program.copy(), Context())
        if not result.program.states:
            reason = result.skipped[0].reason if result.skipped else "it has no attention"
            raise PassError(
                f"{program.name} cannot write calibration text of its own: {reason}.",
                "Give a text with --calib, and generated_windows=0 to fuse-blocks.",
            )
        program = result.program
        if tokens is not None:
            take_picture_inputs(program)
    dtype = scoring_dtype(program, device)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(False) and not holds_aten(program):
        dtype = torch.bfloat16
        if tokens is not None:  # the emitted model takes ids alone
            return _Interpreted(program, device, dtype, seed)
        with contextlib.suppress(LoweringError):
            fast = _Emitted(program, device, dtype, seed)
            if fast.decoder is not None:
                return fast
    return _Interpreted(program, device, dtype, seed)


class _Writer(ABC):
    """A model that writes on.

    Attributes:
        last_alone: Whether it computes the logits of a prompt's last token alone.
    """

    last_alone = False

    def __init__(
        self, program: Program, device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        self.program = resident(program, dtype, device)
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    @abstractmethod
    def start(self, prompts: Tensor, length: int) -> Tensor:
        """Begin texts that will have `length` tokens behind prompts [texts, P].

        Returns:
            The next token's logits, [texts, vocab].
        """

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Go on behind tokens [texts, 1]; return the next one's logits, [texts, vocab]."""

    def at_once(self, length: int, prompt: int) -> int:
        """Return how many texts to write at a time."""
        states = self.program.states.values()
        vocabulary = decoder_config(self.program.config).get("vocab_size", 0)
        cached = length * sum(state.heads * (state.k_dim + state.v_dim) for state in states)
        # Logits are there as the model makes them and as a decoder keeps them, and with noise.
        rows = 1 if self.last_alone else prompt
        need = (cached + 2 * rows * int(vocabulary)) * self.dtype.itemsize + 4 * int(vocabulary)
        return min(PASSAGES_AT_ONCE, max(1, free_bytes(self.device) // 3 // need))

    @torch.inference_mode()
    def write(self, prompts: Tensor, length: int, go_on: Callable[[int], bool]) -> Tensor:
        """Return int64 [texts, length] on the CPU, behind prompts [texts, P].

        Args:
            go_on: Called with the length of the texts so far; False ends them there.
        """
        prompts = prompts.to(self.device)
        parts, logits = [prompts], self.start(prompts, length)
        noise = torch.empty(logits.shape, dtype=torch.float32, device=self.device)
        for count in range(prompts.shape[1] + 1, length + 1):
            # The largest of logits with Gumbel noise is drawn as softmax says, in fewer passes over
            # the vocabulary than softmax and a draw take.
            noise.exponential_(generator=self.generator).log_()
            torch.sub(logits, noise, out=noise)
            parts.append(noise.argmax(-1, keepdim=True))
            if self.device.type == "cuda" and count % QUEUED_TOKENS == 0:
                torch.cuda.synchronize(self.device)
            if not go_on(count) or count == length:
                break
            logits = self.step(parts[-1])
        if bool(noise.amax().isnan()):
            raise PassError(
                f"{self.program.name} gives logits that are no numbers: it writes no text.",
                "Give a text with --calib, and generated_windows=0 to what trains.",
            )
        return torch.cat(parts, 1).cpu()


class _Interpreted(_Writer):
    """Runs the program op by op, anywhere."""

    def __init__(
        self, program: Program, device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        super().__init__(program, device, dtype, seed)
        self.runner = Runner(self.program, dtype, device)
        self.cache: CacheContents = {}
        self.ids = torch.empty(0, 0, dtype=torch.long, device=device)

    def start(self, prompts: Tensor, length: int) -> Tensor:
        self.cache, self.ids = self.runner.empty_cache(len(prompts)), prompts[:, :0]
        return self.step(prompts)

    def step(self, tokens: Tensor) -> Tensor:
        past, self.ids = self.ids.shape[1], torch.cat([self.ids, tokens], 1)
        values = self.runner.window_inputs(self.ids, past)
        logits: Tensor | None = None
        for _, (environment,) in self.runner.stream([values], [self.cache]):
            logits = environment.get(self.program.outputs[0])
        assert logits is not None
        return logits[:, -1]


class _Emitted(_Writer):
    """Runs the emitted model, whose recorded step has no launches to wait for.

    Without kernels of ours, which would be compiled for longer than most trainings let it write.
    """

    def __init__(
        self, program: Program, device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        from graphopt.lowering.kernels import plain_gpu
        from graphopt.lowering.torch import TorchEmitter

        super().__init__(program, device, dtype, seed)
        self.folder = tempfile.TemporaryDirectory(prefix="graphopt-")  # kernels are read from it
        root = Path(self.folder.name)
        given = self.program.copy()
        given.checkpoint_dtype = dtype  # which is what kernels are planned for
        given.tokenizer = None  # it writes ids
        TorchEmitter().emit(given, root, plain_gpu("bf16").name, silent)
        module = import_model(root / "model.py")
        self.decoder = getattr(module, "Decoder", None)
        self.last_alone = getattr(self.decoder, "last_alone", False)
        self.model = module.load(root, dtype=dtype, device=device)
        self.state: Any = None

    def start(self, prompts: Tensor, length: int) -> Tensor:
        assert self.decoder is not None
        if self.state is None or self.state.batch != len(prompts):
            self.state = None  # gives its memory back before the next one takes some
            self.state = self.decoder(self.model, length, len(prompts))
        self.state.start(prompts.tolist())
        logits: Tensor = self.state.logits
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        self.state.launch(tokens)
        logits: Tensor = self.state.logits
        return logits


def held_out_perplexity(
    program: Program, windows: Tensor, device: torch.device, dtype: torch.dtype, at_once: int = 1
) -> float:
    """Return the perplexity of windows of ids [N, S] under a program; infinite beyond e^700.

    Ranks share the windows, where each gets one.

    Args:
        at_once: Windows of a batch, at most.
    """
    likelihoods = ProgramLikelihoods(Runner(program, dtype, device, keep_weights=False))
    ranks = sharing(len(windows))
    found = ranks.gathered(likelihoods.of(ranks.part(windows), at_once=at_once))
    return of_mean_loss(-float(found.double().sum()) / max(likelihoods.count_predicted(windows), 1))


def forward_speed(
    program: Program, windows: Tensor, device: torch.device, dtype: torch.dtype
) -> float:
    """Return how many tokens a second a forward pass over a window takes in, the best of three."""
    runner = Runner(program, dtype, device, keep_weights=False)
    batch = {"input_ids": windows[:1].to(device)}
    times = []
    for _ in range(3):
        started = time.perf_counter()
        float(runner.logits(batch)[0, -1, 0])  # waits for a GPU
        times.append(time.perf_counter() - started)
    return windows.shape[1] / min(times)
