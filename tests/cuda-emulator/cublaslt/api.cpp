// cublasLt*: descriptors, a choice of two algorithms, and the product, which runs on a stream of the fake driver.
//
// Algorithm 0 adds by ascending k; algorithm 1 cuts K in two and adds the halves. The heuristic prefers 1 for few columns where the
// preference allows a reduction, so that who wants equal bits for any number of rows must pin one.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "enqueue.h"
#include "matmul.h"

using namespace emulator::cublaslt;

#define API extern "C" __attribute__((visibility("default")))

// Numbers of attributes and enumerators, as cublasLt.h has them.
enum DescAttribute { COMPUTE_TYPE = 0, SCALE_TYPE = 1, POINTER_MODE = 2, TRANSA = 3, TRANSB = 4, EPILOGUE = 7, BIAS_POINTER = 8, BIAS_DATA_TYPE = 26 };
enum LayoutAttribute { TYPE = 0, ORDER = 1, ROWS = 2, COLS = 3, LD = 4, BATCH_COUNT = 5 };
enum PreferenceAttribute { MAX_WORKSPACE_BYTES = 1, REDUCTION_SCHEME_MASK = 3, MIN_ALIGNMENT_A_BYTES = 5 };
enum ConfigAttribute { CONFIG_ID = 0, CONFIG_SPLITK_NUM = 2, CONFIG_REDUCTION_SCHEME = 3, LAST_CONFIG = 8 };
constexpr int COMPUTE_32F = 68, EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4, OPERATION_T = 1, OPERATION_C = 2, ORDER_ROW = 1;
constexpr uint32_t NO_REDUCTION = 0, REDUCTION_IN_COMPUTE_TYPE = 2;
/// Columns from which on splitting K is not worth it.
constexpr uint64_t FEW_COLUMNS = 16;

/// Descriptors of all kinds: attributes as the bytes that were set.
struct Attributes {
    std::map<int, std::vector<unsigned char>> values;

    void set(int attribute, const void* data, size_t bytes) {
        const unsigned char* first = static_cast<const unsigned char*>(data);
        values[attribute].assign(first, first + bytes);
    }
    template <typename T>
    T get(int attribute, T otherwise) const {
        const auto found = values.find(attribute);
        if (found != values.end()) std::memcpy(&otherwise, found->second.data(), std::min(sizeof(T), found->second.size()));
        return otherwise;
    }
};

/// `cublasLtMatmulAlgo_t`: 8 words that callers copy.
struct Algorithm {
    uint64_t magic;
    int32_t config[LAST_CONFIG + 1];
    /// Of a, b, c, d: what the heuristic was told of their addresses.
    uint16_t alignment[4];
    uint32_t unused[3];
};
static_assert(sizeof(Algorithm) == 64);
constexpr uint64_t MAGIC = 0x7465737365726131;

/// `cublasLtMatmulHeuristicResult_t`
struct HeuristicResult {
    Algorithm algorithm;
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};

static Status refuse(Status status, const char* reason) {
    std::fprintf(stderr, "cuda emulator: cublasLt: %s\n", reason);
    return status;
}

API size_t cublasLtGetVersion() {
    const char* text = std::getenv("CUDA_EMULATOR_CUBLASLT");
    return text == nullptr ? 130100 : static_cast<size_t>(std::atoll(text));
}

API const char* cublasLtGetStatusName(int status) {
    switch (status) {
        case SUCCESS: return "CUBLAS_STATUS_SUCCESS";
        case NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
        default: return "unknown";
    }
}

API const char* cublasLtGetStatusString(int status) {
    return cublasLtGetStatusName(status);
}

API int cublasLtCreate(void** handle) {
    *handle = new char;
    return SUCCESS;
}

API int cublasLtDestroy(void* handle) {
    delete static_cast<char*>(handle);
    return SUCCESS;
}

static int destroy(void* descriptor) {
    delete static_cast<Attributes*>(descriptor);
    return SUCCESS;
}

static int set(void* descriptor, int attribute, const void* data, size_t bytes) {
    if (descriptor == nullptr || data == nullptr) return INVALID_VALUE;
    static_cast<Attributes*>(descriptor)->set(attribute, data, bytes);
    return SUCCESS;
}

