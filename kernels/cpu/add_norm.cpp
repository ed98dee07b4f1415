// Residual addition and norm of vim/ops/add_norm.py, forward and backward.
//
// Sums are float32. An item of work is a block of rows; blocks depend on the shape only, so results
// do not depend on the number of threads.
#include <math.h>

#include "threads.h"
#include "vec.h"

namespace vim {
namespace VIM_ISA {
namespace {

constexpr int64_t BLOCK = 32;  // rows; vim/ops/cpu/add_norm.py

VIM_INLINE int lanes_at(int64_t channel, int64_t channels) {
    return static_cast<int>(least(W, channels - channel));
}

VIM_INLINE float rsqrt(float x) { return 1.0f / sqrtf(x); }

void forward_item(const void* context, int64_t item) {
    const NormForward& p = *static_cast<const NormForward*>(context);
    const int64_t D = p.channels, first = item * BLOCK, last = least(first + BLOCK, p.rows);
    const Rows x = rows(p.x, 0, 0, p.rows, false), residual = rows(p.residual, 0, 0, p.rows, false);
    const Rows normed = rows(p.normed, 0, 0, p.rows, false);
    const Rows stored = rows(p.new_residual, 0, 0, p.rows, false);
    const float scale = 1.0f / static_cast<float>(D);
    float* r = scratch(D + W);
    for (int64_t row = first; row < last; ++row) {
        F total = set1(0.0f), squares = set1(0.0f);
        for (int64_t d = 0; d < D; d += W) {
            const int n = lanes_at(d, D);
            F value = x.at(row, d, n);
            if (residual) value = add(value, residual.at(row, d, n));
            stored.put(row, d, value, n);
            // The norm is taken of what was stored.
            if (stored.size == 2) value = stored.at(row, d, n);
            store(r + d, value);
            total = add(total, value);
            squares = fma(value, value, squares);
        }
        F mean = set1(0.0f);
        if (p.layer) {
            mean = set1(sum(total) * scale);
            squares = set1(0.0f);
            for (int64_t d = 0; d < D; d += W) {
                const int n = lanes_at(d, D);
                F value = sub(load(r + d), mean);
                if (n < W) {  // the lanes beyond D hold -mean
                    store(r + d, value);
                    value = load_some(r + d, n);
                }
                store(r + d, value);
                squares = fma(value, value, squares);
            }
        }
        const float rstd = rsqrt(sum(squares) * scale + static_cast<float>(p.eps));
        p.rstd[row] = rstd;
        for (int64_t d = 0; d < D; d += W) {
            const int n = lanes_at(d, D);
            F value = mul(mul(load(r + d), set1(rstd)), load_some(p.weight + d, n));
            if (p.bias != nullptr) value = add(value, load_some(p.bias + d, n));
            normed.put(row, d, value, n);
        }
    }
}

void backward_item(const void* context, int64_t item) {
    const NormBackward& p = *static_cast<const NormBackward*>(context);
    const int64_t D = p.channels, first = item * BLOCK, last = least(first + BLOCK, p.rows);
    const int64_t padded = ceil_div(D, W) * W;
    const Rows dnormed = rows(p.dnormed, 0, 0, p.rows, false);
    const Rows dstored = rows(p.dnew_residual, 0, 0, p.rows, false);
    const Rows stored = rows(p.new_residual, 0, 0, p.rows, false);
    const Rows dsum = rows(p.dsum, 0, 0, p.rows, false);
    const float scale = 1.0f / static_cast<float>(D);
    float* unit = scratch(4 * padded);
    float *dunit = unit + padded, *dweight = dunit + padded, *dbias = dweight + padded;
    memset(dweight, 0, 2 * padded * sizeof(float));
    for (int64_t row = first; row < last; ++row) {
        const F rstd = set1(p.rstd[row]);
        F mean = set1(0.0f);
        if (p.layer) {
            F total = set1(0.0f);
            for (int64_t d = 0; d < D; d += W)
                total = add(total, stored.at(row, d, lanes_at(d, D)));
            mean = set1(sum(total) * scale);
        }
        F along = set1(0.0f), total = set1(0.0f);
        for (int64_t d = 0; d < D; d += W) {
            const int n = lanes_at(d, D);
            // Beyond D dnormed is zero, and so is everything that is summed.
            const F gradient = dnormed.at(row, d, n);
            const F value = mul(sub(stored.at(row, d, n), mean), rstd);
            const F inner = mul(gradient, load_some(p.weight + d, n));
            store(unit + d, value);
            store(dunit + d, inner);
            store(dweight + d, fma(gradient, value, load(dweight + d)));
            store(dbias + d, add(gradient, load(dbias + d)));
            along = fma(inner, value, along);
            total = add(total, inner);
        }
        const F slope = set1(sum(along) * scale);
        const F shift = set1(p.layer ? sum(total) * scale : 0.0f);
        for (int64_t d = 0; d < D; d += W) {
            const int n = lanes_at(d, D);
            F value = sub(fnma(load(unit + d), slope, load(dunit + d)), shift);
            value = mul(value, rstd);
            if (dstored) value = add(value, dstored.at(row, d, n));
            dsum.put(row, d, value, n);
        }
    }
    float* partial = p.partial + item * 2 * D;
    memcpy(partial, dweight, D * sizeof(float));
    memcpy(partial + D, dbias, D * sizeof(float));
}

// Sums dweight and dbias over the blocks: one item a vector of channels.
void parameters_item(const void* context, int64_t item) {
    const NormBackward& p = *static_cast<const NormBackward*>(context);
    const int64_t D = p.channels, d = item * W, blocks = ceil_div(p.rows, BLOCK);
    const int n = lanes_at(d, D);
    F dweight = set1(0.0f), dbias = set1(0.0f);
    for (int64_t i = 0; i < blocks; ++i) {
        dweight = add(dweight, load_some(p.partial + 2 * i * D + d, n));
        dbias = add(dbias, load_some(p.partial + (2 * i + 1) * D + d, n));
    }
    store_some(p.dweight + d, dweight, n);
    if (p.dbias != nullptr) store_some(p.dbias + d, dbias, n);
}

}  // namespace

void add_norm_fwd(const NormForward& p) {
    parallel_for(p.threads, ceil_div(p.rows, BLOCK), forward_item, &p);
}

void add_norm_bwd(const NormBackward& p) {
    parallel_for(p.threads, ceil_div(p.rows, BLOCK), backward_item, &p);
    parallel_for(p.threads, ceil_div(p.channels, W), parameters_item, &p);
}

}  // namespace VIM_ISA
}  // namespace vim
