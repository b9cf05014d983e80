"""Train tiny models of six families from random weights, for what is measured on many models.

    python tools/train_models.py TEXT... --out FOLDER [--test FILE] [--device cuda]
                                 [--seconds 150] [--steps 6000]
                                 [--own-text 8 --writer FOLDER [--own-seconds 80]]

The first text is the one that the models are for: its last tenth is held out, and the state with
the lowest loss there is kept. With `--own-text` a checkpoint of transformers (a folder with
config.json, model.safetensors and the files of its tokenizer) first continues beginnings out of
that text, as many megabytes as are asked for; the result stands in FOLDER as own_text.txt, and the
models learn from it as well. `--test` is measured at the end and learnt from by nobody.

Each model is a folder that stock transformers loads: config, weights in bf16 and a tokenizer of its
own. All are trained at once, a process each. FOLDER/training.json says how, and what came of it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import keep

from graphopt.evaluate.perplexity import read_text
from graphopt.execute.likelihoods import token_log_likelihoods
from graphopt.sources.windows import TokenText

LENGTH = 256
"""Tokens of a window, in training and in measurements: what the models take at most."""

VOCABULARY = 768
WIDTH = 96
RATE = 4e-3
WARM_UP = 0.03
CHECKS = 40
"""Measurements on the held-out text, in equal distances."""

PASSAGE, BEGINNING = 320, 24
"""Tokens of a passage that the writer continues, and how many of them it is given."""

TEMPERATURE, NUCLEUS, CANDIDATES = 0.9, 0.95, 256
"""How the writer draws: the nucleus is looked for among so many most likely tokens."""


@dataclass(frozen=True)
class Family:
    """One of the models.

    Attributes:
        config: Its class, and the entries that differ from the family's own.
        special: Special tokens, from id 0 on.
        begin: Which of them stands before every text; None where the family puts nothing there.
        end, padding: Which of them end a text and fill a row.
    """

    config: type[PreTrainedConfig]
    entries: dict[str, Any]
    special: tuple[str, ...]
    begin: str | None
    end: str
    padding: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    """Entries of the config while the model is trained."""

    def make_config(self) -> PreTrainedConfig:
        """Return the config of the model, with the ids of its tokenizer."""

        def number(token: str | None) -> int | None:
            return None if token is None else self.special.index(token)

        return self.config(
            vocab_size=VOCABULARY, hidden_size=WIDTH, max_position_embeddings=LENGTH,
            bos_token_id=number(self.begin), eos_token_id=number(self.end),
            pad_token_id=number(self.padding), **self.entries,
        )  # fmt: skip


SENTENCEPIECE = ("<unk>", "<s>", "</s>")
FAMILIES = {
    "llama": Family(
        LlamaConfig,
        {
            "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2,
            "intermediate_size": 192, "tie_word_embeddings": True, "initializer_range": 0.05,
        },
        SENTENCEPIECE, "<s>", "</s>",
    ),
    # Heads wider than their share, norms in front of and behind every part, scaled embeddings.
    "gemma3": Family(
        Gemma3TextConfig,
        {
            "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 1,
            "head_dim": 32, "query_pre_attn_scalar": 32, "intermediate_size": 176,
            "sliding_window": 64, "initializer_range": 0.05,
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
        },
        ("<pad>", "<eos>", "<bos>", "<unk>"), "<bos>", "<eos>", "<pad>",
    ),
    "qwen3": Family(
        Qwen3Config,
        {
            "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 3,
            "head_dim": 16, "intermediate_size": 192, "tie_word_embeddings": True,
            "initializer_range": 0.05,
        },
        ("<|endoftext|>",), None, "<|endoftext|>", "<|endoftext|>",
    ),
    "gpt_neox": Family(
        GPTNeoXConfig,
        {
            "num_hidden_layers": 7, "num_attention_heads": 6, "intermediate_size": 256,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
            },
            "initializer_range": 0.05,
        },
        ("<|endoftext|>",), None, "<|endoftext|>",
    ),
    "opt": Family(
        OPTConfig,
        {
            "num_hidden_layers": 8, "num_attention_heads": 6, "ffn_dim": 256, "init_std": 0.05,
        },
        ("<s>", "<pad>", "</s>", "<unk>"), "</s>", "</s>", "<pad>",
    ),
    "mixtral": Family(
        MixtralConfig,
        {
            "num_hidden_layers": 7, "num_attention_heads": 6, "num_key_value_heads": 2,
            "intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.01, "initializer_range": 0.05,
        },
        SENTENCEPIECE, "<s>", "</s>",
        training={"output_router_logits": True},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What all models are trained with.

    Attributes:
        texts: Files; a tenth of the first one is held out.
        seconds: Of the training of a model; the learning rate falls over them, or over the steps.
        rows: Windows of a step.
    """

    texts: tuple[Path, ...]
    test: Path | None
    out: Path
    device: str
    seconds: float
    steps: int
    rows: int
    seed: int


