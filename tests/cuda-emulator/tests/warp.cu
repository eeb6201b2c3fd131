// Barriers, shuffles, votes, atomics; and how misuse of them ends.

#include "platform.cuh"

#include "harness.h"

KERNEL(sum_block)(const float* x, float* out) {
    SHARED(float, partial, 32);
    float sum = x[blockIdx.x * blockDim.x + threadIdx.x];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0.0f;
        for (unsigned i = 0; i < blockDim.x / 32; i++) total += partial[i];
        out[blockIdx.x] = total;
    }
}
REGISTER(sum_block)

TEST(block_sums) {
    std::vector<float> x(4 * 256), out(4, -1.0f);
    for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(i);
    harness::launch("sum_block", {4}, {256}, 0, const_cast<const float*>(x.data()), out.data());
    for (int block = 0; block < 4; block++) CHECK(out[block] == 256.0f * (256.0f * block) + 255.0f * 128.0f);
}

KERNEL(shuffles)(int* out) {
    const int lane = static_cast<int>(threadIdx.x);
    int* row = out + 8 * lane;
    row[0] = __shfl_sync(FULL_WARP, lane, 5);
    row[1] = __shfl_down_sync(FULL_WARP, lane, 3);
    row[2] = __shfl_up_sync(FULL_WARP, lane, 3);
    row[3] = __shfl_xor_sync(FULL_WARP, lane, 9);
    row[4] = __shfl_sync(FULL_WARP, lane, 2, 8);
    row[5] = static_cast<int>(__shfl_xor_sync(FULL_WARP, 1.5 * lane, 1) * 2.0);
    row[6] = static_cast<int>(__ballot_sync(FULL_WARP, lane % 3 == 0));
    row[7] = 0;
    if (lane < 16) row[7] = __shfl_xor_sync(0xffffu, lane, 8);
    __syncwarp();
}
REGISTER(shuffles)

TEST(shuffles_read_the_named_lane) {
    std::vector<int> out(8 * 32, -1);
    harness::launch("shuffles", {1}, {32}, 0, out.data());
    int votes = 0;
    for (int lane = 0; lane < 32; lane += 3) votes |= static_cast<int>(1u << lane);
    for (int lane = 0; lane < 32; lane++) {
        const int* row = &out[8 * lane];
        CHECK(row[0] == 5);
        CHECK(row[1] == (lane + 3 < 32 ? lane + 3 : lane));
        CHECK(row[2] == (lane >= 3 ? lane - 3 : lane));
        CHECK(row[3] == (lane ^ 9));
        CHECK(row[4] == (lane & ~7) + 2);
        CHECK(row[5] == 3 * (lane ^ 1));
        CHECK(row[6] == votes);
        CHECK(row[7] == (lane < 16 ? (lane ^ 8) : 0));
    }
}

KERNEL(positions)(int* count, uint64_t* largest) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    atomicAdd(&count[block * threads + thread], 1);
    atomicMax(largest, static_cast<uint64_t>(block) * threads + thread);
}
REGISTER(positions)

TEST(every_position_runs_once) {
    std::vector<int> count(2 * 3 * 4 * 5 * 6 * 7, 0);
    uint64_t largest = 0;
    harness::launch("positions", {2, 3, 4}, {5, 6, 7}, 0, count.data(), &largest);
    for (int n : count) CHECK(n == 1);
    CHECK(largest == count.size() - 1);
}

KERNEL_BOUNDS(votes, 64, 1)(int* out) {
    const bool odd = threadIdx.x % 2 == 1;
    const int any = __syncthreads_or(odd), all = __syncthreads_and(odd), count = __syncthreads_count(odd);
    if (threadIdx.x == 7) {
        out[0] = any;
        out[1] = all;
        out[2] = count;
    }
}
REGISTER(votes)

TEST(block_votes) {
    int out[3] = {-1, -1, -1};
    harness::launch("votes", {1}, {64}, 0, static_cast<int*>(out));
    CHECK(out[0] == 1 && out[1] == 0 && out[2] == 32);
    CHECK_DIES("more threads in a block than the kernel takes", harness::launch("votes", {1}, {65}, 0, static_cast<int*>(out)));
}

KERNEL(misuse)(int what) {
    const unsigned lane = threadIdx.x;
    switch (what) {
        case 0:  // a thread returns before a barrier
            if (lane == 3) return;
            __syncthreads();
            break;
        case 1:  // two barriers
            if (lane < 32) __syncthreads();
            else __syncthreads();
            break;
        case 2:  // a lane returns before a shuffle
            if (lane == 4) return;
            __shfl_xor_sync(FULL_WARP, 1, 1);
            break;
        case 3:  // different collectives in one warp
            if (lane % 2 == 0) __syncwarp();
            else __ballot_sync(FULL_WARP, 1);
            break;
        case 4:  // a mask without the caller
            __syncwarp(0xfffffffeu);
            break;
        case 5:  // a source that takes no part
            if (lane < 16) __shfl_sync(0xffffu, 1, 20);
            break;
        case 6:  // one lane at a barrier, others in a shuffle
            if (lane == 9) __syncthreads();
            __shfl_xor_sync(FULL_WARP, 1, 1);
            break;
    }
}
REGISTER(misuse)

TEST(misuse_ends_with_a_message) {
    const auto run = [](int what) { harness::launch("misuse", {2}, {64}, 0, what); };
    CHECK_DIES("kernel misuse, block (0, 0, 0), thread (3, 0, 0): returned, but 3 threads wait at", run(0));
    CHECK_DIES("divergent barrier: __syncthreads at", run(1));
    CHECK_DIES("waits for it in a shuffle", run(2));
    CHECK_DIES("divergent warp: a vote", run(3));
    CHECK_DIES("lacks the calling lane 0", run(4));
    CHECK_DIES("reads lane 20, which takes no part", run(5));
    CHECK_DIES("__syncthreads, but thread (0, 0, 0) waits for it in a shuffle", run(6));
    CHECK(harness::message_of_death([&] { run(99); }).empty());
}

int main(int argc, char** argv) {
    return harness::run_all(argc, argv);
}
