#pragma once

#include <string>

namespace emulator {

/// Says where an address lies; set by who owns the memory.
using Explain = std::string (*)(const void* address);
extern Explain explain_address;

/// From now on a fault of a kernel in this thread ends the process with a message.
void catch_faults();

}  // namespace emulator
