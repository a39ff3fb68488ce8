// SPDX-License-Identifier: MIT
// Short causal depthwise convolution, `fla/modules/convolution.py`, and its gradient, for one
// sequence and up to CHANNELS channels. With e the sequence after its W rows of history,
//
//     z_t = bias + sum_i w_i e_{t+1+i}        y = z or silu(z)        de_s = sum_i w_i dz_{s-1-i}
//
// Only the last W rows of e, and of dz, are ever read: they lie in rings of W rows. The letters in
// the shapes are those of `Conv` in `problem.h`.
#pragma once
#include "rows.h"

namespace FLA_ISA {

struct ConvTask {
  const Conv& p;
  const int64_t n, batch, begin, end, first;
  const int W, count, width;  // count: channels; width: filled up to PAD
  float *ring, *weight;       // [W, CHANNELS]
  float* bias;                // [CHANNELS]

  ConvTask(const Conv& problem, Task task, Arena& arena)
      : p(problem), n(task.sequence), batch(batch_of(p, n)), begin(begin_of(p, n)),
        end(end_of(p, n)), first(task.head * CHANNELS), W(int(p.W)),
        count(int(p.D - first < CHANNELS ? p.D - first : CHANNELS)),
        width((count + PAD - 1) / PAD * PAD) {
    ring = arena.take(W * CHANNELS);
    weight = arena.take(W * CHANNELS);
    bias = arena.take(CHANNELS);
  }

  // One row of these channels, or zeros; and back, unless `rows` is null.
  void get(const float* rows,   // [.., D], or null
           int64_t row,
           float* out) const {  // [CHANNELS]
    for (int c = 0; c < width; c++) out[c] = rows && c < count ? rows[row * p.D + first + c] : 0;
  }
  void put(float* rows,             // [.., D], or null
           int64_t row,
           const float* x) const {  // [CHANNELS]
    if (rows) std::memcpy(rows + row * p.D + first, x, sizeof(float) * count);
  }
  // The place of row e >= 0 in a ring [W, CHANNELS].
  float* slot(float* rows, int64_t e) const { return rows + e % W * CHANNELS; }

  void start() {
    for (int i = 0; i < W; i++) {
      get(p.weight, i, weight + i * CHANNELS);
      get(p.history, n * W + i, slot(ring, i));
    }
    get(p.bias, 0, bias);
  }

  void read(int64_t t) {  // token t of the sequence into the ring
    read_row(p.x, batch, begin + t, 0, first, count, width, slot(ring, t + W));
  }

  // z of token t, the register of channels that begins with c.
  vf z(int64_t t, int c) const {
    vf sum = load(bias + c);
    for (int i = 0; i < W; i++)
      sum += load(weight + i * CHANNELS + c) * load(slot(ring, t + 1 + i) + c);
    return sum;
  }

  void finish() {  // the last W rows
    for (int i = 0; i < W; i++) put(p.final_history, n * W + i, slot(ring, end - begin + i));
  }
};

static int64_t conv_forward(const Conv& p, Task task,
                            float* workspace) {  // null: only counts its floats
  Arena arena{workspace};
  ConvTask conv(p, task, arena);
  float* row = arena.take(CHANNELS);
  if (!workspace) return arena.used;
  conv.start();
  for (int64_t t = 0; t < conv.end - conv.begin; t++) {
    conv.read(t);
    for (int c = 0; c < conv.width; c += LANES) {
      const vf z = conv.z(t, c);
      store(row + c, p.silu ? z * sigmoid(z) : z);
    }
    write_row(p.y, conv.batch, conv.begin + t, 0, conv.first, conv.count, row);
  }
  conv.finish();
  return arena.used;
}

// Goes forward over the tokens too: row t + 1 of the gradient of e is complete once dz_t is there.
// Sums over tokens are taken block by block, which keeps their rounding small.
static int64_t conv_backward(const Conv& p, Task task,
                             float* workspace) {  // null: only counts its floats
  Arena arena{workspace};
  ConvTask conv(p, task, arena);
  const int W = conv.W, sums = (W + 1) * CHANNELS;
  float* dz = arena.take(W * CHANNELS);                       // [W, CHANNELS], a ring
  float* row = arena.take(CHANNELS);                          // [CHANNELS], of the gradient of e
  float *part = arena.take(sums), *total = arena.take(sums);  // [W + 1, CHANNELS]: dweight, dbias
  if (!workspace) return arena.used;
  conv.start();
  std::memset(part, 0, sizeof(float) * sums);
  std::memset(total, 0, sizeof(float) * sums);
  std::memset(dz, 0, sizeof(float) * W * CHANNELS);
  const int64_t length = conv.end - conv.begin;
  for (int64_t t = 0; t < length + W - 1; t++) {
    float* now = conv.slot(dz, t);
    if (t < length) {
      conv.read(t);
      read_row(p.y, conv.batch, conv.begin + t, 0, conv.first, conv.count, conv.width, now);
    } else {
      std::memset(now, 0, sizeof(float) * CHANNELS);
    }
    for (int c = 0; c < conv.width; c += LANES) {
      vf grad = load(now + c), sum = vf{};
      if (p.silu && t < length) {
        const vf z = conv.z(t, c), s = sigmoid(z);
        grad *= s * (1.f + z * (1.f - s));
        store(now + c, grad);
      }
      for (int i = 0; i < W; i++) {
        float* dw = part + i * CHANNELS + c;
        if (t < length) store(dw, load(dw) + grad * load(conv.slot(conv.ring, t + 1 + i) + c));
        if (t >= i) sum += load(conv.weight + i * CHANNELS + c) * load(conv.slot(dz, t - i) + c);
      }
      store(part + W * CHANNELS + c, load(part + W * CHANNELS + c) + grad);
      store(row + c, sum);
    }
    const int64_t e = t + 1, last = e - length;  // row of the extended sequence, and of its last W
    if (last >= 0 && p.dfinal)
      for (int c = 0; c < conv.count; c++)
        row[c] += p.dfinal[(conv.n * W + last) * p.D + conv.first + c];
    if (e < W)
      conv.put(p.dhistory, conv.n * W + e, row);
    else
      write_row(p.dx, conv.batch, conv.begin + e - W, 0, conv.first, conv.count, row);
    if (t % BLOCK == BLOCK - 1 || t == length + W - 2)
      for (int i = 0; i < sums; i++) total[i] += part[i], part[i] = 0;
  }
  // the oldest row of history is read by no tap, and is among the last W only where T = 0
  conv.get(length ? nullptr : p.dfinal, conv.n * W, row);
  conv.put(p.dhistory, conv.n * W, row);
  for (int i = 0; i < W; i++) conv.put(p.dweight, conv.n * W + i, total + i * CHANNELS);
  conv.put(p.dbias, conv.n, total + W * CHANNELS);
  return arena.used;
}

}  // namespace FLA_ISA
