// Residual addition followed by RMSNorm or LayerNorm, and its backward; contract:
// vim/ops/add_norm.py.
//
// A warp takes a row and keeps it in registers: VECS vectors of V features a lane, so that each
// input is read once. The `_any_` kernels serve rows that do not fit, or whose features cannot be
// read in vectors: a block takes a row and reads it again from the cache.
//
// Memory: T (x, normed), I (residual), R (new residual), W (weight, bias). Sums are float.

#include "common.cuh"

constexpr int WARPS = 4;  // rows a block
constexpr int ANY_THREADS = 256;

struct NormForward {
  const void* x;
  const void* residual;  // or null
  const void* weight;
  const void* bias;    // or null
  void* normed;        // (rows, D) contiguous
  void* new_residual;  // the same
  float* rstd;         // (rows)
  int64 rows, features, x_stride, residual_stride;
  double eps;
};

template <typename T, typename I, typename R, typename W, int V, int VECS, bool LAYER>
__global__ void __launch_bounds__(32 * WARPS)
    add_norm_fwd_kernel(const __grid_constant__ NormForward p) {
  const int64 row = blockIdx.x * static_cast<int64>(WARPS) + threadIdx.y;
  if (row >= p.rows) return;
  const int features = p.features;
  const float scale = 1.0f / features;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const I* residual = static_cast<const I*>(p.residual) + row * p.residual_stride;

  // Every load is issued before the first store, which the compiler could not move them past.
  Raw<T, V> raw_x[VECS];
  Raw<I, V> raw_residual[VECS];
#pragma unroll
  for (int i = 0; i < VECS; ++i) {
    const int column = (i * 32 + threadIdx.x) * V;
    const bool inside = column < features;
    raw_x[i] = inside ? load_raw<V>(x + column) : zero_raw<T, V>();
    raw_residual[i] = inside && p.residual != nullptr ? load_raw<V>(residual + column)
                                                      : zero_raw<I, V>();
  }
  float r[VECS][V];
  float sum = 0.0f;
  R* new_residual = static_cast<R*>(p.new_residual) + row * p.features;
#pragma unroll
  for (int i = 0; i < VECS; ++i) {
    const int column = (i * 32 + threadIdx.x) * V;
    float add[V];
    unpack(raw_x[i], r[i]);
    unpack(raw_residual[i], add);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      r[i][v] = rounded_to<R>(r[i][v] + add[v]);
      sum += LAYER ? r[i][v] : r[i][v] * r[i][v];
    }
    if (column < features) store<V>(new_residual + column, r[i]);
  }
  sum = warp_sum(sum);
  if (LAYER) {
    const float mean = sum * scale;
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
      const bool inside = (i * 32 + threadIdx.x) * V < features;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        r[i][v] = inside ? r[i][v] - mean : 0.0f;
        sum += r[i][v] * r[i][v];
      }
    }
    sum = warp_sum(sum);
  }
  const float rstd = rsqrtf(sum * scale + static_cast<float>(p.eps));
  if (threadIdx.x == 0) p.rstd[row] = rstd;

  T* normed = static_cast<T*>(p.normed) + row * p.features;
#pragma unroll
  for (int i = 0; i < VECS; ++i) {
    const int column = (i * 32 + threadIdx.x) * V;
    if (column >= features) continue;
    float weight[V], bias[V] = {};
    load<V>(static_cast<const W*>(p.weight) + column, weight);
    if (p.bias != nullptr) load<V>(static_cast<const W*>(p.bias) + column, bias);
#pragma unroll
    for (int v = 0; v < V; ++v) weight[v] = r[i][v] * rstd * weight[v] + bias[v];
    store<V>(normed + column, weight);
  }
}

// The sum over a block of ANY_THREADS threads, in every thread.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float sums[ANY_THREADS / 32];
  x = warp_sum(x);
  __syncthreads();  // the previous sum has been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.0f;
#pragma unroll
  for (int i = 0; i < ANY_THREADS / 32; ++i) x += sums[i];
  return x;
}

