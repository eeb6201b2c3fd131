// Warp collectives: shuffles, votes, matrix operations.

#include <cstring>

#include "block.h"
#include "observer.h"

namespace emulator {

static Fiber* lanes_of_warp(const Fiber& fiber) {
    return &running().fibers[fiber.warp * 32];
}

static unsigned num_lanes(const Fiber& fiber) {
    const unsigned left = running().num_threads - fiber.warp * 32;
    return left < 32 ? left : 32;
}

void check_nobody_waits(const char* what) {
    const Fiber& fiber = self();
    const Fiber* lanes = lanes_of_warp(fiber);
    for (uint32_t rest = running().waiting_lanes[fiber.warp]; rest != 0; rest &= rest - 1) {
        const Fiber& other = lanes[__builtin_ctz(rest)];
        if ((other.mask >> fiber.lane & 1) != 0) {
            fail("%s, but %s waits for it in %s with mask %08x", what, describe(other).c_str(), other.collective->name, other.mask);
        }
    }
}

/// All lanes of `mask` exist, still run and wait, if at all, in the same collective. Returns those that have not arrived yet.
static uint32_t missing_lanes(const Collective& op, uint32_t mask) {
    const Fiber& fiber = self();
    const RunningBlock& block = running();
    const Fiber* lanes = lanes_of_warp(fiber);
    if ((mask >> fiber.lane & 1) == 0) fail("%s with mask %08x, which lacks the calling lane %u", op.name, mask, fiber.lane);
    if (num_lanes(fiber) < 32 && mask >> num_lanes(fiber) != 0) {
        fail("%s with mask %08x, but the warp has %u lanes", op.name, mask, num_lanes(fiber));
    }
    const uint32_t waiting = block.waiting_lanes[fiber.warp] & mask;
    if (const uint32_t lost = mask & ~waiting & ~block.ready_lanes[fiber.warp]) {
        const Fiber& other = lanes[__builtin_ctz(lost)];
        fail("%s with mask %08x, but %s %s", op.name, mask, describe(other).c_str(),
             other.state == State::Done ? "has returned" : "waits at __syncthreads");
    }
    if (waiting != 0) {
        // All that wait in `mask` were compared with each other when they came.
        const Fiber& other = lanes[__builtin_ctz(waiting)];
        if (other.collective != &op || other.mask != mask) {
            fail("divergent warp: %s with mask %08x, but %s is in %s with mask %08x", op.name, mask, describe(other).c_str(),
                 other.collective->name, other.mask);
        }
    }
    return mask & ~waiting & ~(1u << fiber.lane);
}

uint64_t collect(const Collective& op, uint32_t mask, const Deposit& deposit) {
    Fiber& fiber = self();
    fiber.deposit = deposit;
    if (missing_lanes(op, mask) != 0) {
        fiber.collective = &op;
        fiber.mask = mask;
        make_unready(fiber, State::InCollective);
        running().waiting_lanes[fiber.warp] |= 1u << fiber.lane;
        wait_for_others();
        return fiber.result;
    }
    Fiber* lanes = lanes_of_warp(fiber);
    op.resolve(lanes, mask);
    running().waiting_lanes[fiber.warp] &= ~mask;
    for (uint32_t rest = mask & ~(1u << fiber.lane); rest != 0; rest &= rest - 1) make_ready(lanes[__builtin_ctz(rest)]);
    return fiber.result;
}

void sync_warp(uint32_t mask) {
    static const Collective op = {"__syncwarp", [](Fiber* lanes, uint32_t) {
        if (observer != nullptr) observer->warp_synchronised(lanes[0].warp);
    }};
    collect(op, mask, {});
}

uint64_t shuffle(uint32_t mask, uint64_t value, unsigned source) {
    static const Collective op = {"a shuffle", [](Fiber* lanes, uint32_t mask) {
        for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
            Fiber& lane = lanes[__builtin_ctz(rest)];
            lane.result = lanes[lane.deposit.source].deposit.value;
        }
    }};
    if (source > 31 || (mask >> source & 1) == 0) fail("a shuffle with mask %08x reads lane %u, which takes no part", mask, source);
    Deposit deposit;
    deposit.value = value;
    deposit.source = source;
    return collect(op, mask, deposit);
}

