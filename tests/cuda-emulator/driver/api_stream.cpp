// cuStream*, cuEvent*, cuGraph*.

#include <chrono>
#include <thread>

#include "api.h"
#include "memory.h"
#include "stream.h"

using namespace emulator::driver;

/// How long a wait for work that never ends lasts.
constexpr std::chrono::seconds LONGEST_WAIT(20);

API cuStreamCreate(void** stream, unsigned) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    Context* context = current_context();
    const std::lock_guard<std::mutex> lock(context->mutex);
    const auto made = std::make_shared<Stream>(context);
    context->streams[made.get()] = made;
    *stream = made.get();
    return SUCCESS;
}

API cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
    return cuStreamCreate(stream, flags);
}

API cuStreamDestroy_v2(void* handle) {
    Stream* stream = static_cast<Stream*>(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    stream->drain();
    Context* context = stream->context;
    const std::lock_guard<std::mutex> lock(context->mutex);
    context->streams.erase(stream);
    return SUCCESS;
}

/// Waits for a stream; work that stalls ends in an error of the device.
static Status wait_for(Stream* stream, const Mark* until) {
    const Status status = stream->drain(until);
    if (stream->stalled && (until == nullptr || !until->done)) {
        std::this_thread::sleep_for(LONGEST_WAIT);
        stream->context->error = LAUNCH_TIMEOUT;
        return LAUNCH_TIMEOUT;
    }
    return status;
}

API cuStreamSynchronize(void* handle) {
    const Status status = begin_synchronous_call();
    return status != SUCCESS ? status : wait_for(stream_of(handle), nullptr);
}

API cuStreamQuery(void* handle) {
    const Status status = begin_synchronous_call();
    if (status != SUCCESS) return status;
    const Status drained = stream_of(handle)->drain();
    return drained == SUCCESS && stream_of(handle)->stalled ? NOT_READY : drained;
}

API cuStreamBeginCapture_v2(void* handle, int) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    // The legacy stream cannot be captured.
    return handle == nullptr ? STREAM_CAPTURE_UNSUPPORTED : stream_of(handle)->begin_capture();
}

API cuStreamEndCapture(void* handle, void** graph) {
    std::shared_ptr<Graph> captured;
    const Status status = stream_of(handle)->end_capture(&captured);
    *graph = status == SUCCESS ? new std::shared_ptr<Graph>(captured) : nullptr;
    return status;
}

API cuStreamIsCapturing(void* handle, int* capture_status) {
    const Stream* stream = stream_of(handle);
    *capture_status = !stream->is_capturing() ? 0 : stream->is_invalidated() ? 2 : 1;
    return SUCCESS;
}

API cuStreamWaitEvent(void* handle, void* event, unsigned) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    const std::shared_ptr<Mark> mark = static_cast<Event*>(event)->mark;
    if (mark == nullptr) return SUCCESS;
    return stream_of(handle)->enqueue([mark] { return mark->done ? SUCCESS : mark->stream->drain(mark.get()); });
}

API cuLaunchHostFunc(void* handle, void (*function)(void*), void* argument) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    return stream_of(handle)->enqueue([=] {
        function(argument);
        return SUCCESS;
    });
}

// --- Events ---

API cuEventCreate(void** event, unsigned) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    *event = new Event;
    return SUCCESS;
}

API cuEventDestroy_v2(void* event) {
    delete static_cast<Event*>(event);
    return SUCCESS;
}

API cuEventRecord(void* event, void* handle) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    const auto mark = std::make_shared<Mark>();
    mark->stream = stream_of(handle);
    static_cast<Event*>(event)->mark = mark;
    return mark->stream->enqueue([mark] {
        mark->time = Clock::now();
        mark->done = true;
        return SUCCESS;
    });
}

API cuEventQuery(void* event) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    const std::shared_ptr<Mark> mark = static_cast<Event*>(event)->mark;
    if (mark == nullptr || mark->done) return SUCCESS;
    if (!mark->asked.exchange(true)) return NOT_READY;
    const Status drained = mark->stream->drain(mark.get());
    return drained != SUCCESS ? drained : mark->done ? SUCCESS : NOT_READY;
}

API cuEventSynchronize(void* event) {
    const Status status = begin_synchronous_call();
    if (status != SUCCESS) return status;
    const std::shared_ptr<Mark> mark = static_cast<Event*>(event)->mark;
    return mark == nullptr || mark->done ? SUCCESS : wait_for(mark->stream, mark.get());
}

API cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    const std::shared_ptr<Mark> first = static_cast<Event*>(start)->mark, last = static_cast<Event*>(end)->mark;
    if (first == nullptr || last == nullptr) return INVALID_HANDLE;
    if (!first->done || !last->done) return NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(last->time - first->time).count();
    return SUCCESS;
}

// --- Graphs: a graph and what was made of it share the recorded work. ---

static std::shared_ptr<Graph>& graph_of(void* handle) {
    return *static_cast<std::shared_ptr<Graph>*>(handle);
}

API cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    *executable = new std::shared_ptr<Graph>(graph_of(graph));
    return SUCCESS;
}

API cuGraphLaunch(void* executable, void* handle) {
    const Status status = begin_call();
    if (status != SUCCESS) return status;
    const std::shared_ptr<Graph> graph = graph_of(executable);
    return stream_of(handle)->enqueue([graph] {
        for (const Operation& operation : graph->operations) {
            const Status done = operation();
            if (done != SUCCESS) return done;
        }
        return SUCCESS;
    });
}

API cuGraphUpload(void*, void*) {
    return begin_call();
}

API cuGraphExecDestroy(void* executable) {
    delete &graph_of(executable);
    return SUCCESS;
}

API cuGraphDestroy(void* graph) {
    delete &graph_of(graph);
    return SUCCESS;
}

API cuGraphGetNodes(void* graph, void**, size_t* count) {
    *count = graph_of(graph)->operations.size();
    return SUCCESS;
}
