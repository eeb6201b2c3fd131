// What the fake driver offers the fake cuBLASLt.

#pragma once

#include <cstddef>
#include <functional>

/// Adds work to a stream of the current context, or to the graph it captures. Returns a status of the driver. `name` must stay.
extern "C" int emulator_enqueue(void* stream, const char* name, std::function<void()> work);

/// Whether the range lies in memory of the current device or in pinned memory.
extern "C" bool emulator_reaches(const void* address, size_t bytes);
