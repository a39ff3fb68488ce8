// SPDX-License-Identifier: MIT
// Token by token: the definition, and the step of decoding. The state is read and written once a
// token, in columns that stay in registers.
#pragma once
#include "rows.h"

namespace FLA_ISA {

constexpr int COLUMNS = 4 * LANES;  // of the state, at a time

template <Decay D, Erase E>
struct Token {
  const Problem& p;
  const int K, Kp, Vp;
  const bool early[2];
  float *q, *k, *a, *b, *f, *v, *o, *beta, *column;  // column: the decay of value channels

  Token(const Problem& problem, Arena& arena)
      : p(problem), K(int(p.K)), Kp((K + PAD - 1) / PAD * PAD),
        Vp(int((p.V + COLUMNS - 1) / COLUMNS) * COLUMNS),
        early{p.before != 0, E == LOW_RANK || p.b.data != nullptr} {
    float** const keys[] = {&q, &k, &a, &b, &f};
    for (float** row : keys) *row = arena.take(Kp);
    v = arena.take(Vp);
    o = arena.take(Vp);
    beta = arena.take(Vp);
    column = arena.take(Vp);
  }

  void load_token(int64_t n, int64_t h, int64_t hv, int64_t t) {
    const int64_t batch = batch_of(p, n);
    read_row(p.q, batch, t, h, 0, K, Kp, q);
    read_row(p.k, batch, t, h, 0, K, Kp, k);
    if (p.l2norm) {
      scale_into(inverse_norm(q, Kp), q, q, Kp);
      scale_into(inverse_norm(k, Kp), k, k, Kp);
    }
    read_row(p.v, batch, t, hv, 0, int(p.V), Vp, v);
    if (E == DELTA) read_row(p.beta, batch, t, hv, 0, int(p.V), Vp, beta);
    if (E == LOW_RANK) read_row(p.a, batch, t, hv, 0, K, Kp, a);
    if (p.b.data) read_row(p.b, batch, t, hv, 0, K, Kp, b);
    const vf all = D == SCALAR ? exponential(splat(read_one(p.g, batch, t, hv))) : splat(1);
    if (D == VECTOR) read_row(p.g, batch, t, hv, 0, K, Kp, f);
    for (int i = 0; i < Kp; i += LANES) store(f + i, D == VECTOR ? exponential(load(f + i)) : all);
    if (p.gv.data) {
      read_row(p.gv, batch, t, hv, 0, int(p.V), Vp, column);
      for (int i = 0; i < Vp; i += LANES) store(column + i, exponential(load(column + i)));
    }
    if (E == DELTA && !p.b.data) multiply_into(f, k, b, Kp);  // reads the decayed state
  }

  // Columns from `at` on of a state [K, ld]: from one place to another, or in place.
  template <int VECTORS>
  void advance(const float* from, float* S, int64_t lds, int at) {
    vf out[VECTORS], written[VECTORS], erased[VECTORS], decay[VECTORS];
    for (int j = 0; j < VECTORS; j++) {
      decay[j] = p.gv.data ? load(column + at + j * LANES) : splat(1);
      out[j] = erased[j] = vf{};
      written[j] = load(v + at + j * LANES);
    }
    if (E != NO_ERASE || early[0])
      for (int i = 0; i < K; i++)
        for (int j = 0; j < VECTORS; j++) {
          const vf s = load(from + i * lds + j * LANES);
          if (E != NO_ERASE) erased[j] += b[i] * s;
          if (early[0]) out[j] += q[i] * s;
        }
    if (E == DELTA)
      for (int j = 0; j < VECTORS; j++) {
        if (!p.b.data) erased[j] *= decay[j];  // k reads the decayed state
        written[j] = load(beta + at + j * LANES) * (written[j] - erased[j]);
      }
    for (int i = 0; i < K; i++)
      for (int j = 0; j < VECTORS; j++) {
        vf s = load(from + i * lds + j * LANES);
        if (D != NO_DECAY) s *= f[i];
        s *= decay[j];
        s += k[i] * written[j];
        if (E == LOW_RANK) s += a[i] * erased[j];
        store(S + i * lds + j * LANES, s);
        if (!early[0]) out[j] += q[i] * s;
      }
    for (int j = 0; j < VECTORS; j++) store(o + at + j * LANES, out[j] * p.scale);
  }

  // `tail`: the last columns, copied where V is no multiple of a register
  void step(const float* from, float* S, float* tail) {
    int at = 0;
    for (; at + COLUMNS <= p.V; at += COLUMNS) advance<4>(from + at, S + at, p.V, at);
    for (; at + LANES <= p.V; at += LANES) advance<1>(from + at, S + at, p.V, at);
    const int64_t rest = p.V - at;
    if (!rest) return;
    for (int i = 0; i < K; i++)
      for (int64_t j = 0; j < LANES; j++)
        tail[i * LANES + j] = j < rest ? from[i * p.V + at + j] : 0;
    advance<1>(tail, tail, LANES, at);
    for (int i = 0; i < K; i++)
      std::memcpy(S + i * p.V + at, tail + i * LANES, sizeof(float) * rest);
  }
};

template <Decay D, Erase E>
int64_t tokens(const Problem& p, Task task, float* workspace) {
  Arena arena{workspace};
  Token<D, E> token(p, arena);
  float* tail = arena.take(p.K * LANES);
  if (!workspace) return arena.used;
  const int64_t n = task.sequence;
  for (int64_t hv = task.head; hv < task.last; hv++) {
    const int64_t at = state_of(p, n, hv), begin = begin_of(p, n), end = end_of(p, n);
    float* S = p.final_state + at;
    if (!p.initial)
      std::memset(S, 0, sizeof(float) * p.K * p.V);
    else if (begin == end && p.initial != p.final_state)
      std::memcpy(S, p.initial + at, sizeof(float) * p.K * p.V);
    for (int64_t t = begin; t < end; t++) {
      token.load_token(n, hv / (p.HV / p.H), hv, t);
      token.step(t == begin && p.initial ? p.initial + at : S, S, tail);
      write_row(p.o, batch_of(p, n), t, hv, 0, int(p.V), token.o);
    }
  }
  return arena.used;
}

}  // namespace FLA_ISA
