// Running a launch: blocks one after another, threads as fibers, the block barrier.

#include "block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fault.h"
#include "observer.h"

namespace emulator {

thread_local Thread* current __attribute__((tls_model("initial-exec"))) = nullptr;

const Observer* observer = nullptr;

RunningBlock& running() {
    static thread_local RunningBlock block;
    return block;
}

/// The last instead of the first ready thread goes on, and blocks run backwards: what depends on order shows.
static bool backwards() {
    static const bool value = [] {
        const char* order = std::getenv("CUDA_EMULATOR_ORDER");
        return order != nullptr && std::strcmp(order, "backwards") == 0;
    }();
    return value;
}

static unsigned pick(uint32_t mask) {
    return backwards() ? 31u - static_cast<unsigned>(__builtin_clz(mask)) : static_cast<unsigned>(__builtin_ctz(mask));
}

std::string describe(const Fiber& fiber) {
    char text[64];
    std::snprintf(text, sizeof(text), "thread (%u, %u, %u)", fiber.index.x, fiber.index.y, fiber.index.z);
    return text;
}

void fail(const char* format, ...) {
    std::fprintf(stderr, "cuda emulator: ");
    if (current != nullptr) {
        const RunningBlock& block = running();
        std::fprintf(stderr, "kernel %s, block (%u, %u, %u), %s: ", block.kernel->name, block.index.x, block.index.y, block.index.z,
                     describe(self()).c_str());
    }
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    std::fflush(stderr);
    std::abort();
}

void make_unready(Fiber& fiber, State state) {
    RunningBlock& block = running();
    fiber.state = state;
    block.ready_lanes[fiber.warp] &= ~(1u << fiber.lane);
    if (block.ready_lanes[fiber.warp] == 0) block.ready_warps &= ~(1u << fiber.warp);
}

void make_ready(Fiber& fiber) {
    RunningBlock& block = running();
    fiber.state = State::Ready;
    block.ready_lanes[fiber.warp] |= 1u << fiber.lane;
    block.ready_warps |= 1u << fiber.warp;
}

static void switch_to(Fiber& next, void** from) {
    current = &next;
    emulator_switch(from, next.stack_pointer);
}

/// A ready fiber, of `warp` if it has one.
static Fiber* next_ready(unsigned warp) {
    RunningBlock& block = running();
    if (block.ready_warps == 0) return nullptr;
    if (block.ready_lanes[warp] == 0) warp = pick(block.ready_warps);
    return &block.fibers[warp * 32 + pick(block.ready_lanes[warp])];
}

void wait_for_others() {
    Fiber& fiber = self();
    Fiber* next = next_ready(fiber.warp);
    if (next == nullptr) fail("all threads wait");
    switch_to(*next, &fiber.stack_pointer);
}

int sync_threads(Vote vote, int predicate, const char* file, int line) {
    RunningBlock& block = running();
    Fiber& fiber = self();
    check_nobody_waits("__syncthreads");
    if (block.num_done > 0) fail("__syncthreads at %s:%d, but %u threads have returned", file, line, block.num_done);
    if (block.num_arrived == 0) {
        block.barrier_file = file;
        block.barrier_line = line;
        block.barrier_vote = vote;
        block.barrier_true = 0;
    } else if (block.barrier_line != line || std::strcmp(block.barrier_file, file) != 0 || block.barrier_vote != vote) {
        fail("divergent barrier: __syncthreads at %s:%d, others wait at %s:%d", file, line, block.barrier_file, block.barrier_line);
    }
    block.barrier_true += predicate != 0;
    if (++block.num_arrived < block.num_threads) {
        make_unready(fiber, State::AtBarrier);
        wait_for_others();
        return block.barrier_result;
    }
    const int total = static_cast<int>(block.num_threads);
    switch (vote) {
        case Vote::None: block.barrier_result = 0; break;
        case Vote::Or: block.barrier_result = block.barrier_true > 0; break;
        case Vote::And: block.barrier_result = block.barrier_true == total; break;
        case Vote::Count: block.barrier_result = block.barrier_true; break;
    }
    block.num_arrived = 0;
    if (observer != nullptr) observer->block_synchronised();
    for (unsigned i = 0; i < block.num_threads; i++) {
        if (&block.fibers[i] != &fiber) make_ready(block.fibers[i]);
    }
    return block.barrier_result;
}

static void thread_main() {
    RunningBlock& block = running();
    block.kernel->call(block.arguments);
    Fiber& fiber = self();
    check_nobody_waits("return");
    if (block.num_arrived > 0) {
        fail("returned, but %u threads wait at %s:%d", block.num_arrived, block.barrier_file, block.barrier_line);
    }
    make_unready(fiber, State::Done);
    block.num_done++;
    Fiber* next = next_ready(fiber.warp);
    void* unused;
    if (next != nullptr) {
        switch_to(*next, &unused);
    } else {
        if (block.num_done != block.num_threads) fail("returned, and all others wait");
        emulator_switch(&unused, block.home);
    }
    __builtin_unreachable();
}

static void prepare_threads(RunningBlock& block) {
    block.ready_warps = block.num_warps == 32 ? ~0u : (1u << block.num_warps) - 1;
    for (unsigned warp = 0; warp < block.num_warps; warp++) {
        const unsigned lanes = std::min(32u, block.num_threads - warp * 32);
        block.ready_lanes[warp] = lanes == 32 ? ~0u : (1u << lanes) - 1;
        block.waiting_lanes[warp] = 0;
    }
    dim3 index = {0, 0, 0};
    for (unsigned i = 0; i < block.num_threads; i++) {
        Fiber& fiber = block.fibers[i];
        fiber.index = index;
        fiber.lane = i % 32;
        fiber.warp = i / 32;
        fiber.block = &block;
        fiber.state = State::Ready;
        fiber.copies.clear();
        fiber.group_ends.clear();
        fiber.stack_pointer = block.stacks.prepare(i, thread_main);
        if (++index.x == block.block_dim.x) {
            index.x = 0;
            if (++index.y == block.block_dim.y) {
                index.y = 0;
                index.z++;
            }
        }
    }
}

static void run_block(RunningBlock& block, size_t dynamic_bytes) {
    block.dynamic_shared = block.shared.start_block(dynamic_bytes);
    block.num_done = block.num_arrived = 0;
    prepare_threads(block);
    if (observer != nullptr) observer->block_begins();
    switch_to(*next_ready(0), &block.home);
    if (const char* name = block.shared.overwritten()) fail("wrote outside of shared array %s", name);
    current = nullptr;
}

void run(const Kernel& kernel, const Shape& shape, void** arguments) {
    if (current != nullptr) fail("launch inside a kernel");
    catch_faults();
    if (observer != nullptr) observer->launch_begins();
    RunningBlock& block = running();
    block.kernel = &kernel;
    block.arguments = arguments;
    block.block_dim = shape.block;
    block.grid_dim = shape.grid;
    block.num_threads = shape.block.x * shape.block.y * shape.block.z;
    block.num_warps = (block.num_threads + 31) / 32;
    if (block.fibers.size() < block.num_threads) block.fibers.resize(block.num_threads);
    const uint64_t plane = static_cast<uint64_t>(shape.grid.x) * shape.grid.y, blocks = plane * shape.grid.z;
    for (uint64_t i = 0; i < blocks; i++) {
        const uint64_t at = backwards() ? blocks - 1 - i : i;
        block.index = {static_cast<unsigned>(at % shape.grid.x), static_cast<unsigned>(at % plane / shape.grid.x),
                       static_cast<unsigned>(at / plane)};
        run_block(block, shape.dynamic_shared_bytes);
    }
}

}  // namespace emulator
