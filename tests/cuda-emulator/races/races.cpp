// Finds accesses of different threads to the same bytes, one of them a write, that nothing orders.
//
// Kernels are compiled with `-fsanitize=thread`, which makes the compiler call a function for each access; the functions are here, not
// the compiler's own. For every two bytes the last write and the last readers are kept with the time at which they happened: the number
// of barriers that the block has passed, and that of `__syncwarp` that the warp has passed.

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>

#include "block.h"
#include "fault.h"
#include "observer.h"

namespace emulator {

constexpr size_t PAGE_BYTES = 4096;
constexpr size_t CELL_BYTES = 2;
constexpr size_t MOST_PAGES = 2048;
/// In place of a warp or lane: several.
constexpr uint16_t MANY = 0xffff;

/// When and by whom memory was used.
struct Access {
    uint32_t launch = 0, epoch = 0, warp_epoch = 0;
    uint32_t block = 0;
    uint16_t warp = 0, lane = 0;
    bool is_atomic = false;
    const void* code = nullptr;
};

struct Cell {
    Access write, read;
};

struct Page {
    Cell cells[PAGE_BYTES / CELL_BYTES];
};

/// What is known in one OS thread, of the launches that run there.
struct Shadow {
    std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
    uintptr_t last_number = 0;
    Page* last_page = nullptr;
    uint32_t launch = 0, epoch = 0, warp_epochs[32] = {};

    Page& page(uintptr_t number) {
        if (last_page == nullptr || number != last_number) {
            std::unique_ptr<Page>& page = pages[number];
            if (page == nullptr) page = std::make_unique<Page>();
            last_number = number;
            last_page = page.get();
        }
        return *last_page;
    }
};

static Shadow& shadow() {
    static thread_local Shadow all;
    return all;
}

/// Source line of an address of code, as far as it can be told.
static std::string place(const void* code) {
    Dl_info info;
    if (code == nullptr || dladdr(code, &info) == 0) return "the runtime";
    char command[4096], line[1024] = {};
    std::snprintf(command, sizeof(command), "addr2line -s -e '%s' %#zx 2>/dev/null", info.dli_fname,
                  reinterpret_cast<size_t>(code) - 1 - reinterpret_cast<size_t>(info.dli_fbase));
    FILE* pipe = popen(command, "r");
    if (pipe == nullptr || std::fgets(line, sizeof(line), pipe) == nullptr) line[0] = 0;
    if (pipe != nullptr) pclose(pipe);
    line[std::strcspn(line, "\n")] = 0;
    return line;
}

static std::string who(const Access& access) {
    std::string text = "block " + std::to_string(access.block);
    if (access.warp == MANY) return text + ", several warps";
    text += ", warp " + std::to_string(access.warp);
    return access.lane == MANY ? text + ", several lanes" : text + ", lane " + std::to_string(access.lane);
}

/// Whether `other` and `now` may happen in any order. Shared memory is another one in every block.
static bool is_unordered(const Access& other, const Access& now, bool is_shared) {
    if (other.launch != now.launch || (other.is_atomic && now.is_atomic)) return false;
    if (other.block != now.block) return !is_shared;
    if (other.epoch != now.epoch) return false;
    if (other.warp != now.warp) return true;
    return other.warp_epoch == now.warp_epoch && other.lane != now.lane;
}

static void check(const Access& other, const char* other_kind, const Access& now, const char* kind, const void* address, bool is_shared) {
    if (!is_unordered(other, now, is_shared)) return;
    const std::string where = is_shared ? "shared memory" : explain_address != nullptr ? explain_address(address) : "memory";
    fail("race in %s: %s at %s, and nothing orders it with the %s by %s at %s", where.c_str(), kind, place(now.code).c_str(), other_kind,
         who(other).c_str(), place(other.code).c_str());
}

/// Adds a reader to those of the same time, or replaces those that come before it.
static void add_reader(Access& readers, const Access& now, bool is_shared) {
    const bool same_time = readers.launch == now.launch && readers.block == now.block && readers.epoch == now.epoch;
    if (!same_time) {
        // Readers of two blocks: both must be remembered, which one entry can as "several".
        const bool two_blocks = !is_shared && readers.launch == now.launch && readers.block != now.block;
        readers = now;
        if (two_blocks) readers.warp = MANY;
    } else if (readers.warp != now.warp) {
        readers.warp = MANY;
    } else if (readers.warp_epoch != now.warp_epoch) {
        readers = now;
    } else if (readers.lane != now.lane) {
        readers.lane = MANY;
    }
}

static bool is_private(const void* address) {
    const char* byte = static_cast<const char*>(address);
    const char* frame = static_cast<const char*>(__builtin_frame_address(0));
    if (byte >= frame && byte < frame + (64 << 10)) return true;
    const RunningBlock& block = running();
    const char* fibers = reinterpret_cast<const char*>(block.fibers.data());
    if (byte >= fibers && byte < fibers + block.fibers.size() * sizeof(Fiber)) return true;
    const char* own = reinterpret_cast<const char*>(&block);
    return byte >= own && byte < own + sizeof(block);
}

enum class Kind { Read, Write, Atomic };

static void note(const void* address, size_t bytes, Kind kind, const void* code) {
    if (current == nullptr || is_private(address)) return;
    Shadow& all = shadow();
    const RunningBlock& block = running();
    const Fiber& fiber = self();
    Access now;
    now.launch = all.launch;
    now.epoch = all.epoch;
    now.warp_epoch = all.warp_epochs[fiber.warp];
    now.block = block.index.x + block.grid_dim.x * (block.index.y + block.grid_dim.y * block.index.z);
    now.warp = static_cast<uint16_t>(fiber.warp);
    now.lane = static_cast<uint16_t>(fiber.lane);
    now.is_atomic = kind == Kind::Atomic;
    now.code = code;
    const bool is_shared = block.shared.covers(address);
    const uintptr_t first = reinterpret_cast<uintptr_t>(address), end = first + bytes;
    for (uintptr_t at = first / CELL_BYTES * CELL_BYTES; at < end; at += CELL_BYTES) {
        Cell& cell = all.page(at / PAGE_BYTES).cells[at % PAGE_BYTES / CELL_BYTES];
        const void* byte = reinterpret_cast<const void*>(at);
        if (kind == Kind::Read) {
            check(cell.write, "write", now, "read", byte, is_shared);
            add_reader(cell.read, now, is_shared);
        } else {
            check(cell.write, "write", now, "write", byte, is_shared);
            check(cell.read, "read", now, "write", byte, is_shared);
            cell.write = now;
        }
    }
}

static const Observer watcher = {
    [] {
        Shadow& all = shadow();
        all.launch++;
        all.epoch++;
        if (all.pages.size() > MOST_PAGES) {
            all.pages.clear();
            all.last_page = nullptr;
        }
    },
    [] { shadow().epoch++; },
    [] { shadow().epoch++; },
    [](unsigned warp) { shadow().warp_epochs[warp]++; },
    [](const void* address, size_t bytes) { note(address, bytes, Kind::Read, nullptr); },
    [](const void* address, size_t bytes) { note(address, bytes, Kind::Write, nullptr); },
};

static const bool is_watching = [] {
    observer = &watcher;
    return true;
}();

}  // namespace emulator

