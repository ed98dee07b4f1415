// The team that runs a kernel: the OpenMP team that PyTorch's own operators use where it can be
// reached, else a small pool.
//
// Sharing PyTorch's team matters where every core is taken: OpenMP threads spin for milliseconds
// after a parallel region, and a second team would have to share their cores.
#include "threads.h"

#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <new>
#include <thread>

#ifdef _WIN32
#include <malloc.h>
#else
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define VIM_X86_64
#endif

#include "export.h"

namespace vim {
namespace {

struct Job {
    Task task;
    const void* context;
    int64_t items;
    std::atomic<int64_t> next{0};
};

// Decaying states end as denormal numbers, on which x86 is a hundred times slower.
class FlushDenormals {
#ifdef VIM_X86_64
  public:
    FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#endif
};

void work(Job& job) {
    FlushDenormals guard;
    for (;;) {
        const int64_t item = job.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= job.items) return;
        job.task(job.context, item);
    }
}

// Workers that sleep until a job asks for help. The caller of `run` works, too, and so never
// depends on a worker being free.
class Pool {
  public:
    void run(Job& job, int64_t helpers) {
        Call call{&job, helpers, 0};
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (; workers_ < helpers; ++workers_) std::thread([this] { serve(); }).detach();
            calls_.push_back(&call);
        }
        for (int64_t i = 0; i < helpers; ++i) wake_.notify_one();
        work(job);
        std::unique_lock<std::mutex> lock(mutex_);
        withdraw(&call);
        done_.wait(lock, [&] { return call.active == 0; });
    }

  private:
    struct Call {
        Job* job;
        int64_t wanted, active;
    };

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return !calls_.empty(); });
            Call* call = calls_.front();
            ++call->active;
            if (--call->wanted == 0) calls_.pop_front();
            lock.unlock();
            work(*call->job);
            lock.lock();
            if (--call->active == 0) done_.notify_all();
        }
    }

    void withdraw(Call* call) {
        const auto place = std::find(calls_.begin(), calls_.end(), call);
        if (place != calls_.end()) calls_.erase(place);
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::deque<Call*> calls_;
    int64_t workers_ = 0;
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<GompParallel> gomp{nullptr};
std::atomic<Pool*> pool{nullptr};

// Threads do not survive a fork: the child begins with a new pool, and without OpenMP, whose team
// is lost, too. The parent's pool is left alone, since its mutex may be held.
void forget_threads() {
    gomp = nullptr;
    pool = nullptr;
}

Pool& current_pool() {
    Pool* found = pool.load();
    if (found == nullptr) {
        Pool* fresh = new Pool;
        if (pool.compare_exchange_strong(found, fresh)) return *fresh;
        delete fresh;
    }
    return *found;
}

struct Scratch {
    float* data = nullptr;
    size_t floats = 0;

    ~Scratch() { release(); }

    void release() {
#ifdef _WIN32
        _aligned_free(data);
#else
        free(data);
#endif
    }

    void grow(size_t wanted) {
        release();
        const size_t bytes = (wanted * sizeof(float) + 63) / 64 * 64;
#ifdef _WIN32
        data = static_cast<float*>(_aligned_malloc(bytes, 64));
#else
        void* memory = nullptr;
        data = posix_memalign(&memory, 64, bytes) == 0 ? static_cast<float*>(memory) : nullptr;
#endif
        floats = data == nullptr ? 0 : wanted;
        if (data == nullptr) throw std::bad_alloc();
    }
};

}  // namespace

void parallel_for(int64_t threads, int64_t items, Task task, const void* context) {
    Job job{task, context, items};
    const int64_t team = std::min(threads, items);
    if (team <= 1) {
        work(job);
    } else if (const GompParallel parallel = gomp.load()) {
        parallel([](void* job) { work(*static_cast<Job*>(job)); }, &job,
                 static_cast<unsigned>(team), 0);
    } else {
        current_pool().run(job, team - 1);
    }
}

float* scratch(size_t floats) {
    thread_local Scratch memory;
    if (memory.floats < floats) memory.grow(floats);
    return memory.data;
}

}  // namespace vim

// Sets the OpenMP runtime's entry GOMP_parallel; null means the pool of this library.
VIM_EXPORT void vim_cpu_use_openmp(void* gomp_parallel) {
#ifndef _WIN32
    static const int registered = pthread_atfork(nullptr, nullptr, vim::forget_threads);
    (void)registered;
#endif
    vim::gomp = reinterpret_cast<vim::GompParallel>(gomp_parallel);
}
