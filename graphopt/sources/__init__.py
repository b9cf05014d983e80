"""Opening models: what `MODEL` on the command line may be, and how each is read."""

from __future__ import annotations

import re
from pathlib import Path

from graphopt.errors import SourceError, VerifyError
from graphopt.files.config_schema import check_saved_config
from graphopt.files.refusals import unfit_folder
from graphopt.ir.graph import PROGRAM_INPUTS, Program
from graphopt.sources.base import ModelSource
from graphopt.support.inputs import open_regular
from graphopt.support.near_paths import nearest, path_remedy
from graphopt.support.plain import shown

__all__ = ["ModelSource", "open_model"]

CONFIG_PREFIX = "config:"
PROGRAM_NAME = "program.json"
_ADDRESS = re.compile(r"https?://(?:(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+))?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def open_model(spec: str, *, trust_remote_code: bool = False) -> ModelSource:
    """Open a model without reading its weights.

    Args:
        spec: "demo"; a folder with a transformers checkpoint or a graphopt output; a .gguf file; a
            config.json file, also written "config:FILE"; or a Hugging Face hub id.
        trust_remote_code: Let code of the checkpoint run where transformers has no class for it.

    Raises:
        SourceError: There is no such model, or it is damaged or of a kind that is refused.
    """
    from graphopt.sources.huggingface import CONFIG_NAME, open_config, open_folder, open_hub

    if spec == "demo":
        from graphopt.sources.demo import open_demo

        return open_demo()
    if spec.startswith(CONFIG_PREFIX):
        path = Path(spec.removeprefix(CONFIG_PREFIX)).expanduser()
        return open_config(spec, path, trust_remote_code=trust_remote_code)
    path = Path(spec).expanduser()
    if path.is_dir():
        if (path / PROGRAM_NAME).exists():
            return _open_program(spec, path)
        if (path / CONFIG_NAME).exists():
            return open_folder(spec, path, trust_remote_code=trust_remote_code)
        raise unfit_folder(path)
    if path.is_file():
        if path.suffix == ".json":
            return open_config(spec, path, trust_remote_code=trust_remote_code)
        if path.suffix == ".gguf" or _starts_like_gguf(path):
            from graphopt.sources.gguf import open_gguf

            return open_gguf(spec, path)
        beside = f", {path.parent}" if (path.parent / CONFIG_NAME).exists() else ""
        raise SourceError(
            f"{path} is a file of a kind graphopt does not open.",
            f"Give the model's folder{beside}, a .gguf file, a config.json, a hub id or 'demo'.",
        )
    if (address := _ADDRESS.match(spec)) is not None:
        named = f": {address[1]}" if address[1] else ""
        raise SourceError(
            f"{spec!r} is an address, and models are not read from those.",
            f"Give the id of the model on the Hugging Face hub{named}, or download it.",
        )
    hint = nearest(path, also=("demo",))
    if not _HUB_ID.fullmatch(spec) or path.suffix in (".gguf", ".json", ".safetensors"):
        why = hint or path_remedy(path, FileNotFoundError())
        raise SourceError(f"There is no file or folder {spec!r}.", why)
    return open_hub(spec, hint=hint, trust_remote_code=trust_remote_code)


def _open_program(spec: str, folder: Path) -> ModelSource:
    from graphopt.files.licence import licence_files
    from graphopt.ir.verify import verify
    from graphopt.sources.base import output_tokenizer
    from graphopt.storage.artifact import load_program

    program = load_program(folder)
    try:
        verify(program)
    except VerifyError as error:
        raise SourceError(
            f"{folder / PROGRAM_NAME} holds a malformed program: {error.message}",
            "Compile the model again.",
        ) from error
    _check_model(program, folder / PROGRAM_NAME)
    tokenizer = output_tokenizer(folder, program)
    program.tokenizer = str(tokenizer) if tokenizer else None
    program.licence_files = licence_files(folder)
    return ModelSource(
        spec=spec,
        name=program.name,
        kind="program",
        tokenizer=tokenizer,
        dtype=program.checkpoint_dtype,
        program=program,
    )


def _check_model(program: Program, path: Path) -> None:
    """Refuse a program that is no language model, and a config that no language model has.

    Raises:
        SourceError: Naming what is missing or wrong.
    """
    from graphopt.ir.shapes import infer_program

    again = "Compile the model again."
    odd = sorted(set(program.inputs) - set(PROGRAM_INPUTS))
    wrong = [n for n, k in program.inputs.items() if len(k.shape) != 2 or k.dtype.itemsize < 4]
    if odd or wrong or "input_ids" not in program.inputs:
        raise SourceError(
            f"{path} is no language model: its input {shown([*odd, *wrong, 'input_ids'][0])} is "
            "missing, or not one that a language model has.",
            again,
        )
    carried = infer_program(program)[1]
    logits = carried[program.outputs[0]] if program.outputs else None
    if logits is None or len(logits.shape) != 3 or not isinstance(logits.shape[2], int):
        raise SourceError(
            f"{path} is no language model: it returns no logits [B, S, vocab].", again
        )
    if program.config:
        check_saved_config(path, program.config)


def _starts_like_gguf(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(4) == b"GGUF"
