"""What writes a model's own text: the model, a token of many passages at a time."""

from __future__ import annotations

import contextlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.code import import_model
from graphopt.errors import LoweringError, PassError
from graphopt.execute.draw import Draw
from graphopt.execute.function_run import CacheContents
from graphopt.execute.interpreter import Runner, resident
from graphopt.execute.takes_kernels import takes_kernels
from graphopt.ir.dtypes import holds_aten, scoring_dtype
from graphopt.ir.graph import Program
from graphopt.ir.layer_config import decoder_config
from graphopt.ir.picture_inputs import drop_picture_inputs, take_picture_inputs
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.support.devices import free_bytes
from graphopt.support.progress import silent

PASSAGES_AT_ONCE = 2048
"""Passages that are written side by side, at most: small models step through few as slowly."""

QUEUED_TOKENS = 16
"""Tokens of a passage after which a GPU is waited for: until then, deadlines do not see it."""

KERNELS_PAY = 16.0
"""Seconds of writing from which on kernels are worth the time to compile them: 5 s for SmolLM2 and
7 s for Gemma 3, whose steps then take less than half as long."""


def make_writer(
    program: Program, device: torch.device, seed: int, seconds: float | None = None
) -> Writer:
    """Return what writes a program's text: the emitted model on a GPU, else the interpreter.

    Args:
        seconds: How long it is to write; None where its tokens are counted instead.

    Raises:
        PassError: The model can have no KV cache.
    """
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
            return InterpretedWriter(program, device, dtype, seed)
        pays = seconds is not None and seconds >= KERNELS_PAY
        with contextlib.suppress(LoweringError):
            fast = EmittedWriter(program, device, dtype, seed, with_kernels=pays)
            if fast.decoder is not None:
                return fast
    return InterpretedWriter(program, device, dtype, seed)


class Writer(ABC):
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
        self.draw = Draw(device, seed)

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
        for count in range(prompts.shape[1] + 1, length + 1):
            tokens, scores = self.draw(logits)
            parts.append(tokens)
            if self.device.type == "cuda" and count % QUEUED_TOKENS == 0:
                torch.cuda.synchronize(self.device)
            if not go_on(count) or count == length:
                break
            logits = self.step(tokens)
        if bool(scores.isnan().any()):
            raise PassError(
                f"{self.program.name} gives logits that are no numbers: it writes no text.",
                "Give a text with --calib, and generated_windows=0 to what trains.",
            )
        return torch.cat(parts, 1).cpu()


class InterpretedWriter(Writer):
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


class EmittedWriter(Writer):
    """Runs the emitted model, whose recorded step has no launches to wait for.

    Args:
        with_kernels: Whether it has Triton's, where they run: they are compiled first.
    """

    def __init__(
        self,
        program: Program,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        *,
        with_kernels: bool = False,
    ) -> None:
        from graphopt.lowering.kernels import plain_gpu, portable_gpu
        from graphopt.lowering.torch import TorchEmitter

        super().__init__(program, device, dtype, seed)
        self.folder = tempfile.TemporaryDirectory(prefix="graphopt-")  # kernels are read from it
        root = Path(self.folder.name)
        given = self.program.copy()
        given.checkpoint_dtype = dtype  # which is what kernels are planned for
        given.tokenizer = None  # it writes ids
        with_kernels &= takes_kernels(torch.empty(0, dtype=dtype, device=device))
        target = portable_gpu() if with_kernels else plain_gpu("bf16")
        TorchEmitter().emit(given, root, target.name, silent)
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
