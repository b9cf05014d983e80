"""The types that matrices of a GGUF file may be asked to have."""

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")
"""By the names that a user gives; those of the format are the same in capitals."""
