// SPDX-License-Identifier: MIT
// Buffers, and rows of strided tensors of any type, to and from fp32.
//
// A row is the channels of one batch row b, token t and head h of a `View` [B, T, heads, channels].
#pragma once
#include "problem.h"
#include "simd.h"

namespace FLA_ISA {

// Hands out buffers one after the other. With a null base it only counts, so the code that takes
// the buffers also says how large the workspace must be.
struct Arena {
  float* base;
  int64_t used = 0;
  float* take(int64_t n) {
    float* x = base ? base + used : nullptr;
    used += (n + PAD - 1) / PAD * PAD;  // each begins on a cache line, as the workspace does
    return x;
  }
};

FLA_INLINE float from_bits(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
FLA_INLINE uint32_t to_bits(float x) { uint32_t y; std::memcpy(&y, &x, 4); return y; }

FLA_INLINE float bf16_to_float(uint16_t x) { return from_bits(uint32_t(x) << 16); }

// Rounds to nearest, ties to even, as torch does; so does float_to_f16.
FLA_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  if (x != x) return uint16_t(bits >> 16) | 0x40;  // quiet, and no carry that makes it inf
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

FLA_INLINE float f16_to_float(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = uint32_t(x & 0x7fff) << 13;
  const uint32_t special = (x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;  // inf and nan
  return from_bits(to_bits(from_bits(rest) * 0x1p112f) | special | sign);
}

FLA_INLINE uint16_t float_to_f16(float x) {
  uint32_t bits = to_bits(x);
  const uint16_t sign = uint16_t(bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds beyond the largest
  if (bits < 0x38800000)                         // denormal: 0.5 has the unit 2^-24
    return sign | uint16_t(to_bits(from_bits(bits) + .5f) - 0x3f000000);
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | uint16_t((bits - 0x38000000) >> 13);
}

template <class T, class F>
FLA_INLINE void convert_in(const T* x,  // n elements, `stride` apart
                           int64_t stride, int n,
                           float* y,    // [n]
                           F to_float) {
  if (stride == 1)  // a loop of its own, which the compiler turns into vector instructions
    for (int i = 0; i < n; i++) y[i] = to_float(x[i]);
  else
    for (int i = 0; i < n; i++) y[i] = to_float(x[i * stride]);
}

template <class T, class F>
FLA_INLINE void convert_out(T* x,            // n elements, `stride` apart
                            int64_t stride, int n,
                            const float* y,  // [n]
                            F from_float) {
  if (stride == 1)
    for (int i = 0; i < n; i++) x[i] = from_float(y[i]);
  else
    for (int i = 0; i < n; i++) x[i * stride] = from_float(y[i]);
}

FLA_INLINE int64_t offset(const View& x, int64_t b, int64_t t, int64_t h, int64_t c) {
  return b * x.batch + t * x.token + h * x.head + c * x.channel;
}

// n channels from channel c on, and zeros up to `width`.
static void read_row(const View& x,  // [B, T, heads, channels]
                     int64_t b, int64_t t, int64_t h, int64_t c, int n, int width,
                     float* y) {     // [width]
  const int64_t at = offset(x, b, t, h, c);
  if (x.type == F32)
    convert_in((const float*)x.data + at, x.channel, n, y, [](float v) { return v; });
  else if (x.type == BF16)
    convert_in((const uint16_t*)x.data + at, x.channel, n, y, bf16_to_float);
  else
    convert_in((const uint16_t*)x.data + at, x.channel, n, y, f16_to_float);
  for (int i = n; i < width; i++) y[i] = 0;
}

static void write_row(const View& x,     // [B, T, heads, channels]
                      int64_t b, int64_t t, int64_t h, int64_t c, int n,
                      const float* y) {  // [n]
  const int64_t at = offset(x, b, t, h, c);
  if (x.type == F32)
    convert_out((float*)x.data + at, x.channel, n, y, [](float v) { return v; });
  else if (x.type == BF16)
    convert_out((uint16_t*)x.data + at, x.channel, n, y, float_to_bf16);
  else
    convert_out((uint16_t*)x.data + at, x.channel, n, y, float_to_f16);
}

FLA_INLINE float inverse_norm(const float* x, int n) {  // x [n], n a multiple of PAD
  return 1 / __builtin_sqrtf(dot(x, x, n) + L2_EPS);
}

// One element of a tensor [B, T, heads].
FLA_INLINE float read_one(const View& x, int64_t b, int64_t t, int64_t h) {
  float y;
  read_row(x, b, t, h, 0, 1, 1, &y);
  return y;
}

}  // namespace FLA_ISA
