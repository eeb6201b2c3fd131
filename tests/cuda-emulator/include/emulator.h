// What kernel sources (through platform_emulator.cuh), the fake driver and the tests use of the emulator.
//
// The threads of a block are fibers of one OS thread, so a kernel runs until a barrier, a warp collective or its end; the lanes of a
// warp then go on one after another. Blocks run one after another. Every launch runs on the OS thread that asks for it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

/// Three extents or a position, as CUDA names it.
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

struct Block;

/// A thread of a block, as far as kernels see it.
struct Thread {
    dim3 index;
    unsigned lane;
    const Block* block;
};

/// The thread that runs now on this OS thread; null outside kernels.
extern thread_local Thread* current __attribute__((tls_model("initial-exec")));

/// What all threads of a block share.
struct Block {
    dim3 index, block_dim, grid_dim;
    void* dynamic_shared;
};

// --- Barriers and warp collectives: each is a point where other threads go on. ---

/// What a block barrier computes from the threads' predicates.
enum class Vote { None, Or, And, Count };

/// `__syncthreads` and its voting forms. All threads of the block must come to the same call.
int sync_threads(Vote vote, int predicate, const char* file, int line);

void sync_warp(uint32_t mask);

/// Value of lane `source` of the warp; the lanes of `mask` must all take part, and `source` be one of them.
uint64_t shuffle(uint32_t mask, uint64_t value, unsigned source);

/// One bit for each lane of `mask` whose predicate holds.
uint32_t ballot(uint32_t mask, bool predicate);

void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, const float* c);

/// Loads `matrices` (2 or 4) 8×8 matrices whose rows the first lanes name.
void load_matrices(uint32_t* r, const void* row, int matrices, bool transposed);

// --- Shared memory and asynchronous copies. ---

/// A shared array of a kernel; its address is its identity within a block.
struct SharedSite {
    const char* name;
    size_t bytes, alignment;
};

/// The memory of `site` in the current block, full of 0xFF when it is first asked for.
void* static_shared(const SharedSite& site);

void copy_async_16(void* dst, const void* src, bool valid);
void copy_async_commit();
void copy_async_wait(unsigned unfinished_groups);

/// Ends the process with a message that names kernel, block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// --- Kernels by name. ---

/// A kernel that REGISTER named.
struct Kernel {
    const char* name;
    void (*call)(void** arguments);
    const size_t* argument_bytes;
    size_t num_arguments;
    unsigned max_threads;
    const Kernel* next;
};

/// Bounds that KERNEL_BOUNDS gave; 1,024 where a kernel has none.
struct Bounds {
    const char* name;
    unsigned max_threads;
    const Bounds* next;
    Bounds(const char* kernel, unsigned threads);
};

/// Calls `F` with arguments given as the driver gets them: one pointer each.
template <auto F>
struct Trampoline;

template <typename... A, void (*F)(A...)>
struct Trampoline<F> {
    static_assert((std::is_trivially_copyable_v<A> && ...), "kernel arguments are copied as bytes");
    static constexpr size_t COUNT = sizeof...(A);
    static constexpr size_t BYTES[COUNT + 1] = {sizeof(A)..., 0};

    static void call(void** arguments) { expand(arguments, std::make_index_sequence<COUNT>()); }

    template <size_t... I>
    static void expand([[maybe_unused]] void** arguments, std::index_sequence<I...>) {
        F(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
    }
};

/// Puts a kernel into the table while the program or library is loaded.
struct Registration {
    Kernel kernel;
    Registration(const char* name, void (*call)(void**), const size_t* bytes, size_t count);
};

/// Null when there is none of that name.
const Kernel* find_kernel(const char* name);

/// First of all kernels, linked by `next`.
const Kernel* first_kernel();

/// A launch's extents.
struct Shape {
    dim3 grid, block;
    size_t dynamic_shared_bytes = 0;
};

constexpr size_t MAX_THREADS = 1024;
/// Shared memory of a block without and with the opt-in attribute, as on compute capability 9.0.
constexpr size_t SHARED_BYTES = 48 << 10;
constexpr size_t SHARED_OPT_IN_BYTES = 227 << 10;

/// Null when Hopper would take the launch, else what is wrong with it. `shared_limit`: what the opt-in attribute allows.
const char* refuse(const Kernel& kernel, const Shape& shape, size_t shared_limit);

/// Runs all blocks of a launch to their end.
void run(const Kernel& kernel, const Shape& shape, void** arguments);

}  // namespace emulator
