// SPDX-License-Identifier: MIT
// One chunk of the recurrence: as `step.py` and `decay/`, for CHUNK tokens of one value head.
// With S the state at the chunk's start,
//
//     scores  = left right^T . decays between the tokens
//     read    = enter S
//     solve   delta     u = beta (v - read of b - scores of b u)
//             low rank  u = read of b + scores of b [v; u]
//     output  o = scale (read of q + scores of q [v; u])        (delta: u alone)
//     advance S = last S + leave^T [v; u]                       (delta: u alone)
//
// Left rows [q; b] read, right rows [k] or [k; a] write. `enter` and `leave` are those rows times
// the decay from the chunk's start and to its end. Decays are multiplied token by token, never
// subtracted or divided, so any g <= 0 is harmless, -inf included. A chunk that is not full is
// filled with identity steps: no decay, no write, no read. The letters in the shapes are those of
// `problem.h`; m is the number of tokens that a chunk has, t its first one.
#pragma once
#include "rows.h"

namespace FLA_ISA {

template <Decay D, Erase E>
struct Chunk {
  static constexpr int C = CHUNK, L = E == NO_ERASE ? 1 : 2, R = E == LOW_RANK ? 2 : 1;

  const Problem& p;
  const int K, Kp, width;   // width: channels of a vector decay (Kp, or PANEL for COLUMN), or 1
  const bool keep;          // keep what decays as it stands after every token, for a backward pass
  const bool read_before;   // q reads the state before its token
  const bool erase_before;  // b is given, and reads the state before the decay
  float *left, *enter;      // [L C, Kp]: rows q, b; times the decay from the chunk's start
  float *right, *leave;     // [R C, Kp]: rows k, a; times the decay to the chunk's end
  float *scores;            // [L C, R C]: what left row i reads of what right row j writes
  float *last;              // [Kp]: the decay of the whole chunk
  float *factors;           // [C, width], VECTOR and COLUMN: exp(g) of every token
  float *prefix;            // [C + 1, width]: decay from the chunk's start to before token i
  float *pair;              // [C + 1, C], SCALAR: row i + 1, decay from write j to after token i
  float *decayed;           // [keep ? C : 1, R C, width], after each token: right rows (VECTOR), or
                            // what they wrote (COLUMN)
  float *transposed;        // [R, Kp, C]: right rows by channel
  float *values;            // [R C, PANEL], one panel: what right rows write, v and u
  float *read;              // [L C, PANEL], one panel: what left rows read; its rows of q become o
  float beta[C];            // 0 for tokens that do not exist

  Chunk(const Problem& problem, Arena& arena, bool keep)
      : p(problem), K(int(p.K)), Kp((K + PAD - 1) / PAD * PAD),
        width(D == VECTOR ? Kp : D == COLUMN ? PANEL : 1), keep(keep),
        read_before(p.read_before != 0), erase_before(E == LOW_RANK || p.b.data != nullptr) {
    // without a decay of its rows `enter` is `left`, and the like: nothing is copied
    left = arena.take(L * C * Kp);
    right = arena.take(R * C * Kp);
    enter = D == SCALAR || D == VECTOR ? arena.take(L * C * Kp) : left;
    leave = D == SCALAR ? arena.take(R * C * Kp) : right;
    scores = arena.take(L * C * R * C);
    last = arena.take(Kp);
    const bool vector = D == VECTOR || D == COLUMN, in_place = D == COLUMN && !keep;
    factors = vector ? arena.take(C * width) : nullptr;
    prefix = arena.take((C + 1) * width);
    pair = D == SCALAR ? arena.take((C + 1) * C) : nullptr;
    transposed = D == VECTOR ? nullptr : arena.take(R * Kp * C);
    values = arena.take(R * C * PANEL);
    read = arena.take(L * C * PANEL);
    decayed = in_place ? values : vector ? arena.take((keep ? C : 1) * R * C * width) : nullptr;
    if (D == VECTOR && decayed) leave = after(C - 1);
  }

  // Whether left rows of kind l (0: q, 1: b) read before their token's decay.
  bool before(int l) const { return l == 0 ? read_before : erase_before; }