API int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    Attributes* attributes = new Attributes;
    attributes->set(TYPE, &type, sizeof(type));
    attributes->set(ROWS, &rows, sizeof(rows));
    attributes->set(COLS, &cols, sizeof(cols));
    attributes->set(LD, &ld, sizeof(ld));
    *layout = attributes;
    return SUCCESS;
}

API int cublasLtMatrixLayoutSetAttribute(void* layout, int attribute, const void* data, size_t bytes) {
    return set(layout, attribute, data, bytes);
}

API int cublasLtMatrixLayoutDestroy(void* layout) {
    return destroy(layout);
}

API int cublasLtMatmulDescCreate(void** descriptor, int compute_type, int scale_type) {
    Attributes* attributes = new Attributes;
    attributes->set(COMPUTE_TYPE, &compute_type, sizeof(int));
    attributes->set(SCALE_TYPE, &scale_type, sizeof(int));
    *descriptor = attributes;
    return SUCCESS;
}

API int cublasLtMatmulDescSetAttribute(void* descriptor, int attribute, const void* data, size_t bytes) {
    return set(descriptor, attribute, data, bytes);
}

API int cublasLtMatmulDescDestroy(void* descriptor) {
    return destroy(descriptor);
}

API int cublasLtMatmulPreferenceCreate(void** preference) {
    *preference = new Attributes;
    return SUCCESS;
}

API int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* data, size_t bytes) {
    return set(preference, attribute, data, bytes);
}

API int cublasLtMatmulPreferenceDestroy(void* preference) {
    return destroy(preference);
}

// --- Algorithms ---

static Algorithm algorithm(int id) {
    Algorithm made = {};
    made.magic = MAGIC;
    made.config[CONFIG_ID] = id;
    made.config[CONFIG_SPLITK_NUM] = id == 1 ? 2 : 1;
    made.config[CONFIG_REDUCTION_SCHEME] = id == 1 ? REDUCTION_IN_COMPUTE_TYPE : NO_REDUCTION;
    for (uint16_t& alignment : made.alignment) alignment = 16;
    return made;
}

static size_t workspace_bytes(const Algorithm& algorithm, uint64_t rows, uint64_t cols) {
    const int pieces = algorithm.config[CONFIG_SPLITK_NUM];
    return pieces > 1 ? static_cast<size_t>(pieces) * rows * cols * sizeof(float) : 0;
}

API int cublasLtMatmulAlgoGetIds(void*, int, int, int, int, int, int, int requested, int* ids, int* count) {
    *count = std::min(requested, 2);
    for (int i = 0; i < *count; i++) ids[i] = i;
    return SUCCESS;
}

API int cublasLtMatmulAlgoInit(void*, int, int, int, int, int, int, int id, Algorithm* made) {
    if (id != 0 && id != 1) return INVALID_VALUE;
    *made = algorithm(id);
    return SUCCESS;
}

API int cublasLtMatmulAlgoConfigSetAttribute(Algorithm* algorithm, int attribute, const void* data, size_t bytes) {
    if (attribute < 0 || attribute > LAST_CONFIG || bytes > sizeof(int32_t)) return INVALID_VALUE;
    std::memcpy(&algorithm->config[attribute], data, bytes);
    return SUCCESS;
}

API int cublasLtMatmulAlgoConfigGetAttribute(const Algorithm* algorithm, int attribute, void* data, size_t bytes, size_t* written) {
    if (attribute < 0 || attribute > LAST_CONFIG || bytes > sizeof(int32_t)) return INVALID_VALUE;
    std::memcpy(data, &algorithm->config[attribute], bytes);
    if (written != nullptr) *written = bytes;
    return SUCCESS;
}

// --- The product ---

