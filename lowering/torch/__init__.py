"""PyTorch: a model as one Python file that needs nothing of graphopt."""

from graphopt.lowering.torch.emitter import TorchEmitter, source_files
from graphopt.lowering.torch.render import render_model

__all__ = ["TorchEmitter", "render_model", "source_files"]