template <typename T, typename I, typename R, typename W, bool LAYER>
__global__ void __launch_bounds__(ANY_THREADS)
    add_norm_fwd_any_kernel(const __grid_constant__ NormForward p) {
  const int64 row = blockIdx.x;
  const float scale = 1.0f / p.features;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const I* residual = static_cast<const I*>(p.residual) + row * p.residual_stride;
  const W* weight = static_cast<const W*>(p.weight);
  const W* bias = static_cast<const W*>(p.bias);
  T* normed = static_cast<T*>(p.normed) + row * p.features;
  R* new_residual = static_cast<R*>(p.new_residual) + row * p.features;

  float sum = 0.0f;
  for (int64 i = threadIdx.x; i < p.features; i += ANY_THREADS) {
    float r = to_float(x[i]);
    if (p.residual != nullptr) r += to_float(residual[i]);
    new_residual[i] = from_float<R>(r);
    r = rounded_to<R>(r);
    sum += LAYER ? r : r * r;
  }
  sum = block_sum(sum);
  const float mean = LAYER ? sum * scale : 0.0f;
  if (LAYER) {
    sum = 0.0f;
    for (int64 i = threadIdx.x; i < p.features; i += ANY_THREADS) {
      const float r = to_float(new_residual[i]) - mean;
      sum += r * r;
    }
    sum = block_sum(sum);
  }
  const float rstd = rsqrtf(sum * scale + static_cast<float>(p.eps));
  if (threadIdx.x == 0) p.rstd[row] = rstd;
  for (int64 i = threadIdx.x; i < p.features; i += ANY_THREADS) {
    const float r = to_float(new_residual[i]) - mean;
    const float b = bias != nullptr ? to_float(bias[i]) : 0.0f;
    normed[i] = from_float<T>(r * rstd * to_float(weight[i]) + b);
  }
}

// With unit = (r - mean) rstd (mean only for LAYER) and dunit = dnormed weight:
//
//     dr = rstd (dunit - unit mean(dunit unit) - mean(dunit)) + dnew_residual
//     dweight = sum dnormed unit,  dbias = sum dnormed                         over the rows
//
// dr is the gradient of x and of the residual, written in the dtype of either or of both.
struct NormBackward {
  const void* dnormed;        // (rows, D), rows apart by their stride
  const void* dnew_residual;  // the same, or null
  const void* new_residual;   // the same
  const float* rstd;
  const void* weight;
  void* dx;         // (rows, D) contiguous of T, or null
  void* dresidual;  // (rows, D) contiguous of R, or null
  float* partials;  // (blocks, D + D) sums for dweight and dbias; without BIAS (blocks, D)
  float* mean;      // (rows) workspace of the `_any_` kernel of LAYER
  int64 rows, features, dnormed_stride, dnew_residual_stride, new_residual_stride;
};

template <typename T, typename R, typename W, int V, int VECS, bool LAYER, bool BIAS>
__global__ void __launch_bounds__(32 * WARPS, LAYER || VECS > 6 ? 1 : VECS <= 2 ? 8 : 4)
    add_norm_bwd_kernel(const __grid_constant__ NormBackward p) {
  const int features = p.features;
  const float scale = 1.0f / features;
  float dweight[VECS][V] = {}, dbias[VECS][V] = {};

  int64 row = blockIdx.x * static_cast<int64>(WARPS) + threadIdx.y;
  for (; row < p.rows; row += gridDim.x * static_cast<int64>(WARPS)) {
    const T* dnormed = static_cast<const T*>(p.dnormed) + row * p.dnormed_stride;
    const R* dnew = static_cast<const R*>(p.dnew_residual) + row * p.dnew_residual_stride;
    const R* new_residual = static_cast<const R*>(p.new_residual) + row * p.new_residual_stride;
    Raw<T, V> raw_dnormed[VECS];
    Raw<R, V> raw_residual[VECS], raw_dnew[VECS];
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
      const int column = (i * 32 + threadIdx.x) * V;
      const bool inside = column < features;
      raw_residual[i] = inside ? load_raw<V>(new_residual + column) : zero_raw<R, V>();
      raw_dnormed[i] = inside ? load_raw<V>(dnormed + column) : zero_raw<T, V>();
      raw_dnew[i] = inside && p.dnew_residual != nullptr ? load_raw<V>(dnew + column)
                                                         : zero_raw<R, V>();
    }
    const float rstd = p.rstd[row];

    float unit[VECS][V], dunit[VECS][V];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
      unpack(raw_residual[i], unit[i]);
#pragma unroll
      for (int v = 0; v < V; ++v) sum += unit[i][v];
    }
    const float mean = LAYER ? warp_sum(sum) * scale : 0.0f;
    float projection = 0.0f, shift = 0.0f;
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
      const int column = (i * 32 + threadIdx.x) * V;
      float weight[V] = {};
      if (column < features) load<V>(static_cast<const W*>(p.weight) + column, weight);
      unpack(raw_dnormed[i], dunit[i]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        unit[i][v] = (unit[i][v] - mean) * rstd;
        dweight[i][v] += dunit[i][v] * unit[i][v];
        if (BIAS) dbias[i][v] += dunit[i][v];
        dunit[i][v] *= weight[v];
        projection += dunit[i][v] * unit[i][v];
        if (LAYER) shift += dunit[i][v];
      }
    }
    projection = warp_sum(projection) * scale;
    if (LAYER) shift = warp_sum(shift) * scale;
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
      const int column = (i * 32 + threadIdx.x) * V;
      if (column >= features) continue;
      float dr[V];
      unpack(raw_dnew[i], dr);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        dr[v] += rstd * (dunit[i][v] - unit[i][v] * projection - shift);
      }
      const int64 at = row * p.features + column;
      if (p.dx != nullptr) store<V>(static_cast<T*>(p.dx) + at, dr);
      if (p.dresidual != nullptr) store<V>(static_cast<R*>(p.dresidual) + at, dr);
    }
  }

  __shared__ alignas(16) float sums[WARPS][VECS * 32 * V];
  const int thread = threadIdx.y * 32 + threadIdx.x;
  float* partials = p.partials + blockIdx.x * p.features * (BIAS ? 2 : 1);
