// cuInit, cuDevice*, cuCtx*, errors.

#include <cstdio>
#include <cstring>

#include "api.h"
#include "memory.h"
#include "settings.h"
#include "stream.h"

using namespace emulator::driver;

constexpr int MOST_DEVICES = 16;

static std::atomic<bool> initialised = false;
static std::mutex contexts_mutex;
static Context contexts[MOST_DEVICES];

static bool exists(int device) {
    return device >= 0 && device < settings().device_count && device < MOST_DEVICES;
}

API cuInit(unsigned) {
    if (settings().device_count == 0) return NO_DEVICE;
    initialised = true;
    return SUCCESS;
}

API cuDriverGetVersion(int* version) {
    *version = settings().driver_version;
    return SUCCESS;
}

API cuGetErrorName(int status, const char** name) {
    *name = name_of(status);
    return *name == nullptr ? INVALID_VALUE : SUCCESS;
}

API cuGetErrorString(int status, const char** text) {
    return cuGetErrorName(status, text);
}

API cuDeviceGetCount(int* count) {
    if (!initialised) return NOT_INITIALIZED;
    *count = settings().device_count;
    return SUCCESS;
}

API cuDeviceGet(int* device, int ordinal) {
    if (!initialised) return NOT_INITIALIZED;
    if (!exists(ordinal)) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

API cuDeviceGetName(char* name, int bytes, int device) {
    if (!exists(device)) return INVALID_DEVICE;
    std::snprintf(name, static_cast<size_t>(bytes), "Emulated GPU");
    return SUCCESS;
}

API cuDeviceTotalMem_v2(size_t* bytes, int device) {
    if (!exists(device)) return INVALID_DEVICE;
    *bytes = settings().memory_bytes;
    return SUCCESS;
}

API cuDeviceGetUuid_v2(char* uuid, int device) {
    if (!exists(device)) return INVALID_DEVICE;
    std::memset(uuid, 0, 16);
    uuid[15] = static_cast<char>(device);
    return SUCCESS;
}

API cuDeviceGetPCIBusId(char* text, int bytes, int device) {
    if (!exists(device)) return INVALID_DEVICE;
    std::snprintf(text, static_cast<size_t>(bytes), "0000:%02x:00.0", device + 1);
    return SUCCESS;
}

API cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (!exists(device)) return INVALID_DEVICE;
    switch (attribute) {
        case 1: *value = 1024; break;                               // MAX_THREADS_PER_BLOCK
        case 2: case 3: *value = 1024; break;                       // MAX_BLOCK_DIM_X, Y
        case 4: *value = 64; break;                                 // MAX_BLOCK_DIM_Z
        case 5: *value = 0x7fffffff; break;                         // MAX_GRID_DIM_X
        case 6: case 7: *value = 65535; break;                      // MAX_GRID_DIM_Y, Z
        case 8: *value = 48 << 10; break;                           // MAX_SHARED_MEMORY_PER_BLOCK
        case 10: *value = 32; break;                                // WARP_SIZE
        case 12: case 82: *value = 65536; break;                    // MAX_REGISTERS_PER_BLOCK, _PER_MULTIPROCESSOR
        case 13: case 36: *value = 1000000; break;                  // CLOCK_RATE, MEMORY_CLOCK_RATE in kHz
        case 16: *value = settings().multiprocessors; break;        // MULTIPROCESSOR_COUNT
        case 18: *value = 0; break;                                 // INTEGRATED
        case 19: case 31: case 41: *value = 1; break;               // CAN_MAP_HOST_MEMORY, CONCURRENT_KERNELS, UNIFIED_ADDRESSING
        case 33: *value = device + 1; break;                        // PCI_BUS_ID
        case 34: case 50: *value = 0; break;                        // PCI_DEVICE_ID, PCI_DOMAIN_ID
        case 37: *value = 5120; break;                              // GLOBAL_MEMORY_BUS_WIDTH in bits
        case 38: *value = 50 << 20; break;                          // L2_CACHE_SIZE
        case 39: *value = 2048; break;                              // MAX_THREADS_PER_MULTIPROCESSOR
        case 75: *value = settings().capability / 10; break;        // COMPUTE_CAPABILITY_MAJOR
        case 76: *value = settings().capability % 10; break;        // COMPUTE_CAPABILITY_MINOR
        case 81: *value = 228 << 10; break;                         // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
        case 97: *value = settings().capability >= 90 ? 227 << 10 : 163 << 10; break;  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        case 106: *value = 32; break;                               // MAX_BLOCKS_PER_MULTIPROCESSOR
        case 115: *value = 0; break;                                // MEMORY_POOLS_SUPPORTED
        default: return INVALID_VALUE;
    }
    return SUCCESS;
}

