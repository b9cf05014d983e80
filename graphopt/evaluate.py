"""Running a model in any of its forms, and measuring how good it is.

A language model is a source captured into a program, the `model.py` of a torch artifact or the
graph of an ONNX artifact; all three give logits through one interface, so that their quality is
measured by the same code.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from graphopt.errors import SourceError, UsageError, reason
from graphopt.execute.interpreter import complete_inputs
from graphopt.ir.context import context_length, rotary_parameters, stated_length
from graphopt.ir.graph import Program
from graphopt.sources.base import output_tokenizer, tokenizer_in
from graphopt.sources.check import CheckedRunner, check_finite
from graphopt.sources.confined import folder_inside
from graphopt.sources.generation import GenerationSettings, read_generation
from graphopt.sources.windows import Bos, TokenText, prompt_ids, special_ends, tokenizer_at
from graphopt.support.boundary import out_of_memory
from graphopt.support.inputs import OpenSchema, parse, parse_json, read_utf8
from graphopt.support.progress import Progress, silent
from graphopt.targets import get_target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Backend = Literal["auto", "program", "torch", "onnx"]

_CPU = torch.device("cpu")

ROWS_AT_ONCE = 256
"""Rows of logits whose log-softmax is in memory at once."""

_PROBED = 16
"""Tokens of a text by which is told whether a model sees both ways."""


class LanguageModel(ABC):
    """Something that maps token ids to logits, with or without a KV cache.

    Attributes:
        backend: How it runs: "program", "torch" or "onnx".
        name: Short name of the model.
        config: The Hugging Face config as a dict; {} where there is none.
        generation: How text is to be generated, as `Program.generation` has it.
        tokenizer: Folder with its tokenizer; None if there is none.
        length: How many tokens a text may have; None where that is what the config states.
    """

    backend: ClassVar[str]
    name: str
    config: dict[str, Any]
    generation: Mapping[str, Any] = {}
    tokenizer: Path | None
    length: int | None = None

    @abstractmethod
    def start(self, batch: int) -> Any:
        """Return an empty cache for `batch` sequences, in the model's own form."""

    def start_text(self, room: int) -> Any:
        """Return an empty cache for one text of at most `room` tokens.

        A step with it gives at least the logits of its last token; nothing is padded.
        """
        return self.start(1)

    @abstractmethod
    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        """Run the next tokens of every sequence.

        Args:
            inputs: `input_ids` [B, S], `attention_mask` [B, P + S], nonzero at real tokens, and
                `position_ids` [B, S], all int64.
            cache: From `start` or the step before, holding P tokens; it is used up.

        Returns:
            Logits [B, S, vocab] in fp32 on the CPU, and the cache with P + S tokens.
        """

    def check_ids(self, ids: Iterable[int]) -> None:
        """Refuse tokens that the model has no embedding for.

        Raises:
            SourceError: An id is beyond the vocabulary that the config states.
        """
        text = self.config.get("text_config")
        stated = (text if isinstance(text, dict) else self.config).get("vocab_size")
        largest = max(ids, default=0)
        if isinstance(stated, int) and largest >= stated:
            raise SourceError(
                f"The tokenizer of {self.name} gives the id {largest}, and the model knows "
                f"{stated} tokens.",
                "Put the tokenizer files that belong to the model into its folder.",
            )

    def check_causal(self, ids: Tensor) -> None:
        """Refuse a model whose tokens see those behind them: it is shown what it is to predict.

        Args:
            ids: int64 [S], at least two.

        Raises:
            SourceError: Another last token changes the logits of an earlier one.
        """
        pair = ids[:_PROBED].repeat(2, 1)
        pair[1, -1] = pair[0, 0] if pair[0, 0] != pair[0, -1] else (pair[0, -1] + 1) % 2
        one, other = self.logits(pair)[:, :-1]
        # A mixture's products differ by roundings of the dtype; what is seen shows beyond them.
        if float((one - other).abs().max()) > 0.05 * float(one.abs().max()):
            raise SourceError(
                f"{self.name} sees both ways: another last token changes what it says of earlier "
                "ones, so that likelihoods of a text say nothing.",
                'Where it is a decoder, its config lacks "is_decoder": true or its like.',
            )

    @property
    def positions(self) -> int | None:
        """How many tokens a text may have; None if nothing says it."""
        return self.length or stated_length(self.config)

    @property
    def settings(self) -> GenerationSettings:
        """What ends a text of the model, and how its tokens are drawn.

        Raises:
            SourceError: An entry of its config is of a wrong type or out of range.
        """
        return GenerationSettings.of(self.config, self.generation)

    @property
    def rotary_switch(self) -> int | None:
        """Tokens of the longest text with LongRoPE's short frequencies; None for other models."""
        lengths = [
            entries.get("original_max_position_embeddings")
            for entries in rotary_parameters(self.config, "longrope")
        ]
        return next((length for length in lengths if isinstance(length, int)), None)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits of whole sequences.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, S], nonzero at real tokens; all of them by default.

        Returns:
            fp32 [B, S, vocab].
        """
        inputs = {"input_ids": input_ids}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        return self.step(complete_inputs(inputs), self.start(input_ids.shape[0]))[0]


@dataclass
class _Replay:
    """What stands for a cache where the program has none: the tokens so far, run again."""

    input_ids: Tensor | None = None


class ProgramModel(LanguageModel):
    """A program, run by the ops' torch implementations in fp32.

    Args:
        program: What to run, with or without KV states.
        keep_weights: Hold every weight after its first use; otherwise each run reads them again
            and needs the memory of one layer.
        device: Where to run.
    """

    backend = "program"

    def __init__(
        self, program: Program, *, keep_weights: bool = True, device: torch.device = _CPU
    ) -> None:
        self.name = program.name
        self.config, self.generation = program.config, program.generation
        self.tokenizer = Path(program.tokenizer) if program.tokenizer else None
        self.length = context_length(program)
        self._device = device
        self._runner = CheckedRunner(program, device=device, keep_weights=keep_weights)

    def start(self, batch: int) -> Any:
        states = self._runner.program.states
        return self._runner.empty_cache(batch) if states else _Replay()

    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        inputs = {name: value.to(self._device) for name, value in inputs.items()}
        if not isinstance(cache, _Replay):
            outputs, cache = self._runner.run(inputs, cache)
            return outputs[0].float().cpu(), cache
        new = inputs["input_ids"]
        ids = new if cache.input_ids is None else torch.cat([cache.input_ids, new], 1)
        whole = complete_inputs({"input_ids": ids, "attention_mask": inputs["attention_mask"]})
        outputs, _ = self._runner.run(whole)
        return outputs[0][:, -new.shape[1] :].float().cpu(), _Replay(ids)


class TorchArtifactModel(LanguageModel):
    """The `model.py` of a torch artifact.

    The file is code, and so are those beside it for a GPU, so they are run only where they are,
    byte for byte, what graphopt writes for the program beside them. One for a GPU runs there in
    16 bits where there is one, and otherwise on the CPU in fp32.

    Args:
        root: Output folder of `graphopt compile --emit torch`.
        program: The program saved in it.
        trust_remote_code: Run the file even if it was changed.

    Raises:
        SourceError: The file differs from what graphopt writes, or cannot be loaded, or the
            weights beside it are others than the program's.
    """

    backend = "torch"

    def __init__(self, root: Path, program: Program, *, trust_remote_code: bool = False) -> None:
        from safetensors import SafetensorError

        from graphopt.emitted import checked_code, trusted_code
        from graphopt.storage.saved import artifact_target, check_weights_file

        target = artifact_target(root)
        path = root / "model.py"
        on_gpu = get_target(target).kind == "gpu" and torch.cuda.is_available()
        self._code = (
            trusted_code(root)
            if trust_remote_code
            else checked_code(root, program, target, images=on_gpu)
        )
        if not trust_remote_code:  # a changed file may read others
            check_weights_file(root, program)
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self.name = program.name
        self.config, self.generation = program.config, program.generation
        self.tokenizer = output_tokenizer(root, program)
        self.length = context_length(program)
        self._cached = bool(program.states)
        try:
            module = self._code.import_model()
            self._decoder = getattr(module, "Decoder", None)
            _check_weights(module, program)
            if on_gpu:
                self._model = module.load(root, device=self._device)
            else:
                self._model = module.load(root, dtype=torch.float32, device=self._device)
        except (
            OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError
        ) as error:  # fmt: skip
            raise SourceError(
                f"{path} cannot be loaded: {reason(error)}.",
                "Compile the model again.",
            ) from error

    def start(self, batch: int) -> Any:
        return self._model.empty_cache(batch) if self._cached else _Replay()

    def start_text(self, room: int) -> Any:
        if self._decoder is None:
            return self.start(1)
        # A decoder holds a token more than the prompt.
        return self._decoder(self._model, max(room, 2))

    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        if self._decoder is not None and isinstance(cache, self._decoder):
            (tokens,) = inputs["input_ids"].tolist()
            if cache.used:
                for token in tokens:
                    cache.step(token)
            else:
                cache.start(tokens)
            return cache.logits[:, None].float().cpu(), cache
        if not isinstance(cache, _Replay):
            return self._run(inputs, cache)
        new = inputs["input_ids"]
        ids = new if cache.input_ids is None else torch.cat([cache.input_ids, new], 1)
        whole = complete_inputs({"input_ids": ids, "attention_mask": inputs["attention_mask"]})
        logits, _ = self._run(whole, self._model.empty_cache(ids.shape[0]))
        return logits[:, -new.shape[1] :], _Replay(ids)

    def _run(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        mask = inputs["attention_mask"]
        # Kernels need no mask where nothing is padded.
        needed = self._device.type == "cpu" or not bool(mask.all())
        with torch.no_grad():
            logits, cache = self._model(
                inputs["input_ids"].to(self._device),
                mask.to(self._device) if needed else None,
                inputs["position_ids"].to(self._device),
                cache,
            )
        return logits.float().cpu(), cache


def _check_weights(module: ModuleType, program: Program) -> None:
    """Let the weights that a module loads be checked, each by its name, before they are used."""
    build = getattr(module, "Model", None)
    constants = {weight.name for weight in program.weights if weight.constant}

    def checked(*weights: Mapping[str, Tensor]) -> Any:
        for name, value in (item for given in weights for item in given.items()):
            check_finite(name, value.detach(), constant=name in constants)
        assert build is not None
        return build(*weights)

    if build is not None:
        module.Model = checked  # type: ignore[attr-defined]


class OnnxArtifactModel(LanguageModel):
    """The graph of an ONNX artifact, run by ONNX Runtime on the CPU.

    Args:
        folder: Folder with `model.onnx`, whose inputs are `input_ids`, and where it has them
            `attention_mask`, `position_ids` and `past_key_values.N.key` / `.value`, and whose
            outputs are `logits` and `present.N.key` / `.value`.
        name: Short name of the model.
        config: Its Hugging Face config.
        generation: How text is to be generated; by default what a generation_config.json in the
            folder says.
        tokenizer: Folder with its tokenizer; by default `folder` where it holds one.
        constants: Initializers that may hold infinity on purpose.
        length: How many tokens a text may have; None where that is what the config states.

    Raises:
        SourceError: ONNX Runtime cannot load the graph, its inputs are others, its data lies
            outside the folder, or a weight is not finite.
    """

    backend = "onnx"

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "",
        config: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        tokenizer: Path | None = None,
        constants: Collection[str] = (),
        length: int | None = None,
    ) -> None:
        import onnxruntime

        from graphopt.sources.onnx_file import check_onnx

        self.name = name or folder.resolve().name
        self.config = dict(config or {})
        self.generation = read_generation(folder) if generation is None else generation
        self.length = length
        self.tokenizer = tokenizer_in(folder) or tokenizer
        path = folder / "model.onnx"
        check_onnx(path, constants)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails is said by an exception, not by its log
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            # ONNX Runtime's exceptions share no base class of their own.
            raise SourceError(
                f"ONNX Runtime cannot load {path}: {reason(error)}.",
                "Compile the model again.",
            ) from error
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._pasts = [name for name in self._inputs if name.startswith("past_key_values.")]
        known = {"input_ids", "attention_mask", "position_ids", *self._pasts}
        presents = {name.replace("past_key_values.", "present.") for name in self._pasts}
        missing = ({"input_ids"} - set(self._inputs)) | (presents - set(self._outputs))
        odd = sorted((set(self._inputs) - known) | missing)
        if odd or "logits" not in self._outputs:
            raise SourceError(
                f"{path} is no language model as graphopt emits it: {(odd or ['logits'])[0]!r} is "
                "unexpected or missing.",
                "Compile the model again with --emit onnx.",
            )
        self._path = path
        self._check_logits(next(o for o in self._session.get_outputs() if o.name == "logits"))
        for name in self._pasts:
            self._check_cache(name)

    def _check_logits(self, value: Any) -> None:
        if value.type not in ("tensor(float)", "tensor(float16)", "tensor(double)"):
            raise SourceError(
                f"{self._path}: the output 'logits' is a {value.type}, and it should be a tensor "
                "of floats.",
                "Compile the model again with --emit onnx.",
            )

    def _check_cache(self, name: str) -> None:
        """Refuse a cache of other dimensions than [B, heads, P, head size], the middle ones known.

        Raises:
            SourceError: Naming the input.
        """
        value = self._inputs[name]
        sizes = value.shape[1::2]
        if (
            value.type != "tensor(float)"
            or len(value.shape) != 4
            or not all(isinstance(size, int) and 0 < size < 2**16 for size in sizes)
        ):
            raise SourceError(
                f"{self._path}: the input {name!r} is a {value.type} of shape {value.shape}, and a "
                "cache as graphopt emits it is a tensor(float) of [batch, heads, past, head size].",
                "Compile the model again with --emit onnx.",
            )

    def start(self, batch: int) -> Any:
        if not self._pasts:
            return _Replay()
        cache = {}
        for name in self._pasts:
            _, heads, _, width = self._inputs[name].shape
            cache[name] = torch.zeros(batch, heads, 0, width).numpy()
        return cache

    def step(self, inputs: Mapping[str, Tensor], cache: Any) -> tuple[Tensor, Any]:
        count = inputs["input_ids"].shape[1]
        replayed = isinstance(cache, _Replay)
        if replayed and cache.input_ids is not None:
            ids = torch.cat([cache.input_ids, inputs["input_ids"]], 1)
            mask = inputs["attention_mask"]
            inputs = complete_inputs({"input_ids": ids, "attention_mask": mask})
        feeds = {n: v.numpy() for n, v in inputs.items() if n in self._inputs}
        if not replayed:
            feeds.update(cache)
        results = dict(zip(self._outputs, self._run(feeds), strict=True))
        logits = torch.from_numpy(results["logits"]).float()
        rows, places = feeds["input_ids"].shape
        if logits.dim() != 3 or logits.shape[:2] != (rows, places):
            raise SourceError(
                f"{self._path} gives logits of shape {list(logits.shape)} for {rows} x {places} "
                "tokens.",
                "Compile the model again with --emit onnx.",
            )
        if replayed:
            return logits[:, -count:], _Replay(inputs["input_ids"])
        return logits, {
            name: results[name.replace("past_key_values.", "present.")] for name in self._pasts
        }

    def _run(self, feeds: Mapping[str, Any]) -> Sequence[Any]:
        """Return the outputs of the graph.

        Raises:
            SourceError: ONNX Runtime cannot run it: shapes of tensors inside do not agree, or it
                takes other inputs than it did when it was emitted.
        """
        try:
            results: Sequence[Any] = self._session.run(self._outputs, feeds)
        except Exception as error:
            if out_of_memory(error):
                raise
            raise SourceError(
                f"ONNX Runtime cannot run {self._path}: {reason(error)}.",
                "Compile the model again with --emit onnx.",
            ) from error
        return results


def open_language_model(
    spec: str,
    backend: Backend = "auto",
    *,
    trust_remote_code: bool = False,
    keep_weights: bool = True,
) -> LanguageModel:
    """Open a model or an artifact to run it.

    Args:
        spec: What `open_model` takes, an output folder of `graphopt compile`, or a folder with
            `model.onnx`.
        backend: "auto" runs an output folder's model.py where it has one, else its ONNX graph,
            else its program; everything else is captured and run as a program.
        trust_remote_code: Let code of a checkpoint, or a changed model.py, run.
        keep_weights: See `ProgramModel`.

    Raises:
        SourceError: There is no such model, or it cannot be read.
        CaptureError: The source cannot be captured.
        UsageError: The backend is not among what the folder holds.
    """
    root = Path(spec).expanduser()
    artifact = (root / "program.json").is_file()
    onnx_folder = (folder_inside(root, "onnx") or root / "onnx") if artifact else root
    has_torch = artifact and (root / "model.py").is_file()
    has_onnx = (onnx_folder / "model.onnx").is_file()
    if backend == "auto":
        backend = "torch" if has_torch else "onnx" if has_onnx else "program"
    for name, there in (("torch", has_torch), ("onnx", has_onnx)):
        if backend == name and not there:
            raise UsageError(
                f"{spec!r} holds no {name} artifact.",
                f"Compile one with `graphopt compile {spec} --emit {name} -o FOLDER`.",
            )
    if backend == "onnx" and not artifact:
        return OnnxArtifactModel(onnx_folder)
    from graphopt.capture import capture

    program = capture(spec, trust_remote_code=trust_remote_code)
    if backend == "torch":
        return TorchArtifactModel(root, program, trust_remote_code=trust_remote_code)
    if backend == "onnx":
        return OnnxArtifactModel(
            onnx_folder,
            name=program.name,
            config=program.config,
            generation=program.generation,
            tokenizer=output_tokenizer(root, program),
            constants=[weight.name for weight in program.weights if weight.constant],
            length=context_length(program),
        )
    return ProgramModel(program, keep_weights=keep_weights)


def load_tokenizer(model: LanguageModel) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model.

    Raises:
        SourceError: It has none, or the files cannot be read without running code.
    """
    return tokenizer_at(model.tokenizer, model.name)


