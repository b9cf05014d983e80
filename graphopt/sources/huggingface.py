"""Models in transformers' layout: a folder, a hub id, or a bare config file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphopt.errors import SourceError, first_line
from graphopt.files.config_schema import check_config, check_sizes, without_code
from graphopt.files.confined import inside
from graphopt.files.licence import PATTERNS, licence_files
from graphopt.files.refusals import REMEDY, refuse_adapter, refuse_quantised, unfit_folder
from graphopt.files.safetensors import INDEX_NAME, WEIGHTS_NAME, read_checkpoint
from graphopt.ir.weights import Producer
from graphopt.sources.base import ModelSource, common_dtype, tokenizer_in
from graphopt.sources.generation import read_generation
from graphopt.sources.licence import MODEL_CARD, stated_licence
from graphopt.sources.quantised import ENTRY, ReadTensors, stated_method
from graphopt.sources.vision import takes_pictures
from graphopt.support.boundary import out_of_memory
from graphopt.support.inputs import read_json
from graphopt.support.plain import shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_NAME = "config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DOWNLOAD_PATTERNS = [
    "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", MODEL_CARD, *PATTERNS,
]  # fmt: skip
"""What is fetched from the hub: no pickles, no code, no copies in other formats."""

COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that a config may say its model computes in, and that values of fp8 weights then have."""

CONNECT_SECONDS = 10.0
"""How long the hub may take to answer before the cached copy is used or the run is refused."""


