// cuMem*: allocation, copies, fills.

#include <cstring>
#include <memory>
#include <vector>

#include "api.h"
#include "memory.h"
#include "settings.h"
#include "stream.h"

using namespace emulator::driver;
using Address = unsigned long long;

static void* pointer(Address address) {
    return reinterpret_cast<void*>(address);
}

/// Whether the range may be used by the current device: its own memory, or pinned memory of the host.
static bool reachable(const void* address, size_t bytes) {
    return memory().holds(current_context()->device, address, bytes) || memory().holds(HOST, address, bytes);
}

API cuMemAlloc_v2(Address* address, size_t bytes) {
    const Status status = begin_synchronous_call();
    if (status != SUCCESS) return status;
    void* start = nullptr;
    const Status allocated = memory().allocate(current_context()->device, bytes, &start);
    *address = reinterpret_cast<Address>(start);
    return allocated;
}

API cuMemFree_v2(Address address) {
    const Status status = begin_synchronous_call();
    if (status != SUCCESS) return status;
    if (address == 0) return SUCCESS;
    current_context()->drain();
    return memory().release(current_context()->device, pointer(address));
}

API cuMemHostAlloc(void** start, size_t bytes, unsigned) {
    const Status status = begin_synchronous_call();
    return status != SUCCESS ? status : memory().allocate(HOST, bytes, start);
}

API cuMemFreeHost(void* start) {
    const Status status = begin_synchronous_call();
    if (status != SUCCESS) return status;
    current_context()->drain();
    return memory().release(HOST, start);
}

API cuMemHostGetDevicePointer_v2(Address* address, void* start, unsigned) {
    if (!memory().holds(HOST, start, 1)) return INVALID_VALUE;
    *address = reinterpret_cast<Address>(start);
    return SUCCESS;
}

API cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    const size_t total = settings().memory_bytes, used = memory().used_bytes(current_context()->device);
    *total_bytes = total;
    *free_bytes = total - (used < total ? used : total);
    return SUCCESS;
}

/// Enqueues a copy between memory that both sides reach at any time.
static Status copy(void* dst, const void* src, size_t bytes, void* stream) {
    return stream_of(stream)->enqueue([=] {
        std::memmove(dst, src, bytes);
        return SUCCESS;
    });
}

API cuMemcpyHtoDAsync_v2(Address dst, const void* src, size_t bytes, void* stream) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    if (bytes == 0) return SUCCESS;
    if (!reachable(pointer(dst), bytes)) return INVALID_VALUE;
    if (memory().holds(HOST, src, bytes)) return copy(pointer(dst), src, bytes, stream);
    // Memory that is not pinned is read before the call returns; a graph cannot hold it.
    if (stream_of(stream)->is_capturing()) {
        stream_of(stream)->invalidate();
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    const unsigned char* first = static_cast<const unsigned char*>(src);
    const auto staged = std::make_shared<std::vector<unsigned char>>(first, first + bytes);
    return stream_of(stream)->enqueue([=] {
        std::memcpy(pointer(dst), staged->data(), bytes);
        return SUCCESS;
    });
}

API cuMemcpyDtoHAsync_v2(void* dst, Address src, size_t bytes, void* stream) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    if (bytes == 0) return SUCCESS;
    if (!reachable(pointer(src), bytes)) return INVALID_VALUE;
    if (memory().holds(HOST, dst, bytes)) return copy(dst, pointer(src), bytes, stream);
    const Status may_wait = begin_synchronous_call();
    if (may_wait != SUCCESS) return may_wait;
    copy(dst, pointer(src), bytes, stream);
    return stream_of(stream)->drain();
}

API cuMemcpyDtoDAsync_v2(Address dst, Address src, size_t bytes, void* stream) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    if (bytes == 0) return SUCCESS;
    if (!reachable(pointer(dst), bytes) || !reachable(pointer(src), bytes)) return INVALID_VALUE;
    return copy(pointer(dst), pointer(src), bytes, stream);
}

API cuMemcpyHtoD_v2(Address dst, const void* src, size_t bytes) {
    const Status status = begin_synchronous_call();
    if (status != SUCCESS) return status;
    if (!reachable(pointer(dst), bytes)) return INVALID_VALUE;
    copy(pointer(dst), src, bytes, nullptr);
    return stream_of(nullptr)->drain();
}

API cuMemcpyDtoH_v2(void* dst, Address src, size_t bytes) {
    const Status status = begin_synchronous_call();
    if (status != SUCCESS) return status;
    if (!reachable(pointer(src), bytes)) return INVALID_VALUE;
    copy(dst, pointer(src), bytes, nullptr);
    return stream_of(nullptr)->drain();
}

API cuMemcpyDtoD_v2(Address dst, Address src, size_t bytes) {
    return cuMemcpyDtoDAsync_v2(dst, src, bytes, nullptr);
}

API cuMemsetD8Async(Address dst, unsigned char byte, size_t bytes, void* stream) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    if (bytes == 0) return SUCCESS;
    if (!reachable(pointer(dst), bytes)) return INVALID_VALUE;
    return stream_of(stream)->enqueue([=] {
        std::memset(pointer(dst), byte, bytes);
        return SUCCESS;
    });
}

API cuMemsetD8_v2(Address dst, unsigned char byte, size_t bytes) {
    return cuMemsetD8Async(dst, byte, bytes, nullptr);
}
