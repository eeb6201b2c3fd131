// What a product is, once all descriptors are read.

#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator::cublaslt {

enum Status : int { SUCCESS = 0, NOT_INITIALIZED = 1, ALLOC_FAILED = 3, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };

enum Type : int { R_32F = 0, R_16BF = 14 };

constexpr size_t bytes_of(Type type) {
    return type == R_16BF ? 2 : 4;
}

/// A matrix in memory: element (i, j) lies at i · row_step + j · col_step.
struct Operand {
    void* data;
    Type type;
    uint64_t rows, cols;
    int64_t row_step, col_step;

    size_t bytes() const;
};

/// d = alpha · a · b + beta · c + bias, bias one number per row of d.
struct Product {
    Operand a, b, c, d;
    float alpha, beta;
    /// Null when there is none.
    const void* bias;
    Type bias_type;
    /// Into how many pieces K is cut; their sums are added at the end.
    uint32_t split_k;
};

/// Each sum in f32 by ascending k.
void multiply(const Product& product);

}  // namespace emulator::cublaslt
