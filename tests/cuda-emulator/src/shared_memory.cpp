#include "shared_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulator {

constexpr size_t ARRAYS_BYTES = 128 << 10;
constexpr size_t DYNAMIC_BYTES = 256 << 10;
constexpr size_t GUARD_BYTES = 4 << 10;
constexpr size_t CANARY_BYTES = 64;
constexpr unsigned char CANARY = 0xa5;
constexpr unsigned char POISON = 0xff;

static bool intact(const unsigned char* canary, size_t bytes) {
    return std::all_of(canary, canary + bytes, [](unsigned char byte) { return byte == CANARY; });
}

SharedMemory::~SharedMemory() {
    if (memory_ != nullptr) munmap(memory_, ARRAYS_BYTES + DYNAMIC_BYTES + GUARD_BYTES);
}

void* SharedMemory::start_block(size_t dynamic_bytes) {
    if (memory_ == nullptr) {
        void* memory = mmap(nullptr, ARRAYS_BYTES + DYNAMIC_BYTES + GUARD_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) {
            std::perror("cuda emulator: shared memory");
            std::abort();
        }
        memory_ = static_cast<unsigned char*>(memory);
        mprotect(memory_ + ARRAYS_BYTES + DYNAMIC_BYTES, GUARD_BYTES, PROT_NONE);
    }
    arrays_.clear();
    next_ = memory_;
    declared_bytes_ = 0;
    dynamic_bytes_ = dynamic_bytes;
    const size_t rounded = (dynamic_bytes + 127) / 128 * 128;
    unsigned char* end = memory_ + ARRAYS_BYTES + DYNAMIC_BYTES;
    dynamic_ = end - rounded;
    std::memset(dynamic_ - CANARY_BYTES, CANARY, CANARY_BYTES);
    std::memset(dynamic_, POISON, dynamic_bytes);
    std::memset(dynamic_ + dynamic_bytes, CANARY, rounded - dynamic_bytes);
    return dynamic_;
}

void* SharedMemory::array(const SharedSite& site) {
    for (const Array& array : arrays_) {
        if (array.site == &site) return array.start;
    }
    declared_bytes_ += site.bytes;
    if (declared_bytes_ > SHARED_BYTES) fail("declared shared memory of %zu bytes exceeds %zu", declared_bytes_, SHARED_BYTES);
    if (declared_bytes_ + dynamic_bytes_ > SHARED_OPT_IN_BYTES) {
        fail("shared memory of %zu + %zu dynamic bytes exceeds %zu", declared_bytes_, dynamic_bytes_, SHARED_OPT_IN_BYTES);
    }
    const size_t alignment = std::max<size_t>(site.alignment, 16);
    const uintptr_t start = (reinterpret_cast<uintptr_t>(next_) + CANARY_BYTES + alignment - 1) / alignment * alignment;
    unsigned char* array = reinterpret_cast<unsigned char*>(start);
    std::memset(array - CANARY_BYTES, CANARY, CANARY_BYTES);
    std::memset(array, POISON, site.bytes);
    std::memset(array + site.bytes, CANARY, CANARY_BYTES);
    next_ = array + site.bytes;
    arrays_.push_back({&site, array});
    return array;
}

bool SharedMemory::holds(const void* address, size_t bytes) const {
    const unsigned char* first = static_cast<const unsigned char*>(address);
    if (first >= dynamic_ && first + bytes <= dynamic_ + dynamic_bytes_) return true;
    return std::any_of(arrays_.begin(), arrays_.end(), [&](const Array& array) {
        return first >= array.start && first + bytes <= array.start + array.site->bytes;
    });
}

bool SharedMemory::covers(const void* address) const {
    const unsigned char* byte = static_cast<const unsigned char*>(address);
    return memory_ != nullptr && byte >= memory_ && byte < memory_ + ARRAYS_BYTES + DYNAMIC_BYTES;
}

bool SharedMemory::behind(const void* address) const {
    const unsigned char* end = memory_ + ARRAYS_BYTES + DYNAMIC_BYTES;
    const unsigned char* byte = static_cast<const unsigned char*>(address);
    return memory_ != nullptr && byte >= end && byte < end + GUARD_BYTES;
}

const char* SharedMemory::overwritten() const {
    const unsigned char* end = memory_ + ARRAYS_BYTES + DYNAMIC_BYTES;
    if (!intact(dynamic_ - CANARY_BYTES, CANARY_BYTES)) return "dynamic shared memory";
    if (!intact(dynamic_ + dynamic_bytes_, static_cast<size_t>(end - dynamic_) - dynamic_bytes_)) return "dynamic shared memory";
    for (const Array& array : arrays_) {
        if (!intact(array.start - CANARY_BYTES, CANARY_BYTES)) return array.site->name;
        // The next array's canary may begin before this one's ends, but both hold the same bytes.
        if (&array == &arrays_.back() && !intact(array.start + array.site->bytes, CANARY_BYTES)) return array.site->name;
    }
    return nullptr;
}

}  // namespace emulator
