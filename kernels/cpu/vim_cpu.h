// What the modules of vim/ops/cpu pass to the kernels: fields of 8 bytes, which Python packs in the
// order that they have here.
//
// Size letters: B batch, L tokens, D channels, N state, G groups, K width of the convolution.
// Strides count elements. A pointer that may be null says so.
#pragma once

#include <stdint.h>

namespace vim {

// Tokens of a sequence, (B, L, D) or (B, L, G, N), whose last dimension has stride 1.
struct Sequence {
    void* data;  // null where the tensor is absent
    int64_t batch, token, group;
    int64_t bf16;  // whether elements are bfloat16 rather than float32
};

struct ScanInputs {
    int64_t batch, length, channels, state, groups;
    int64_t dt_softplus, reverse, threads;
    Sequence u, dt, z, B, C;  // z may be absent
    const float* A;           // (D, N)
    const float* D;           // (D,) or null
    const float* dt_bias;     // (D,) or null
};

struct ScanForward {
    ScanInputs in;
    Sequence y;
    const float* initial_state;  // (B, D, N) or null
    float* final_state;          // (B, D, N)
    float* saved;                // (B, chunks, N, D) the state before each chunk of tokens, or null
    Sequence addend;             // added to y before the gate; may be absent
    double scale;                // of y, after the gate
};

struct ScanBackward {
    ScanInputs in;
    Sequence dy, du, ddt, dz;   // dz is absent where z is
    const float* dfinal_state;  // (B, D, N) or null
    const float* saved;         // as ScanForward wrote it
    float *dA, *dB, *dC;        // (D, N), (B, L, G, N) twice
    float *dD, *ddt_bias;       // (D,), null where the input is absent
    float* dinitial_state;      // (B, D, N) or null
    float* partial_parameters;  // (B, N + 2, D) workspace: dA, dD and ddt_bias of a batch item
    float* partial_matrices;    // (2, blocks, B, L, G, N) workspace: dB and dC of a channel block
};

struct ConvForward {
    int64_t batch, length, channels, width;
    int64_t silu, reverse, threads;
    Sequence x, initial_state, y,
        final_state;      // states are (B, K - 1, D); the initial may be absent
    const float* weight;  // (K, D)
    const float* bias;    // (D,) or null
};

struct ConvBackward {
    int64_t batch, length, channels, width;
    int64_t silu, reverse, threads;
    Sequence x, initial_state, dy, dfinal_state;  // the states may be absent
    Sequence dx, dinitial_state;                  // dinitial_state may be absent
    const float* weight;                          // (K, D)
    const float* bias;                            // (D,) or null
    float *dweight, *dbias;                       // (K, D), (D,) or null
    float* partial;                               // (B, chunks, K + 1, D) workspace
};

// The tensors of one direction of the mixer; R is the rank of dt_proj.
struct MixerBranch {
    const float *conv_weight, *conv_bias;  // (D, K), (D,)
    const float *x_proj, *dt_proj;         // (R + 2 N, D), (D, R)
    const float *dt_bias, *A_log, *D;      // (D,), (D, N), (D,)
    Sequence projected;                    // (B, L, R + 2 N) what x_proj gave; may be absent
    float* saved;                          // as in ScanForward
};

struct MixerForward {
    int64_t batch, length, channels, state, rank, width, threads;
    Sequence x, z, y;
    // Workspace. With D' and P, which are D and R + 2 N rounded up to multiples of 16:
    float* packed;        // (2, D' (K + R + P + N + 1)) the weights as the kernels read them
    float* intermediate;  // (max(2, threads / 2), L, D + P), null where threads divide the batch
    MixerBranch branches[2];
    double scale;  // of the sum of both directions
};

// Rows are tokens of a Sequence with one batch item.
struct NormForward {
    int64_t rows, channels;
    int64_t layer, threads;  // layer: subtract the mean
    double eps;
    Sequence x, residual, normed, new_residual;  // residual may be absent
    const float* weight;                         // (D,)
    const float* bias;                           // (D,) or null
    float* rstd;                                 // (rows,)
};

struct NormBackward {
    int64_t rows, channels;
    int64_t layer, threads;
    Sequence dnormed, dnew_residual, new_residual, dsum;  // dnew_residual may be absent
    const float* weight;                                  // (D,)
    const float* rstd;                                    // (rows,)
    float *dweight, *dbias;                               // (D,); dbias may be null
    float* partial;                                       // (blocks, 2, D) workspace
};

}  // namespace vim
