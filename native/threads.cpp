// One pool of threads, PyTorch's own where its OpenMP is known (native/README.md says why).
#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "scratch.h"

namespace {

constexpr int64_t LITTLE = 64 << 10;  // bytes that one thread reads before another wakes up

struct Work {
    const Stage *stages;
    int count;
    alignas(64) std::atomic<int64_t> next{0};  // the first task that nobody has taken
    alignas(64) std::atomic<int64_t> done{0};
};

inline void breathe(int spins) {
    if (spins > 2000) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Tasks are numbered through all stages. A task waits until all of earlier stages are done: those
// were taken before it, by threads that run, so that this ends with any number of threads.
void take_part(void *context) {
    Work &work = *static_cast<Work *>(context);
    int stage = 0;
    int64_t begin = 0;  // of the stage
    for (;;) {
        const int64_t task = work.next.fetch_add(1, std::memory_order_relaxed);
        while (stage < work.count && task >= begin + work.stages[stage].tasks)
            begin += work.stages[stage++].tasks;
        if (stage == work.count) return;
        for (int spins = 0; work.done.load(std::memory_order_acquire) < begin; spins++)
            breathe(spins);
        work.stages[stage].run(work.stages[stage].context, task - begin);
        // Nobody waits for the last stage, and an atomic step makes the processor wait for memory.
        if (stage + 1 < work.count) work.done.fetch_add(1, std::memory_order_acq_rel);
    }
}

// Threads of our own. The caller works too, and waits only for those who have joined in.
class Pool {
  public:
    void run(Work &work) {
        std::unique_lock<std::mutex> alone(callers_, std::try_to_lock);
        if (!alone.owns_lock()) return take_part(&work);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!started_) start();
            work_ = &work;
            round_++;
        }
        wake_.notify_all();
        take_part(&work);
        std::unique_lock<std::mutex> lock(mutex_);
        work_ = nullptr;
        left_.wait(lock, [&] { return inside_ == 0; });
    }

  private:
    void start() {
        started_ = true;
        const char *wanted = std::getenv("OMP_NUM_THREADS");
        int threads = wanted ? std::atoi(wanted) : 0;
        if (threads < 1) threads = static_cast<int>(std::thread::hardware_concurrency());
        for (int i = 1; i < threads; i++) std::thread([this] { serve(); }).detach();
    }

    void serve() {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return work_ && round_ != seen; });
            seen = round_;
            Work *work = work_;
            inside_++;
            lock.unlock();
            take_part(work);
            lock.lock();
            if (--inside_ == 0) left_.notify_one();
        }
    }

    std::mutex callers_, mutex_;
    std::condition_variable wake_, left_;
    Work *work_ = nullptr;
    uint64_t round_ = 0;
    int inside_ = 0;
    bool started_ = false;
};

Pool &own_pool() {
    static Pool *pool = new Pool;  // never torn down: its threads outlive main
    return *pool;
}

using Parallel = void (*)(void (*)(void *), void *, unsigned threads, unsigned flags);
std::atomic<Parallel> gomp{nullptr};

}  // namespace

void use_threads_of(void *gomp_parallel) { gomp = reinterpret_cast<Parallel>(gomp_parallel); }

void run_stages(const Stage *stages, int count, int64_t bytes) {
    Work work{stages, count};
    if (bytes < LITTLE) return take_part(&work);
    if (const Parallel parallel = gomp) return parallel(take_part, &work, 0, 0);
    own_pool().run(work);
}

uint8_t *kept_room(size_t bytes) {
    thread_local Scratch room;
    return room.room<uint8_t>(bytes);
}
