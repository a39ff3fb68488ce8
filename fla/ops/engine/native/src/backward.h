// SPDX-License-Identifier: MIT
// The gradient of the recurrence by hand, as `step.py` has it: block by block from the last to the
// first, each block's chunks computed again from its stored first state. With Z the gradient of the
// state after a chunk, X that of what left rows read (q: scale do; b: from `solve_...`), and W what
// right rows wrote,
//
//     m       = scores^T X + leave Z            the gradient of W
//     dscores = X W^T
//     dleft   = dscores right + X S^T           each times its decays
//     dright  = dscores^T left + W Z^T
//     Z       = last Z + enter^T X              the gradient of the state before the chunk
//
// The letters in the shapes are those of `problem.h`.
#pragma once
#include "chunk.h"

namespace FLA_ISA {

template <Decay D, Erase E>
struct Backward {
  using Forward = Chunk<D, E>;
  static constexpr int C = CHUNK, L = Forward::L, R = Forward::R, CHUNKS = BLOCK / CHUNK;

  const Problem& p;
  Forward chunk;                // with `keep`: right rows as they stand after every token
  const int K, Kp;
  const int first, count;       // panels of this task
  const int64_t part;           // the first batch row of this part's sums over value channels
  const int64_t size;           // K PANEL, floats of a state's panel
  float *states;                // [CHUNKS, count, K, PANEL]: the first states of the block's chunks
  float *solutions;             // [CHUNKS, count, C, PANEL]: y of `Chunk::solve`
  float *X, *m;                 // [L C, PANEL], [R C, PANEL], one panel
  float *XT, *WT;               // [PANEL, L C], [PANEL, R C]: X and W transposed
  float *dscores;               // [L C, R C]
  float *dleft, *dright;        // [L C, Kp], [R C, Kp]
  float *dleftT, *drightT;      // the same by channel, [Kp, L C], [Kp, R C]: sums over panels
  float *through;               // [Kp] (COLUMN: [PANEL]): S Z, what passes from edge to edge
  float *entered;               // [L C, Kp] (COLUMN: [C, PANEL]): what each read takes of the first
                                // state, for dg
  float *dg;                    // [C, Kp] (COLUMN: [C, PANEL]; SCALAR: the first C)
  float *dq, *dk;               // [BLOCK, Kp]: sums over the value heads of a key head
  float dbeta[C];

  Backward(const Problem& problem, Task task, Arena& arena)
      : p(problem), chunk(problem, arena, true), K(chunk.K), Kp(chunk.Kp),
        first(task.panel), count(task.end - first),
        part(task.part * (problem.bounds ? 1 : problem.N)), size(problem.K * PANEL) {
    states = arena.take(CHUNKS * count * size);
    solutions = arena.take(CHUNKS * count * C * PANEL);
    X = arena.take(L * C * PANEL);
    m = arena.take(R * C * PANEL);
    XT = arena.take(L * C * PANEL);
    WT = arena.take(R * C * PANEL);
    dscores = arena.take(L * C * R * C);
    dleft = arena.take(L * C * Kp);
    dright = arena.take(R * C * Kp);
    dleftT = arena.take(L * C * Kp);
    drightT = arena.take(R * C * Kp);
    const int width = D == COLUMN ? PANEL : Kp;
    through = arena.take(width);
    entered = arena.take(L * C * width);
    dg = arena.take(C * width);
    dq = arena.take(BLOCK * Kp);
    dk = arena.take(BLOCK * Kp);
  }

  // Of chunk c of the block and panel x of the task.
  float* state(int c, int x) { return states + (c * count + x) * size; }
  float* solution(int c, int x) { return solutions + (c * count + x) * C * PANEL; }

  // The block of `tokens` tokens from t on: its chunks forward again, then backward. The last chunk
  // needs no second `prepare`.
  void block(int64_t n, int64_t h, int64_t hv, int64_t t, int tokens,
             float* Z) {  // [count, K, PANEL]: becomes the gradient of the block's first state
    const int chunks = (tokens + C - 1) / C;
    std::memcpy(states, checkpoint(p, n, t, hv) + first * size, sizeof(float) * count * size);
    for (int c = 0; c < chunks; c++) {
      const int live = tokens - c * C < C ? tokens - c * C : C;
      chunk.prepare(n, h, hv, t + c * C, live);
      for (int x = 0; x < count; x++) again(n, hv, t + c * C, live, c, x, c + 1 < chunks);
    }
    for (int c = chunks - 1; c >= 0; c--) {
      const int live = tokens - c * C < C ? tokens - c * C : C;
      if (c + 1 < chunks) chunk.prepare(n, h, hv, t + c * C, live);
      values(n, hv, t + c * C, live, c, Z);
      if (D == VECTOR)
        vector_rows();
      else
        matrix_rows();
      put(n, hv, t + c * C, live, c);
    }
  }

