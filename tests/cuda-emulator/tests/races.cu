// What the search for races finds, and what it lets pass. Without it nothing is found.

#include "platform.cuh"

#include "harness.h"

KERNEL(exchange)(float* out, int how) {
    SHARED(float, tile, 64);
    const unsigned thread = threadIdx.x;
    tile[thread] = static_cast<float>(thread);
    switch (how) {
        case 0: __syncthreads(); break;
        case 1: __syncwarp(); break;  // enough within a warp only
        case 2: break;
    }
    const unsigned partner = thread ^ (how == 1 && blockDim.x == 64 ? 32 : 1);
    const float value = tile[partner];
    if (how == 3) __syncthreads();  // too late
    out[blockIdx.x * blockDim.x + thread] = value;
}
REGISTER(exchange)

/// Reads, then writes what another warp may still be reading.
KERNEL(reuse)(float* out, int with_barrier) {
    SHARED(float, tile, 64);
    tile[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = tile[63 - threadIdx.x];
    if (with_barrier) __syncthreads();
    tile[threadIdx.x] = 2.0f;
}
REGISTER(reuse)

KERNEL(meet)(uint32_t* total, int with_atomics) {
    if (with_atomics) atomicAdd(total, 1u);
    else if (threadIdx.x == 0) *total += 1;
}
REGISTER(meet)

KERNEL(stage)(const float* src, float* out, int with_barrier) {
    SHARED(float4, tile, 64);
    cp_async_16(&tile[threadIdx.x], src + 4 * threadIdx.x, true);
    cp_async_commit();
    cp_async_wait<0>();
    if (with_barrier) __syncthreads();
    out[threadIdx.x] = tile[63 - threadIdx.x].x;
}
REGISTER(stage)

static bool is_found(const std::function<void()>& body) {
    return harness::message_of_death(body).find("race in") != std::string::npos;
}

TEST(races_are_found_when_looked_for) {
#ifdef __SANITIZE_THREAD__
    const bool looked_for = true;
#else
    const bool looked_for = false;
#endif
    std::vector<float> out(256, 0.0f);
    alignas(16) float src[256] = {};
    uint32_t total = 0;
    const auto exchange = [&](unsigned threads, int how) { return is_found([&, threads, how] { harness::launch("exchange", {2}, {threads}, 0, out.data(), how); }); };
    CHECK(!exchange(64, 0));
    CHECK(!exchange(32, 1));
    CHECK(exchange(64, 1) == looked_for);
    CHECK(exchange(32, 2) == looked_for);
    CHECK(exchange(32, 3) == looked_for);
    CHECK(is_found([&] { harness::launch("reuse", {1}, {64}, 0, out.data(), 0); }) == looked_for);
    CHECK(!is_found([&] { harness::launch("reuse", {1}, {64}, 0, out.data(), 1); }));
    CHECK(is_found([&] { harness::launch("meet", {2}, {32}, 0, &total, 0); }) == looked_for);
    CHECK(!is_found([&] { harness::launch("meet", {2}, {32}, 0, &total, 1); }));
    CHECK(is_found([&] { harness::launch("stage", {1}, {64}, 0, static_cast<const float*>(src), out.data(), 0); }) == looked_for);
    CHECK(!is_found([&] { harness::launch("stage", {1}, {64}, 0, static_cast<const float*>(src), out.data(), 1); }));
}

int main(int argc, char** argv) {
    return harness::run_all(argc, argv);
}
