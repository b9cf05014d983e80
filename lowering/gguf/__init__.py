"""GGUF files, for llama.cpp: of the architectures that are read from them."""

from graphopt.lowering.gguf.emitter import GgufEmitter

__all__ = ["GgufEmitter"]
