#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace emulator {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t GUARD_BYTES = 4 << 10;

#if defined(__x86_64__)
// Callee-saved registers of the System V ABI; the floating-point control words are the same in all fibers.
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");

static void* first_frame(char* top, void (*entry)()) {
    void** sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;  // where `entry` would return to, and what aligns its frame
    *--sp = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    return sp;
}
#elif defined(__aarch64__)
// Callee-saved registers of AAPCS64: x19 to x30 and the lower halves of v8 to v15.
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, %function
emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulator_switch, .-emulator_switch
)");

static void* first_frame(char* top, void (*entry)()) {
    void** sp = reinterpret_cast<void**>(top) - 20;
    for (int i = 0; i < 20; i++) sp[i] = nullptr;
    sp[11] = reinterpret_cast<void*>(entry);
    return sp;
}
#else
#error "the emulator knows x86-64 and aarch64"
#endif

Stacks::~Stacks() {
    for (char* stack : stacks_) munmap(stack, GUARD_BYTES + STACK_BYTES);
}

void* Stacks::prepare(size_t index, void (*entry)()) {
    while (stacks_.size() <= index) {
        void* stack = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) {
            std::perror("cuda emulator: stack");
            std::abort();
        }
        madvise(stack, GUARD_BYTES + STACK_BYTES, MADV_NOHUGEPAGE);
        mprotect(stack, GUARD_BYTES, PROT_NONE);
        stacks_.push_back(static_cast<char*>(stack));
    }
    // Tops at different offsets within a page, so that the fibers' hot lines do not all fall into the same cache sets.
    const size_t offset = (index % 16) * 192;
    return first_frame(stacks_[index] + GUARD_BYTES + STACK_BYTES - offset, entry);
}

long Stacks::overflowed(const void* address) const {
    const char* byte = static_cast<const char*>(address);
    for (size_t i = 0; i < stacks_.size(); i++) {
        if (byte >= stacks_[i] && byte < stacks_[i] + GUARD_BYTES) return static_cast<long>(i);
    }
    return -1;
}

}  // namespace emulator
