// cuModule*, cuFunc*, cuLaunchKernel, cuOccupancy*. A module is any image with a known beginning: the kernels are those that were
// linked into this library.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "api.h"
#include "emulator.h"
#include "enqueue.h"
#include "memory.h"
#include "settings.h"
#include "stream.h"

using namespace emulator::driver;

struct Function {
    const emulator::Kernel* kernel;
    Context* context;
    size_t shared_limit;
};

struct Module {
    Context* context;
    std::vector<std::unique_ptr<Function>> functions;
    std::mutex mutex;
};

/// A fat binary, an ELF file, or PTX text.
static bool is_image(const void* image) {
    const unsigned char* bytes = static_cast<const unsigned char*>(image);
    const unsigned char fat[] = {0x50, 0xed, 0x55, 0xba}, elf[] = {0x7f, 'E', 'L', 'F'};
    return std::memcmp(bytes, fat, 4) == 0 || std::memcmp(bytes, elf, 4) == 0 || std::strncmp(reinterpret_cast<const char*>(bytes), "//", 2) == 0 ||
           std::strncmp(reinterpret_cast<const char*>(bytes), ".version", 8) == 0;
}

API cuModuleLoadData(void** module, const void* image) {
    const Status status = begin_synchronous_call();
    if (status != SUCCESS) return status;
    if (image == nullptr || !is_image(image)) return INVALID_IMAGE;
    Module* loaded = new Module;
    loaded->context = current_context();
    *module = loaded;
    return SUCCESS;
}

API cuModuleUnload(void* module) {
    delete static_cast<Module*>(module);
    return SUCCESS;
}

API cuModuleGetFunction(void** function, void* handle, const char* name) {
    Module* module = static_cast<Module*>(handle);
    const emulator::Kernel* kernel = emulator::find_kernel(name);
    if (kernel == nullptr) {
        std::fprintf(stderr, "cuda emulator: no REGISTER(%s) in the kernel sources\n", name);
        return NOT_FOUND;
    }
    const std::lock_guard<std::mutex> lock(module->mutex);
    module->functions.push_back(std::make_unique<Function>(Function{kernel, module->context, emulator::SHARED_BYTES}));
    *function = module->functions.back().get();
    return SUCCESS;
}

API cuFuncSetAttribute(void* handle, int attribute, int value) {
    Function* function = static_cast<Function*>(handle);
    if (attribute == 8) {  // MAX_DYNAMIC_SHARED_SIZE_BYTES
        if (value < 0 || static_cast<size_t>(value) > emulator::SHARED_OPT_IN_BYTES) return INVALID_VALUE;
        function->shared_limit = static_cast<size_t>(value);
        return SUCCESS;
    }
    return attribute == 9 ? SUCCESS : INVALID_VALUE;  // PREFERRED_SHARED_MEMORY_CARVEOUT
}

API cuFuncGetAttribute(int* value, int attribute, void* handle) {
    const Function* function = static_cast<Function*>(handle);
    switch (attribute) {
        case 0: *value = static_cast<int>(function->kernel->max_threads); break;   // MAX_THREADS_PER_BLOCK
        case 1: case 2: case 3: *value = 0; break;                                 // SHARED, CONST, LOCAL_SIZE_BYTES
        case 4: *value = 32; break;                                                // NUM_REGS
        case 5: case 6: *value = settings().capability; break;                     // PTX_VERSION, BINARY_VERSION
        case 8: *value = static_cast<int>(function->shared_limit); break;          // MAX_DYNAMIC_SHARED_SIZE_BYTES
        default: return INVALID_VALUE;
    }
    return SUCCESS;
}

API cuFuncGetParamInfo(void* handle, size_t index, size_t* offset, size_t* bytes) {
    const emulator::Kernel* kernel = static_cast<Function*>(handle)->kernel;
    if (index >= kernel->num_arguments) return INVALID_VALUE;
    size_t at = 0;
    for (size_t i = 0; i <= index; i++) {
        const size_t alignment = std::min<size_t>(kernel->argument_bytes[i], 8);
        at = (at + alignment - 1) / alignment * alignment;
        if (i < index) at += kernel->argument_bytes[i];
    }
    *offset = at;
    if (bytes != nullptr) *bytes = kernel->argument_bytes[index];
    return SUCCESS;
}

API cuFuncGetName(const char** name, void* handle) {
    *name = static_cast<Function*>(handle)->kernel->name;
    return SUCCESS;
}

API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int threads, size_t dynamic_bytes) {
    const size_t by_shared = static_cast<size_t>(228 << 10) / (dynamic_bytes + 1024);
    *blocks = static_cast<int>(std::min<size_t>({by_shared, static_cast<size_t>(2048 / std::max(threads, 1)), 32}));
    return SUCCESS;
}

/// A launch with its arguments copied, as a stream or a graph keeps it.
struct Launch {
    const emulator::Kernel* kernel;
    emulator::Shape shape;
    int device;
    std::vector<unsigned char> bytes;
    std::vector<size_t> offsets;

    Status run() const {
        std::vector<unsigned char> copy = bytes;
        std::vector<void*> arguments;
        for (const size_t offset : offsets) arguments.push_back(copy.data() + offset);
        arguments.push_back(nullptr);
        emulator::run(*kernel, shape, arguments.data());
        memory().check(device, kernel->name);
        return SUCCESS;
    }
};

static std::atomic<long> num_launches = 0;

API cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned dynamic_bytes,
                   void* stream_handle, void** arguments, void** extra) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    const Function* function = static_cast<Function*>(handle);
    Stream* stream = stream_of(stream_handle);
    if (function == nullptr || function->context != stream->context) return INVALID_HANDLE;
    const emulator::Kernel* kernel = function->kernel;
    const emulator::Shape shape = {{gx, gy, gz}, {bx, by, bz}, dynamic_bytes};
    const char* reason = emulator::refuse(*kernel, shape, function->shared_limit);
    if (extra != nullptr || (arguments == nullptr && kernel->num_arguments > 0)) reason = "arguments that are not one pointer each";
    if (reason != nullptr) {
        std::fprintf(stderr, "cuda emulator: launch of %s refused: %s (grid %u %u %u, block %u %u %u, %u dynamic bytes)\n", kernel->name,
                     reason, gx, gy, gz, bx, by, bz, dynamic_bytes);
        return INVALID_VALUE;
    }
    const auto launch = std::make_shared<Launch>(Launch{kernel, shape, stream->context->device, {}, {}});
    for (size_t i = 0; i < kernel->num_arguments; i++) {
        const size_t offset = (launch->bytes.size() + 15) / 16 * 16;
        launch->bytes.resize(offset + kernel->argument_bytes[i]);
        std::memcpy(launch->bytes.data() + offset, arguments[i], kernel->argument_bytes[i]);
        launch->offsets.push_back(offset);
    }
    return stream->enqueue([launch, stream] {
        const long number = ++num_launches;
        if (number == settings().fail_launch) return LAUNCH_FAILED;
        if (number == settings().stall_launch) {
            stream->stalled = true;
            return SUCCESS;
        }
        return launch->run();
    });
}

extern "C" __attribute__((visibility("default"))) int emulator_enqueue(void* stream, const char* name, std::function<void()> work) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    const int device = current_context()->device;
    return stream_of(stream)->enqueue([work = std::move(work), name, device] {
        work();
        memory().check(device, name);
        return SUCCESS;
    });
}

extern "C" __attribute__((visibility("default"))) bool emulator_reaches(const void* address, size_t bytes) {
    if (current_context() == nullptr) return false;
    return memory().holds(current_context()->device, address, bytes) || memory().holds(HOST, address, bytes);
}
