// The fake driver and cuBLASLt, called as the backend calls them.

#include <cstring>
#include <string>
#include <thread>

#include "cuda_api.h"
#include "harness.h"

/// A device with its context, one stream and the probe kernels.
struct Gpu {
    int device;
    void *context, *stream, *module, *add, *load_vector;

    explicit Gpu(int ordinal = 0) {
        static const unsigned char image[] = {0x50, 0xed, 0x55, 0xba, 0, 0, 0, 0};
        CHECK(cuInit(0) == 0);
        CHECK(cuDeviceGet(&device, ordinal) == 0);
        CHECK(cuDevicePrimaryCtxRetain(&context, device) == 0);
        CHECK(cuCtxSetCurrent(context) == 0);
        CHECK(cuStreamCreate(&stream, 1) == 0);
        CHECK(cuModuleLoadData(&module, image) == 0);
        CHECK(cuModuleGetFunction(&add, module, "emulator_add") == 0);
        CHECK(cuModuleGetFunction(&load_vector, module, "emulator_load_vector") == 0);
    }
    ~Gpu() {
        cuModuleUnload(module);
        cuStreamDestroy_v2(stream);
        cuDevicePrimaryCtxRelease_v2(device);
    }
    Address alloc(size_t bytes) const {
        Address address = 0;
        CHECK(cuMemAlloc_v2(&address, bytes) == 0);
        return address;
    }
    template <typename T>
    T* pinned(size_t count) const {
        void* start = nullptr;
        CHECK(cuMemHostAlloc(&start, count * sizeof(T), 3) == 0);
        return static_cast<T*>(start);
    }
    int launch_add(Address x, float value, int32_t count, int64_t beside = 0, unsigned dynamic_bytes = 0, unsigned threads = 32) const {
        void* arguments[] = {&x, &value, &count, &beside};
        const unsigned blocks = (static_cast<unsigned>(count) + 31) / 32;
        return cuLaunchKernel(add, blocks, 1, 1, threads, 1, 1, dynamic_bytes, stream, arguments, nullptr);
    }
    void synchronize() const { CHECK(cuStreamSynchronize(stream) == 0); }
};

TEST(devices_are_hopper) {
    int version = 0, count = 0, value = 0;
    CHECK(cuDriverGetVersion(&version) == 0 && version == 13000);
    const Gpu gpu;
    CHECK(cuDeviceGetCount(&count) == 0 && count == 2);
    CHECK(cuDeviceGet(&value, 2) == 101);
    CHECK(cuDeviceGetAttribute(&value, 75, 0) == 0 && value == 9);
    CHECK(cuDeviceGetAttribute(&value, 97, 0) == 0 && value == 227 << 10);
    void* function;
    CHECK(cuModuleGetFunction(&function, gpu.module, "no_such_kernel") == 500);
    CHECK(cuModuleLoadData(&function, "what is this") == 200);
    size_t offset = 0, bytes = 0;
    CHECK(cuFuncGetParamInfo(gpu.add, 3, &offset, &bytes) == 0 && offset == 16 && bytes == 8);
    CHECK(cuFuncGetParamInfo(gpu.add, 4, &offset, &bytes) == 1);
    cuCtxSetCurrent(nullptr);
    Address address;
    CHECK(cuMemAlloc_v2(&address, 4) == 201);
}

TEST(memory_is_poisoned_counted_and_given_back) {
    const Gpu gpu;
    size_t before = 0, after = 0, total = 0;
    CHECK(cuMemGetInfo_v2(&before, &total) == 0 && total == 1 << 30);
    const Address x = gpu.alloc(1000);
    CHECK(x % 256 == 0);
    CHECK(cuMemGetInfo_v2(&after, &total) == 0 && before - after == 1000);
    unsigned char bytes[1000];
    CHECK(cuMemcpyDtoHAsync_v2(bytes, x, 1000, gpu.stream) == 0);
    for (unsigned char byte : bytes) CHECK(byte == 0xff);
    CHECK(cuMemcpyDtoHAsync_v2(bytes, x + 1, 1000, gpu.stream) == 1);
    CHECK(cuMemFree_v2(x) == 0 && cuMemFree_v2(x) == 1);
    CHECK(cuMemGetInfo_v2(&after, &total) == 0 && before == after);
    Address y;
    CHECK(cuMemAlloc_v2(&y, (1 << 30) + 1) == 2);
}