  // Chunk c, panel x once more: y into `solution`, and if there is a next chunk its first state.
  void again(int64_t n, int64_t hv, int64_t t, int live, int c, int x, bool more) {
    if (E == NO_ERASE && !more) return;
    chunk.load_values(n, hv, t, live, first + x);
    chunk.write(state(c, x), solution(c, x), false);
    if (!more) return;
    std::memcpy(state(c + 1, x), state(c, x), sizeof(float) * size);
    chunk.advance(state(c + 1, x));
  }

  // All that sums over value channels, panel by panel.
  void values(int64_t n, int64_t hv, int64_t t, int live, int c,
              float* Z) {  // [count, K, PANEL]: moves to the front of the chunk
    std::memset(dscores, 0, sizeof(float) * L * C * R * C);
    std::memset(dleftT, 0, sizeof(float) * L * C * Kp);
    std::memset(drightT, 0, sizeof(float) * R * C * Kp);
    std::memset(through, 0, sizeof(float) * Kp);
    std::memset(dbeta, 0, sizeof(dbeta));
    for (int x = 0; x < count; x++) {
      load_panel(n, hv, t, live, c, x);
      if (D == COLUMN)
        column_panel(state(c, x), Z + x * size);
      else
        row_panel(state(c, x), Z + x * size, solution(c, x));
      for (int i = 0; i < live; i++) {
        write_panel(p.dv, n, t + i, hv, x, m + i * PANEL);
        if (D == COLUMN) write_panel(p.dg, n, t + i, hv, x, dg + i * PANEL);
      }
    }
    transpose(Kp, L * C, dleftT, L * C, dleft, Kp);
    transpose(Kp, R * C, drightT, R * C, dright, Kp);
  }

  void write_panel(const View& out,      // [B, T, HV, V]
                   int64_t n, int64_t t, int64_t hv, int x,
                   const float* row) {   // [PANEL]
    write_row(out, batch_of(p, n), t, hv, (first + x) * PANEL, width_of(p, first + x), row);
  }

  // One panel: m, then X of b, then the sums for dscores, dleft and dright, and Z.
  void row_panel(const float* S,    // [K, PANEL]: the chunk's first state
                 float* Z,          // [K, PANEL]
                 const float* y) {  // [C, PANEL]: y of `Chunk::solve`
    const float* W = chunk.values;
    product<ZERO>(R * C, PANEL, C, chunk.scores, 1, R * C, X, PANEL, m, PANEL);
    product<KEEP>(R * C, PANEL, K, chunk.leave, Kp, 1, Z, PANEL, m, PANEL);
    if (E == DELTA) solve_delta(y);
    if (E == LOW_RANK) solve_low_rank();
    transpose(L * C, PANEL, X, PANEL, XT, L * C);
    transpose(R * C, PANEL, W, PANEL, WT, R * C);
    product<KEEP>(L * C, R * C, PANEL, X, PANEL, 1, WT, R * C, dscores, R * C);
    product<KEEP>(K, L * C, PANEL, S, PANEL, 1, XT, L * C, dleftT, L * C);
    product<KEEP>(K, R * C, PANEL, Z, PANEL, 1, WT, R * C, drightT, R * C);
    if (D != NO_DECAY)
      for (int k = 0; k < K; k++) through[k] += dot(S + k * PANEL, Z + k * PANEL, PANEL);
    product<D == NO_DECAY ? KEEP : BY_ROW>(K, PANEL, L * C, chunk.enter, 1, Kp, X, PANEL, Z, PANEL,
                                           chunk.last);
  }

