// The table of kernels, filled while the program or library is loaded, and what a launch may ask for.

#include <cstring>

#include "emulator.h"

namespace emulator {

// Constant initialisation, so that they are there before any registration runs.
static const Kernel* kernels = nullptr;
static const Bounds* bounds = nullptr;

Bounds::Bounds(const char* kernel, unsigned threads) : name(kernel), max_threads(threads), next(bounds) {
    bounds = this;
}

Registration::Registration(const char* name, void (*call)(void**), const size_t* bytes, size_t count)
    : kernel{name, call, bytes, count, MAX_THREADS, kernels} {
    if (find_kernel(name) != nullptr) fail("two kernels are called %s", name);
    for (const Bounds* bound = bounds; bound != nullptr; bound = bound->next) {
        if (std::strcmp(bound->name, name) == 0) kernel.max_threads = bound->max_threads;
    }
    kernels = &kernel;
}

const Kernel* find_kernel(const char* name) {
    for (const Kernel* kernel = kernels; kernel != nullptr; kernel = kernel->next) {
        if (std::strcmp(kernel->name, name) == 0) return kernel;
    }
    return nullptr;
}

const Kernel* first_kernel() {
    return kernels;
}

const char* refuse(const Kernel& kernel, const Shape& shape, size_t shared_limit) {
    const dim3& grid = shape.grid;
    const dim3& block = shape.block;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "a grid without blocks";
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "a grid past 2^31 - 1, 65535, 65535";
    if (block.x == 0 || block.y == 0 || block.z == 0) return "a block without threads";
    if (block.x > 1024 || block.y > 1024 || block.z > 64) return "a block past 1024, 1024, 64";
    if (static_cast<size_t>(block.x) * block.y * block.z > kernel.max_threads) return "more threads in a block than the kernel takes";
    if (shape.dynamic_shared_bytes > shared_limit) return "more dynamic shared memory than the kernel was allowed";
    return nullptr;
}

}  // namespace emulator
