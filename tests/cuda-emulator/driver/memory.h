// Memory of the fake devices and pinned memory of the host: full of 0xFF when it is new, and guarded. It ends at a page that may not be
// touched, but for what alignment to 256 bytes leaves; that, and some bytes before the start, hold a pattern that is looked at after
// every kernel.

#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <string>

#include "status.h"

namespace emulator::driver {

/// The "device" of pinned host memory.
constexpr int HOST = -1;

class Memory {
  public:
    Status allocate(int device, size_t bytes, void** start);
    Status release(int device, void* start);
    /// Gives back all that is left of a device.
    void release_all(int device);
    /// Whether the range lies in one allocation of this device or, with HOST, of pinned memory.
    bool holds(int device, const void* address, size_t bytes) const;
    size_t used_bytes(int device) const;
    /// Ends the process if something was written beside an allocation of `device` or of the host.
    void check(int device, const char* what) const;
    /// Where an address lies, in words.
    std::string explain(const void* address) const;

  private:
    struct Allocation {
        size_t bytes;
        int device;
        unsigned char* mapping;
        size_t mapping_bytes;
    };
    void unmap(unsigned char* start, const Allocation& allocation);

    mutable std::mutex mutex_;
    std::map<unsigned char*, Allocation> allocations_;
};

Memory& memory();

}  // namespace emulator::driver