  // The same where the columns decay, with their dg. From the last token to the first, m is the
  // gradient of what tokens wrote as it stands after the token.
  void column_panel(const float* S,  // [K, PANEL]: the chunk's first state
                    float* Z) {      // [K, PANEL]
    chunk.spread(nullptr);
    const float *written = chunk.after(C - 1), *last = chunk.prefix + C * PANEL;
    product<ZERO>(C, PANEL, K, chunk.right, Kp, 1, Z, PANEL, m, PANEL);
    product<ZERO>(C, PANEL, K, chunk.left, Kp, 1, S, PANEL, chunk.read, PANEL);
    for (int w = 0; w < PANEL; w += LANES) {
      vf all = vf{};
      for (int k = 0; k < K; k++) all += load(S + k * PANEL + w) * load(Z + k * PANEL + w);
      store(through + w, all * load(last + w));
    }
    for (int i = C - 1; i >= 0; i--) column_token(i);
    transpose(C, PANEL, entered, PANEL, XT, C);
    transpose(C, PANEL, written, PANEL, WT, C);
    product<KEEP>(K, C, PANEL, S, PANEL, 1, XT, C, dleftT, C);
    product<KEEP>(K, C, PANEL, Z, PANEL, 1, WT, C, drightT, C);
    product<BY_COLUMN>(K, PANEL, C, chunk.left, 1, Kp, entered, PANEL, Z, PANEL, last);
  }

  // Token i of `column_panel`: its read, then its decay backward.
  void column_token(int i) {
    const float *y = chunk.after(i), *x = X + i * PANEL;
    float *enter = entered + i * PANEL, *d = dg + i * PANEL;
    multiply_into(chunk.prefix + (i + 1) * PANEL, x, enter, PANEL);
    for (int w = 0; w < PANEL; w += LANES)
      store(through + w, load(through + w) + load(enter + w) * load(chunk.read + i * PANEL + w));
    for (int j = 0; j <= i; j++) {
      dscores[i * C + j] += dot(x, y + j * PANEL, PANEL);
      axpy(chunk.scores[i * C + j], x, m + j * PANEL, PANEL);
    }
    std::memcpy(d, through, sizeof(float) * PANEL);
    for (int j = 0; j < i; j++) pass(i, y + j * PANEL, m + j * PANEL, d);
  }

  // The gradient of o into X, and what right rows wrote, W, into `chunk.values`.
  void load_panel(int64_t n, int64_t hv, int64_t t, int live, int c, int x) {
    for (int i = 0; i < live; i++) {
      read_row(p.o, batch_of(p, n), t + i, hv, (first + x) * PANEL, width_of(p, first + x), PANEL,
               X + i * PANEL);
      scale_into(p.scale, X + i * PANEL, X + i * PANEL, PANEL);
    }
    std::memset(X + live * PANEL, 0, sizeof(float) * (C - live) * PANEL);
    if (E != DELTA) chunk.load_values(n, hv, t, live, first + x);
    for (int i = 0; i < C; i++) {
      if (E == DELTA)
        scale_into(chunk.beta[i], solution(c, x) + i * PANEL, chunk.values + i * PANEL, PANEL);
      if (E == LOW_RANK)
        std::memcpy(chunk.values + (C + i) * PANEL, solution(c, x) + i * PANEL,
                    sizeof(float) * PANEL);
    }
  }

  // m becomes the gradient of v, X of b that of what b read: with r = m - (beta B)^T r, backward
  // substitution, dv = beta r, dbeta = r . y.
  void solve_delta(const float* y) {  // [C, PANEL]
    const float* B = chunk.scores + C * C;
    for (int i = C - 1; i >= 0; i--) {
      float* row = m + i * PANEL;
      for (int j = i + 1; j < C; j++) axpy(-B[j * C + i], m + j * PANEL, row, PANEL);
      dbeta[i] += dot(row, y + i * PANEL, PANEL);
      scale_into(chunk.beta[i], row, row, PANEL);
      scale_into(-1, row, X + (C + i) * PANEL, PANEL);
    }
  }

  // Likewise: r = m_u + B_a^T r is X of b, and dv = m_v + B_k^T r.
  void solve_low_rank() {
    const float* B = chunk.scores + C * 2 * C;
    for (int i = C - 1; i >= 0; i--) {
      float* r = X + (C + i) * PANEL;
      std::memcpy(r, m + (C + i) * PANEL, sizeof(float) * PANEL);
      for (int j = i + 1; j < C; j++) {
        axpy(B[j * 2 * C + C + i], X + (C + j) * PANEL, r, PANEL);
        axpy(B[j * 2 * C + i], X + (C + j) * PANEL, m + i * PANEL, PANEL);
      }
    }
  }

  // The last token whose decay a path to left row i of kind l passes.
  int until(int l, int i) const { return i - chunk.before(l); }

