// SPDX-License-Identifier: MIT
// Rows through a norm, a gate or both, and their gradient: RMSNorm, gated RMSNorm, SwiGLU.
//
//     u = x / sqrt(mean(x^2) + eps), or x        z = w u + b        y = z act(g), or z
//
// The letters in the shapes are those of `Gated` in `problem.h`. One row at a time is in the
// workspace, in fp32.
#pragma once
#include "rows.h"

namespace FLA_ISA {

struct GatedTask {
  const Gated& p;
  const int64_t begin, end;
  const int count, width;      // count: channels; width: filled up to PAD with zeros
  float *x, *g, *y;            // [width], one row
  float *weight, *bias;        // [width]; ones and zeros where they are absent

  GatedTask(const Gated& problem, Task task, Arena& arena)
      : p(problem), begin(task.sequence * BLOCK),
        end(begin + BLOCK < p.N ? begin + BLOCK : p.N), count(int(p.D)),
        width((count + PAD - 1) / PAD * PAD) {
    x = arena.take(width);
    g = arena.take(width);
    y = arena.take(width);
    weight = arena.take(width);
    bias = arena.take(width);
  }

  void start() {
    for (int c = 0; c < width; c++) {
      weight[c] = c < count ? (p.weight ? p.weight[c] : 1) : 0;
      bias[c] = c < count && p.bias ? p.bias[c] : 0;
    }
  }

  void read(const View& view,    // [N, D], or absent
            int64_t row,
            float* out) const {  // [width]
    if (view.data) read_row(view, 0, row, 0, 0, count, width, out);
  }
  void write(const View& view,         // [N, D], or absent
             int64_t row,
             const float* in) const {  // [width]
    if (view.data) write_row(view, 0, row, 0, 0, count, in);
  }

  float inverse() const {  // the norm's, of the row in x
    return p.norm ? 1 / __builtin_sqrtf(dot(x, x, width) / p.D + p.eps) : 1;
  }
};

static int64_t gated_forward(const Gated& p, Task task,
                             float* workspace) {  // null: only counts its floats
  Arena arena{workspace};
  GatedTask rows(p, task, arena);
  if (!workspace) return arena.used;
  rows.start();
  for (int64_t r = rows.begin; r < rows.end; r++) {
    rows.read(p.x, r, rows.x);
    rows.read(p.g, r, rows.g);
    const float inverse = rows.inverse();
    for (int c = 0; c < rows.width; c += LANES) {
      vf z = load(rows.x + c) * inverse * load(rows.weight + c) + load(rows.bias + c);
      if (p.gate) {
        const vf g = load(rows.g + c), s = sigmoid(g);
        z *= p.gate == SILU ? g * s : s;
      }
      store(rows.y + c, z);
    }
    rows.write(p.y, r, rows.y);
  }
  return arena.used;
}

// Every block of rows writes its own row of dweight and dbias: no thread waits for another.
static int64_t gated_backward(const Gated& p, Task task,
                              float* workspace) {  // null: only counts its floats
  Arena arena{workspace};
  GatedTask rows(p, task, arena);
  float *dweight = arena.take(rows.width), *dbias = arena.take(rows.width);  // [width]
  if (!workspace) return arena.used;
  rows.start();
  std::memset(dweight, 0, sizeof(float) * rows.width);
  std::memset(dbias, 0, sizeof(float) * rows.width);
  for (int64_t r = rows.begin; r < rows.end; r++) {
    rows.read(p.x, r, rows.x);
    rows.read(p.g, r, rows.g);
    rows.read(p.y, r, rows.y);
    const float inverse = rows.inverse();
    vf along = vf{};  // du . u
    for (int c = 0; c < rows.width; c += LANES) {
      const vf u = load(rows.x + c) * inverse, w = load(rows.weight + c);
      vf dz = load(rows.y + c);
      if (p.gate) {
        const vf g = load(rows.g + c), s = sigmoid(g), z = u * w + load(rows.bias + c);
        store(rows.g + c, dz * z * (p.gate == SILU ? s * (1.f + g * (1.f - s)) : s * (1.f - s)));
        dz *= p.gate == SILU ? g * s : s;
      }
      store(dweight + c, load(dweight + c) + dz * u);
      store(dbias + c, load(dbias + c) + dz);
      along += dz * w * u;
      store(rows.y + c, dz * w);
    }
    rows.write(p.dg, r, rows.g);
    if (p.norm) {
      // dx = (du - u mean(u du)) / rms, with u computed again from x
      const float mean = sum(along) / p.D;
      for (int c = 0; c < rows.width; c += LANES)
        store(rows.y + c, inverse * (load(rows.y + c) - mean * inverse * load(rows.x + c)));
    }
    rows.write(p.dx, r, rows.y);
  }
  const int64_t at = task.sequence * p.D, bytes = sizeof(float) * rows.count;
  if (p.dweight) std::memcpy(p.dweight + at, dweight, bytes);
  if (p.dbias) std::memcpy(p.dbias + at, dbias, bytes);
  return arena.used;
}

}  // namespace FLA_ISA
