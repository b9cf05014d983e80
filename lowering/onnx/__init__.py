"""ONNX: a folder that onnxruntime and onnxruntime-genai load."""

from graphopt.lowering.onnx.emitter import OnnxEmitter

__all__ = ["OnnxEmitter"]