  // From dscores to the gradients of rows, as matrix products; for all but VECTOR.
  void matrix_rows() {
    if (D == SCALAR) scalar_gradient();
    for (int i = 0; i < L * C; i++)
      for (int r = 0; r < R; r++) {
        float* row = dscores + i * R * C + r * C;
        if (D == SCALAR)
          multiply_into(chunk.pair + (i % C + !chunk.before(i / C)) * C, row, row, C);
        for (int j = chunk.seen(i / C, i % C); j < C; j++) row[j] = 0;
      }
    product<KEEP>(L * C, Kp, R * C, dscores, R * C, 1, chunk.right, Kp, dleft, Kp);
    product<KEEP>(R * C, Kp, L * C, dscores, 1, R * C, chunk.left, Kp, dright, Kp);
  }

  // dg_t: what the paths carry that pass token t, from a write or the first state before it to a
  // read or the last state after it. Also multiplies dleft and dright by the decays to the edges.
  void scalar_gradient() {
    double all = 0, sums[C];  // many terms of one size: in fp32 their rounding would show
    for (int k = 0; k < K; k++) all += through[k];
    for (int t = 0; t < C; t++) sums[t] = all * chunk.last[0];
    for (int row = 0; row < L * C; row++) {
      const int l = row / C, i = row % C;
      float* d = dleft + row * Kp;
      scale_into(chunk.prefix[i + !chunk.before(l)], d, d, Kp);
      double carried = dot(chunk.left + row * Kp, d, Kp);
      for (int t = 0; t <= until(l, i); t++) {
        sums[t] += carried;
        for (int r = 0; r < R; r++)
          carried += chunk.scores[row * R * C + r * C + t] * dscores[row * R * C + r * C + t];
      }
    }
    for (int row = 0; row < R * C; row++) {
      float* d = dright + row * Kp;
      scale_into(chunk.pair[C * C + row % C], d, d, Kp);
      const float carried = dot(chunk.right + row * Kp, d, Kp);
      for (int t = row % C + 1; t < C; t++) sums[t] += carried;
    }
    for (int t = 0; t < C; t++) dg[t] = float(sums[t]);
  }

  // The same per channel, with the gradients of rows token by token. From the last token to the
  // first, `dright` is the gradient of the right rows as they stand after the token.
  void vector_rows() {
    for (int row = 0; row < L * C; row++) {
      const int l = row / C, i = row % C;
      multiply_into(chunk.prefix + (i + !chunk.before(l)) * Kp, dleft + row * Kp, dleft + row * Kp,
                    Kp);
      multiply_into(chunk.left + row * Kp, dleft + row * Kp, entered + row * Kp, Kp);
    }
    multiply_into(chunk.last, through, through, Kp);  // and what has entered so far
    for (int i = C - 1; i >= 0; i--) {
      for (int l = 0; l < L; l++) {
        const int row = i + chunk.before(l);
        if (row < C) axpy(1, entered + (l * C + row) * Kp, through, Kp);
        if (!chunk.before(l)) vector_row(l, i, chunk.seen(l, i), chunk.after(i));
      }
      float* d = dg + i * Kp;
      std::memcpy(d, through, sizeof(float) * Kp);
      for (int r = 0; r < R; r++)
        for (int j = r * C; j < r * C + i; j++)
          pass(i, chunk.after(i) + j * Kp, dright + j * Kp, d);
      for (int l = 0; l < L; l++)
        if (chunk.before(l)) vector_row(l, i, i, chunk.after(i ? i - 1 : 0));
    }
  }

  // The gradient of a row back through the decay of token i.
  void pass(int i,
            const float* y,  // [Kp] (COLUMN: [PANEL]): the row as it stands after token i
            float* dy,       // its gradient, which becomes that before token i
            float* d) {      // dg of token i, added to
    const int width = D == COLUMN ? PANEL : Kp;
    const float* f = chunk.factors + i * width;
    for (int w = 0; w < width; w += LANES) {
      const vf grad = load(dy + w);
      store(d + w, load(d + w) + load(y + w) * grad);
      store(dy + w, grad * load(f + w));
    }
  }

  // Gradients of left row i of kind l, and of the first `seen` right rows of each kind through it.
  void vector_row(int l, int i, int seen,
                  const float* y) {  // [R C, Kp]: right rows as they stand where row i reads
    const int row = l * C + i;
    for (int r = 0; r < R; r++)
      for (int j = r * C; j < r * C + seen; j++) {
        const float w = dscores[row * R * C + j];
        axpy(w, y + j * Kp, dleft + row * Kp, Kp);
        axpy(w, chunk.left + row * Kp, dright + j * Kp, Kp);
      }
  }

