// A CUDA device of fibers, one for each thread of a block. A fiber runs until it waits for others, so a
// launch is the same each time. Blocks, and the threads of a block, come in a random order of a fixed seed.
//
// This file is compiled without a sanitizer, which would take the switching for the kernels' work. It tells
// the one that is linked in of every switch. ThreadSanitizer sees a thread in every fiber and knows of no
// order between them but that of __syncthreads and of launches: it reports races that never happen here. A
// shuffle gives no such order, as on the device.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

// Null where the sanitizer is not linked in.
#define WEAK __attribute__((weak))
extern "C" {
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, std::size_t* size);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* address);
WEAK void __tsan_release(void* address);
}

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr std::size_t kStackBytes = 1 << 17;  // a sanitizer's report is written on it too
constexpr unsigned kNoOrder = 1;              // __tsan_switch_to_fiber_no_sync
// Fibers are made once, for that is slow. So many blocks that follow each other have fibers of their own, and
// nothing that ThreadSanitizer would take for an order between them.
constexpr std::size_t kBlocksAtOnce = 2;

struct Fiber {
    ucontext_t context;
    const void* stack;
    std::size_t stack_bytes;
    void* fake_stack = nullptr;
    void* tsan = nullptr;
};

// Where `expected` threads wait for each other, again and again. Nobody comes to the round after the next
// before all have left this one: what belongs to a round is kept twice.
struct Meeting {
    unsigned expected = 0, arrived = 0, round = 0;
    std::uint64_t bits[2][kWarp] = {};
    char order[2];  // addresses for ThreadSanitizer
};

struct Thread : Fiber {
    unsigned number = 0;  // in its block
    const Meeting* waits_at = nullptr;
    unsigned round = 0;
    bool done = false;

    bool waits() const { return waits_at != nullptr && waits_at->round == round; }
};

struct Block {
    const std::function<void()>* kernel;
    std::vector<Thread*> threads;
    std::vector<Meeting> warps;
    Meeting barrier;
};

std::deque<Thread> fibers[kBlocksAtOnce];
std::mt19937 random_numbers;
Block* block;
Thread* current;
Fiber scheduler;
cudaError_t last_error = cudaSuccess;
char starts, ends;  // addresses for ThreadSanitizer

void acquire(char& address) {
    if (__tsan_acquire) __tsan_acquire(&address);
}

void release(char& address) {
    if (__tsan_release) __tsan_release(&address);
}

[[noreturn]] void fail(const char* message) {
    std::fprintf(stderr, "cuda_on_cpu: %s (block %u, %u, %u)\n", message, blockIdx.x, blockIdx.y, blockIdx.z);
    std::abort();
}

// Returns when `to` switches back.
void switch_fiber(Fiber& from, Fiber& to) {
    if (__sanitizer_start_switch_fiber)
        __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, kNoOrder);
    swapcontext(&from.context, &to.context);
    if (__sanitizer_finish_switch_fiber)
        __sanitizer_finish_switch_fiber(from.fake_stack, &to.stack, &to.stack_bytes);
}

// A fiber's life: one thread of one block after another.
void run_threads() {
    if (__sanitizer_finish_switch_fiber)
        __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
    for (;;) {
        acquire(starts);
        (*block->kernel)();
        release(ends);
        current->done = true;
        switch_fiber(*current, scheduler);
    }
}

void make_fiber(Thread& thread) {
    void* const stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a stack");
    thread.stack = stack;
    thread.stack_bytes = kStackBytes;
    if (__tsan_create_fiber) thread.tsan = __tsan_create_fiber(0);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stack;
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_threads, 0);
    thread.context.uc_stack.ss_size = 0;  // or AddressSanitizer takes its guards away with every switch
}

// Returns when all have come, with the number of the round.
unsigned meet(Meeting& meeting) {
    const unsigned round = meeting.round;
    if (++meeting.arrived == meeting.expected) {
        meeting.arrived = 0;
        ++meeting.round;
    } else {
        current->waits_at = &meeting;
        current->round = round;
        switch_fiber(*current, scheduler);
    }
    return round;
}

void schedule(std::vector<Thread*> order) {
    if (__tsan_get_current_fiber) scheduler.tsan = __tsan_get_current_fiber();
    release(starts);
    std::shuffle(order.begin(), order.end(), random_numbers);
    for (bool goes_on = true; goes_on;) {
        goes_on = false;
        for (Thread* const thread : order) {
            if (thread->done || thread->waits()) continue;
            goes_on = true;
            current = thread;
            const unsigned number = thread->number;
            threadIdx = {number % blockDim.x, number / blockDim.x % blockDim.y,
                         number / blockDim.x / blockDim.y};
            switch_fiber(scheduler, *thread);
        }
    }
    for (const Thread* const thread : order) {
        if (!thread->done) fail("threads wait for others that never come");
    }
}

void run_block(const std::function<void()>& kernel, std::deque<Thread>& pool) {
    const unsigned size = blockDim.x * blockDim.y * blockDim.z;
    const auto running = std::make_unique<Block>();
    running->kernel = &kernel;
    running->warps.resize((size + kWarp - 1) / kWarp);
    running->barrier.expected = size;
    while (pool.size() < size) make_fiber(pool.emplace_back());
    for (unsigned number = 0; number < size; ++number) {
        Thread& thread = pool[number];
        thread.number = number;
        thread.waits_at = nullptr;
        thread.done = false;
        running->threads.push_back(&thread);
        ++running->warps[number / kWarp].expected;
    }
    block = running.get();
    schedule(running->threads);
}

}  // namespace

unsigned lane() { return current->number % kWarp; }

std::uint64_t exchange(unsigned mask, std::uint64_t bits, unsigned source) {
    if (mask != 0xffffffffu) fail("only whole warps exchange values");
    Meeting& warp = block->warps[current->number / kWarp];
    warp.bits[warp.round % 2][lane()] = bits;
    const unsigned round = meet(warp);
    return source < warp.expected ? warp.bits[round % 2][source] : bits;
}

void run(dim3 grid, dim3 threads, const std::function<void()>& kernel) {
    const std::size_t blocks = std::size_t{grid.x} * grid.y * grid.z;
    const std::size_t size = std::size_t{threads.x} * threads.y * threads.z;
    if (blocks == 0 || size == 0 || size > kMaxThreads || grid.y > 65535 || grid.z > 65535) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
    gridDim = grid;
    blockDim = threads;
    std::vector<std::size_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_numbers);
    for (std::size_t i = 0; i < blocks; ++i) {
        blockIdx = {static_cast<unsigned>(order[i] % grid.x),
                    static_cast<unsigned>(order[i] / grid.x % grid.y),
                    static_cast<unsigned>(order[i] / grid.x / grid.y)};
        std::thread(run_block, std::cref(kernel), std::ref(fibers[i % kBlocksAtOnce])).join();
    }
    acquire(ends);
}

}  // namespace cuda_on_cpu

void __syncthreads() {
    using namespace cuda_on_cpu;
    char& order = block->barrier.order[block->barrier.round % 2];
    release(order);
    meet(block->barrier);
    acquire(order);
}

cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }
