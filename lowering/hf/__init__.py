"""transformers checkpoints, for programs that a config of transformers makes."""

from graphopt.lowering.hf.emitter import HfEmitter

__all__ = ["HfEmitter"]
