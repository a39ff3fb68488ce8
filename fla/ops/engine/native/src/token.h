// SPDX-License-Identifier: MIT
// Token by token: the definition, and the step of decoding.
//
//     S' = diag(exp(g)) S diag(exp(gv))
//     delta      S = S' + k (beta (v - b S'))^T         b is k, or reads S
//     low rank   S = S' + a (b^T S) + k v^T
//     o = scale q S        or, with read_before, of the state before its token
//
// The state is read twice and written once per token, a few columns at a time, whose sums over key
// channels stay in registers. The letters in the shapes are those of `problem.h`; Vp is V filled up
// to a multiple of COLUMNS.
#pragma once
#include "rows.h"

namespace FLA_ISA {

constexpr int COLUMNS = 4 * LANES;  // of the state, at a time

template <Decay D, Erase E>
struct Token {
  const Problem& p;
  const int K, Kp, Vp;
  const bool read_before;   // q reads the state before its token
  const bool erase_before;  // b is given, and reads the state before the decay
  float *q, *k, *a, *b;     // [Kp]
  float* f;                 // [Kp]: exp(g)
  float *v, *o, *beta;      // [Vp]
  float* column;            // [Vp]: exp(gv), read only where there is a gv

  Token(const Problem& problem, Arena& arena)
      : p(problem), K(int(p.K)), Kp((K + PAD - 1) / PAD * PAD),
        Vp(int((p.V + COLUMNS - 1) / COLUMNS) * COLUMNS),
        read_before(p.read_before != 0), erase_before(E == LOW_RANK || p.b.data != nullptr) {
    float** const keys[] = {&q, &k, &a, &b, &f};
    for (float** row : keys) *row = arena.take(Kp);
    v = arena.take(Vp);
    o = arena.take(Vp);
    beta = arena.take(Vp);
    column = arena.take(Vp);
  }

  // The rows of one token, with exponentials taken.
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
    // k reads the decayed state: as a b that reads the state before, it is k times the decay
    if (E == DELTA && !erase_before) multiply_into(f, k, b, Kp);
  }

  // VECTORS registers of columns of a state through one token, from one place to another or in
  // place. First all reads of the state before the token, then its new rows, one after the other.
  template <int VECTORS>
  void advance(const float* from,  // [K, lds], from column `at` on
               float* S,           // [K, lds], the same columns; may be `from`
               int64_t lds,
               int at) {           // first of these columns among the value channels
    vf out[VECTORS], written[VECTORS], erased[VECTORS], decay[VECTORS];
    for (int j = 0; j < VECTORS; j++) {
      decay[j] = p.gv.data ? load(column + at + j * LANES) : splat(1);
      out[j] = erased[j] = vf{};
      written[j] = load(v + at + j * LANES);
    }
    if (E != NO_ERASE || read_before)
      for (int i = 0; i < K; i++)
        for (int j = 0; j < VECTORS; j++) {
          const vf s = load(from + i * lds + j * LANES);
          if (E != NO_ERASE) erased[j] += b[i] * s;
          if (read_before) out[j] += q[i] * s;
        }
    if (E == DELTA)
      for (int j = 0; j < VECTORS; j++) {
        if (!erase_before) erased[j] *= decay[j];  // k reads the state decayed by gv too
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
        if (!read_before) out[j] += q[i] * s;
      }
    for (int j = 0; j < VECTORS; j++) store(o + at + j * LANES, out[j] * p.scale);
  }

  // All columns of the state through one token. The last ones are copied where V is no multiple of
  // a register: what lies after a state is not ours.
  void step(const float* from,  // [K, V]
            float* S,           // [K, V]; may be `from`
            float* tail) {      // [K, LANES], scratch
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

// One task of the token form: all tokens of each head in turn, whose state stays in the cache.
template <Decay D, Erase E>
int64_t tokens(const Problem& p, Task task,
               float* workspace) {  // of as many floats as the same call with null returns
  Arena arena{workspace};
  Token<D, E> token(p, arena);
  float* tail = arena.take(p.K * LANES);
  if (!workspace) return arena.used;
  const int64_t n = task.sequence;
  for (int64_t hv = task.head; hv < task.last; hv++) {
    const int64_t at = state_of(p, n, hv), begin = begin_of(p, n), end = end_of(p, n);
    float* S = p.final_state + at;  // [K, V], where the state lives from the first token on
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