def read_config(
    path: Path, *, trust_remote_code: bool = False, quantised: bool = False
) -> PretrainedConfig:
    """Return the config in a config.json, checked to be of a causal language model.

    A checkpoint that brings code is read with transformers' own class for its type where there is
    one; its code runs only where `trust_remote_code` is set.

    Args:
        quantised: Its weights are quantised in a way that is read: the config returned is that of
            the dense model.

    Raises:
        SourceError: The file is missing or malformed, needs code that is not trusted, or describes
            an encoder-decoder, a model that takes images or sound, one that is quantised, or one
            that is no causal language model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    data = read_json(path)
    model_type = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(model_type, str):
        raise SourceError(
            f"{path} states no model_type, so it is not the config of a transformers model.",
            "Give the config.json of a causal language model.",
        )
    if "backbone_hidden_size" in data:
        raise SourceError(
            f"{path} describes a model of type {model_type!r}, an assistant that computes with the "
            "states, keys and values of another model (backbone_hidden_size).",
            "Give the model that it drafts tokens for.",
        )
    native = model_type in CONFIG_MAPPING and not (trust_remote_code and "auto_map" in data)
    if not native and not trust_remote_code:
        _refuse_unknown(path, model_type, has_code="auto_map" in data)
    kind = CONFIG_MAPPING[model_type] if native else None
    names = dict(getattr(kind, "attribute_map", {}))
    check_config(path, data, names)
    try:
        if kind is not None:
            config: Any = kind.from_dict(without_code(data))
        else:
            place = path.parent if path.name == CONFIG_NAME else path
            config = AutoConfig.from_pretrained(place, trust_remote_code=True)
    except Exception as error:
        # Config classes check their entries with assorted error types.
        if out_of_memory(error):
            raise
        raise SourceError(
            f"{path} is not a valid config of type {model_type!r}: {first_line(error)}.",
            "Correct the entry it names.",
        ) from error
    if quantised and hasattr(config, ENTRY):
        delattr(config, ENTRY)
    _refuse_other_models(path, config, native=native)
    # What the class computes of the entries, such as a head's size, must be a size as well.
    remedy = "Correct the entries that it is computed from."
    check_sizes(path, config.to_dict(), names, remedy=remedy)
    return config


def _refuse_unknown(path: Path, model_type: str, *, has_code: bool) -> None:
    if has_code:
        raise SourceError(
            f"{path} describes a model of type {model_type!r} that only code from the checkpoint "
            "itself can build (auto_map).",
            "Read that code, and pass --trust-remote-code if you want it to run.",
        )
    raise SourceError(
        f"{path} describes a model of type {model_type!r}, which the installed transformers does "
        "not know.",
        "Update transformers, or give a model of another type.",
    )


_LANGUAGE_PARTS = ("text_config", "decoder", "attn_config", "ffn_config")
"""Configs inside a config that describe the language model, or a part of its layers."""

_MEDIA = ("audio", "image", "speech", "video", "vision", "vq")
"""What the names of configs say that describe parts for images and sound."""


def _refuse_other_models(path: Path, config: Any, *, native: bool) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    what = f"{path} describes a model of type {config.model_type!r}"
    remedy = "graphopt takes decoder-only language models."
    if config.is_encoder_decoder:
        raise SourceError(f"{what}, which is an encoder-decoder.", remedy)
    other = sorted(name for name in config.sub_configs if name not in _LANGUAGE_PARTS)
    media = [name for name in other if any(word in name for word in _MEDIA)]
    sees = takes_pictures(config)
    if media and not sees:
        raise SourceError(
            f"{what}, which takes more than text ({', '.join(other)}).",
            f"{remedy[:-1]}, alone or behind one vision tower. Some models are also published as a "
            "text-only checkpoint.",
        )
    if other and not sees:
        raise SourceError(f"{what}, which is made of several models ({', '.join(other)}).", remedy)
    for entry in ("quantization_config", "compression_config", "quantization"):
        stated = getattr(config, entry, None)
        if stated:
            # Of transformers, of compressed-tensors before it, and of MLX.
            stated = stated if isinstance(stated, dict) else {}
            method = stated.get("quant_method") or stated.get("format") or stated.get("mode")
            by = f" by {shown(method)}" if method else f" ({entry})"
            raise SourceError(f"{what} whose weights are quantised{by}.", REMEDY)
    if not native:
        return
    stated = [name for name in config.architectures or [] if isinstance(name, str)]
    classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if sees else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in classes:
        if any(name.endswith("ForCausalLM") for name in stated):
            raise SourceError(
                f"{what}, the text part of a model of another type: transformers' "
                "AutoModelForCausalLM loads none by itself.",
                remedy,
            )
        raise SourceError(f"{what}, which is no causal language model.", remedy)
    known = set(_class_names(classes[type(config)]))
    if stated and not known & set(stated):
        heads = [name for name in stated if "For" in name and (sees or "CausalLM" not in name)]
        if heads:
            raise SourceError(
                f"{what} with the head of {heads[0]}, which is no causal language model.", remedy
            )


def _class_names(classes: Any) -> list[str]:
    several = classes if isinstance(classes, tuple | list) else (classes,)
    return [cls.__name__ for cls in several]


def read_weights(folder: Path) -> dict[str, Producer]:
    """Return the tensors of a checkpoint folder, unread.

    Raises:
        SourceError: There are no safetensors files, or they are damaged or incomplete.
    """
    if not (folder / WEIGHTS_NAME).exists() and not (folder / INDEX_NAME).exists():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise SourceError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when "
                "it is loaded.",
                "Convert it: load it with transformers in a place you trust and call "
                "save_pretrained, which writes safetensors.",
            )
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        if others:
            raise SourceError(
                f"{folder} holds {others[0]} but no {INDEX_NAME}.",
                f"Add the index, or rename a single file to {WEIGHTS_NAME}.",
            )
        raise SourceError(
            f"{folder} holds no weights ({WEIGHTS_NAME}).",
            f"Complete it. `graphopt inspect --config {folder / CONFIG_NAME}` needs none.",
        )
    return dict(read_checkpoint(folder))


def open_folder(
    spec: str, folder: Path, *, name: str = "", trust_remote_code: bool = False
) -> ModelSource:
    """Open a checkpoint folder.

    Raises:
        SourceError: The config, the generation config or the weights are refused, or it holds
            something else; see `read_config`, `read_generation`, `read_weights` and `refusals`.
    """
    refuse_adapter(folder)
    if not (folder / CONFIG_NAME).exists():
        raise unfit_folder(folder)
    path = inside(folder, CONFIG_NAME)
    entries = read_json(path)
    method = stated_method(folder, entries if isinstance(entries, dict) else {})
    config = read_config(path, trust_remote_code=trust_remote_code, quantised=method is not None)
    # Old checkpoints say in config.json how to generate, which config classes do not take in.
    generation = read_generation(folder, entries)
    read = ReadTensors(read_weights(folder))
    if method is not None:
        dtype = getattr(config, "dtype", None)
        read = method.read(read.tensors, dtype if dtype in COMPUTED else torch.bfloat16)
    refuse_quantised(folder, read.tensors)
    return ModelSource(
        spec=spec,
        name=name or folder.resolve().name,
        kind="hf",
        config=config,
        producers=read.tensors,
        tokenizer=tokenizer_in(folder),
        generation=generation,
        dtype=common_dtype(read.tensors),
        licence=stated_licence(folder),
        licence_files=licence_files(folder),
        notes=read.notes,
        out_by_in=frozenset(read.out_by_in),
    )


def open_config(spec: str, path: Path, *, trust_remote_code: bool = False) -> ModelSource:
    """Open a config.json alone: a model without weights.

    Raises:
        SourceError: The config is refused; see `read_config`.
    """
    config = read_config(path, trust_remote_code=trust_remote_code)
    name = path.parent.resolve().name if path.name == CONFIG_NAME else path.stem
    dtype = getattr(config, "dtype", None)
    return ModelSource(
        spec=spec,
        name=name,
        kind="config",
        config=config,
        dtype=dtype or common_dtype({}),
    )


def open_hub(spec: str, *, hint: str = "", trust_remote_code: bool = False) -> ModelSource:
    """Open a model of the Hugging Face hub, downloaded once into huggingface_hub's cache.

    Without a network a cached copy is used.

    Args:
        hint: Said in the refusal where a local file was probably meant.

    Raises:
        SourceError: There is no such model, it is not open to this user, or the hub cannot be
            reached and there is no cached copy; or the checkpoint is refused.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = [*DOWNLOAD_PATTERNS, *(["*.py"] if trust_remote_code else [])]
    try:
        folder = snapshot_download(spec, allow_patterns=patterns, etag_timeout=CONNECT_SECONDS)
    except GatedRepoError as error:
        raise SourceError(
            f"The hub gives {spec!r} only to users who accepted its terms.",
            "Accept them on the model's page and log in with `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"There is no file or folder {spec!r} here and no such model on the hub.", hint
        ) from error
    except (HFValidationError, ValueError) as error:
        raise SourceError(
            f"There is no file or folder {spec!r}, and it is not a hub id.", hint
        ) from error
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"There is no file or folder {spec!r} here, and the Hugging Face hub is out of reach.",
            hint or "Connect to a network, or give a model folder, a .gguf file or 'demo'.",
        ) from error
    except Exception as error:
        # The hub's client lets errors of the HTTP library through, and their types change with it.
        raise SourceError(
            f"{spec!r} could not be downloaded from the hub: {first_line(error)}.",
            "Try again, or download the model by other means and give its folder.",
        ) from error
    return open_folder(
        spec, Path(folder), name=spec.split("/")[-1], trust_remote_code=trust_remote_code
    )
