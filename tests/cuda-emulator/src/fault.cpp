// A kernel that touches what it must not ends with a message instead of a bare signal.

#include <signal.h>
#include <unistd.h>

#include <cstdint>

#include "block.h"
#include "fault.h"

namespace emulator {

Explain explain_address = nullptr;

static struct sigaction previous[NSIG];

static void on_fault(int signal, siginfo_t* info, void* context) {
    if (current == nullptr) {
        // Not ours: let whoever was here before have it.
        const struct sigaction& other = previous[signal];
        if ((other.sa_flags & SA_SIGINFO) != 0 && other.sa_sigaction != nullptr) return other.sa_sigaction(signal, info, context);
        sigaction(signal, &other, nullptr);
        return;
    }
    if (signal == SIGILL || signal == SIGTRAP) fail("address that is not a multiple of its type's alignment");
    if (signal == SIGFPE) fail("division by zero");
    if (running().stacks.overflowed(info->si_addr) >= 0) fail("more than 64 KiB of stack");
    if (running().shared.behind(info->si_addr)) fail("access behind the end of dynamic shared memory");
    const std::string where = explain_address == nullptr ? "" : explain_address(info->si_addr);
    fail("access to %p%s%s", info->si_addr, where.empty() ? "" : ": ", where.c_str());
}

/// Handlers run on a stack of their own: the faulting one may be full.
static void prepare_thread() {
    static thread_local bool is_ready = false;
    if (is_ready) return;
    is_ready = true;
    stack_t now;
    if (sigaltstack(nullptr, &now) == 0 && (now.ss_flags & SS_DISABLE) == 0 && now.ss_size >= (32 << 10)) return;
    static thread_local std::vector<char> memory(64 << 10);
    stack_t own = {};
    own.ss_sp = memory.data();
    own.ss_size = memory.size();
    sigaltstack(&own, nullptr);
}

void catch_faults() {
    prepare_thread();
    static const bool installed = [] {
        for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE}) {
            struct sigaction action = {};
            action.sa_sigaction = on_fault;
            action.sa_flags = SA_SIGINFO | SA_ONSTACK;
            sigaction(signal, &action, &previous[signal]);
        }
        return true;
    }();
    (void)installed;
}

}  // namespace emulator