TEST(work_waits_until_it_is_needed) {
    const Gpu gpu;
    const Address x = gpu.alloc(4);
    float* host = gpu.pinned<float>(2);
    host[0] = 1.0f;
    host[1] = 0.0f;
    CHECK(cuMemcpyHtoDAsync_v2(x, host, 4, gpu.stream) == 0);
    CHECK(gpu.launch_add(x, 10.0f, 1) == 0);
    CHECK(cuMemcpyDtoHAsync_v2(host + 1, x, 4, gpu.stream) == 0);
    void* event;
    CHECK(cuEventCreate(&event, 2) == 0 && cuEventRecord(event, gpu.stream) == 0);
    CHECK(host[1] == 0.0f);
    host[0] = 2.0f;  // too early: the copy has not run
    CHECK(cuEventQuery(event) == 600 && cuEventQuery(event) == 0);
    CHECK(host[1] == 12.0f);
    // What is not pinned is read at once.
    float loose = 3.0f;
    CHECK(cuMemcpyHtoDAsync_v2(x, &loose, 4, gpu.stream) == 0);
    loose = 4.0f;
    CHECK(cuMemcpyDtoHAsync_v2(host, x, 4, gpu.stream) == 0);
    gpu.synchronize();
    CHECK(host[0] == 3.0f);
    CHECK(cuEventDestroy_v2(event) == 0 && cuMemFreeHost(host) == 0);
}

TEST(graphs_replay_with_fresh_data) {
    const Gpu gpu;
    const Address x = gpu.alloc(4);
    float* host = gpu.pinned<float>(2);
    CHECK(cuStreamBeginCapture_v2(gpu.stream, 1) == 0);
    CHECK(cuMemcpyHtoDAsync_v2(x, host, 4, gpu.stream) == 0);
    CHECK(gpu.launch_add(x, 1.0f, 1) == 0 && gpu.launch_add(x, 2.0f, 1) == 0);
    CHECK(cuMemcpyDtoHAsync_v2(host + 1, x, 4, gpu.stream) == 0);
    void *graph, *executable;
    CHECK(cuStreamEndCapture(gpu.stream, &graph) == 0);
    CHECK(cuGraphInstantiateWithFlags(&executable, graph, 0) == 0 && cuGraphDestroy(graph) == 0);
    for (float start : {0.0f, 5.0f}) {
        host[0] = start;
        CHECK(cuGraphLaunch(executable, gpu.stream) == 0);
        gpu.synchronize();
        CHECK(host[1] == start + 3.0f);
    }
    CHECK(cuGraphExecDestroy(executable) == 0);
    // What no capture survives.
    CHECK(cuStreamBeginCapture_v2(gpu.stream, 1) == 0);
    Address y;
    CHECK(cuMemAlloc_v2(&y, 4) == 900);
    CHECK(gpu.launch_add(x, 1.0f, 1) == 901);
    CHECK(cuStreamEndCapture(gpu.stream, &graph) == 901 && graph == nullptr);
    CHECK(gpu.launch_add(x, 1.0f, 1) == 0);
}

TEST(launches_are_refused_as_on_hopper) {
    const Gpu gpu;
    const Address x = gpu.alloc(4);
    CHECK(gpu.launch_add(x, 1.0f, 1, 0, 48 << 10) == 0);
    CHECK(gpu.launch_add(x, 1.0f, 1, 0, (48 << 10) + 1) == 1);
    CHECK(cuFuncSetAttribute(gpu.add, 8, 228 << 10) == 1);
    CHECK(cuFuncSetAttribute(gpu.add, 8, 227 << 10) == 0);
    CHECK(gpu.launch_add(x, 1.0f, 1, 0, 227 << 10) == 0);
    CHECK(gpu.launch_add(x, 1.0f, 1, 0, 0, 1025) == 1);
}

