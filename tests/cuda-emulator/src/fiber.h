// Stacks and the switch between them.

#pragma once

#include <cstddef>
#include <vector>

namespace emulator {

/// Saves the running fiber's registers on its stack and its stack pointer in `*from`, and goes on with the fiber saved as `to`.
extern "C" void emulator_switch(void** from, void* to);

/// Stacks of one OS thread's fibers, made when first needed, each with a page below it that must not be touched.
class Stacks {
  public:
    Stacks() = default;
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;
    ~Stacks();

    /// Stack pointer of a fiber that starts `entry` (which must not return) on stack `index`.
    void* prepare(size_t index, void (*entry)());

    /// Index of the stack whose guard page holds `address`, or -1.
    long overflowed(const void* address) const;

  private:
    std::vector<char*> stacks_;
};

}  // namespace emulator
