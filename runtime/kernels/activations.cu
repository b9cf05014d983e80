// Activations of gates, for the kernels in whose front this stands.
//
// Constants: ACTIVATION, a place among the names below; ROUNDED, where what comes out becomes codes
// of a few bits: then sigmoids may be 2^-12 off, by one instruction in place of two and a sum.

// machine instructions ---------------------------------------------------------------------------

__device__ __forceinline__ float exponential(float x) { return __expf(x); }
__device__ __forceinline__ float quotient(float x, float y) { return __fdividef(x, y); }
// PTX ISA, tanh.approx.f32: at most 2^-11 of the result off.
__device__ __forceinline__ float rough_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// activations ------------------------------------------------------------------------------------

enum { SILU, SIGMOID, GELU, GELU_TANH, QUICK_GELU, RELU, RELU2, TANH };

__device__ __forceinline__ float sigmoid(float x) {
  if (ROUNDED) return fmaf(0.5f, rough_tanh(0.5f * x), 0.5f);
  return quotient(1.0f, 1.0f + exponential(-x));
}

__device__ __forceinline__ float activation(float x) {
  switch (ACTIVATION) {
    case SILU: return x * sigmoid(x);
    case SIGMOID: return sigmoid(x);
    case GELU: return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    // 1 + tanh(u) is 2 sigmoid(2 u).
    case GELU_TANH: return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    case QUICK_GELU: return x * sigmoid(1.702f * x);
    case RELU: return fmaxf(x, 0.0f);
    case RELU2: return fmaxf(x, 0.0f) * fmaxf(x, 0.0f);
    default: return tanhf(x);
  }
}
