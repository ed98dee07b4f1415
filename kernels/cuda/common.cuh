// What the kernels share: conversions, vector accesses, fast functions, reductions.
//
// T is float, __nv_bfloat16 or __half in memory; in registers everything is float. NVRTC compiles
// without the standard library, so `int64` stands for std::int64_t.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using int64 = long long;

constexpr unsigned FULL_WARP = 0xffffffffu;

// sm_120 holds fewer blocks, having less shared memory, and its code needs a few registers more.
#if __CUDA_ARCH__ >= 1200
constexpr int FEWER_BLOCKS = 1;
#else
constexpr int FEWER_BLOCKS = 0;
#endif

// ---- one value

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// The value that `x` has after a trip through memory as T.
template <typename T> __device__ __forceinline__ float rounded_to(float x) {
  return to_float(from_float<T>(x));
}

// ---- two values of 16 bits in one word, the first in the lower half

__device__ __forceinline__ float2 unpack_pair(__nv_bfloat16, unsigned word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ float2 unpack_pair(__half, unsigned word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ __forceinline__ unsigned pack_pair(__nv_bfloat16, float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ __forceinline__ unsigned pack_pair(__half, float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// ---- N values side by side, N a power of two, accessed 16 bytes at a time where there are as many

template <int BYTES> struct Access;
template <> struct Access<2> { using type = unsigned short; };
template <> struct Access<4> { using type = unsigned; };
template <> struct Access<8> { using type = uint2; };
template <> struct Access<16> { using type = uint4; };

// Values of T as they lie in memory: a load in flight takes no more registers than its bytes need.
template <typename T, int N> struct Raw {
  static constexpr int BYTES = N * sizeof(T);
  static constexpr int WORDS = BYTES < 4 ? 1 : BYTES / 4;
  using Type = typename Access<(BYTES < 16 ? BYTES : 16)>::type;
  static constexpr int ACCESSES = BYTES / sizeof(Type);
  union {
    unsigned words[WORDS];
    Type accesses[ACCESSES];
  };
};

// `p` must be aligned to an access: min(16, N * sizeof(T)) bytes.
template <int N, typename T> __device__ __forceinline__ Raw<T, N> load_raw(const T* p) {
  Raw<T, N> raw;
#pragma unroll
  for (int i = 0; i < Raw<T, N>::ACCESSES; ++i) {
    raw.accesses[i] = reinterpret_cast<const typename Raw<T, N>::Type*>(p)[i];
  }
  return raw;
}

template <typename T, int N> __device__ __forceinline__ Raw<T, N> zero_raw() {
  Raw<T, N> raw;
#pragma unroll
  for (int i = 0; i < Raw<T, N>::WORDS; ++i) raw.words[i] = 0;
  return raw;
}

template <typename T, int N>
__device__ __forceinline__ void unpack(const Raw<T, N>& raw, float (&x)[N]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __uint_as_float(raw.words[i]);
  } else if constexpr (N == 1) {
    x[0] = unpack_pair(T(), raw.accesses[0]).x;
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float2 pair = unpack_pair(T(), raw.words[i / 2]);
      x[i] = pair.x;
      x[i + 1] = pair.y;
    }
  }
}

template <int N, typename T> __device__ __forceinline__ void load(const T* p, float (&x)[N]) {
  unpack(load_raw<N>(p), x);
}

template <int N, typename T> __device__ __forceinline__ void store(T* p, const float (&x)[N]) {
  Raw<T, N> raw;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) raw.words[i] = __float_as_uint(x[i]);
  } else if constexpr (N == 1) {
    raw.accesses[0] = pack_pair(T(), x[0], 0.0f);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) raw.words[i / 2] = pack_pair(T(), x[i], x[i + 1]);
  }
#pragma unroll
  for (int i = 0; i < Raw<T, N>::ACCESSES; ++i) {
    reinterpret_cast<typename Raw<T, N>::Type*>(p)[i] = raw.accesses[i];
  }
}

// ---- functions of one or two special-function instructions, a few ulps of float32 each

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// 2^x; subnormal results are zero.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^(delta * A2), the decay of a step. The instruction's result is 2e-8 too small on average, which a
// state that decays slowly multiplies up over the tokens it remembers; the addend makes up for it,
// at no cost, and is too small to change 2^0.
__device__ __forceinline__ float decay_of(float delta, float A2) {
  return fast_exp2(fmaf(delta, A2, 2.9e-8f));
}

// 1 / x; zero where x is infinite.
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_sigmoid(float x) {
  return fast_reciprocal(1.0f + fast_exp2(-LOG2_E * x));
}

__device__ __forceinline__ float fast_silu(float x) { return x * fast_sigmoid(x); }

// ---- copies to shared memory that a thread waits for later

// Read 4, 8 or 16 bytes; what is not valid is filled with zeros.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? BYTES : 0;
  if constexpr (BYTES == 16) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(global),
                 "r"(bytes), "n"(BYTES)
                 : "memory");
  }
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- reductions

// The sum over the lanes of a warp, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_WARP, x, offset);
  return x;
}

// The second stage of a deterministic sum: the blocks of a kernel leave one row of float32 each.
//
// partials: (rows, gridDim.y, columns), columns side by side: the sum of sizes. Sums of the first sizes[0] columns go to outputs[0],
// which is (gridDim.y, sizes[0]), of the next to outputs[1], and so on.
// Block: (32, up to SUM_PARTIALS_LANES, which share the rows); grid: (ceil(columns / 32), directions).
constexpr int SUM_OUTPUTS = 4;

struct SumPartials {
  const float* partials;
  int64 rows, row_stride, direction_stride;
  void* outputs[SUM_OUTPUTS];
  int64 sizes[SUM_OUTPUTS];
};

constexpr int SUM_PARTIALS_LANES = 32;

template <typename T>
__global__ void __launch_bounds__(32 * SUM_PARTIALS_LANES)
    sum_partials_kernel(const __grid_constant__ SumPartials p) {
  __shared__ float sums[SUM_PARTIALS_LANES][32];
  int64 columns = 0;
#pragma unroll
  for (int i = 0; i < SUM_OUTPUTS; ++i) columns += p.sizes[i];
  int64 column = blockIdx.x * 32ll + threadIdx.x;
  const bool there = column < columns;
  float sum = 0.0f;
  if (there) {
    const float* at = p.partials + blockIdx.y * p.direction_stride + column;
#pragma unroll 8
    for (int64 row = threadIdx.y; row < p.rows; row += blockDim.y) {
      sum += at[row * p.row_stride];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || !there) return;
  for (int i = 1; i < blockDim.y; ++i) sum += sums[i][threadIdx.x];
#pragma unroll
  for (int i = 0; i < SUM_OUTPUTS; ++i) {
    if (column >= 0 && column < p.sizes[i]) {
      static_cast<T*>(p.outputs[i])[blockIdx.y * p.sizes[i] + column] = from_float<T>(sum);
    }
    column -= p.sizes[i];
  }
}