  // All that does not depend on the value channels: rows, decays and scores, for m tokens from t
  // on, of head h of q and k and head hv of the others.
  void prepare(int64_t n, int64_t h, int64_t hv, int64_t t, int m) {
    const int64_t batch = batch_of(p, n);
    load_rows(p.q, batch, t, m, h, left, p.l2norm);
    load_rows(p.k, batch, t, m, h, right, p.l2norm);
    if (E != NO_ERASE && p.b.data) load_rows(p.b, batch, t, m, hv, left + C * Kp, false);
    if (E == DELTA && !p.b.data) std::memcpy(left + C * Kp, right, sizeof(float) * C * Kp);
    if (E == LOW_RANK) load_rows(p.a, batch, t, m, hv, right + C * Kp, false);
    if (E == DELTA)
      for (int i = 0; i < C; i++) beta[i] = i < m ? read_one(p.beta, batch, t + i, hv) : 0;
    if (D == SCALAR) scalar_decay(batch, hv, t, m);
    if (D == VECTOR) vector_decay(batch, hv, t, m);
    if (D == VECTOR)
      vector_scores();
    else
      matrix_scores();
  }

  void load_rows(const View& x,  // [B, T, heads, K]
                 int64_t batch, int64_t t, int m, int64_t h,
                 float* out,     // [C, Kp]
                 bool normalise) {
    for (int i = 0; i < m; i++) {
      float* row = out + i * Kp;
      read_row(x, batch, t + i, h, 0, K, Kp, row);
      if (normalise) scale_into(inverse_norm(row, Kp), row, row, Kp);
    }
    std::memset(out + m * Kp, 0, sizeof(float) * (C - m) * Kp);
  }

  // prefix, pair, enter, leave and last from one log decay per token. All of the state takes the
  // same factors, so their rounding would add up over tokens: products are formed in fp64.
  void scalar_decay(int64_t batch, int64_t hv, int64_t t, int m) {
    double row[C] = {}, all = 1;  // row: decay from write j to after token i
    std::memset(pair, 0, sizeof(float) * C);
    prefix[0] = 1;
    for (int i = 0; i < C; i++) {
      const double f = i < m ? __builtin_exp(read_one(p.g, batch, t + i, hv)) : 1;
      for (int j = 0; j < C; j++) row[j] *= f;
      row[i] = 1;
      for (int j = 0; j < C; j++) pair[(i + 1) * C + j] = float(row[j]);
      prefix[i + 1] = float(all *= f);
    }
    for (int i = 0; i < L * C; i++)
      scale_into(prefix[i % C + !before(i / C)], left + i * Kp, enter + i * Kp, Kp);
    for (int j = 0; j < R * C; j++)
      scale_into(pair[C * C + j % C], right + j * Kp, leave + j * Kp, Kp);
    for (int k = 0; k < Kp; k += LANES) store(last + k, splat(prefix[C]));
  }

  // factors and prefix from n channels of x, from channel c on.
  void load_factors(const View& x,  // [B, T, HV, channels], log decays
                    int64_t batch, int64_t t, int m, int64_t hv, int64_t c, int n) {
    for (int w = 0; w < width; w += LANES) store(prefix + w, splat(1));
    for (int i = 0; i < C; i++) {
      float* f = factors + i * width;
      if (i < m) read_row(x, batch, t + i, hv, c, n, width, f);
      for (int w = 0; w < width; w += LANES)
        store(f + w, i < m ? exponential(load(f + w)) : splat(1));
      multiply_into(f, prefix + i * width, prefix + (i + 1) * width, width);
    }
  }

  void vector_decay(int64_t batch, int64_t hv, int64_t t, int m) {
    load_factors(p.g, batch, t, m, hv, 0, K);
    for (int i = 0; i < L * C; i++)
      multiply_into(prefix + (i % C + !before(i / C)) * Kp, left + i * Kp, enter + i * Kp, Kp);
    std::memcpy(last, prefix + C * Kp, sizeof(float) * Kp);
  }

  // How many writes of its own chunk left row i of kind l sees: q its own token's too, unless it
  // reads before it; b never.
  int seen(int l, int i) const { return i + (l == 0 && !read_before); }

  // Scores as a matrix product, times the decays of pairs; for all but VECTOR.
  void matrix_scores() {
    for (int r = 0; r < R; r++) {
      transpose(C, Kp, right + r * C * Kp, Kp, transposed, C);
      product<ZERO>(L * C, C, Kp, left, Kp, 1, transposed, C, scores + r * C, R * C);
    }
    for (int i = 0; i < L * C; i++)
      for (int r = 0; r < R; r++) {
        float* row = scores + i * R * C + r * C;
        if (D == SCALAR) multiply_into(pair + (i % C + !before(i / C)) * C, row, row, C);
        for (int j = seen(i / C, i % C); j < C; j++) row[j] = 0;
      }
  }

