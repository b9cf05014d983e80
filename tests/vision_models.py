"""Small random models that see, and prompts with pictures for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import VOCAB, byte_tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

IMAGE = 290
"""The image token; a byte-level tokenizer has ids below 260."""

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 258,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
CLIP = {"model_type": "clip_vision_model", "projection_dim": 16, **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}
SPECIAL = {"image_token_id": IMAGE, "image_token_index": IMAGE}
GRIDS = {"image_grid_pinpoints": [[16, 32], [32, 16]]}
QWEN_TEXT = TEXT | {
    "head_dim": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
QWEN = {
    "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293, **SPECIAL,
}  # fmt: skip
QWEN_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
              "temporal_patch_size": 2}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": CLIP,
              "image_seq_length": 16, **SPECIAL},
    "llava_next": {"text_config": {"model_type": "mistral", **TEXT}, "vision_config": CLIP,
                   **GRIDS, **SPECIAL},
    "llava_onevision": {"text_config": {"model_type": "qwen2", **TEXT, "head_dim": None},
                        "vision_config": SIGLIP, **GRIDS, **SPECIAL, "video_token_index": 291},
    "qwen2_vl": {"text_config": QWEN_TEXT, "vision_config": QWEN_TOWER | {
        "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}, **QWEN},
    "qwen2_5_vl": {"text_config": QWEN_TEXT, "vision_config": QWEN_TOWER | {
        "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16,
        "fullatt_block_indexes": [1]}, **QWEN},
    "idefics3": {"text_config": {"model_type": "llama", **TEXT}, "scale_factor": 2,
                 "vision_config": TOWER, **SPECIAL},
    "smolvlm": {"text_config": {"model_type": "llama", **TEXT}, "scale_factor": 2,
                "vision_config": TOWER, **SPECIAL},
    "gemma3": {"text_config": {**TEXT, "sliding_window": 8, "query_pre_attn_scalar": 8,
                               "layer_types": ["sliding_attention", "sliding_attention",
                                               "full_attention"]},
               "vision_config": SIGLIP, "mm_tokens_per_image": 4, **SPECIAL},
    "internvl": {"text_config": {"model_type": "qwen3", **TEXT},
                 "vision_config": TOWER | {"image_size": [16, 16], "patch_size": [4, 4]},
                 "downsample_ratio": 0.5, "image_seq_length": 4, **SPECIAL},
    "mistral3": {"text_config": {"model_type": "mistral", **TEXT},
                 "vision_config": {"model_type": "pixtral", **TOWER, "head_dim": 8},
                 "spatial_merge_size": 2, **SPECIAL},
}  # fmt: skip
"""transformers' type -> the config of a small model."""

FAMILIES = tuple(CONFIGS)


def vision_model(model_type: str, **text: Any) -> PreTrainedModel:
    """Return a random model, with weights so large that every feature shows in the logits."""
    torch.manual_seed(0)
    entries = CONFIGS[model_type]
    given = entries | {"text_config": entries["text_config"] | text}
    given["text_config"] = {k: v for k, v in given["text_config"].items() if v is not None}
    config = AutoConfig.for_model(model_type, **given)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15)
    return model


def save_vision(folder: Path, model_type: str, **text: Any) -> Path:
    """Write a random model with a tokenizer and return its folder."""
    vision_model(model_type, **text).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


TOKENS = {"llava": 16, "llava_next": 36, "llava_onevision": 36, "qwen2_vl": 6, "qwen2_5_vl": 6}
"""Tokens that a picture of `pixels` becomes; 4 in other families."""


