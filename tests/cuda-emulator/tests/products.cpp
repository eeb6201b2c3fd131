// The fake cuBLASLt against plain loops.

#include <cstring>

#include "cuda_api.h"
#include "harness.h"

constexpr int R_32F = 0, R_16BF = 14;

static float bf16_value(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

/// A matrix in device memory, which here is host memory too. Numbers are multiples of 1/8, so that sums are exact in any order.
struct Matrix {
    Address address = 0;
    int type;
    uint64_t rows, cols, ld;

    Matrix(int type_, uint64_t rows_, uint64_t cols_, uint64_t ld_, harness::Random& random) : type(type_), rows(rows_), cols(cols_), ld(ld_) {
        const size_t bytes = type == R_32F ? 4 : 2;
        CHECK(cuMemAlloc_v2(&address, ld * cols * bytes) == 0);
        for (uint64_t i = 0; i < ld * cols; i++) {
            const float value = static_cast<float>(static_cast<int>(random.bits() % 17) - 8) / 8.0f;
            uint32_t word;
            std::memcpy(&word, &value, 4);
            if (type == R_32F) reinterpret_cast<float*>(address)[i] = value;
            else reinterpret_cast<uint16_t*>(address)[i] = static_cast<uint16_t>(word >> 16);
        }
    }
    ~Matrix() { cuMemFree_v2(address); }
    Matrix(const Matrix&) = delete;

    float at(uint64_t row, uint64_t col) const {
        const uint64_t i = row + col * ld;
        return type == R_32F ? reinterpret_cast<const float*>(address)[i] : bf16_value(reinterpret_cast<const uint16_t*>(address)[i]);
    }
    void* pointer() const { return reinterpret_cast<void*>(address); }
};

/// Context, stream, handle, workspace.
struct Library {
    void *context, *stream, *handle;
    Address workspace = 0;
    static constexpr size_t WORKSPACE = 1 << 20;

    Library() {
        CHECK(cuInit(0) == 0 && cuDevicePrimaryCtxRetain(&context, 0) == 0 && cuCtxSetCurrent(context) == 0);
        CHECK(cuStreamCreate(&stream, 1) == 0 && cublasLtCreate(&handle) == 0);
        CHECK(cuMemAlloc_v2(&workspace, WORKSPACE) == 0);
    }
    ~Library() {
        cuMemFree_v2(workspace);
        cublasLtDestroy(handle);
        cuStreamDestroy_v2(stream);
        cuDevicePrimaryCtxRelease_v2(0);
    }
};

struct Case {
    bool transpose_a, transpose_b;
    int type, output;
    bool has_bias;
    uint64_t m, n, k, pad;
    float beta;
    bool may_reduce;
};

struct Outcome {
    int status;
    int split_k;
    bool equal;
};

static Outcome run(const Library& library, const Case& c, size_t shift = 0) {
    harness::Random random = {c.m * 31 + c.n * 7 + c.k};
    const Matrix a(c.type, c.transpose_a ? c.k : c.m, c.transpose_a ? c.m : c.k, (c.transpose_a ? c.k : c.m) + c.pad, random);
    const Matrix b(c.type, c.transpose_b ? c.n : c.k, c.transpose_b ? c.k : c.n, (c.transpose_b ? c.n : c.k) + c.pad, random);
    const Matrix d(c.output, c.m, c.n, c.m + c.pad, random), bias(c.output, c.m, 1, c.m, random);
    std::vector<float> expected;
    for (uint64_t col = 0; col < c.n; col++) {
        for (uint64_t row = 0; row < c.m; row++) {
            float sum = 0.0f;
            for (uint64_t k = 0; k < c.k; k++) sum += (c.transpose_a ? a.at(k, row) : a.at(row, k)) * (c.transpose_b ? b.at(col, k) : b.at(k, col));
            expected.push_back(2.0f * sum + (c.beta == 0.0f ? 0.0f : c.beta * d.at(row, col)) + (c.has_bias ? bias.at(row, 0) : 0.0f));
        }
    }
    void *descriptor, *preference, *la, *lb, *ld;
    const int ta = c.transpose_a, tb = c.transpose_b, epilogue = c.has_bias ? 4 : 1;
    const uint32_t reductions = c.may_reduce ? 7 : 0;
    const uint64_t limit = Library::WORKSPACE;
    cublasLtMatmulDescCreate(&descriptor, 68, R_32F);
    cublasLtMatmulDescSetAttribute(descriptor, 3, &ta, 4);
    cublasLtMatmulDescSetAttribute(descriptor, 4, &tb, 4);
    cublasLtMatmulDescSetAttribute(descriptor, 7, &epilogue, 4);
    cublasLtMatmulDescSetAttribute(descriptor, 8, &bias.address, 8);
    cublasLtMatmulPreferenceCreate(&preference);
    cublasLtMatmulPreferenceSetAttribute(preference, 1, &limit, 8);
    cublasLtMatmulPreferenceSetAttribute(preference, 3, &reductions, 4);
    cublasLtMatrixLayoutCreate(&la, a.type, a.rows, a.cols, static_cast<int64_t>(a.ld));
    cublasLtMatrixLayoutCreate(&lb, b.type, b.rows, b.cols, static_cast<int64_t>(b.ld));
    cublasLtMatrixLayoutCreate(&ld, d.type, d.rows, d.cols, static_cast<int64_t>(d.ld));
    alignas(8) unsigned char results[96 * 2];
    int count = 0;
    Outcome outcome = {cublasLtMatmulAlgoGetHeuristic(library.handle, descriptor, la, lb, ld, ld, preference, 1, results, &count), 0, true};
    if (outcome.status == 0 && count == 1) {
        cublasLtMatmulAlgoConfigGetAttribute(results, 2, &outcome.split_k, 4, nullptr);
        const float alpha = 2.0f;
        unsigned char* pa = static_cast<unsigned char*>(a.pointer()) + shift;
        outcome.status = cublasLtMatmul(library.handle, descriptor, &alpha, pa, la, b.pointer(), lb, &c.beta, d.pointer(), ld, d.pointer(), ld,
                                        results, reinterpret_cast<void*>(library.workspace), Library::WORKSPACE, library.stream);
        CHECK(cuStreamSynchronize(library.stream) == 0);
    }
    for (uint64_t i = 0; i < expected.size(); i++) {
        const float got = d.at(i % c.m, i / c.m);
        outcome.equal = outcome.equal && std::fabs(got - expected[i]) <= (c.output == R_32F ? 0.0f : std::fabs(expected[i]) / 256.0f);
    }
    for (void* layout : {la, lb, ld}) cublasLtMatrixLayoutDestroy(layout);
    cublasLtMatmulDescDestroy(descriptor);
    cublasLtMatmulPreferenceDestroy(preference);
    return outcome;
}

TEST(products_in_all_forms) {
    const Library library;
    for (int form = 0; form < 64; form++) {
        const int type = (form & 4) != 0 ? R_16BF : R_32F, output = (form & 8) != 0 && type == R_16BF ? R_16BF : R_32F;
        const Case c = {(form & 1) != 0, (form & 2) != 0, type, output, (form & 16) != 0, 37, 5, 24, (form & 32) != 0 ? 3u : 0u,
                        (form & 32) != 0 ? 1.0f : 0.0f, false};
        const Outcome outcome = run(library, c);
        CHECK(outcome.status == 0 && outcome.split_k == 1 && outcome.equal);
    }
}

TEST(a_heuristic_that_may_reduce_splits_k_for_few_columns) {
    const Library library;
    const Case few = {true, false, R_16BF, R_32F, false, 33, 4, 64, 0, 0.0f, true}, many = {true, false, R_16BF, R_32F, false, 33, 64, 64, 0, 0.0f, true};
    const Outcome of_few = run(library, few), of_many = run(library, many);
    CHECK(of_few.status == 0 && of_few.split_k == 2 && of_few.equal);
    CHECK(of_many.status == 0 && of_many.split_k == 1 && of_many.equal);
}

TEST(operands_must_be_as_aligned_as_promised) {
    const Library library;
    const Case c = {true, false, R_16BF, R_32F, false, 8, 8, 16, 0, 0.0f, false};
    CHECK(run(library, c, 16).status == 7);
    const Case mixed = {true, false, R_32F, R_16BF, false, 8, 8, 16, 0, 0.0f, false};
    CHECK(run(library, mixed).status == 15);
}

int main(int argc, char** argv) {
    return harness::run_all(argc, argv);
}