  // What decays, [R C, width], as it stands after token i. Without `keep` there is one copy, which
  // the next token overwrites.
  float* after(int i) const { return decayed + (keep ? int64_t(i) * R * C * width : 0); }

  // Takes earlier rows through the decay of token i, and adds row i, which is not decayed by it.
  void pass_token(int i,
                  const float* rows) {  // [R C, width]: the right rows, or what they wrote
    float *now = after(i), *old = after(i ? i - 1 : 0);
    for (int r = 0; r < R; r++) {
      for (int j = r * C; j < r * C + i; j++)
        multiply_into(factors + i * width, old + j * width, now + j * width, width);
      const int at = (r * C + i) * width;
      if (now != rows) std::memcpy(now + at, rows + at, sizeof(float) * width);
    }
  }

  // Scores token by token: with a decay per channel they are no product of two matrices.
  void vector_scores() {
    std::memset(scores, 0, sizeof(float) * L * C * R * C);
    for (int i = 0; i < C; i++) {
      for (int l = 0; l < L; l++)
        if (before(l)) row_scores(l, i, i, after(i ? i - 1 : 0));
      pass_token(i, right);
      for (int l = 0; l < L; l++)
        if (!before(l)) row_scores(l, i, seen(l, i), after(i));
    }
  }

  // Scores of left row i of kind l with the first `count` right rows of each kind.
  void row_scores(int l, int i, int count,
                  const float* y) {  // [R C, Kp]: right rows as they stand where row i reads
    const int row = l * C + i;
    for (int r = 0; r < R; r++)
      for (int j = r * C; j < r * C + count; j++)
        scores[row * R * C + j] = dot(left + row * Kp, y + j * Kp, Kp);
  }

  // A panel of v into `values`; for COLUMN also its decays.
  void load_values(int64_t n, int64_t hv, int64_t t, int m, int panel) {
    for (int i = 0; i < m; i++)
      read_row(p.v, batch_of(p, n), t + i, hv, panel * PANEL, width_of(p, panel), PANEL,
               values + i * PANEL);
    std::memset(values + m * PANEL, 0, sizeof(float) * (C - m) * PANEL);
    if (D == COLUMN)
      load_factors(p.gv, batch_of(p, n), t, m, hv, panel * PANEL, width_of(p, panel));
  }

  // COLUMN: lets what tokens wrote decay, and adds what q reads of it to `out` [C, PANEL] unless
  // that is null. Decays differ from column to column, so that is one product per token.
  void spread(float* out) {
    for (int i = 0; i < C; i++) {
      pass_token(i, values);
      if (out)
        product<KEEP>(1, PANEL, i + 1, scores + i * C, C, 1, after(i), PANEL, out + i * PANEL,
                      PANEL);
    }
  }

  // What the chunk writes, u, from v in `values` and the rows of b in `read`, by forward
  // substitution. y [C, PANEL], unless null, is kept for a backward pass: v less what b reads for a
  // delta rule, what b reads for a low-rank one.
  void solve(float* y) {
    const float *B = scores + C * R * C, *in = read + C * PANEL;
    for (int i = 0; i < C; i++) {
      float row[PANEL];
      for (int w = 0; w < PANEL; w += LANES) {
        vf x = E == DELTA ? load(values + i * PANEL + w) - load(in + i * PANEL + w)
                          : load(in + i * PANEL + w);
        for (int j = 0; j < i; j++)
          if (E == DELTA)
            x -= B[i * C + j] * load(values + j * PANEL + w);
          else
            x += B[i * 2 * C + j] * load(values + j * PANEL + w) +
                 B[i * 2 * C + C + j] * load(values + (C + j) * PANEL + w);
        store(row + w, x);
      }
      if (y) std::memcpy(y + i * PANEL, row, sizeof(row));
      if (E == DELTA)
        scale_into(beta[i], row, values + i * PANEL, PANEL);
      else
        std::memcpy(values + (C + i) * PANEL, row, sizeof(row));
    }
  }

  // What left rows read of the chunk's first state, and from it what the chunk writes.
  void write(const float* S,  // [K, PANEL]
             float* y,        // out [C, PANEL], or null: see `solve`
             bool queries) {  // q reads too; a backward pass needs only what is written
    const int first = queries ? 0 : C;
    if (queries || E != NO_ERASE)
      product<ZERO>(L * C - first, PANEL, K, enter + first * Kp, Kp, 1, S, PANEL,
                    read + first * PANEL, PANEL);
    if (E != NO_ERASE) solve(y);
    if (D != COLUMN) return;
    for (int i = 0; queries && i < C; i++)
      multiply_into(prefix + (i + 1) * PANEL, read + i * PANEL, read + i * PANEL, PANEL);
    spread(queries ? read : nullptr);
  }

