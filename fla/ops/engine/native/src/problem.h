// SPDX-License-Identifier: MIT
// What a call hands over: plain structures, the same in Python's ctypes (`library.py`).
#pragma once
#include <cstdint>

enum Type : int32_t { F32 = 0, BF16 = 1, F16 = 2 };
enum Decay : int32_t { NO_DECAY = 0, SCALAR = 1, VECTOR = 2, COLUMN = 3 };  // COLUMN: by `gv`
enum Erase : int32_t { NO_ERASE = 0, DELTA = 1, LOW_RANK = 2 };
enum Gate : int32_t { NO_GATE = 0, SILU = 1, SIGMOID = 2 };

struct View {  // [B, T, heads, channels], or [B, T, heads]; strides in elements
  void* data;
  int64_t batch, token, head, channel;
  int32_t type;
};

// In memory order as in Python. B = 1 where `bounds` is given; N sequences. An absent view has no
// data. `states` holds the first state of every block of BLOCK tokens: a sequence's first block is
// number bounds[n] / BLOCK + n, or n * ceil(T / BLOCK). A backward pass goes over the value channels
// in `parts` parts. Each has its own rows of the gradients that sum over them, all but dv and that of
// gv: batch b of part i is row i * B + b.
struct Problem {
  View q, k, v, g, beta, gv, a, b, o;  // chunk by chunk gv comes alone, and beta is one per token
  View dq, dk, dv, dg, dbeta, da, db;  // `o` is the gradient of o in a backward pass, dg also of gv
  const float *initial, *dfinal;       // [N, HV, K, V]
  float *final_state, *dinitial, *states;
  const int64_t* bounds;
  int64_t N, T, H, HV, K, V;
  float scale;
  int32_t decay, erase, l2norm, before, parts;
};

// A short convolution of x [B, T, D]; `y` is its gradient in a backward pass. Rows of D channels:
// weight [W], history and its like [N, W] with the oldest first, dweight [N, W], dbias [N].
struct Conv {
  View x, y, dx;
  const float *weight, *bias, *history, *dfinal;
  float *final_history, *dweight, *dbias, *dhistory;
  const int64_t* bounds;
  int64_t N, T, D, W;
  int32_t silu;
};

// A selective scan of x, dt [B, T, D] with B, C [B, T, K]; `y` is its gradient in a backward pass.
// A is [K, D], a state [N, K, D], `states` as above; dA [N, K, D], dB and dC
// [blocks of CHANNELS, B, T, K].
struct Scan {
  View x, dt, B, C, y, dx, ddt;
  const float *A, *initial, *dfinal;
  float *final_state, *dinitial, *states, *dA, *dB, *dC;
  const int64_t* bounds;
  int64_t N, T, D, K;
};

// N rows of D channels through a norm, a gate or both; `y` is its gradient in a backward pass. weight
// and bias [D], their gradients [blocks of BLOCK rows, D].
struct Gated {
  View x, g, y, dx, dg;
  const float *weight, *bias;
  float *dweight, *dbias;
  int64_t N, D;
  float eps;
  int32_t norm, gate;
};

constexpr int CHUNK = 16, BLOCK = 64, PANEL = 32, CHANNELS = 128;
constexpr float L2_EPS = 1e-6f;

// Some value heads of one sequence, and some of their panels; in a backward pass some key heads. They
// go through the tokens together: the rows of a token's heads lie side by side, those of the next
// token often a page away.
struct Task {
  int64_t sequence, head, last;
  int panel, end, part;
};

inline int panels(const Problem& p) { return int((p.V + PANEL - 1) / PANEL); }
inline int width_of(const Problem& p, int panel) {  // its columns that are real
  return p.V - panel * PANEL < PANEL ? int(p.V - panel * PANEL) : PANEL;
}
inline int64_t state_of(const Problem& p, int64_t n, int64_t hv) {
  return (n * p.HV + hv) * p.K * p.V;
}

// of sequence n of any problem
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
