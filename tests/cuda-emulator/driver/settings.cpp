#include "settings.h"

#include <cstdlib>

namespace emulator::driver {

static long long number(const char* name, long long otherwise) {
    const char* text = std::getenv(name);
    return text == nullptr || *text == '\0' ? otherwise : std::atoll(text);
}

const Settings& settings() {
    static const Settings values = {
        static_cast<int>(number("CUDA_EMULATOR_DEVICES", 2)),
        static_cast<int>(number("CUDA_EMULATOR_DRIVER", 13000)),
        static_cast<int>(number("CUDA_EMULATOR_CAPABILITY", 90)),
        static_cast<int>(number("CUDA_EMULATOR_MULTIPROCESSORS", 4)),
        static_cast<size_t>(number("CUDA_EMULATOR_MEMORY_BYTES", 1ll << 30)),
        number("CUDA_EMULATOR_EAGER", 0) != 0,
        static_cast<long>(number("CUDA_EMULATOR_FAIL_LAUNCH", 0)),
        static_cast<long>(number("CUDA_EMULATOR_STALL_LAUNCH", 0)),
    };
    return values;
}

}  // namespace emulator::driver