/// Reads a layout; `transposed` exchanges rows and columns.
static Status read_operand(const void* layout, const void* data, bool transposed, Operand* operand) {
    const Attributes& attributes = *static_cast<const Attributes*>(layout);
    const uint64_t rows = attributes.get<uint64_t>(ROWS, 0), cols = attributes.get<uint64_t>(COLS, 0);
    const int64_t ld = attributes.get<int64_t>(LD, 0);
    const bool by_rows = attributes.get<int>(ORDER, 0) == ORDER_ROW;
    if (attributes.get<int>(ORDER, 0) > ORDER_ROW) return refuse(NOT_SUPPORTED, "a tiled layout");
    if (attributes.get<int>(BATCH_COUNT, 1) != 1) return refuse(NOT_SUPPORTED, "a batch");
    if (ld < static_cast<int64_t>(by_rows ? cols : rows)) return refuse(INVALID_VALUE, "a leading dimension below the extent");
    const int type = attributes.get<int>(TYPE, -1);
    if (type != R_32F && type != R_16BF) return refuse(NOT_SUPPORTED, "a type that is neither f32 nor bf16");
    *operand = {const_cast<void*>(data), static_cast<Type>(type), rows, cols, by_rows ? ld : 1, by_rows ? 1 : ld};
    if (transposed) {
        std::swap(operand->rows, operand->cols);
        std::swap(operand->row_step, operand->col_step);
    }
    return SUCCESS;
}

/// Reads all descriptors but the addresses.
static Status read_product(const void* descriptor, const void* a, const void* b, const void* c, const void* d, Product* product) {
    const Attributes& attributes = *static_cast<const Attributes*>(descriptor);
    const auto transposed = [&](int attribute) {
        const int operation = attributes.get<int>(attribute, 0);
        return operation == OPERATION_T || operation == OPERATION_C;
    };
    if (attributes.get<int>(COMPUTE_TYPE, 0) != COMPUTE_32F) return refuse(NOT_SUPPORTED, "a compute type other than f32");
    if (attributes.get<int>(SCALE_TYPE, -1) != R_32F) return refuse(NOT_SUPPORTED, "a scale type other than f32");
    if (attributes.get<int>(POINTER_MODE, 0) != 0) return refuse(NOT_SUPPORTED, "alpha and beta on the device");
    const struct {
        const void* layout;
        bool transposed;
        Operand* operand;
    } operands[] = {{a, transposed(TRANSA), &product->a}, {b, transposed(TRANSB), &product->b}, {c, false, &product->c}, {d, false, &product->d}};
    for (const auto& [layout, exchanged, operand] : operands) {
        const Status status = read_operand(layout, nullptr, exchanged, operand);
        if (status != SUCCESS) return status;
    }
    const Operand &pa = product->a, &pb = product->b, &pc = product->c, &pd = product->d;
    if (pa.cols != pb.rows || pa.rows != pd.rows || pb.cols != pd.cols || pc.rows != pd.rows || pc.cols != pd.cols) {
        return refuse(INVALID_VALUE, "extents that do not fit each other");
    }
    if (pa.type != pb.type || pc.type != pd.type || (pa.type == R_32F && pd.type != R_32F)) return refuse(NOT_SUPPORTED, "a mixture of types");
    const int epilogue = attributes.get<int>(EPILOGUE, EPILOGUE_DEFAULT);
    if (epilogue != EPILOGUE_DEFAULT && epilogue != EPILOGUE_BIAS) return refuse(NOT_SUPPORTED, "an epilogue other than a bias");
    product->bias = epilogue == EPILOGUE_BIAS ? attributes.get<const void*>(BIAS_POINTER, nullptr) : nullptr;
    product->bias_type = static_cast<Type>(attributes.get<int>(BIAS_DATA_TYPE, pd.type));
    if (epilogue == EPILOGUE_BIAS && product->bias == nullptr) return refuse(INVALID_VALUE, "a bias without an address");
    return SUCCESS;
}