uint32_t ballot(uint32_t mask, bool predicate) {
    static const Collective op = {"a vote", [](Fiber* lanes, uint32_t mask) {
        uint32_t votes = 0;
        for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
            const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
            votes |= static_cast<uint32_t>(lanes[lane].deposit.value) << lane;
        }
        for (uint32_t rest = mask; rest != 0; rest &= rest - 1) lanes[__builtin_ctz(rest)].result = votes;
    }};
    Deposit deposit;
    deposit.value = predicate ? 1 : 0;
    return static_cast<uint32_t>(collect(op, mask, deposit));
}

// --- mma ---

typedef float float8 __attribute__((vector_size(32)));

static float low_bf16(uint32_t pair) {
    const uint32_t bits = pair << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static float high_bf16(uint32_t pair) {
    const uint32_t bits = pair & 0xffff0000u;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

/// Products of two bf16 are exact in f32; they are added by ascending k. The device's order within a k16 step is its own.
static void multiply(Fiber* lanes, uint32_t) {
    float a[16][16];
    float8 b[16], sum[16];
    for (unsigned lane = 0; lane < 32; lane++) {
        const unsigned g = lane / 4, t = lane % 4;
        const Deposit& deposit = lanes[lane].deposit;
        const uint32_t* ra = static_cast<const uint32_t*>(deposit.in[0]);
        const uint32_t* rb = static_cast<const uint32_t*>(deposit.in[1]);
        const float* rc = static_cast<const float*>(deposit.in[2]);
        for (unsigned i = 0; i < 4; i++) {
            const unsigned row = g + 8 * (i & 1), column = 2 * t + 8 * (i >> 1);
            a[row][column] = low_bf16(ra[i]);
            a[row][column + 1] = high_bf16(ra[i]);
        }
        for (unsigned i = 0; i < 2; i++) {
            b[2 * t + 8 * i][g] = low_bf16(rb[i]);
            b[2 * t + 8 * i + 1][g] = high_bf16(rb[i]);
        }
        for (unsigned i = 0; i < 4; i++) sum[g + 8 * (i >> 1)][2 * t + (i & 1)] = rc[i];
    }
    for (unsigned row = 0; row < 16; row++) {
        for (unsigned k = 0; k < 16; k++) sum[row] += a[row][k] * b[k];
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        const unsigned g = lane / 4, t = lane % 4;
        float* d = static_cast<float*>(lanes[lane].deposit.out);
        for (unsigned i = 0; i < 4; i++) d[i] = sum[g + 8 * (i >> 1)][2 * t + (i & 1)];
    }
}

void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
    static const Collective op = {"mma_m16n8k16_bf16", multiply};
    Deposit deposit;
    deposit.out = d;
    deposit.in[0] = a;
    deposit.in[1] = b;
    deposit.in[2] = c;
    collect(op, ~0u, deposit);
}

// --- ldmatrix ---

template <int MATRICES, bool TRANSPOSED>
static void load_fragments(Fiber* lanes, uint32_t) {
    for (unsigned matrix = 0; matrix < MATRICES; matrix++) {
        uint16_t elements[8][8];
        for (unsigned row = 0; row < 8; row++) std::memcpy(elements[row], lanes[8 * matrix + row].deposit.in[0], 16);
        for (unsigned lane = 0; lane < 32; lane++) {
            const unsigned g = lane / 4, t = lane % 4;
            const uint32_t first = TRANSPOSED ? elements[2 * t][g] : elements[g][2 * t];
            const uint32_t second = TRANSPOSED ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
            static_cast<uint32_t*>(lanes[lane].deposit.out)[matrix] = first | second << 16;
        }
    }
}

void load_matrices(uint32_t* r, const void* row, int matrices, bool transposed) {
    static const Collective ops[4] = {{"ldmatrix_x2", load_fragments<2, false>},
                                      {"ldmatrix_x2_trans", load_fragments<2, true>},
                                      {"ldmatrix_x4", load_fragments<4, false>},
                                      {"ldmatrix_x4_trans", load_fragments<4, true>}};
    const Collective& op = ops[(matrices == 4 ? 2 : 0) + (transposed ? 1 : 0)];
    if (self().lane < 8u * static_cast<unsigned>(matrices)) {
        if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("%s: row at %p is not aligned to 16 bytes", op.name, row);
        if (!running().shared.holds(row, 16)) fail("%s: row at %p is not in shared memory", op.name, row);
        if (observer != nullptr) observer->read(row, 16);
    }
    Deposit deposit;
    deposit.out = r;
    deposit.in[0] = row;
    collect(op, ~0u, deposit);
}

}  // namespace emulator
