// cp.async: a copy is carried out only when its thread waits for its group, and its destination holds 0xFF until then, so that
// a missing wait is seen.

#include <cstring>

#include "block.h"
#include "observer.h"

namespace emulator {

void copy_async_16(void* dst, const void* src, bool valid) {
    if (reinterpret_cast<uintptr_t>(dst) % 16 != 0) fail("cp_async_16: destination %p is not aligned to 16 bytes", dst);
    if (!running().shared.holds(dst, 16)) fail("cp_async_16: destination %p is not in shared memory", dst);
    if (valid && reinterpret_cast<uintptr_t>(src) % 16 != 0) fail("cp_async_16: source %p is not aligned to 16 bytes", src);
    if (observer != nullptr) observer->written(dst, 16);
    std::memset(dst, 0xff, 16);
    self().copies.push_back({dst, src, valid});
}

void copy_async_commit() {
    Fiber& fiber = self();
    fiber.group_ends.push_back(fiber.copies.size());
}

void copy_async_wait(unsigned unfinished_groups) {
    Fiber& fiber = self();
    if (fiber.group_ends.size() <= unfinished_groups) return;
    const size_t groups = fiber.group_ends.size() - unfinished_groups;
    const size_t copies = fiber.group_ends[groups - 1];
    for (size_t i = 0; i < copies; i++) {
        const AsyncCopy& copy = fiber.copies[i];
        if (observer != nullptr) observer->written(copy.dst, 16);
        if (observer != nullptr && copy.valid) observer->read(copy.src, 16);
        if (copy.valid) {
            std::memcpy(copy.dst, copy.src, 16);
        } else {
            std::memset(copy.dst, 0, 16);
        }
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<long>(copies));
    fiber.group_ends.erase(fiber.group_ends.begin(), fiber.group_ends.begin() + static_cast<long>(groups));
    for (size_t& end : fiber.group_ends) end -= copies;
}

void* static_shared(const SharedSite& site) {
    return running().shared.array(site);
}

}  // namespace emulator