def read_text(path: Path) -> str:
    """Return an evaluation text as papers prepare it: the lines of the file joined by blank lines.

    Raises:
        SourceError: The file cannot be read, is not UTF-8 or holds no text.
    """
    text = read_utf8(Path(path)).replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise SourceError(f"{path} is empty.", "Give a file with text in the model's language.")
    return "\n\n".join(text.removesuffix("\n").split("\n"))


@dataclass(frozen=True)
class PerplexityResult:
    """What `perplexity` measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        tokens: Tokens that were run: windows times seqlen.
        windows: How many windows.
        seqlen: Tokens of a window.
        seconds: Time it took, without opening the model.
        begin: Ids that every window begins with, which count among its tokens.
    """

    perplexity: float
    tokens: int
    windows: int
    seqlen: int
    seconds: float
    begin: tuple[int, ...] = ()


def token_log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of each target under softmax(logits), in fp32.

    Args:
        logits: [..., vocab].
        targets: int64 [...].

    Returns:
        fp32 [...]. Temporary memory is that of a few hundred rows.
    """
    rows, wanted = logits.flatten(0, -2), targets.flatten()
    parts = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE].float()
        index = wanted[start : start + ROWS_AT_ONCE, None]
        parts.append(part.gather(-1, index)[:, 0] - part.logsumexp(-1))
    return torch.cat(parts).view(targets.shape)


def window_perplexity(
    logits: Callable[[Tensor], Tensor],
    windows: Tensor,
    progress: Progress = silent,
    *,
    first: int = 1,
) -> float:
    """Return the perplexity of windows of ids, the first token of each not predicted.

    Args:
        logits: From int64 [1, S] to the next tokens' logits [1, S, vocab], on one device.
        windows: int64 [N, S], one at a time.
        first: Place of the first token that is predicted, at least 1.

    Returns:
        Infinity beyond e^700, where a broken model is sure of the wrong token.
    """
    total = 0.0
    progress("perplexity", 0, len(windows))
    for done, window in enumerate(windows.split(1), start=1):
        rows, targets = logits(window)[:, first - 1 : -1], window[:, first:]
        total -= float(token_log_likelihoods(rows, targets).double().sum())
        progress("perplexity", done, len(windows))
    mean = total / (len(windows) * (windows.shape[1] - first))
    return math.exp(mean) if mean < 700 else math.inf


def perplexity(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    windows: int | None = None,
    seqlen: int = 2048,
    bos: Bos = "every",
    progress: Progress = silent,
) -> PerplexityResult:
    """Measure perplexity over windows that do not overlap.

    The text is tokenised once, as a whole, and cut into windows of `seqlen` tokens, each of which
    begins with what the tokenizer puts before a text; a rest that fills no window is left out.
    Neither that beginning nor a window's first token is predicted. With `bos="first"` the
    procedure is that of compression papers (Frantar et al., GPTQ, arXiv 2210.17323, section 4),
    and the same for tokenizers that put nothing before a text.

    Args:
        text: See `read_text`.
        windows: How many at most, from the start of the text; None for all.
        seqlen: Tokens of a window, with its beginning.
        bos: Which windows begin with what the tokenizer puts before a text.

    Raises:
        SourceError: The text fills no window.
        UsageError: `windows` or `seqlen` is out of range for the model.
    """
    if windows is not None and windows < 1:
        raise UsageError(f"The number of windows must be at least 1, not {windows}.")
    if seqlen < 2:
        raise UsageError(f"The window length must be at least 2 tokens, not {seqlen}.")
    if model.positions is not None and seqlen > model.positions:
        raise UsageError(
            f"A window of {seqlen} tokens exceeds the {model.positions} that {model.name} takes.",
            f"Pass --seqlen {model.positions} or less.",
        )
    tokens = TokenText.of(tokenizer, text, bos)
    begin = tuple(tokens.begin.tolist())
    if seqlen <= len(begin):
        raise UsageError(
            f"A window of {seqlen} tokens has no room for text: the tokenizer puts {len(begin)} "
            "before it.",
            f"Pass --seqlen {len(begin) + 1} or more.",
        )
    count = tokens.count(seqlen)
    if count == 0:
        raise SourceError(
            f"The text is too short: its {len(tokens)} tokens fill no window of {seqlen}.",
            f"Give a longer text, or pass --seqlen {len(tokens)} or less."
            if len(tokens) > max(len(begin), 1)
            else "Give a longer text.",
        )
    count = count if windows is None else min(count, windows)
    model.check_ids([*begin, *tokens.ids.tolist()])
    rows = tokens.windows(seqlen)[:count]
    model.check_causal(rows[0])
    started = time.perf_counter()
    first = max(len(begin), 1)
    return PerplexityResult(
        perplexity=window_perplexity(model.logits, rows, progress, first=first),
        tokens=count * seqlen,
        windows=count,
        seqlen=seqlen,
        seconds=time.perf_counter() - started,
        begin=begin,
    )


@dataclass(frozen=True)
class PiqaRow:
    """One question: a goal, two solutions, and which of them (0 or 1) is right."""

    goal: str
    solutions: tuple[str, str]
    label: int


@dataclass(frozen=True)
class PiqaResult:
    """What `piqa_accuracy` measured: the share answered rightly, over how many, in what time."""

    accuracy: float
    rows: int
    seconds: float


class _PiqaLine(OpenSchema):
    """One line of a PIQA file; some copies write the label as text."""

    goal: str
    sol1: Annotated[str, pydantic.Field(min_length=1)]
    sol2: Annotated[str, pydantic.Field(min_length=1)]
    label: Literal[0, 1, "0", "1"]


def read_piqa(path: Path) -> list[PiqaRow]:
    """Read PIQA questions: JSON lines with `goal`, `sol1`, `sol2` and `label` (0 means sol1).

    Raises:
        SourceError: The file cannot be read or is empty, or a line is malformed; with its number.
    """
    remedy = 'Each line is {"goal": ..., "sol1": ..., "sol2": ..., "label": 0 or 1}.'
    rows = []
    for number, line in enumerate(read_utf8(Path(path)).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse(
            _PiqaLine, parse_json(line.encode(), where, remedy=remedy), where, remedy=remedy
        )
        rows.append(PiqaRow(row.goal, (row.sol1, row.sol2), int(row.label)))
    if not rows:
        raise SourceError(f"{path} is empty.", "Give a file with one question a line.")
    return rows


def piqa_accuracy(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PiqaRow],
    *,
    batch: int = 8,
    progress: Progress = silent,
) -> PiqaResult:
    """Measure how often the right solution is the likelier one, per character.

    The prompt is "Question: {goal}\\nAnswer: {solution}". A solution's score is the log-probability
    of its tokens after the prompt, divided by its length in characters (`acc_norm` of the
    lm-evaluation-harness).

    Args:
        rows: See `read_piqa`.
        batch: Sequences that run at once; they are padded on the right, which changes no result.

    Raises:
        UsageError: There are no rows, or `batch` is not positive.
    """
    if not rows or batch < 1:
        raise UsageError("PIQA needs at least one question and a batch of at least one.")
    started = time.perf_counter()
    ends = special_ends(tokenizer)
    sequences: list[list[int]] = []
    starts: list[int] = []
    for row in rows:
        prompt = f"Question: {row.goal}\nAnswer:"
        answer_at = len(prompt_ids(tokenizer, prompt, ends))
        for solution in row.solutions:
            sequences.append(prompt_ids(tokenizer, f"{prompt} {solution}", ends))
            starts.append(min(answer_at, len(sequences[-1]) - 1))
    model.check_ids(token for ids in sequences for token in ids)
    model.check_causal(torch.tensor(sequences[0]))
    if model.positions is not None:
        # What is too long loses the beginning of its text.
        n = len(ends[0])
        surplus = [max(len(ids) - model.positions, 0) for ids in sequences]
        sequences = [ids[:n] + ids[n + cut :] for ids, cut in zip(sequences, surplus, strict=True)]
        starts = [max(start - cut, n, 1) for start, cut in zip(starts, surplus, strict=True)]
    scores = [0.0] * len(sequences)
    # Sequences of like length share a batch, so that little of it is padding.
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    progress("piqa", 0, len(order))
    for first in range(0, len(order), batch):
        members = order[first : first + batch]
        length = max(len(sequences[index]) for index in members)
        ids = torch.zeros(len(members), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, index in enumerate(members):
            own = sequences[index]
            ids[place, : len(own)], mask[place, : len(own)] = torch.tensor(own), 1
        likelihoods = token_log_likelihoods(model.logits(ids, mask)[:, :-1], ids[:, 1:])
        for place, index in enumerate(members):
            answer = likelihoods[place, starts[index] - 1 : len(sequences[index]) - 1]
            solution = rows[index // 2].solutions[index % 2]
            scores[index] = float(answer.double().sum()) / len(solution)
        progress("piqa", min(first + batch, len(order)), len(order))
    right = sum(
        int(scores[2 * number + 1] > scores[2 * number]) == row.label
        for number, row in enumerate(rows)
    )
    return PiqaResult(right / len(rows), len(rows), time.perf_counter() - started)
