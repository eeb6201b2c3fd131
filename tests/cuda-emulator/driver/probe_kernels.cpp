// Kernels that the tests of the fake driver launch.

#include "platform.cuh"

/// x[i] += value for i < count, and x[beside] = 0 if beside is not 0.
KERNEL(emulator_add)(float* x, float value, int32_t count, int64_t beside) {
    const int32_t i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) x[i] += value;
    if (i == 0 && beside != 0) x[beside] = 0.0f;
}
REGISTER(emulator_add)

/// x[0..4] as one vector at an offset of `bytes`.
KERNEL(emulator_load_vector)(float* x, int32_t bytes) {
    const float4 vector = *reinterpret_cast<const float4*>(reinterpret_cast<const char*>(x) + bytes);
    x[0] = vector.x + vector.w;
}
REGISTER(emulator_load_vector)
