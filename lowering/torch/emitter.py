"""The torch emitter: a model as one Python file, with its weights beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch

from graphopt.errors import LoweringError
from graphopt.files.safetensors import INDEX_NAME, WEIGHTS_NAME, SafetensorsWriter
from graphopt.ir.dataflow import used_ops
from graphopt.ir.dtypes import is_rounded
from graphopt.ir.graph import Program
from graphopt.ir.ranks import group_of
from graphopt.ir.types import DTYPES
from graphopt.ir.weights import Weight
from graphopt.lowering.base import NOTHING, Emitted, Emitter
from graphopt.lowering.kernels.family import policy_files, runtime_text
from graphopt.lowering.kernels.plan_kernels import compute_dtype
from graphopt.lowering.tokenizer import (
    TEMPLATE_NAME,
    TOKENIZER_NAME,
    picture_lines,
    picture_prompt,
    run_lines,
    write_generation,
    write_tokenizer,
)
from graphopt.lowering.torch import ranks
from graphopt.lowering.torch.lowered_kernels import (
    FOLDER,
    LoweredKernels,
    in_plain_torch,
    lower_attentions,
    range_report,
)
from graphopt.lowering.torch.passes import lower, lowering_passes
from graphopt.lowering.torch.render import has_arena, render_model
from graphopt.lowering.torch.sees import Sees, why_ids_alone
from graphopt.pass_manager.contract import Pass
from graphopt.storage.shared_weights import shared_weights, write_index
from graphopt.storage.stored_weight import StoredWeight
from graphopt.support.progress import Progress
from graphopt.targets import Target, get_target

MODEL_NAME = "model.py"
ARENA_FOLDER, PICTURES_FOLDER, POLICY_FOLDER = "arena", "pictures", "policies"
_ARENA_INIT = '''"""One buffer for what steps compute; written by graphopt."""

from .arena import Arena

__all__ = ["Arena"]
'''
_PICTURES_INIT = '''"""Embeddings of pictures and text; written by graphopt."""

from .package_pictures import Pictures

__all__ = ["Pictures"]
'''
_POLICY_INIT = '''"""Which pages of a KV cache a step reads; written by graphopt."""

from .policy_attention import cached_policy_attention, empty_caches, policy_of

__all__ = ["cached_policy_attention", "empty_caches", "policy_of"]
'''


def source_files(program: Program, target: str) -> dict[str, str]:
    """Return the text of every source file of the artifact, by its path in the output folder.

    Raises:
        LoweringError: See `render_model`.
    """
    return _texts(program, target)[0]


def _texts(program: Program, target: str) -> tuple[dict[str, str], LoweredKernels | None]:
    """Return the source files, and the kernels among them."""
    lowered = lower(program, target)
    kernels = lower_attentions(lowered, target)
    texts = {MODEL_NAME: render_model(program, target, lowered)}
    if has_arena(texts[MODEL_NAME]):
        texts |= {f"{ARENA_FOLDER}/{name}": text for name, text in arena_package().items()}
    if kernels is not None:
        texts |= {f"{FOLDER}/{name}": text for name, text in kernels.files().items()}
    elif any(state.policy for state in program.states.values()):
        texts |= {f"{POLICY_FOLDER}/{name}": text for name, text in policy_package().items()}
    if group_of(program):
        texts |= {f"{ranks.FOLDER}/{name}": text for name, text in ranks.ranks_package().items()}
    if Sees.of(program) is not None:
        texts |= {f"{PICTURES_FOLDER}/{name}": text for name, text in pictures_package().items()}
    return texts, kernels


def arena_package() -> dict[str, str]:
    """Return the text of every file of the folder `arena`, by path."""
    names = ("arena.py", "arena_offsets.py", "out_forms.py")
    return {"__init__.py": _ARENA_INIT, **{name: runtime_text(name) for name in names}}


def pictures_package() -> dict[str, str]:
    """Return the text of every file of the folder `pictures`, by path."""
    names = (
        "package_pictures.py", "picture_prompts.py", "picture_tower.py", "functional.py",
        "errors.py", "boundary.py", "meta_parameters.py", "plain.py",
    )  # fmt: skip
    return {"__init__.py": _PICTURES_INIT, **{name: runtime_text(name) for name in names}}


def policy_package() -> dict[str, str]:
    """Return the text of every file of the folder `policies`, by path."""
    shared = {name: runtime_text(name) for name in ("functional.py", "kv_memory.py")}
    return {"__init__.py": _POLICY_INIT, **shared, **policy_files()}


def _all_on_host(program: Program) -> list[tuple[str, str]]:
    """Return what of placed keys a model in plain PyTorch leaves out."""
    placed = [state.name for state in program.states.values() if state.host is not None]
    if not placed:
        return []
    where = placed[0] if len(placed) == 1 else f"{placed[0]} to {placed[-1]}"
    return [(where, "their places are left out: this model runs on one device, with all its keys")]


def _left_out(program: Program, target: str) -> list[tuple[str, str]]:
    """Return what a model leaves out that is in plain PyTorch."""
    return [*_all_on_host(program), *_no_kernels(get_target(target), used_ops(program))]


def _no_kernels(machine: Target, ops: frozenset[str]) -> list[tuple[str, str]]:
    """Return that attentions run by their reference, on a GPU that has no kernels of ours."""
    if machine.kind == "cpu" or machine.kernels or not ops & {"attention", "policy_attention"}:
        return []
    why = f"{machine.name} has no attention kernels of ours"
    return [("every layer", f"attention by its reference: {why}")]


def _without_kernel(kernels: LoweredKernels) -> list[tuple[str, str]]:
    attentions = [(where, f"attention by its reference: {why}") for where, why in kernels.refused]
    attentions += _no_kernels(kernels.target, kernels.ops)
    if kernels.both_ways:
        what = "a prompt with pictures, whose tokens see each other both ways, is read by the"
        attentions.append(("attention", f"{what} reference: kernels are causal"))
    return attentions + kernels.without_layer_kernels()


class TorchEmitter(Emitter):
    """Writes `model.py`, `model.safetensors` with the weights, and the tokenizer's files.

    Weights that another form of the folder has stored under the same name, in the same layout and
    dtype, are not stored twice: `model.safetensors.index.json` then says which file holds which.

    Args:
        in_compute_dtype: For a GPU, store weights in the 16 bits that the model computes in, rather
            than as the program holds them.
    """

    name: ClassVar[str] = "torch"
    shares: ClassVar[bool] = True
    for_ranks: ClassVar[bool] = True

    def __init__(self, *, in_compute_dtype: bool = True) -> None:
        self.in_compute_dtype = in_compute_dtype

    def check(self, program: Program, target: str) -> None:
        """Refuse a program with something in it that `model.py` cannot say.

        Raises:
            LoweringError: Naming the op and the call.
        """
        render_model(program, target)

    def passes(self, target: str) -> list[Pass]:
        return lowering_passes(target)

    def without_pictures(self, program: Program) -> str | None:
        blind = why_ids_alone(program)
        return None if blind is None else f"the package takes token ids alone: {blind}"

    def fallbacks(self, program: Program, target: str) -> list[tuple[str, str]]:
        kernels = lower_attentions(program, target)
        if kernels is None:
            return _left_out(program, target)
        return _without_kernel(kernels)

    def stored_dtype(self, program: Program, weight: Weight, target: str) -> torch.dtype:
        machine = get_target(target)
        if not self.in_compute_dtype or in_plain_torch(program, machine) or not is_rounded(weight):
            return weight.dtype
        return DTYPES[compute_dtype(program, machine)]

    def emit(
        self,
        program: Program,
        root: Path,
        target: str,
        progress: Progress,
        stored: Mapping[str, StoredWeight] = NOTHING,
    ) -> Emitted:
        sources, kernels = _texts(program, target)
        for name, text in sources.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        files = [root / name for name in sources]
        notes: list[tuple[str, str]] = []
        if kernels is None:
            fallbacks = _left_out(program, target)
        else:
            images, fallbacks = self._compile(kernels, root / FOLDER)
            files += images
            notes = kernels.notes + range_report(program, kernels.dtype)
        dtypes = {name: dtype for name, (_, dtype) in self.tensors(program, target).items()}
        if group_of(program):
            notes.append(("ranks", ranks.size_note(program, dtypes)))
        shared = shared_weights(root, program, dtypes, stored)
        storage = self._write_weights(program, root, dtypes, shared, progress)
        tokenizer, told = write_tokenizer(program, root)
        files += [root / name for name in (WEIGHTS_NAME, INDEX_NAME) if (root / name).exists()]
        files += [*tokenizer, *write_generation(program, root)]
        notes += told
        count = len(group_of(program))
        start = f"torchrun --nproc-per-node {count}" if count else "python"
        run = f"{start} {{out}}/{MODEL_NAME}"
        needs = ["torch", "safetensors"] if kernels is None else kernels.packages
        names = [file.name for file in tokenizer]
        if TOKENIZER_NAME in names:
            needs = [*needs, "tokenizers", *(["jinja2"] if TEMPLATE_NAME in names else [])]
            run = f"{run} --prompt 'Hello'"
        else:
            run = f"{run} 1 2 3 --new 16   # token ids;"
        mark = "" if "#" in run else "   #"
        usage = [
            *run_lines(program),
            f"{run}{mark} needs {', '.join(needs[:-1])} and {needs[-1]}",
            *picture_lines(
                f"python {{out}}/{MODEL_NAME}",
                None if Sees.of(program) is None else picture_prompt(root, names),
                "transformers and pillow",
            ),
        ]
        return Emitted(files, storage, frozenset(shared), usage, notes, fallbacks)

    @staticmethod
    def _compile(kernels: LoweredKernels, folder: Path) -> tuple[list[Path], list[tuple[str, str]]]:
        """Write what is compiled ahead; return its files, and what runs without a kernel."""
        fallbacks = _without_kernel(kernels)
        try:
            images = kernels.compile()
        except LoweringError as error:
            fallbacks.append((FOLDER, f"sources only: {error.message} {error.remedy}"))
            return [], fallbacks
        for name, data in images.items():
            (folder / name).write_bytes(data)
        return [folder / name for name in images], fallbacks

    @staticmethod
    def _write_weights(
        program: Program,
        root: Path,
        dtypes: Mapping[str, torch.dtype],
        shared: Mapping[str, StoredWeight],
        progress: Progress,
    ) -> dict[str, StoredWeight]:
        """Write the tensors of weights, one at a time, and the index; return where each is.

        Args:
            dtypes: In which each is stored.
            shared: Those that another form has stored.

        Raises:
            SourceError: A weight cannot be read, or a trained one holds NaN or infinity.
            GraphoptError: The disk is full.
        """
        storage = dict(shared)
        weights = [w for w in program.weights.tensors() if w.name not in shared]
        kinds = {weight.name: (weight.shape, dtypes[weight.name]) for weight in weights}
        if weights or not shared:
            with SafetensorsWriter(root / WEIGHTS_NAME, kinds) as writer:
                done, total = 0, sum(raw.nbytes for raw in writer.tensors.values())
                for weight in weights:
                    progress("writing weights", done, total)
                    done += writer.tensors[weight.name].nbytes
                    if weight.constant:
                        # A constant may hold infinity on purpose.
                        writer.write(weight.name, weight.load().contiguous())
                    else:
                        writer.copy(weight.name, weight.producer)
                progress("writing weights", total, total)
            for name, raw in writer.tensors.items():
                storage[name] = StoredWeight(WEIGHTS_NAME, raw.offset, raw.shape, raw.dtype)
        if shared:
            write_index(root, {name: place.file for name, place in storage.items()})
        return storage
