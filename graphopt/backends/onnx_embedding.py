"""The table of words of a model that sees, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graphopt.backends.onnx_session import open_session
from graphopt.files.onnx_file import EMBEDDING_NAME
from graphopt.ir.embedder import FEATURES
from graphopt.ir.sighted import EMBEDS


class OnnxEmbedding:
    """`embedding.onnx` of a folder: what the decoder takes for token ids."""

    def __init__(self, folder: Path) -> None:
        self._session = open_session(folder / EMBEDDING_NAME)
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        self._none = np.zeros((0, shapes[FEATURES][1]), np.float32)

    def __call__(self, ids: Tensor) -> Tensor:
        """Return f32 [B, S, D] for int64 [B, S], in which an image token is a word."""
        feeds = {"input_ids": ids.numpy(), FEATURES: self._none}
        return torch.from_numpy(self._session.run([EMBEDS], feeds)[0])
