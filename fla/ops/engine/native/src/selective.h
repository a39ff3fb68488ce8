// SPDX-License-Identifier: MIT
// The selective scan, `engine/scan/selective.py`, and its gradient, for one sequence and up to
// CHANNELS channels: K numbers of state per channel, channels side by side in registers.
//
//     S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t        y_t = sum_k C_t S_t
//
// The letters in the shapes are those of `Scan` in `problem.h`; LANES channels share a register.
#pragma once
#include "rows.h"

namespace FLA_ISA {

struct ScanTask {
  const Scan& p;
  const int64_t n, batch, begin, end, first;
  const int K, count, width;  // count: channels; width: filled up to PAD
  float *A, *S;               // [K, CHANNELS]
  float *x, *dt;              // [tokens, CHANNELS]
  float *B, *C;               // [tokens, K]

  ScanTask(const Scan& problem, Task task, Arena& arena, int tokens)
      : p(problem), n(task.sequence), batch(batch_of(p, n)), begin(begin_of(p, n)),
        end(end_of(p, n)), first(task.head * CHANNELS), K(int(p.K)),
        count(int(p.D - first < CHANNELS ? p.D - first : CHANNELS)),
        width((count + PAD - 1) / PAD * PAD) {
    A = arena.take(K * CHANNELS);
    S = arena.take(K * CHANNELS);
    x = arena.take(tokens * CHANNELS);
    dt = arena.take(tokens * CHANNELS);
    B = arena.take(tokens * K);
    C = arena.take(tokens * K);
  }

  // K rows of these channels, or zeros; and back.
  void get(const float* rows,    // [.., K, D], or null
           int64_t i,
           float* out) const {   // [K, CHANNELS]
    for (int k = 0; k < K; k++)
      for (int c = 0; c < width; c++)
        out[k * CHANNELS + c] = rows && c < count ? rows[(i * K + k) * p.D + first + c] : 0;
  }
  void put(float* rows,               // [.., K, D]
           int64_t i,
           const float* from) const {  // [K, CHANNELS]
    for (int k = 0; k < K; k++)
      std::memcpy(rows + (i * K + k) * p.D + first, from + k * CHANNELS, sizeof(float) * count);
  }

  void read(const View& from,    // [B, T, D]
            int64_t t,
            float* out) const {  // [CHANNELS]
    read_row(from, batch, begin + t, 0, first, count, width, out);
  }
  void load_token(int64_t t, int row) {
    read(p.x, t, x + row * CHANNELS);
    read(p.dt, t, dt + row * CHANNELS);
    read_row(p.B, batch, begin + t, 0, 0, K, K, B + row * K);
    read_row(p.C, batch, begin + t, 0, 0, K, K, C + row * K);
  }
};

static int64_t scan_forward(const Scan& p, Task task,
                            float* workspace) {  // null: only counts its floats
  Arena arena{workspace};
  ScanTask scan(p, task, arena, 1);
  float* row = arena.take(CHANNELS);
  if (!workspace) return arena.used;
  scan.get(p.A, 0, scan.A);
  scan.get(p.initial, scan.n, scan.S);
  for (int64_t t = 0; t < scan.end - scan.begin; t++) {
    if (p.states && t % BLOCK == 0)
      scan.put(p.states, first_block(p, scan.n) + t / BLOCK, scan.S);
    scan.load_token(t, 0);
    for (int c = 0; c < scan.width; c += LANES) {
      const vf dt = load(scan.dt + c), write = dt * load(scan.x + c);
      vf y = vf{};
      for (int k = 0; k < scan.K; k++) {
        float* at = scan.S + k * CHANNELS + c;
        const vf f = exponential(dt * load(scan.A + k * CHANNELS + c));
        const vf s = f * load(at) + write * scan.B[k];
        store(at, s);
        y += s * scan.C[k];
      }
      store(row + c, y);
    }
    write_row(p.y, scan.batch, scan.begin + t, 0, scan.first, scan.count, row);
  }
  scan.put(p.final_state, scan.n, scan.S);
  return arena.used;
}

// Block by block from the last to the first, a block's states formed again from its first one, one
// register of channels at a time. Z is the gradient of the state after a token.
struct ScanBackward : ScanTask {
  float* dy;          // [BLOCK, CHANNELS]; dx takes its place
  float* Z;           // [K, CHANNELS]
  float* factors;     // [BLOCK, K, LANES]: exp(dt A)
  float* states;      // [BLOCK + 1, K, LANES]: before the block, and after each of its tokens
  float *dA, *total;  // [K, CHANNELS]: of a block, and the sum over blocks
  float *dB, *dC;     // [BLOCK, K, LANES]: sums over registers of channels, lane by lane

