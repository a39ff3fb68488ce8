// SPDX-License-Identifier: MIT
// What a call hands over: plain structures, the same in Python's ctypes (`library.py`).
//
//     B, T            batch, and tokens of each row of it; B = 1 where `bounds` is given
//     N               sequences: B, or as many as lie between `bounds`
//     H, HV           heads of q and k, value heads; HV is a multiple of H
//     K, V            channels per head of keys and of values
//     Kp              K filled up with zeros to a multiple of PAD
//     C, L, R         tokens per chunk; kinds of rows that read (q, with an erase also b: 2) and
//                     that write (k, with a low-rank erase also a: 2)
//     PANEL, BLOCK    value channels, and tokens, that are worked on together
//
// Tensors are contiguous fp32 unless they are a `View`, which has strides and a type of its own.
#pragma once
#include <cstdint>

enum Type : int32_t { F32 = 0, BF16 = 1, F16 = 2 };
enum Decay : int32_t { NO_DECAY = 0, SCALAR = 1, VECTOR = 2, COLUMN = 3 };  // COLUMN: by `gv`
enum Erase : int32_t { NO_ERASE = 0, DELTA = 1, LOW_RANK = 2 };
enum Gate : int32_t { NO_GATE = 0, SILU = 1, SIGMOID = 2 };

// A tensor [B, T, heads, channels], or [B, T, heads] with a channel stride of 0.
struct View {
  void* data;                            // null where the tensor is absent
  int64_t batch, token, head, channel;   // strides in elements
  int32_t type;                          // Type
};

// A call of the recurrence, in memory order as in Python. A backward pass goes over the value
// channels in `parts` parts, which run side by side; each part has its own rows of the gradients
// that sum over value channels, all but dv and that of gv: batch b of part i is row i * B + b.
struct Problem {
  View q, k;             // [B, T, H, K]
  View v;                // [B, T, HV, V]
  View g;                // log decays: [B, T, HV] for SCALAR, [B, T, HV, K] for VECTOR
  View beta;             // [B, T, HV]; token by token also [B, T, HV, V]
  View gv;               // log decays [B, T, HV, V]; chunk by chunk it comes without g and erase
  View a, b;             // [B, T, HV, K]
  View o;                // out [B, T, HV, V]; in a backward pass the gradient of o
  View dq, dk;           // out [parts B, T, H, K]
  View dv;               // out [B, T, HV, V]
  View dg;               // out [parts B, T, HV] or [parts B, T, HV, K]; of gv: [B, T, HV, V]
  View dbeta;            // out [parts B, T, HV]
  View da, db;           // out [parts B, T, HV, K]
  const float* initial;  // [N, HV, K, V], or null
  const float* dfinal;   // [N, HV, K, V], or null
  float* final_state;    // out [N, HV, K, V]; token by token it may be `initial`
  float* dinitial;       // out [N, HV, K, V]
  float* states;         // [blocks, HV, panels, K, PANEL], or null: the first state of every block
                         // of BLOCK tokens (`first_block`), written forward, read backward
  const int64_t* bounds; // [N + 1], as cu_seqlens, or null
  int64_t N, T, H, HV, K, V;
  float scale;
  int32_t decay, erase;  // Decay, Erase
  int32_t l2norm;        // q and k are divided by their norms
  int32_t read_before;   // o reads the state before its token
  int32_t parts;
};

// A short convolution with W taps over D channels. Histories are the last W tokens, oldest first.
struct Conv {
  View x;                 // [B, T, D]
  View y;                 // out [B, T, D]; in a backward pass its gradient
  View dx;                // out [B, T, D]
  const float* weight;    // [W, D]
  const float* bias;      // [D], or null
  const float* history;   // [N, W, D], or null
  const float* dfinal;    // [N, W, D], or null
  float* final_history;   // out [N, W, D]
  float* dweight;         // out [N, W, D]: each sequence's part
  float* dbias;           // out [N, D], or null: each sequence's part
  float* dhistory;        // out [N, W, D], or null
  const int64_t* bounds;  // [N + 1], or null
  int64_t N, T, D, W;
  int32_t silu;
};

// A selective scan with K numbers of state for each of D channels.
struct Scan {
  View x, dt;             // [B, T, D]
  View B, C;              // [B, T, K]
  View y;                 // out [B, T, D]; in a backward pass its gradient
  View dx, ddt;           // out [B, T, D]
  const float* A;         // [K, D]
  const float* initial;   // [N, K, D], or null
  const float* dfinal;    // [N, K, D], or null
  float* final_state;     // out [N, K, D]
  float* dinitial;        // out [N, K, D]
  float* states;          // [blocks, K, D], or null: as in `Problem`
  float* dA;              // out [N, K, D]: each sequence's part
  float *dB, *dC;         // out [blocks of CHANNELS, B, T, K]: the part of each block of channels
  const int64_t* bounds;  // [N + 1], or null
  int64_t N, T, D, K;
};

// N rows of D channels through a norm, a gate or both.
struct Gated {
  View x;                  // [N, D]
  View g;                  // [N, D], absent without a gate
  View y;                  // out [N, D]; in a backward pass its gradient
  View dx, dg;             // out [N, D]
  const float* weight;     // [D], or null
  const float* bias;       // [D], or null
  float *dweight, *dbias;  // out [blocks of BLOCK rows, D], or null: each block's part
  int64_t N, D;
  float eps;
  int32_t norm;            // rows are divided by their root mean square
  int32_t gate;            // Gate
};

// Work within chunks grows with CHUNK. Of a backward pass's states one per BLOCK tokens is stored,
// and the others of the block are formed again.
constexpr int CHUNK = 16, BLOCK = 64, PANEL = 32, CHANNELS = 128;
constexpr float L2_EPS = 1e-6f;

// Some value heads of one sequence, and some of their panels; in a backward pass some key heads.
// They go through the tokens together: the rows of a token's heads lie side by side, those of the
// next token often a page away.
struct Task {
  int64_t sequence;    // or block of rows
  int64_t head, last;  // heads from `head` to before `last`; or block of channels
  int panel, end;      // panels from `panel` to before `end`
  int part;            // number of this part of the panels
};

inline int panels(const Problem& p) { return int((p.V + PANEL - 1) / PANEL); }
inline int width_of(const Problem& p, int panel) {  // its columns that are real
  return p.V - panel * PANEL < PANEL ? int(p.V - panel * PANEL) : PANEL;
}
inline int64_t state_of(const Problem& p, int64_t n, int64_t hv) {  // where [K, V] begins
  return (n * p.HV + hv) * p.K * p.V;
}

// Where sequence n of any problem lies. Its first block of BLOCK tokens is number
// bounds[n] / BLOCK + n: with n added, no two sequences share a block.
template <class P>
int64_t batch_of(const P& p, int64_t n) { return p.bounds ? 0 : n; }
template <class P>
int64_t begin_of(const P& p, int64_t n) { return p.bounds ? p.bounds[n] : 0; }
template <class P>
int64_t end_of(const P& p, int64_t n) { return p.bounds ? p.bounds[n + 1] : p.T; }
template <class P>
int64_t first_block(const P& p, int64_t n) {
  return p.bounds ? p.bounds[n] / BLOCK + n : n * ((p.T + BLOCK - 1) / BLOCK);
}