def pixels(model_type: str, counts: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
    """Return random pictures as a family's processor gives them, so many for each prompt."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(counts)

    def values(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    square = torch.tensor([[16, 16]] * count)
    if not count:
        return {}
    if model_type in ("llava_next", "llava_onevision"):
        return {"pixel_values": values(3, 3, 16, 16), "image_sizes": square}
    if model_type in ("qwen2_vl", "qwen2_5_vl"):
        grid = torch.tensor([[1, 4, 6]] * count)
        return {"pixel_values": values(24, 96).flatten(0, 1), "image_grid_thw": grid}
    if model_type in ("idefics3", "smolvlm"):
        # As many for each prompt, with black ones for those that there are not.
        padded = torch.zeros(len(counts), max(counts), 3, 16, 16)
        made = values(3, 16, 16).split(list(counts))
        for row, own in zip(padded, made, strict=True):
            row[: len(own)] = own
        return {"pixel_values": padded}
    more = {"image_sizes": square} if model_type == "mistral3" else {}
    return {"pixel_values": values(3, 16, 16)} | more


def prompts(model_type: str, counts: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
    """Return what a model of transformers takes: random words around so many pictures a row.

    Rows are of unequal lengths, padded on the left.
    """
    generator = torch.Generator().manual_seed(seed + 100)

    def words(count: int) -> Tensor:
        return torch.randint(3, 256, (count,), generator=generator)

    rows = []
    for number, count in enumerate(counts):
        parts = [words(5 + 3 * number)]
        for _ in range(count):
            parts += [torch.full((TOKENS.get(model_type, 4),), IMAGE), words(3)]
        rows.append(torch.cat([*parts, words(4)]))
    length = max(map(len, rows))
    ids = torch.stack([F.pad(row, (length - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(r), (length - len(r), 0)) for r in rows])
    kinds = {"gemma3": "token_type_ids", "qwen2_vl": "mm_token_type_ids",
             "qwen2_5_vl": "mm_token_type_ids"}.get(model_type)  # fmt: skip
    more = {kinds: (ids == IMAGE).long()} if kinds is not None else {}
    return {"input_ids": ids, "attention_mask": mask, **more, **pixels(model_type, counts, seed)}


def save_with_processor(folder: Path, family: str = "llava", template: str | None = None) -> Path:
    """Write a model with the processor that makes its prompts, and return its folder.

    Of LLaVA pictures of any size become 16 tokens, of Gemma 3 four with others around them; of
    Qwen2-VL as many as their sizes ask for. That one's own needs torchvision, so that
    `QwenProcessor` is to stand in.
    """
    from transformers import (
        CLIPImageProcessorPil,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
        LlavaProcessor,
    )

    tokenizer = picture_tokenizer()
    model = vision_model(family, eos_token_id=258)
    token = tokenizer.convert_tokens_to_ids("<image>")
    model.config.image_token_id = model.config.image_token_index = token
    model.save_pretrained(folder)
    if family == "gemma3":
        images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
        Gemma3Processor(
            images, tokenizer, image_seq_length=4, chat_template=template
        ).save_pretrained(folder)
    elif family == "qwen2_vl":
        tokenizer.save_pretrained(folder)
        (folder / "processor_config.json").write_text("{}")
    else:
        clip = CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        )
        LlavaProcessor(
            clip, tokenizer, patch_size=4, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=template,
        ).save_pretrained(folder)  # fmt: skip
    return folder


def picture_tokenizer() -> PreTrainedTokenizerFast:
    """Return the byte-level tokenizer with tokens for pictures and what stands around them."""
    names = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=byte_tokenizer().backend_tokenizer, eos_token="<end>",
        extra_special_tokens=names, clean_up_tokenization_spaces=False,
    )  # fmt: skip


class QwenProcessor:
    """What Qwen2-VL's processor does with pictures, without the part for videos."""

    chat_template = None
    image_token = "<image>"

    def __init__(self) -> None:
        from transformers import Qwen2VLImageProcessorPil

        self.tokenizer = picture_tokenizer()
        self.images = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2,
            size={"shortest_edge": 64, "longest_edge": 1024},
        )  # fmt: skip

    def __call__(self, images: Any, text: list[str], return_tensors: str) -> dict[str, Tensor]:
        made = self.images(images, return_tensors="pt") if images else {}
        (prompt,) = text
        begun, *parts = prompt.split(self.image_token)
        for grid, part in zip(made.get("image_grid_thw", ()), parts, strict=True):
            begun += self.image_token * (int(grid.prod()) // 4) + part
        ids = self.tokenizer([begun], return_tensors="pt")["input_ids"]
        kinds = (ids == self.tokenizer.convert_tokens_to_ids(self.image_token)).long()
        own = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
        return {**own, **made}
