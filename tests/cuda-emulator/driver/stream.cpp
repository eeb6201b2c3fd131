#include "stream.h"

#include "settings.h"

namespace emulator::driver {

/// Work that a queue takes before it is run anyway.
constexpr size_t MOST_PENDING = 4096;

static thread_local Stream* capturing = nullptr;

Context*& current_context() {
    static thread_local Context* context = nullptr;
    return context;
}

Stream* stream_of(void* handle) {
    return handle != nullptr ? static_cast<Stream*>(handle) : current_context()->default_stream.get();
}

Status begin_call() {
    if (current_context() == nullptr) return INVALID_CONTEXT;
    return current_context()->error;
}

Status begin_synchronous_call() {
    if (capturing != nullptr) {
        capturing->invalidate();
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    return begin_call();
}

void Context::drain() {
    // Other threads may destroy their streams meanwhile.
    std::vector<std::shared_ptr<Stream>> all;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        all.push_back(default_stream);
        for (const auto& [_, stream] : streams) all.push_back(stream);
    }
    for (const std::shared_ptr<Stream>& stream : all) stream->drain();
}

bool Stream::is_capturing() const {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    return capture_ != nullptr;
}

bool Stream::is_invalidated() const {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    return invalidated_;
}

void Stream::invalidate() {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    invalidated_ = true;
}

Status Stream::enqueue(Operation operation) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (capture_ != nullptr) {
        if (capturing != this) return STREAM_CAPTURE_WRONG_THREAD;
        if (invalidated_) return STREAM_CAPTURE_INVALIDATED;
        capture_->operations.push_back(std::move(operation));
        return SUCCESS;
    }
    pending_.push_back(std::move(operation));
    return settings().eager || pending_.size() > MOST_PENDING ? drain() : SUCCESS;
}

Status Stream::drain(const Mark* until) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    while (!pending_.empty() && !stalled && context->error == SUCCESS && (until == nullptr || !until->done)) {
        const Operation operation = std::move(pending_.front());
        pending_.pop_front();
        const Status status = operation();
        if (status != SUCCESS) context->error = status;
    }
    return context->error;
}

Status Stream::begin_capture() {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (capture_ != nullptr || capturing != nullptr) return STREAM_CAPTURE_UNSUPPORTED;
    drain();
    capture_ = std::make_shared<Graph>();
    invalidated_ = false;
    capturing = this;
    return SUCCESS;
}

Status Stream::end_capture(std::shared_ptr<Graph>* graph) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (capture_ == nullptr) return INVALID_VALUE;
    if (capturing != this) return STREAM_CAPTURE_WRONG_THREAD;
    capturing = nullptr;
    *graph = std::move(capture_);
    capture_ = nullptr;
    return invalidated_ ? STREAM_CAPTURE_INVALIDATED : SUCCESS;
}

}  // namespace emulator::driver