def split(text: str) -> tuple[str, str]:
    """Return a text's first nine tenths, and its last one, which is held out."""
    place = text.rindex("\n", 0, len(text) * 9 // 10)
    return text[:place], text[place:]


def make_tokenizer(family: Family, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer made from texts, with the special tokens of a family."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(family.special), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator((text[:2_000_000] for text in texts), trainer)
    if family.begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[family.begin, "$A"],
            special_tokens=[(family.begin, tokenizer.token_to_id(family.begin))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=family.begin, eos_token=family.end,
        pad_token=family.padding, unk_token="<unk>" if "<unk>" in family.special else None,
        model_max_length=LENGTH, clean_up_tokenization_spaces=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Windows:
    """Random windows of several texts.

    Attributes:
        texts: int64 [T], one each, on the device.
        shares: How many of the windows of a step are of each.
        begin: int64 [n], what every window begins with.
    """

    texts: list[Tensor]
    shares: list[int]
    begin: Tensor

    @classmethod
    def of(cls, texts: Sequence[TokenText], rows: int, device: torch.device) -> Windows:
        """Share the windows out by the roots of lengths: a short text is not drowned by a long one,
        nor learnt by heart."""
        roots = [math.sqrt(len(text)) for text in texts]
        shares = [max(1, round(rows * root / sum(roots))) for root in roots[1:]]
        return cls(
            [text.ids.to(device) for text in texts],
            [rows - sum(shares), *shares],
            texts[0].begin.to(device),
        )

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return windows, int64 [rows, LENGTH]."""
        room = LENGTH - len(self.begin)
        parts = []
        for ids, count in zip(self.texts, self.shares, strict=True):
            starts = torch.randint(
                len(ids) - room + 1, (count, 1), generator=generator, device=ids.device
            )
            rows = ids[starts + torch.arange(room, device=ids.device)]
            parts.append(torch.cat([self.begin.expand(count, len(self.begin)), rows], 1))
        return torch.cat(parts)


def dense_experts(experts: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return what computes experts of a mixture with every token in every expert.

    Tiny experts are too little work for a kernel each; the sum, and so the gradients, are those of
    the tokens' own experts, as the others have the weight 0.
    """

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        gate_up_EID, down_EDI = experts.gate_up_proj, experts.down_proj
        share_TE = torch.zeros(len(hidden), len(down_EDI), dtype=hidden.dtype, device=hidden.device)
        share_TE = share_TE.scatter(1, chosen, weights.to(hidden.dtype))
        both = hidden @ gate_up_EID.flatten(0, 1).T
        gate, up = both.view(len(hidden), len(down_EDI), -1).chunk(2, -1)
        inner = experts.act_fn(gate) * up * share_TE[..., None]  # type: ignore[operator]
        return inner.flatten(1) @ down_EDI.transpose(1, 2).flatten(0, 1)

    return forward


@contextlib.contextmanager
def in_training(model: nn.Module, family: Family) -> Iterator[None]:
    """Give a model the entries that its config has in training, and experts without loops."""
    experts = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    for module in experts:
        module.forward = dense_experts(module)
    before = {name: getattr(model.config, name) for name in family.training}
    for name, value in family.training.items():
        setattr(model.config, name, value)
    yield
    for name, value in before.items():
        setattr(model.config, name, value)
    for module in experts:
        del module.forward


@torch.no_grad()
def loss_of(model: nn.Module, windows: Tensor, begin: int) -> float:
    """Return the mean loss of a token that does not belong to a window's beginning."""
    model.eval()
    first = max(begin, 1)
    total = 0.0
    for part in windows.split(64):
        rows = model(input_ids=part, use_cache=False).logits[:, first - 1 : -1]
        total -= float(token_log_likelihoods(rows, part[:, first:]).double().sum())
    return total / (len(windows) * (windows.shape[1] - first))


def train(name: str, settings: Settings) -> dict[str, Any]:
    """Train the model of a family and write it; return what came of it."""
    # A step is many small kernels, and several models share the machine.
    torch.set_num_threads(2 if settings.device == "cuda" else torch.get_num_threads())
    torch.backends.cuda.matmul.allow_tf32 = True
    family, device = FAMILIES[name], torch.device(settings.device)
    folder = settings.out / name
    first, held_out_text = split(read_text(settings.texts[0]))
    texts = [first, *(read_text(path) for path in settings.texts[1:])]
    make_tokenizer(family, texts).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = [TokenText.of(tokenizer, text) for text in texts]
    held_out = TokenText.of(tokenizer, held_out_text).windows(LENGTH).to(device)
    windows = Windows.of(tokens, settings.rows, device)

    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(family.make_config()).to(device)
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=RATE, betas=(0.9, 0.95), fused=device.type == "cuda",
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(settings.seed)
    best, best_state = math.inf, {}
    losses: list[list[float]] = []
    started, step, done = time.perf_counter(), 0, 0.0
    with in_training(model, family):
        while done < 1:
            model.train()
            done = max(step / settings.steps, (time.perf_counter() - started) / settings.seconds)
            rate = RATE * min(1.0, done / WARM_UP, 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
            for group in optimizer.param_groups:
                group["lr"] = max(rate, RATE / 1000)
            batch = windows.draw(generator)
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if done >= len(losses) / CHECKS:
                loss = loss_of(model, held_out, len(windows.begin))
                losses.append([step, time.perf_counter() - started, loss])
                if loss < best:
                    best = loss
                    best_state = {key: w.clone() for key, w in model.state_dict().items()}
    seconds = time.perf_counter() - started
    model.load_state_dict(best_state)
    model.to(torch.bfloat16).save_pretrained(folder)
    model.float().eval()
    found = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "tokens": [len(text) for text in tokens],
        "windows_of_a_step": windows.shares,
        "steps": step,
        "seconds": seconds,
        "losses": losses,
        "held_out_perplexity": math.exp(loss_of(model, held_out, len(windows.begin))),
    }
    if settings.test is not None:
        rows = TokenText.of(tokenizer, read_text(settings.test)).windows(LENGTH).to(device)
        found["test_perplexity"] = math.exp(loss_of(model, rows, len(windows.begin)))
        found["without_block"] = without_blocks(model, rows[:64], len(windows.begin))
    return found


def without_blocks(model: nn.Module, windows: Tensor, begin: int) -> list[float]:
    """Return the perplexity without each of a model's blocks, in terms of the whole model's."""
    count = model.config.num_hidden_layers
    (blocks,) = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)

    def passed_by(block: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        return (stream, *result[1:]) if isinstance(result, tuple) else stream

    whole = loss_of(model, windows, begin)
    found = []
    for block in blocks:
        handle = block.register_forward_hook(passed_by, with_kwargs=True)
        found.append(math.exp(loss_of(model, windows, begin) - whole))
        handle.remove()
    return found


@torch.inference_mode()
def write_on(
    folder: Path, text: str, *, megabytes: float, seconds: float, rows: int, seed: int, device: str
) -> str:
    """Return text that a causal model writes behind beginnings from random places of a text.

    Args:
        folder: A checkpoint of transformers.
        megabytes: How much to write, at most.
        seconds: Stop after so many; passages that are not finished count as they are.
        rows: Passages written at once.
    """
    deadline = time.perf_counter() + seconds
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = TokenText.of(tokenizer, text).ids
    special = torch.tensor(tokenizer.all_special_ids, device=device)
    torch.manual_seed(seed)
    written: list[str] = []
    size = 0
    while size < megabytes * 1e6 and (time.perf_counter() < deadline or not written):
        starts = torch.randint(len(ids) - BEGINNING, (rows, 1))
        passages = [ids[starts + torch.arange(BEGINNING)].to(device)]
        cache = None
        for _ in range(PASSAGE - BEGINNING):
            result = model(
                input_ids=passages[-1], past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = result.past_key_values
            logits = result.logits[:, -1].index_fill_(1, special, -math.inf)
            values, tokens = (logits.float() / TEMPERATURE).topk(CANDIDATES)
            shares = values.softmax(-1)
            shares = shares.masked_fill(shares.cumsum(-1) - shares > NUCLEUS, 0.0)
            passages.append(tokens.gather(1, torch.multinomial(shares, 1)))
            if time.perf_counter() > deadline:
                break
        del cache
        texts = tokenizer.batch_decode(torch.cat(passages, 1).cpu(), skip_special_tokens=True)
        written += texts
        size += sum(len(passage.encode()) for passage in texts)
        print(f"{size / 1e6:.1f} MB written, {seconds - deadline + time.perf_counter():.0f} s",
              flush=True)  # fmt: skip
    # `read_text` sets a blank line between lines, as the writer saw them.
    return "\n".join(passage.replace("\n\n", "\n") for passage in written)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="+", help="training texts")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    parser.add_argument("--test", type=Path, help="text that is only measured")
    parser.add_argument("--families", default=",".join(FAMILIES), help="which, with commas")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=150.0, help="of training, at most")
    parser.add_argument("--steps", type=int, default=6000, help="of training, at most")
    parser.add_argument("--rows", type=int, default=32, help="windows of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(FAMILIES), help="models trained at once")
    parser.add_argument("--own-text", type=float, default=0.0, help="megabytes to be written")
    parser.add_argument("--writer", type=Path, help="checkpoint of the model that writes them")
    parser.add_argument("--own-seconds", type=float, default=80.0, help="of writing, at most")
    parser.add_argument("--own-rows", type=int, default=2048, help="passages written at once")
    options = parser.parse_args()
    if options.own_text and options.writer is None:
        parser.error("--own-text needs --writer")
    options.out.mkdir(parents=True, exist_ok=True)
    texts = tuple(options.texts)
    names = options.families.split(",")
    settings = Settings(
        texts, options.test, options.out, options.device, options.seconds, options.steps,
        options.rows, options.seed,
    )  # fmt: skip
    found: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        if options.own_text:
            own = options.out / "own_text.txt"
            own.write_text(
                write_on(
                    options.writer, split(read_text(texts[0]))[0], megabytes=options.own_text,
                    seconds=options.own_seconds, rows=options.own_rows, seed=options.seed,
                    device=options.device,
                ),
                encoding="utf-8",
            )  # fmt: skip
            torch.cuda.empty_cache()
            settings = Settings(**{**vars(settings), "texts": (*texts, own)})
        runs = {pool.submit(train, name, settings): name for name in names}
        for run in concurrent.futures.as_completed(runs):
            if error := run.exception():
                # The others are worth their time all the same.
                traceback.print_exception(error)
                continue
            found[runs[run]] = run.result()
            save(options, settings, {name: found[name] for name in names if name in found})
    show(found)
    sys.exit(len(found) < len(names))


def save(options: argparse.Namespace, settings: Settings, found: dict[str, Any]) -> None:
    """Keep what is finished; a later model may be cut off."""
    command = ["python tools/train_models.py", *(path.name for path in options.texts)]
    command += [f"--steps {options.steps} --seconds {options.seconds:g} --rows {options.rows}"]
    command += [f"--seed {options.seed} --device {options.device}"]
    if options.own_text:
        command.append(f"--own-text {options.own_text:g} --writer SmolLM2-135M-Instruct")
    keep(
        settings.out / "training.json", "train", command, torch.device(options.device),
        {"texts": {path.name: path.stat().st_size for path in settings.texts}, "models": found},
    )  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """Print a line for each model."""
    print(f"{'model':10} {'steps':>6} {'seconds':>8} {'held out':>9} {'test':>8}  times without")
    for name, row in sorted(found.items()):
        times = " ".join(f"{value:.2f}" for value in row.get("without_block", ()))
        print(
            f"{name:10} {row['steps']:6} {row['seconds']:8.1f} {row['held_out_perplexity']:9.2f} "
            f"{row.get('test_perplexity', math.nan):8.2f}  {times}"
        )


if __name__ == "__main__":
    main()
