// What a CUDA kernel finds on a GPU, for a C++ compiler: one block, or cluster of two, at a time, its
// threads as fibers that change places wherever threads wait for one another. Slow, exact about who sees what: an asynchronous
// copy happens only when it is waited for, and the order of threads is another one after every wait.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <tuple>
#include <ucontext.h>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define alignas(bytes) __attribute__((aligned(bytes)))  // which may stand after __shared__
#define __builtin_assume(condition) static_cast<void>(0)

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim3 { unsigned x = 1, y = 1, z = 1; };

template <class A, class B> constexpr auto min(A a, B b) { return b < a ? b : a; }
template <class A, class B> constexpr auto max(A a, B b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }

struct __nv_bfloat16 { std::uint16_t bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    if (x != x) return {0x7fff};
    const unsigned bits = __float_as_uint(x);
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
struct __half { _Float16 value; };
struct alignas(4) __half2 { __half x, y; };
inline float __half2float(__half x) { return x.value; }
inline float2 __half22float2(__half2 x) { return {float(x.x.value), float(x.y.value)}; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

namespace device {

struct Copy { void *to; const void *from; int bytes; bool valid; int group; };
struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    dim3 index;
    int number = 0, rank = 0;  // in the cluster; of the block
    int groups = 0;            // of copies, committed
    bool done = false;
    std::vector<Copy> copies;
};
struct Barrier { int arrived = 0; unsigned generation = 0; };
struct Warp { Barrier barrier; std::uint64_t words[32][8]; };

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
struct Block { Barrier barriers[16]; dim3 index; int alive; };
inline Block blocks[2];
inline Barrier cluster;
inline ucontext_t scheduler;
inline Thread *current;
inline dim3 block_size, grid_size;
inline bool progress;
inline void (*entry)();

inline void yield() { swapcontext(&current->context, &scheduler); }
inline void wait(Barrier &barrier, int count) {
    const unsigned generation = barrier.generation;
    progress = true;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) yield();
}
inline Warp &warp() { return warps[current->number / 32]; }
inline int lane() { return current->number % 32; }
inline int lanes() { return std::min<int>(32, threads.size() - current->number / 32 * 32); }
inline void wait_for_warp() { wait(warp().barrier, lanes()); }
inline Block &block() { return blocks[current->rank]; }
inline void wait_for_some(int barrier, int count) { wait(block().barriers[barrier], count); }
inline void wait_for_cluster() { wait(cluster, threads.size()); }
// What a block has of the shared variable of which this one has `mine`, in an array of both blocks'.
inline int rank() { return current->rank; }
template <class T> std::uint64_t in_block(unsigned rank, const T *mine) {
    return reinterpret_cast<std::uint64_t>(mine + (static_cast<int>(rank) - current->rank));
}

// What every lane of the warp has given, in `words`; until the next wait of the warp.
template <class T> void give(const T &value) {
    static_assert(sizeof(T) <= sizeof(warp().words[0]));
    wait_for_warp();  // for those who still read the last ones
    std::memcpy(warp().words[lane()], &value, sizeof(T));
    wait_for_warp();
}
template <class T> T given_by(int lane) {
    T value;
    std::memcpy(&value, warp().words[lane], sizeof(T));
    return value;
}

// D = A B + C of mma.m16n8k8, of which each lane has given its part. `a_of` (row, k) and `b_of`
// (k, column) find an element among what was given.
template <class A, class B>
void multiply(float (&d)[4], const float (&c)[4], const A &a_of, const B &b_of) {
    for (int i = 0; i < 4; ++i) {
        const int row = lane() / 4 + i / 2 * 8, column = 2 * (lane() % 4) + i % 2;
        double sum = c[i];
        for (int k = 0; k < 8; ++k) sum += double(a_of(row, k)) * b_of(k, column);
        d[i] = static_cast<float>(sum);
    }
}
inline float tf32(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }
inline void multiply_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2],
                          const float (&c)[4]) {
    struct Part { float a[4], b[2]; };
    give(Part{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
    multiply(
        d, c,
        [](int row, int k) {
            return tf32(given_by<Part>(row % 8 * 4 + k % 4).a[row / 8 + k / 4 * 2]);
        },
        [](int k, int column) { return tf32(given_by<Part>(column * 4 + k % 4).b[k / 4]); });
}
// The same of 16-bit elements: two neighbours a word.
inline float half_of(__nv_bfloat16, unsigned word, int i) {
    return __uint_as_float(i ? word & 0xffff0000u : word << 16);
}
inline float half_of(__half, unsigned word, int i) {
    __half2 pair;
    std::memcpy(&pair, &word, 4);
    return __half2float(i ? pair.y : pair.x);
}
template <class T> void multiply_halves(T type, float (&d)[4], const unsigned (&a)[2], unsigned b) {
    struct Part { unsigned a[2], b; };
    give(Part{{a[0], a[1]}, b});
    multiply(
        d, d,
        [=](int row, int k) {
            return half_of(type, given_by<Part>(row % 8 * 4 + k / 2).a[row / 8], k % 2);
        },
        [=](int k, int column) {
            return half_of(type, given_by<Part>(column * 4 + k / 2).b, k % 2);
        });
}

// m16n8k16: the products of the first eight k and of the last.
template <class T> void multiply_halves(T type, float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                        unsigned b1) {
    multiply_halves(type, d, {a[0], a[1]}, b0);
    multiply_halves(type, d, {a[2], a[3]}, b1);
}
template <bool TRANSPOSED> void load_matrices(unsigned (&words)[4], const void *row) {
    give(row);
    for (int i = 0; i < 4; ++i) {
        std::uint16_t pair[2];
        for (int j = 0; j < 2; ++j) {
            int from = lane() / 4, at = 2 * (lane() % 4) + j;
            if (TRANSPOSED) std::swap(from, at);
            std::memcpy(&pair[j], given_by<const std::uint16_t *>(8 * i + from) + at, 2);
        }
        std::memcpy(&words[i], pair, 4);
    }
    wait_for_warp();  // nobody writes before all have read
}

inline void copy_async(void *to, const void *from, int bytes, bool valid) {
    current->copies.push_back({to, from, bytes, valid, current->groups});
}
inline void commit() { ++current->groups; }
inline void wait_copies(int pending) {
    auto &copies = current->copies;
    const int until = current->groups - pending;
    for (const Copy &copy : copies) {
        if (copy.group >= until) continue;
        if (copy.valid) std::memcpy(copy.to, copy.from, copy.bytes);
        else std::memset(copy.to, 0, copy.bytes);
    }
    copies.erase(std::remove_if(copies.begin(), copies.end(),
                                [&](const Copy &copy) { return copy.group < until; }),
                 copies.end());
}

inline float exp2_approx(float x) {
    const float y = std::exp2(x);
    return std::fabs(y) < 1.17549435e-38f ? 0.f : y;
}

inline void run_thread() {
    entry();
    current->done = true;
    progress = true;
    // Who has left counts as arrived.
    Barrier &barrier = block().barriers[0];
    if (--block().alive > 0 && barrier.arrived == block().alive) barrier.arrived = 0, ++barrier.generation;
    yield();
}

// Run blocks `indices` at the same time.
inline void run_blocks(const std::vector<dim3> &indices, std::mt19937 &random) {
    const int size = block_size.x * block_size.y * block_size.z, count = size * indices.size();
    if (static_cast<int>(threads.size()) != count) {
        threads.clear();
        threads.resize(count);
        for (Thread &thread : threads) thread.stack.resize(128 << 10);
    }
    warps.assign((count + 31) / 32, Warp());
    for (std::size_t i = 0; i < indices.size(); ++i) blocks[i] = {{}, indices[i], size};
    cluster = Barrier();
    std::vector<int> order(count);
    for (int i = 0; i < count; ++i) {
        Thread &thread = threads[i];
        order[i] = thread.number = i;
        thread.rank = i / size;
        const unsigned in_block = i % size;
        thread.index = {in_block % block_size.x, in_block / block_size.x % block_size.y,
                        in_block / block_size.x / block_size.y};
        thread.done = false;
        thread.groups = 0;
        thread.copies.clear();
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, run_thread, 0);
    }
    for (int alive = count; alive > 0;) {
        std::shuffle(order.begin(), order.end(), random);
        progress = false;
        for (int i : order) {
            if (threads[i].done) continue;
            current = &threads[i];
            swapcontext(&scheduler, &current->context);
            alive -= threads[i].done;
        }
        if (!progress && alive > 0) {
            std::fprintf(stderr, "%d threads wait for ever\n", alive);
            std::abort();
        }
    }
}

template <class T> T argument(const std::uint64_t *&words) {
    T value;
    std::memcpy(&value, words, sizeof(T));
    words += (sizeof(T) + 7) / 8;
    return value;
}
inline const std::uint64_t *arguments;
template <auto kernel> struct Call;
template <class... A, void (*kernel)(A...)> struct Call<kernel> {
    static void run() {
        const std::uint64_t *words = arguments;
        std::tuple<A...> values{argument<A>(words)...};  // braces: from left to right
        std::apply(kernel, values);
    }
};
template <auto kernel>
void run(unsigned cluster, const unsigned *grid, const unsigned *block, const std::uint64_t *words) {
    static std::mt19937 random(0);
    entry = Call<kernel>::run;
    arguments = words;
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {block[0], block[1], block[2]};
    std::vector<dim3> indices;
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) {
                indices.push_back({x, y, z});
                if (indices.size() < cluster && x + 1 < grid[0]) continue;
                run_blocks(indices, random);
                indices.clear();
            }
}

}  // namespace device

#define threadIdx (device::current->index)
#define blockIdx (device::block().index)
#define blockDim (device::block_size)
#define gridDim (device::grid_size)

inline void __syncthreads() { device::wait_for_some(0, device::block().alive); }
inline void __syncwarp(unsigned = 0xffffffffu) { device::wait_for_warp(); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    device::give(value);
    return device::given_by<float>(device::lane() ^ mask);
}
template <typename T> T __shfl_sync(unsigned, T value, int from) {
    device::give(value);
    return device::given_by<T>(from);
}
inline std::uintptr_t __cvta_generic_to_shared(const void *p) {
    return reinterpret_cast<std::uintptr_t>(p);
}
