// What the fake driver pretends, by environment variables that are read at its first call. See README.md.

#pragma once

#include <cstddef>

namespace emulator::driver {

struct Settings {
    int device_count;
    int driver_version;
    /// 10 · major + minor
    int capability;
    int multiprocessors;
    /// Of each device.
    size_t memory_bytes;
    /// Work runs when it is enqueued, not when something waits for it.
    bool eager;
    /// The n-th launch of the process, counted from 1, fails or never ends; 0: none does.
    long fail_launch, stall_launch;
};

const Settings& settings();

}  // namespace emulator::driver