TEST(writes_beside_an_allocation_end_with_a_message) {
    const Gpu gpu;
    const auto add = [&](size_t bytes, int64_t beside) {
        const Address x = gpu.alloc(bytes);
        gpu.launch_add(x, 0.0f, 1, beside);
        cuStreamSynchronize(gpu.stream);
    };
    CHECK_DIES("emulator_add wrote behind an allocation of 100 bytes", add(100, 25));
    CHECK_DIES("emulator_add wrote before an allocation of 100 bytes", add(100, -1));
    CHECK_DIES("kernel emulator_add, block (0, 0, 0), thread (0, 0, 0): access to", add(256, 64));
    CHECK_DIES("byte 256 of an allocation of 256 bytes", add(256, 64));
    const auto load_vector = [&](int32_t offset) {
        Address x = gpu.alloc(64);
        void* arguments[] = {&x, &offset};
        cuLaunchKernel(gpu.load_vector, 1, 1, 1, 1, 1, 1, 0, gpu.stream, arguments, nullptr);
        cuStreamSynchronize(gpu.stream);
    };
    CHECK_DIES("not a multiple of its type's alignment", load_vector(8));
    CHECK(harness::message_of_death([&] { load_vector(16); }).empty());
}

TEST(threads_share_devices) {
    const auto work = [](int index) {
        const int ordinal = index % 2;
        const Gpu gpu(ordinal);
        const Address x = gpu.alloc(4 * 1000);
        float* host = gpu.pinned<float>(1000);
        CHECK(cuMemsetD8Async(x, 0, 4000, gpu.stream) == 0);
        for (int i = 0; i < 200; i++) CHECK(gpu.launch_add(x, static_cast<float>(ordinal + 1), 1000) == 0);
        CHECK(cuMemcpyDtoHAsync_v2(host, x, 4000, gpu.stream) == 0);
        gpu.synchronize();
        for (int i = 0; i < 1000; i++) CHECK(host[i] == 200.0f * static_cast<float>(ordinal + 1));
    };
    std::vector<std::thread> threads;
    for (int index = 0; index < 6; index++) threads.emplace_back(work, index);
    for (std::thread& thread : threads) thread.join();
}

// --- Injected errors: settings are read once, so each case is a process of its own. ---

/// Prints the statuses that a program meets on its way through one launch.
static int probe() {
    int version = 0, value = 0;
    const int initialised = cuInit(0);
    cuDriverGetVersion(&version);
    if (initialised != 0) {
        std::printf("init %d\n", initialised);
        return 0;
    }
    cuDeviceGetAttribute(&value, 75, 0);
    const Gpu gpu;
    Address x = 0;
    const int allocated = cuMemAlloc_v2(&x, 4096);
    std::printf("version %d major %d alloc %d", version, value, allocated);
    if (allocated == 0) {
        int statuses[2];
        for (int& status : statuses) {
            gpu.launch_add(x, 1.0f, 1);
            status = cuStreamSynchronize(gpu.stream);
        }
        std::printf(" launches %d %d", statuses[0], statuses[1]);
    }
    std::printf("\n");
    return 0;
}

static std::string probe_with(const std::string& environment) {
    char self[4096] = {};
    if (readlink("/proc/self/exe", self, sizeof(self) - 1) < 0) return "";
    FILE* pipe = popen((environment + " '" + self + "' --probe").c_str(), "r");
    char line[256] = {};
    if (std::fgets(line, sizeof(line), pipe) == nullptr) line[0] = 0;
    pclose(pipe);
    return line;
}

TEST(errors_are_injected_by_the_environment) {
    CHECK(probe_with("") == "version 13000 major 9 alloc 0 launches 0 0\n");
    CHECK(probe_with("CUDA_EMULATOR_DEVICES=0") == "init 100\n");
    CHECK(probe_with("CUDA_EMULATOR_DRIVER=12040 CUDA_EMULATOR_CAPABILITY=75") == "version 12040 major 7 alloc 0 launches 0 0\n");
    CHECK(probe_with("CUDA_EMULATOR_MEMORY_BYTES=4095") == "version 13000 major 9 alloc 2\n");
    CHECK(probe_with("CUDA_EMULATOR_FAIL_LAUNCH=2") == "version 13000 major 9 alloc 0 launches 0 719\n");
    CHECK(probe_with("CUDA_EMULATOR_FAIL_LAUNCH=1") == "version 13000 major 9 alloc 0 launches 719 719\n");
    CHECK(probe_with("CUDA_EMULATOR_EAGER=1") == "version 13000 major 9 alloc 0 launches 0 0\n");
}

int main(int argc, char** argv) {
    if (argc > 1 && std::string(argv[1]) == "--probe") return probe();
    return harness::run_all(argc, argv);
}