  // S [K, PANEL] from the chunk's start to its end.
  void advance(float* S) {
    if (D == COLUMN)
      return product<BY_COLUMN>(K, PANEL, C, leave, 1, Kp, after(C - 1), PANEL, S, PANEL,
                                prefix + C * PANEL);
    product<D == NO_DECAY ? KEEP : BY_ROW>(K, PANEL, R * C, leave, 1, Kp, values, PANEL, S, PANEL,
                                           last);
  }

  // One panel of o.
  void output(int64_t n, int64_t hv, int64_t t, int m, int panel) {
    if (D != COLUMN)
      product<KEEP>(C, PANEL, R * C, scores, R * C, 1, values, PANEL, read, PANEL);
    for (int i = 0; i < m; i++) {
      scale_into(p.scale, read + i * PANEL, read + i * PANEL, PANEL);
      write_row(p.o, batch_of(p, n), t + i, hv, panel * PANEL, width_of(p, panel),
                read + i * PANEL);
    }
  }
};

// A panel of a state, its columns filled up with zeros, and back: products then run over whole
// registers, whatever V.
static void pack_panel(const Problem& p,
                       const float* S,  // [K, V], or null: zeros
                       int panel,
                       float* out) {    // [K, PANEL]
  const int width = width_of(p, panel);
  for (int64_t k = 0; k < p.K; k++)
    for (int w = 0; w < PANEL; w++)
      out[k * PANEL + w] = S && w < width ? S[k * p.V + panel * PANEL + w] : 0;
}

static void unpack_panel(const Problem& p,
                         const float* S,  // [K, PANEL]
                         int panel,
                         float* out) {    // [K, V]
  for (int64_t k = 0; k < p.K; k++)
    std::memcpy(out + k * p.V + panel * PANEL, S + k * PANEL, sizeof(float) * width_of(p, panel));
}

// The stored first state, [panels, K, PANEL], of the block that begins with token t.
FLA_INLINE float* checkpoint(const Problem& p, int64_t n, int64_t t, int64_t hv) {
  const int64_t block = first_block(p, n) + (t - begin_of(p, n)) / BLOCK;
  return p.states + (block * p.HV + hv) * panels(p) * p.K * PANEL;
}

// One task of the forward pass: chunk by chunk, in each head by head, in each panel by panel, so
// that rows and scores of a chunk serve all panels while they are in the cache.
template <Decay D, Erase E>
int64_t forward(const Problem& p, Task task,
                float* workspace) {  // of as many floats as the same call with null returns
  Arena arena{workspace};
  Chunk<D, E> chunk(p, arena, false);
  const int64_t size = p.K * PANEL, count = panels(p);
  float* states = arena.take((task.last - task.head) * count * size);  // [heads, panels, K, PANEL]
  if (!workspace) return arena.used;
  const int64_t n = task.sequence;
  for (int64_t hv = task.head; hv < task.last; hv++)
    for (int x = task.panel; x < task.end; x++)
      pack_panel(p, p.initial ? p.initial + state_of(p, n, hv) : nullptr, x,
                 states + ((hv - task.head) * count + x) * size);
  for (int64_t t = begin_of(p, n); t < end_of(p, n); t += CHUNK) {
    const int m = int(end_of(p, n) - t < CHUNK ? end_of(p, n) - t : CHUNK);
    for (int64_t hv = task.head; hv < task.last; hv++) {
      float* S = states + (hv - task.head) * count * size;
      if (p.states && (t - begin_of(p, n)) % BLOCK == 0)
        std::memcpy(checkpoint(p, n, t, hv) + task.panel * size, S + task.panel * size,
                    sizeof(float) * (task.end - task.panel) * size);
      chunk.prepare(n, hv / (p.HV / p.H), hv, t, m);
      for (int x = task.panel; x < task.end; x++) {
        chunk.load_values(n, hv, t, m, x);
        chunk.write(S + x * size, nullptr, true);
        chunk.output(n, hv, t, m, x);
        chunk.advance(S + x * size);
      }
    }
  }
  for (int64_t hv = task.head; hv < task.last; hv++)
    for (int x = task.panel; x < task.end; x++)
      unpack_panel(p, states + ((hv - task.head) * count + x) * size, x,
                   p.final_state + state_of(p, n, hv));
  return arena.used;
}

}  // namespace FLA_ISA
