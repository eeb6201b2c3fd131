#include "matmul.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace emulator::cublaslt {

typedef float float8 __attribute__((vector_size(32)));
constexpr size_t LANES = 8;

size_t Operand::bytes() const {
    if (rows == 0 || cols == 0) return 0;
    const uint64_t last = (rows - 1) * static_cast<uint64_t>(row_step) + (cols - 1) * static_cast<uint64_t>(col_step);
    return (last + 1) * bytes_of(type);
}

static float read(const void* data, Type type, size_t at) {
    float value;
    if (type == R_16BF) {
        const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[at]) << 16;
        std::memcpy(&value, &bits, 4);
    } else {
        value = static_cast<const float*>(data)[at];
    }
    return value;
}

static void write(void* data, Type type, size_t at, float value) {
    if (type == R_32F) {
        static_cast<float*>(data)[at] = value;
        return;
    }
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    static_cast<uint16_t*>(data)[at] = is_nan ? 0x7fff : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static size_t place(const Operand& operand, uint64_t row, uint64_t col) {
    return static_cast<size_t>(row) * static_cast<size_t>(operand.row_step) + static_cast<size_t>(col) * static_cast<size_t>(operand.col_step);
}

/// All of `a` as f32, `[k][rows rounded up to LANES]`, so that eight sums go on side by side.
static std::vector<float8> pack(const Operand& a) {
    const size_t groups = (a.rows + LANES - 1) / LANES;
    std::vector<float8> packed(groups * a.cols, float8{});
    for (uint64_t row = 0; row < a.rows; row++) {
        for (uint64_t k = 0; k < a.cols; k++) {
            packed[row / LANES * a.cols + k][row % LANES] = read(a.data, a.type, place(a, row, k));
        }
    }
    return packed;
}

void multiply(const Product& product) {
    const Operand &a = product.a, &b = product.b, &c = product.c, &d = product.d;
    const std::vector<float8> packed = pack(a);
    const uint64_t depth = a.cols, piece = (depth + product.split_k - 1) / product.split_k;
    std::vector<float> column(depth);
    for (uint64_t col = 0; col < d.cols; col++) {
        for (uint64_t k = 0; k < depth; k++) column[k] = read(b.data, b.type, place(b, k, col));
        for (uint64_t first = 0; first < d.rows; first += LANES) {
            const float8* rows = &packed[first / LANES * depth];
            float8 total = {};
            for (uint64_t begin = 0; begin < depth; begin += piece) {
                float8 sum = {};
                for (uint64_t k = begin; k < std::min(begin + piece, depth); k++) sum += rows[k] * column[k];
                total = begin == 0 ? sum : total + sum;
            }
            for (uint64_t row = first; row < std::min<uint64_t>(first + LANES, d.rows); row++) {
                float value = product.alpha * total[row - first];
                if (product.beta != 0.0f) value += product.beta * read(c.data, c.type, place(c, row, col));
                if (product.bias != nullptr) value += read(product.bias, product.bias_type, row);
                write(d.data, d.type, place(d, row, col), value);
            }
        }
    }
}

}  // namespace emulator::cublaslt
