// A small harness for tests of kernels and of the emulator itself: checks, death tests, launches by name.

#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "emulator.h"

namespace harness {

struct Test {
    const char* name;
    void (*body)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

inline int& num_failures() {
    static int count = 0;
    return count;
}

struct Added {
    Added(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

/// Launches a kernel of this program by name, as the driver would: refused launches end the test program.
template <typename... A>
void launch(const char* name, dim3 grid, dim3 block, size_t dynamic_shared_bytes, A... arguments) {
    const emulator::Kernel* kernel = emulator::find_kernel(name);
    if (kernel == nullptr) emulator::fail("no kernel %s", name);
    const size_t bytes[] = {sizeof(A)..., 0};
    if (kernel->num_arguments != sizeof...(A)) emulator::fail("%s takes %zu arguments", name, kernel->num_arguments);
    for (size_t i = 0; i < sizeof...(A); i++) {
        if (bytes[i] != kernel->argument_bytes[i]) emulator::fail("%s: argument %zu has %zu bytes", name, i, kernel->argument_bytes[i]);
    }
    void* pointers[] = {static_cast<void*>(&arguments)..., nullptr};
    const emulator::Shape shape = {grid, block, dynamic_shared_bytes};
    if (const char* reason = emulator::refuse(*kernel, shape, emulator::SHARED_OPT_IN_BYTES)) emulator::fail("%s: %s", name, reason);
    emulator::run(*kernel, shape, pointers);
}

/// What `body` writes to standard error before it aborts; empty when it does not abort.
inline std::string message_of_death(const std::function<void()>& body) {
    int ends[2];
    if (pipe(ends) != 0) std::abort();
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        body();
        _exit(0);
    }
    close(ends[1]);
    std::string text;
    char buffer[512];
    for (ssize_t count; (count = read(ends[0], buffer, sizeof(buffer))) > 0;) text.append(buffer, static_cast<size_t>(count));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT ? text : std::string();
}

/// Numbers in [-1, 1), the same at every run.
struct Random {
    uint64_t state;
    uint32_t bits() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state >> 33);
    }
    float next() { return static_cast<float>(bits()) / static_cast<float>(1u << 30) - 1.0f; }
};

/// Runs all tests, or those whose name contains the first argument.
inline int run_all(int argc, char** argv) {
    int count = 0;
    for (const Test& test : tests()) {
        if (argc > 1 && std::string(test.name).find(argv[1]) == std::string::npos) continue;
        const int before = num_failures();
        test.body();
        std::printf("%s %s\n", num_failures() == before ? "ok  " : "FAIL", test.name);
        count++;
    }
    std::printf("%d tests, %d failed checks\n", count, num_failures());
    return num_failures() == 0 && count > 0 ? 0 : 1;
}

}  // namespace harness

#define TEST(name)                                          \
    static void test_##name();                              \
    static const harness::Added added_##name(#name, test_##name); \
    static void test_##name()

#define CHECK(condition)                                                             \
    do {                                                                             \
        if (!(condition)) {                                                          \
            std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);      \
            harness::num_failures()++;                                               \
        }                                                                            \
    } while (0)

/// `statement` must end the process with a message that contains `text`.
#define CHECK_DIES(text, ...)                                                                        \
    do {                                                                                             \
        const std::string message = harness::message_of_death([&] { __VA_ARGS__; });                 \
        if (message.find(text) == std::string::npos) {                                               \
            std::printf("%s:%d: expected death by \"%s\", got \"%s\"\n", __FILE__, __LINE__, text, message.c_str()); \
            harness::num_failures()++;                                                               \
        }                                                                                            \
    } while (0)
