// Shared memory of the running block: arrays that kernels declare, and the dynamic part. Full of 0xFF at the start of each block;
// what lies around an array is checked at the block's end.

#pragma once

#include <cstddef>
#include <vector>

#include "emulator.h"

namespace emulator {

class SharedMemory {
  public:
    SharedMemory() = default;
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;
    ~SharedMemory();

    /// Forgets all arrays; address of the dynamic part, which ends where reading faults (but for what 128-byte alignment leaves).
    void* start_block(size_t dynamic_bytes);
    void* array(const SharedSite& site);
    /// Whether `bytes` from `address` on lie in one array or in the dynamic part.
    bool holds(const void* address, size_t bytes) const;
    /// Whether `address` lies in shared memory at all.
    bool covers(const void* address) const;
    /// Whether `address` lies in the page behind the dynamic part, which faults.
    bool behind(const void* address) const;
    /// Name of what was written beside, or null.
    const char* overwritten() const;

  private:
    struct Array {
        const SharedSite* site;
        unsigned char* start;
    };
    unsigned char* memory_ = nullptr;
    unsigned char* next_ = nullptr;
    unsigned char* dynamic_ = nullptr;
    size_t dynamic_bytes_ = 0;
    size_t declared_bytes_ = 0;
    std::vector<Array> arrays_;
};

}  // namespace emulator