// --- What the compiler calls. ---

using emulator::Kind;
using emulator::note;

#define HOOK extern "C" __attribute__((used)) void
#define CODE __builtin_return_address(0)

#define ACCESSES(bytes)                                                                                          \
    HOOK __tsan_read##bytes(const void* address) { note(address, bytes, Kind::Read, CODE); }                     \
    HOOK __tsan_write##bytes(const void* address) { note(address, bytes, Kind::Write, CODE); }                   \
    HOOK __tsan_unaligned_read##bytes(const void* address) { note(address, bytes, Kind::Read, CODE); }           \
    HOOK __tsan_unaligned_write##bytes(const void* address) { note(address, bytes, Kind::Write, CODE); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

HOOK __tsan_read_range(const void* address, size_t bytes) { note(address, bytes, Kind::Read, CODE); }
HOOK __tsan_write_range(const void* address, size_t bytes) { note(address, bytes, Kind::Write, CODE); }
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
HOOK __tsan_atomic_thread_fence(int) {}

#define ATOMICS(bits, type)                                                                                       \
    extern "C" __attribute__((used)) type __tsan_atomic##bits##_load(const volatile type* p, int) {               \
        note(const_cast<const type*>(p), sizeof(type), Kind::Atomic, CODE);                                       \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                              \
    }                                                                                                             \
    extern "C" __attribute__((used)) bool __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* expected, type value, int, \
                                                                                        int) {                    \
        note(const_cast<const type*>(p), sizeof(type), Kind::Atomic, CODE);                                       \
        return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
    }
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