API int cublasLtMatmulAlgoGetHeuristic(void* handle, void* descriptor, void* a, void* b, void* c, void* d, void* preference, int requested,
                                       HeuristicResult* results, int* count) {
    if (handle == nullptr || requested < 1) return INVALID_VALUE;
    Product product;
    const Status status = read_product(descriptor, a, b, c, d, &product);
    *count = 0;
    if (status != SUCCESS) return status;
    const Attributes& wishes = *static_cast<const Attributes*>(preference);
    const bool may_reduce = (wishes.get<uint32_t>(REDUCTION_SCHEME_MASK, 7) & REDUCTION_IN_COMPUTE_TYPE) != 0;
    std::vector<int> ids = {0};
    if (may_reduce) ids.insert(product.d.cols < FEW_COLUMNS ? ids.begin() : ids.end(), 1);
    for (const int id : ids) {
        Algorithm made = algorithm(id);
        for (int i = 0; i < 4; i++) made.alignment[i] = static_cast<uint16_t>(wishes.get<uint32_t>(MIN_ALIGNMENT_A_BYTES + i, 256));
        const size_t workspace = workspace_bytes(made, product.d.rows, product.d.cols);
        if (workspace > wishes.get<uint64_t>(MAX_WORKSPACE_BYTES, 0) || *count == requested) continue;
        results[(*count)++] = {made, workspace, SUCCESS, 1.0f, {}};
    }
    return SUCCESS;
}

API int cublasLtMatmulAlgoCheck(void*, void* descriptor, void* a, void* b, void* c, void* d, const Algorithm* algorithm, HeuristicResult* result) {
    Product product;
    const Status status = read_product(descriptor, a, b, c, d, &product);
    if (status != SUCCESS || algorithm->magic != MAGIC) return status != SUCCESS ? status : INVALID_VALUE;
    *result = {*algorithm, workspace_bytes(*algorithm, product.d.rows, product.d.cols), SUCCESS, 1.0f, {}};
    return SUCCESS;
}

/// Addresses that the algorithm may be given, within memory of the device.
static Status check_addresses(const Product& product, const Algorithm& algorithm) {
    const Operand* operands[] = {&product.a, &product.b, &product.c, &product.d};
    for (int i = 0; i < 4; i++) {
        if (i == 2 && product.beta == 0.0f) continue;
        if (reinterpret_cast<uintptr_t>(operands[i]->data) % algorithm.alignment[i] != 0) {
            return refuse(INVALID_VALUE, "an operand less aligned than the heuristic was told (256 bytes unless the preference says otherwise)");
        }
        if (!emulator_reaches(operands[i]->data, operands[i]->bytes())) return refuse(INVALID_VALUE, "an operand outside of the device's memory");
    }
    if (product.bias != nullptr && !emulator_reaches(product.bias, product.d.rows * bytes_of(product.bias_type))) {
        return refuse(INVALID_VALUE, "a bias outside of the device's memory");
    }
    return SUCCESS;
}

API int cublasLtMatmul(void* handle, void* descriptor, const float* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
                       const float* beta, const void* c, void* c_layout, void* d, void* d_layout, const Algorithm* chosen, void* workspace,
                       size_t workspace_limit, void* stream) {
    if (handle == nullptr) return NOT_INITIALIZED;
    Product product;
    const Status status = read_product(descriptor, a_layout, b_layout, c_layout, d_layout, &product);
    if (status != SUCCESS) return status;
    product.a.data = const_cast<void*>(a);
    product.b.data = const_cast<void*>(b);
    product.c.data = const_cast<void*>(c);
    product.d.data = d;
    product.alpha = *alpha;
    product.beta = *beta;
    const Algorithm algorithm = chosen != nullptr ? *chosen : ::algorithm(0);
    if (algorithm.magic != MAGIC) return refuse(INVALID_VALUE, "an algorithm that was not given by this library");
    product.split_k = static_cast<uint32_t>(std::max(1, algorithm.config[CONFIG_SPLITK_NUM]));
    const size_t needed = workspace_bytes(algorithm, product.d.rows, product.d.cols);
    if (needed > workspace_limit || (needed > 0 && !emulator_reaches(workspace, needed))) return refuse(INVALID_VALUE, "too little workspace");
    const Status placed = check_addresses(product, algorithm);
    if (placed != SUCCESS) return placed;
    return emulator_enqueue(stream, "cublasLtMatmul", [product] { multiply(product); }) == 0 ? SUCCESS : EXECUTION_FAILED;
}
