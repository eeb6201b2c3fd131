// Contexts, streams, events and graphs of the fake driver.
//
// What is enqueued waits until something needs it: a wait, a query, a free. So a host that reads too early, or reuses a staging buffer
// too early, gets wrong bytes, as it might on a device. (CUDA_EMULATOR_EAGER=1 runs all at once.)

#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "status.h"

namespace emulator::driver {

using Operation = std::function<Status()>;

struct Stream;

struct Context {
    int device = 0;
    int references = 0;
    /// What every later call answers once something failed on the device.
    std::atomic<Status> error = SUCCESS;
    std::mutex mutex;
    std::map<Stream*, std::shared_ptr<Stream>> streams;
    std::shared_ptr<Stream> default_stream;

    /// Runs what waits in all streams.
    void drain();
};

struct Graph {
    std::vector<Operation> operations;
};

using Clock = std::chrono::steady_clock;

/// One recording of an event.
struct Mark {
    std::atomic<bool> done = false;
    /// Asked once: the first answer is always "not ready", so that callers show that they can wait.
    std::atomic<bool> asked = false;
    Clock::time_point time;
    Stream* stream = nullptr;
};

struct Event {
    std::shared_ptr<Mark> mark;
};

struct Stream {
    explicit Stream(Context* owner) : context(owner) {}

    Context* const context;

    /// Adds work: to the graph while capturing, else to the queue.
    Status enqueue(Operation operation);
    /// Runs what waits, or, with a mark, until that is done.
    Status drain(const Mark* until = nullptr);

    Status begin_capture();
    Status end_capture(std::shared_ptr<Graph>* graph);
    bool is_capturing() const;
    bool is_invalidated() const;
    /// A call that no capture survives.
    void invalidate();

    /// Work that never ends was started.
    std::atomic<bool> stalled = false;

  private:
    mutable std::recursive_mutex mutex_;
    std::deque<Operation> pending_;
    std::shared_ptr<Graph> capture_;
    bool invalidated_ = false;
};

/// Context that is current in this thread, or null.
Context*& current_context();

/// The stream of a handle; null stands for the current context's own.
Stream* stream_of(void* handle);

/// A call that waits for the device or may do so: it must not come from a thread that captures. Returns what the caller must answer.
Status begin_synchronous_call();

/// Whether calls may be made at all: initialised, a context is current, nothing failed before.
Status begin_call();

}  // namespace emulator::driver
