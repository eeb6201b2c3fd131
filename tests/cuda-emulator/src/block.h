// A block while it runs: its fibers, who of them may go on, and what the others wait for.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "shared_memory.h"

namespace emulator {

/// What a lane brings to a warp collective; which fields count is the collective's affair.
struct Deposit {
    uint64_t value = 0;
    unsigned source = 0;
    void* out = nullptr;
    const void* in[3] = {};
};

struct Fiber;

/// A warp collective: `resolve` runs once, when the last lane of `mask` has arrived.
struct Collective {
    const char* name;
    void (*resolve)(Fiber* lanes, uint32_t mask);
};

/// A started `cp.async`.
struct AsyncCopy {
    void* dst;
    const void* src;
    bool valid;
};

enum class State : uint8_t { Ready, InCollective, AtBarrier, Done };

struct Fiber : Thread {
    void* stack_pointer;
    unsigned warp;
    State state;
    // In a collective.
    const Collective* collective;
    uint32_t mask;
    Deposit deposit;
    uint64_t result;
    // Asynchronous copies, oldest first, and how many of them each committed group ends with.
    std::vector<AsyncCopy> copies;
    std::vector<size_t> group_ends;
};

struct RunningBlock : Block {
    const Kernel* kernel;
    void** arguments;
    unsigned num_threads, num_warps;
    std::vector<Fiber> fibers;
    uint32_t ready_warps;
    uint32_t ready_lanes[32];
    uint32_t waiting_lanes[32];  // in a collective
    unsigned num_done;
    // The block barrier.
    unsigned num_arrived;
    const char* barrier_file;
    int barrier_line;
    Vote barrier_vote;
    int barrier_true, barrier_result;
    void* home;  // stack pointer of the OS thread's own stack
    SharedMemory shared;
    Stacks stacks;
};

/// The block that runs on this OS thread.
RunningBlock& running();

inline Fiber& self() {
    return *static_cast<Fiber*>(current);
}

/// Goes on with another fiber; returns when this one is ready again.
void wait_for_others();

void make_ready(Fiber& fiber);
void make_unready(Fiber& fiber, State state);

/// Takes part in `op` with the lanes of `mask`; returns this lane's result once all have arrived.
uint64_t collect(const Collective& op, uint32_t mask, const Deposit& deposit);

/// Fails when a lane of this warp waits for this one in a collective, which it then will never enter.
void check_nobody_waits(const char* what);

std::string describe(const Fiber& fiber);

}  // namespace emulator