#pragma unroll
  for (int which = 0; which < (BIAS ? 2 : 1); ++which) {
    if (which == 1) __syncthreads();  // the sums for dweight have been read
#pragma unroll
    for (int i = 0; i < VECS; ++i) {
      store<V>(&sums[threadIdx.y][(i * 32 + threadIdx.x) * V], which ? dbias[i] : dweight[i]);
    }
    __syncthreads();
    for (int column = thread; column < features; column += 32 * WARPS) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < WARPS; ++warp) sum += sums[warp][column];
      partials[which * p.features + column] = sum;
    }
  }
}

template <typename T, typename R, typename W, bool LAYER>
__global__ void __launch_bounds__(ANY_THREADS)
    add_norm_bwd_any_kernel(const __grid_constant__ NormBackward p) {
  const int64 row = blockIdx.x;
  const float scale = 1.0f / p.features;
  const T* dnormed = static_cast<const T*>(p.dnormed) + row * p.dnormed_stride;
  const R* dnew = static_cast<const R*>(p.dnew_residual) + row * p.dnew_residual_stride;
  const R* new_residual = static_cast<const R*>(p.new_residual) + row * p.new_residual_stride;
  const W* weight = static_cast<const W*>(p.weight);
  const float rstd = p.rstd[row];

  float mean = 0.0f;
  if (LAYER) {
    for (int64 i = threadIdx.x; i < p.features; i += ANY_THREADS) mean += to_float(new_residual[i]);
    mean = block_sum(mean) * scale;
    if (threadIdx.x == 0) p.mean[row] = mean;
  }
  float projection = 0.0f, shift = 0.0f;
  for (int64 i = threadIdx.x; i < p.features; i += ANY_THREADS) {
    const float dunit = to_float(dnormed[i]) * to_float(weight[i]);
    projection += dunit * (to_float(new_residual[i]) - mean) * rstd;
    shift += dunit;
  }
  projection = block_sum(projection) * scale;
  shift = LAYER ? block_sum(shift) * scale : 0.0f;
  for (int64 i = threadIdx.x; i < p.features; i += ANY_THREADS) {
    const float dunit = to_float(dnormed[i]) * to_float(weight[i]);
    const float unit = (to_float(new_residual[i]) - mean) * rstd;
    float dr = rstd * (dunit - unit * projection - shift);
    if (p.dnew_residual != nullptr) dr += to_float(dnew[i]);
    const int64 at = row * p.features + i;
    if (p.dx != nullptr) static_cast<T*>(p.dx)[at] = from_float<T>(dr);
    if (p.dresidual != nullptr) static_cast<R*>(p.dresidual)[at] = from_float<R>(dr);
  }
}

// dweight and dbias beside the kernel above: a thread takes a column, gridDim.y blocks the rows.
template <typename T, typename R, bool LAYER, bool BIAS>
__global__ void __launch_bounds__(ANY_THREADS)
    add_norm_bwd_any_columns_kernel(const __grid_constant__ NormBackward p) {
  const int64 column = blockIdx.x * static_cast<int64>(ANY_THREADS) + threadIdx.x;
  if (column >= p.features) return;
  float dweight = 0.0f, dbias = 0.0f;
#pragma unroll 4
  for (int64 row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const float dn = to_float(static_cast<const T*>(p.dnormed)[row * p.dnormed_stride + column]);
    const int64 at = row * p.new_residual_stride + column;
    const float r = to_float(static_cast<const R*>(p.new_residual)[at]);
    dweight += dn * (r - (LAYER ? p.mean[row] : 0.0f)) * p.rstd[row];
    dbias += dn;
  }
  float* partials = p.partials + blockIdx.y * p.features * (BIAS ? 2 : 1);
  partials[column] = dweight;
  if (BIAS) partials[p.features + column] = dbias;
}
