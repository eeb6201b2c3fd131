// Who wants to know of accesses to memory and of what orders them; nobody unless races/ is linked in.

#pragma once

#include <cstddef>

namespace emulator {

struct Observer {
    void (*launch_begins)();
    void (*block_begins)();
    /// All threads of the block have passed a barrier; all accesses until now come before those from now on.
    void (*block_synchronised)();
    /// As above, for the lanes of one warp.
    void (*warp_synchronised)(unsigned warp);
    /// Accesses that the runtime makes for the current thread.
    void (*read)(const void* address, size_t bytes);
    void (*written)(const void* address, size_t bytes);
};

extern const Observer* observer;

}  // namespace emulator
