"""How exactly ONNX Runtime multiplies with packed weights: com.microsoft::MatMulNBits' levels."""

EXACT = 1
"""Products in fp32."""

ROUNDING = 4
"""Products of integers: what packed weights are multiplied with is rounded to 8 bits, in blocks."""

ACCURACY_LEVELS = (EXACT, ROUNDING)
"""Those that are written: of the others, one is fp32 as well and two compute in 16 bits."""
