"""Which configs are of models that take pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOWER = "vision_config"
"""What configs call the part that looks at pictures."""

AUTO_CLASS = "AutoModelForImageTextToText"
"""What transformers loads such models by, and what code of a checkpoint says that it is for."""


def takes_pictures(config: PretrainedConfig) -> bool:
    """Return whether a config is of a decoder behind one vision tower, as transformers has it.

    Models with other parts beside, such as ones for sound or a resampler with a config of its own,
    are none.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    parts = set(getattr(config, "sub_configs", {}))
    known = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or AUTO_CLASS in (
        getattr(config, "auto_map", None) or {}
    )
    return parts == {TOWER, "text_config"} and known and not config.is_encoder_decoder