  ScanBackward(const Scan& problem, Task task, Arena& arena)
      : ScanTask(problem, task, arena, BLOCK) {
    dy = arena.take(BLOCK * CHANNELS);
    Z = arena.take(K * CHANNELS);
    factors = arena.take(BLOCK * K * LANES);
    states = arena.take((BLOCK + 1) * K * LANES);
    dA = arena.take(K * CHANNELS);
    total = arena.take(K * CHANNELS);
    dB = arena.take(BLOCK * K * LANES);
    dC = arena.take(BLOCK * K * LANES);
  }

  // The block's states of the register of channels that begins with c.
  void again(int tokens, int c) {
    for (int k = 0; k < K; k++) store(states + k * LANES, load(S + k * CHANNELS + c));
    for (int t = 0; t < tokens; t++) {
      const vf step = load(dt + t * CHANNELS + c), write = step * load(x + t * CHANNELS + c);
      for (int k = 0; k < K; k++) {
        const int64_t at = (int64_t(t) * K + k) * LANES;
        const vf f = exponential(step * load(A + k * CHANNELS + c));
        store(factors + at, f);
        store(states + at + K * LANES, f * load(states + at) + write * B[t * K + k]);
      }
    }
  }

  // Token t backward, for the same register.
  void token(int t, int c) {
    const vf grad = load(dy + t * CHANNELS + c), step = load(dt + t * CHANNELS + c);
    const vf in = load(x + t * CHANNELS + c), write = step * in;
    vf written = vf{}, dstep = vf{};
    for (int k = 0; k < K; k++) {
      const int64_t at = (int64_t(t) * K + k) * LANES;
      float *z = Z + k * CHANNELS + c, *da = dA + k * CHANNELS + c;
      const vf now = load(z) + grad * C[t * K + k], back = now * load(factors + at);
      const vf dlog = back * load(states + at);
      store(dC + at, load(dC + at) + grad * load(states + at + K * LANES));
      store(dB + at, load(dB + at) + now * write);
      store(da, load(da) + dlog * step);
      store(z, back);
      written += now * B[t * K + k];
      dstep += dlog * load(A + k * CHANNELS + c);
    }
    store(dy + t * CHANNELS + c, written * step);  // the gradient of x in its place
    store(dt + t * CHANNELS + c, dstep + written * in);
  }

  // The block of `tokens` tokens from t on.
  void block(int64_t t, int tokens) {
    get(p.states, first_block(p, n) + t / BLOCK, S);
    for (int i = 0; i < tokens; i++) {
      load_token(t + i, i);
      read(p.y, t + i, dy + i * CHANNELS);
    }
    const int64_t sums = int64_t(tokens) * K;
    std::memset(dB, 0, sizeof(float) * sums * LANES);
    std::memset(dC, 0, sizeof(float) * sums * LANES);
    std::memset(dA, 0, sizeof(float) * K * CHANNELS);
    for (int c = 0; c < width; c += LANES) {
      again(tokens, c);
      for (int i = tokens - 1; i >= 0; i--) token(i, c);
    }
    for (int i = 0; i < tokens; i++) {
      write_row(p.dx, batch, begin + t + i, 0, first, count, dy + i * CHANNELS);
      write_row(p.ddt, batch, begin + t + i, 0, first, count, dt + i * CHANNELS);
    }
    const int64_t batches = p.bounds ? 1 : p.N;
    const int64_t at = ((first / CHANNELS * batches + batch) * p.T + begin + t) * K;
    for (int64_t i = 0; i < sums; i++) {
      p.dB[at + i] = sum(load(dB + i * LANES));
      p.dC[at + i] = sum(load(dC + i * LANES));
    }
    // block by block: one sum over all tokens would lose more digits
    for (int i = 0; i < K * CHANNELS; i++) total[i] += dA[i];
  }
};

static int64_t scan_backward(const Scan& p, Task task,
                             float* workspace) {  // null: only counts its floats
  Arena arena{workspace};
  ScanBackward scan(p, task, arena);
  if (!workspace) return arena.used;
  scan.get(p.A, 0, scan.A);
  scan.get(p.dfinal, scan.n, scan.Z);
  std::memset(scan.total, 0, sizeof(float) * scan.K * CHANNELS);
  const int64_t length = scan.end - scan.begin;
  for (int64_t t = (length - 1) / BLOCK * BLOCK; length && t >= 0; t -= BLOCK)
    scan.block(t, int(length - t < BLOCK ? length - t : BLOCK));
  scan.put(p.dinitial, scan.n, scan.Z);
  scan.put(p.dA, scan.n, scan.total);
  return arena.used;
}

}  // namespace FLA_ISA