  // Stores the gradients of chunk c, and adds those of q and k to the block's.
  void put(int64_t n, int64_t hv, int64_t t, int live, int c) {
    const int64_t batch = part + batch_of(p, n);
    for (int i = 0; i < live; i++) {
      float *to_q = dq + (c * C + i) * Kp, *to_k = dk + (c * C + i) * Kp;
      axpy(1, dleft + i * Kp, to_q, Kp);
      axpy(1, dright + i * Kp, to_k, Kp);
      if (E == DELTA && !p.b.data) axpy(1, dleft + (C + i) * Kp, to_k, Kp);
      if (p.b.data) write_row(p.db, batch, t + i, hv, 0, K, dleft + (C + i) * Kp);
      if (E == LOW_RANK) write_row(p.da, batch, t + i, hv, 0, K, dright + (C + i) * Kp);
      if (E == DELTA) write_row(p.dbeta, batch, t + i, hv, 0, 1, dbeta + i);
      if (D == SCALAR) write_row(p.dg, batch, t + i, hv, 0, 1, dg + i);
      if (D == VECTOR) write_row(p.dg, batch, t + i, hv, 0, K, dg + i * Kp);
    }
  }

  // The block's gradients of q and k, back through the norm.
  void finish(int64_t n, int64_t h, int64_t t, int tokens) {
    for (int i = 0; i < tokens; i++) {
      finish_row(p.q, p.dq, n, t + i, h, dq + i * Kp);
      finish_row(p.k, p.dk, n, t + i, h, dk + i * Kp);
    }
  }

  void finish_row(const View& x,   // [B, T, H, K]: q or k as given
                  const View& dx,  // [parts B, T, H, K]
                  int64_t n, int64_t t, int64_t h,
                  float* d) {      // [Kp]
    if (p.l2norm) {
      float* unit = dleft;
      read_row(x, batch_of(p, n), t, h, 0, K, Kp, unit);
      const float inverse = inverse_norm(unit, Kp);
      scale_into(inverse, unit, unit, Kp);
      axpy(-dot(unit, d, Kp), unit, d, Kp);
      scale_into(inverse, d, d, Kp);
    }
    write_row(dx, part + batch_of(p, n), t, h, 0, K, d);
  }
};

// One task of the backward pass. A key head's value heads go together, since dq and dk sum over
// them.
template <Decay D, Erase E>
int64_t backward(const Problem& p, Task task,
                 float* workspace) {  // of as many floats as the same call with null returns
  Arena arena{workspace};
  Backward<D, E> back(p, task, arena);
  const int64_t groups = p.H ? p.HV / p.H : 1, whole = back.count * back.size;
  const int64_t first = task.head * groups, last = task.last * groups;  // value heads
  float* Z = arena.take((last - first) * whole);  // [heads, count, K, PANEL]
  if (!workspace) return arena.used;
  const int64_t n = task.sequence, begin = begin_of(p, n), end = end_of(p, n);
  for (int64_t hv = first; hv < last; hv++)
    for (int x = 0; x < back.count; x++)
      pack_panel(p, p.dfinal ? p.dfinal + state_of(p, n, hv) : nullptr, task.panel + x,
                 Z + (hv - first) * whole + x * back.size);
  for (int64_t block = (end - begin + BLOCK - 1) / BLOCK; block-- > 0;) {
    const int64_t t = begin + block * BLOCK;
    const int tokens = int(end - t < BLOCK ? end - t : BLOCK);
    for (int64_t h = task.head; h < task.last; h++) {
      std::memset(back.dq, 0, sizeof(float) * BLOCK * back.Kp);
      std::memset(back.dk, 0, sizeof(float) * BLOCK * back.Kp);
      for (int64_t hv = h * groups; hv < (h + 1) * groups; hv++)
        back.block(n, h, hv, t, tokens, Z + (hv - first) * whole);
      back.finish(n, h, t, tokens);
    }
  }
  for (int64_t hv = first; hv < last; hv++)
    for (int x = 0; x < back.count; x++)
      unpack_panel(p, Z + (hv - first) * whole + x * back.size, task.panel + x,
                   p.dinitial + state_of(p, n, hv));
  return arena.used;
}

}  // namespace FLA_ISA
