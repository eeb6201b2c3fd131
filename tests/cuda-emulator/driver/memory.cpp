#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "emulator.h"
#include "fault.h"
#include "settings.h"

namespace emulator::driver {

constexpr size_t PAGE = 4096;
constexpr size_t ALIGNMENT = 256;
constexpr size_t LOOKED_AT = 256;
constexpr unsigned char POISON = 0xff;
/// Of a larger allocation only so much is poisoned at both ends.
constexpr size_t POISONED_BYTES = 32 << 20;
/// From here on huge pages save more time than they waste.
constexpr size_t HUGE_BYTES = 4 << 20;

static unsigned char canary_block[PAGE];

static bool intact(const unsigned char* start, size_t bytes) {
    return std::memcmp(start, canary_block, bytes) == 0;
}

Memory& memory() {
    // Never destroyed: other static objects may still free memory while the process ends.
    static Memory* all = [] {
        std::memset(canary_block, 0xa5, sizeof(canary_block));
        explain_address = [](const void* address) { return memory().explain(address); };
        return new Memory;
    }();
    return *all;
}

static size_t round_up(size_t value, size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

Status Memory::allocate(int device, size_t bytes, void** start) {
    if (bytes == 0) return INVALID_VALUE;
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t used = 0;
    for (const auto& [_, other] : allocations_) used += other.device == device ? other.bytes : 0;
    if (device != HOST && bytes > settings().memory_bytes - std::min(used, settings().memory_bytes)) return OUT_OF_MEMORY;
    // One page for the bytes looked at before the start, and one that may not be touched behind the end.
    const size_t rounded = round_up(bytes, ALIGNMENT), body = round_up(rounded, PAGE) + PAGE;
    void* mapping = mmap(nullptr, body + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return OUT_OF_MEMORY;
    unsigned char* first = static_cast<unsigned char*>(mapping);
    mprotect(first + body, PAGE, PROT_NONE);
    if (bytes >= HUGE_BYTES) madvise(mapping, body, MADV_HUGEPAGE);
    unsigned char* begin = first + body - rounded;
    std::memset(begin - LOOKED_AT, 0xa5, LOOKED_AT);
    std::memset(begin + bytes, 0xa5, rounded - bytes);
    std::memset(begin, POISON, std::min(bytes, POISONED_BYTES));
    if (bytes > POISONED_BYTES) {
        const size_t tail = std::min(bytes - POISONED_BYTES, POISONED_BYTES);
        std::memset(begin + bytes - tail, POISON, tail);
    }
    allocations_[begin] = {bytes, device, first, body + PAGE};
    *start = begin;
    return SUCCESS;
}

void Memory::unmap(unsigned char*, const Allocation& allocation) {
    munmap(allocation.mapping, allocation.mapping_bytes);
}

Status Memory::release(int device, void* start) {
    check(device, "work before a free");
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = allocations_.find(static_cast<unsigned char*>(start));
    if (found == allocations_.end() || found->second.device != device) return INVALID_VALUE;
    unmap(found->first, found->second);
    allocations_.erase(found);
    return SUCCESS;
}

void Memory::release_all(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = allocations_.begin(); it != allocations_.end();) {
        if (it->second.device == device) {
            unmap(it->first, it->second);
            it = allocations_.erase(it);
        } else {
            ++it;
        }
    }
}

bool Memory::holds(int device, const void* address, size_t bytes) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    unsigned char* first = static_cast<unsigned char*>(const_cast<void*>(address));
    auto it = allocations_.upper_bound(first);
    if (it == allocations_.begin()) return false;
    --it;
    return it->second.device == device && first + bytes <= it->first + it->second.bytes;
}

size_t Memory::used_bytes(int device) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t used = 0;
    for (const auto& [_, allocation] : allocations_) used += allocation.device == device ? allocation.bytes : 0;
    return used;
}

void Memory::check(int device, const char* what) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [start, allocation] : allocations_) {
        if (allocation.device != device && allocation.device != HOST) continue;
        const size_t tail = round_up(allocation.bytes, ALIGNMENT) - allocation.bytes;
        const char* side = !intact(start - LOOKED_AT, LOOKED_AT) ? "before" : !intact(start + allocation.bytes, tail) ? "behind" : nullptr;
        if (side != nullptr) {
            fail("%s wrote %s an allocation of %zu bytes at %p", what, side, allocation.bytes, static_cast<const void*>(start));
        }
    }
}

std::string Memory::explain(const void* address) const {
    if (!mutex_.try_lock()) return "";
    const std::lock_guard<std::mutex> lock(mutex_, std::adopt_lock);
    const unsigned char* byte = static_cast<const unsigned char*>(address);
    for (const auto& [start, allocation] : allocations_) {
        if (byte < allocation.mapping || byte >= allocation.mapping + allocation.mapping_bytes) continue;
        const long long offset = byte - start;
        return "byte " + std::to_string(offset) + " of an allocation of " + std::to_string(allocation.bytes) + " bytes";
    }
    return "in no allocation";
}

}  // namespace emulator::driver