API cuDevicePrimaryCtxRetain(void** context, int device) {
    if (!initialised) return NOT_INITIALIZED;
    if (!exists(device)) return INVALID_DEVICE;
    const std::lock_guard<std::mutex> lock(contexts_mutex);
    Context& primary = contexts[device];
    if (primary.references++ == 0) {
        primary.device = device;
        primary.error = SUCCESS;
        primary.default_stream = std::make_shared<Stream>(&primary);
    }
    *context = &primary;
    return SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int device) {
    if (!exists(device)) return INVALID_DEVICE;
    const std::lock_guard<std::mutex> lock(contexts_mutex);
    Context& primary = contexts[device];
    if (primary.references == 0) return INVALID_CONTEXT;
    if (--primary.references == 0) {
        primary.drain();
        memory().release_all(device);
    }
    return SUCCESS;
}

API cuCtxSetCurrent(void* context) {
    if (!initialised) return NOT_INITIALIZED;
    current_context() = static_cast<Context*>(context);
    return SUCCESS;
}

API cuCtxGetCurrent(void** context) {
    *context = current_context();
    return SUCCESS;
}

API cuCtxGetDevice(int* device) {
    if (current_context() == nullptr) return INVALID_CONTEXT;
    *device = current_context()->device;
    return SUCCESS;
}

API cuCtxSetFlags(unsigned) {
    return begin_call();
}

API cuCtxSynchronize() {
    const Status status = begin_synchronous_call();
    if (status != SUCCESS) return status;
    current_context()->drain();
    return current_context()->error;
}

API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = *greatest = 0;
    return begin_call();
}

namespace emulator::driver {

const char* name_of(int status) {
    switch (status) {
        case SUCCESS: return "CUDA_SUCCESS";
        case INVALID_VALUE: return "CUDA_ERROR_INVALID_VALUE";
        case OUT_OF_MEMORY: return "CUDA_ERROR_OUT_OF_MEMORY";
        case NOT_INITIALIZED: return "CUDA_ERROR_NOT_INITIALIZED";
        case NO_DEVICE: return "CUDA_ERROR_NO_DEVICE";
        case INVALID_DEVICE: return "CUDA_ERROR_INVALID_DEVICE";
        case INVALID_IMAGE: return "CUDA_ERROR_INVALID_IMAGE";
        case INVALID_CONTEXT: return "CUDA_ERROR_INVALID_CONTEXT";
        case INVALID_HANDLE: return "CUDA_ERROR_INVALID_HANDLE";
        case NOT_FOUND: return "CUDA_ERROR_NOT_FOUND";
        case NOT_READY: return "CUDA_ERROR_NOT_READY";
        case LAUNCH_TIMEOUT: return "CUDA_ERROR_LAUNCH_TIMEOUT";
        case LAUNCH_FAILED: return "CUDA_ERROR_LAUNCH_FAILED";
        case STREAM_CAPTURE_UNSUPPORTED: return "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED";
        case STREAM_CAPTURE_INVALIDATED: return "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED";
        case STREAM_CAPTURE_UNMATCHED: return "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED";
        case STREAM_CAPTURE_WRONG_THREAD: return "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD";
        default: return nullptr;
    }
}

}  // namespace emulator::driver
