// Matrix products, fragment loads, asynchronous copies, shared memory; and how misuse of them ends.

#include "platform.cuh"

#include "harness.h"

// --- mma: fragments filled here by the PTX ISA's formulas for element i of a lane, not by the emulator's. ---

KERNEL(multiply_tile)(const bf16* a, const bf16* b, const float* c, float* d) {
    const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
    uint32_t ra[4], rb[2];
    float rc[4], rd[4];
    uint16_t* ea = reinterpret_cast<uint16_t*>(ra);
    uint16_t* eb = reinterpret_cast<uint16_t*>(rb);
    for (int i = 0; i < 8; i++) {
        const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
        const int col = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
        ea[i] = a[row * 16 + col].bits;
    }
    for (int i = 0; i < 4; i++) {
        const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
        eb[i] = b[row * 8 + group].bits;
    }
    for (int i = 0; i < 4; i++) rc[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    mma_m16n8k16_bf16(rd, ra, rb, rc);
    for (int i = 0; i < 4; i++) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = rd[i];
}
REGISTER(multiply_tile)

TEST(mma_equals_the_naive_product) {
    harness::Random random = {7};
    std::vector<bf16> a(16 * 16), b(16 * 8);
    std::vector<float> c(16 * 8), d(16 * 8, NAN);
    for (bf16& x : a) x = to_bf16(random.next());
    for (bf16& x : b) x = to_bf16(random.next());
    for (float& x : c) x = random.next();
    harness::launch("multiply_tile", {1}, {32}, 0, const_cast<const bf16*>(a.data()), const_cast<const bf16*>(b.data()),
                    const_cast<const float*>(c.data()), d.data());
    for (int row = 0; row < 16; row++) {
        for (int col = 0; col < 8; col++) {
            double sum = c[row * 8 + col];
            for (int k = 0; k < 16; k++) sum += static_cast<double>(to_float(a[row * 16 + k])) * to_float(b[k * 8 + col]);
            CHECK(std::fabs(sum - d[row * 8 + col]) < 1e-5);
        }
    }
}

TEST(bf16_rounds_to_even_and_keeps_nan) {
    CHECK(to_bf16(1.0f + 0x1p-8f).bits == 0x3f80);
    CHECK(to_bf16(1.0f + 0x3p-8f).bits == 0x3f82);
    CHECK(to_bf16(1.0f + 0x1.01p-8f).bits == 0x3f81);
    CHECK(to_bf16(3.4e38f).bits == 0x7f80);
    CHECK(to_bf16(-INFINITY).bits == 0xff80);
    CHECK(std::isnan(to_float(to_bf16(__uint_as_float(0x7f800001u)))));
    CHECK(pack_bf16x2(1.0f, -2.0f) == 0xc0003f80u);
    CHECK(bf16x2_low(0xc0003f80u) == 1.0f && bf16x2_high(0xc0003f80u) == -2.0f);
}

// --- ldmatrix ---

/// The i-th number of matrix m at (r, c) is 64 m + 8 r + c.
KERNEL(load_fragments)(uint32_t* out, int misuse) {
    SHARED(uint16_t, tile, 4 * 64);
    SHARED(uint16_t, apart, 8);
    for (int i = threadIdx.x; i < 4 * 64; i += 32) tile[i] = static_cast<uint16_t>(i);
    __syncwarp();
    const uint16_t* row = tile + 8 * threadIdx.x;
    if (misuse == 1) row += 1;
    if (misuse == 2 && threadIdx.x == 9) row = apart + 8;
    ldmatrix_x4(out + 12 * threadIdx.x, row);
    ldmatrix_x4_trans(out + 12 * threadIdx.x + 4, row);
    ldmatrix_x2(out + 12 * threadIdx.x + 8, tile + 8 * (threadIdx.x % 16));
    ldmatrix_x2_trans(out + 12 * threadIdx.x + 10, tile + 8 * (threadIdx.x % 16));
}
REGISTER(load_fragments)

TEST(ldmatrix_hands_out_fragments) {
    std::vector<uint32_t> out(12 * 32, 0);
    harness::launch("load_fragments", {1}, {32}, 0, out.data(), 0);
    for (uint32_t lane = 0; lane < 32; lane++) {
        for (uint32_t m = 0; m < 4; m++) {
            const uint32_t first = 64 * m + 8 * (lane / 4) + 2 * (lane % 4);
            const uint32_t below = 64 * m + 16 * (lane % 4) + lane / 4;
            CHECK(out[12 * lane + m] == (first | (first + 1) << 16));
            CHECK(out[12 * lane + 4 + m] == (below | (below + 8) << 16));
            if (m < 2) CHECK(out[12 * lane + 8 + m] == (first | (first + 1) << 16));
            if (m < 2) CHECK(out[12 * lane + 10 + m] == (below | (below + 8) << 16));
        }
    }
    CHECK_DIES("ldmatrix_x4: row at", harness::launch("load_fragments", {1}, {32}, 0, out.data(), 1));
    CHECK_DIES("is not in shared memory", harness::launch("load_fragments", {1}, {32}, 0, out.data(), 2));
}

// --- cp.async ---

KERNEL(copy_tiles)(const float* src, float* out, int wait) {
    DYNAMIC_SHARED(float, tiles);
    float* first = tiles + 4 * threadIdx.x;
    float* second = first + 4 * blockDim.x;
    cp_async_16(first, src + 4 * threadIdx.x, true);
    cp_async_commit();
    cp_async_16(second, src, threadIdx.x % 2 == 0);
    cp_async_commit();
    if (wait == 1) cp_async_wait<1>();
    if (wait == 2) cp_async_wait<0>();
    out[2 * threadIdx.x] = first[3];
    out[2 * threadIdx.x + 1] = second[0];
}
REGISTER(copy_tiles)

TEST(copies_arrive_when_waited_for) {
    alignas(16) float src[4 * 64];
    for (int i = 0; i < 4 * 64; i++) src[i] = static_cast<float>(i + 1);
    std::vector<float> out(2 * 64);
    for (int wait = 0; wait < 3; wait++) {
        harness::launch("copy_tiles", {1}, {64}, 2 * 64 * 16, static_cast<const float*>(src), out.data(), wait);
        for (int thread = 0; thread < 64; thread++) {
            const float first = out[2 * thread], second = out[2 * thread + 1];
            CHECK(wait == 0 ? std::isnan(first) : first == static_cast<float>(4 * thread + 4));
            CHECK(wait < 2 ? std::isnan(second) : second == (thread % 2 == 0 ? 1.0f : 0.0f));
        }
    }
    CHECK_DIES("is not in shared memory",
               harness::launch("copy_tiles", {1}, {64}, 2 * 64 * 16 - 16, static_cast<const float*>(src), out.data(), 2));
    CHECK_DIES("source", harness::launch("copy_tiles", {1}, {64}, 2 * 64 * 16, static_cast<const float*>(src + 1), out.data(), 2));
}

// --- Shared memory ---

KERNEL(leave_marks)(float* out, int index) {
    SHARED(float, mark, 8);
    out[blockIdx.x] = mark[3];
    mark[3] = 1.0f;
    mark[index] = 1.0f;
}
REGISTER(leave_marks)

template <int BYTES>
__device__ void use_much() {
    SHARED(char, much, BYTES);
    much[0] = 1;
}

KERNEL(too_much_shared)(int bytes) {
    if (bytes > 0) use_much<(48 << 10)>();
    if (bytes > 1) use_much<16>();
}
REGISTER(too_much_shared)

TEST(shared_memory_is_fresh_and_bounded) {
    std::vector<float> out(3, 0.0f);
    harness::launch("leave_marks", {3}, {1}, 0, out.data(), 4);
    for (float x : out) CHECK(std::isnan(x));
    CHECK_DIES("wrote outside of shared array mark", harness::launch("leave_marks", {3}, {1}, 0, out.data(), 8));
    CHECK_DIES("wrote outside of shared array", harness::launch("leave_marks", {3}, {1}, 0, out.data(), -1));
    harness::launch("too_much_shared", {1}, {1}, 179 << 10, 1);
    CHECK_DIES("declared shared memory", harness::launch("too_much_shared", {1}, {1}, 0, 2));
    CHECK_DIES("more dynamic shared memory", harness::launch("too_much_shared", {1}, {1}, 228 << 10, 0));
}

TEST(launch_limits) {
    const auto run = [](dim3 grid, dim3 block) { harness::launch("too_much_shared", grid, block, 0, 0); };
    CHECK_DIES("a block past", run({1}, {1025}));
    CHECK_DIES("more threads", run({1}, {33, 32}));
    CHECK_DIES("a block past", run({1}, {1, 1, 65}));
    CHECK_DIES("a block without threads", run({1}, {0}));
    CHECK_DIES("a grid without blocks", run({1, 0}, {1}));
    CHECK_DIES("a grid past", run({1, 65536}, {1}));
    run({70000}, {1});
}

int main(int argc, char** argv) {
    return harness::run_all(argc, argv);
}
