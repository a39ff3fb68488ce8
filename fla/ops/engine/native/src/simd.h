// SPDX-License-Identifier: MIT
// One register of floats as a compiler vector type, whatever the instruction set. No fast-math:
// decays may be -inf.
//
// Shapes are [rows, columns]; ld.. is the distance between rows in floats. Loads need no alignment.
#pragma once
#include <cstdint>
#include <cstring>

#define FLA_INLINE static inline __attribute__((always_inline))

namespace FLA_ISA {

// floats of a register, and rows and registers of the tile of a matrix product
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 8, TILE_VECTORS = 2;
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE_ROWS = 6, TILE_VECTORS = 2;
#elif defined(__aarch64__)
constexpr int LANES = 4, TILE_ROWS = 8, TILE_VECTORS = 2;
#else
constexpr int LANES = 4, TILE_ROWS = 4, TILE_VECTORS = 2;
#endif
constexpr int PAD = 16;  // rows of channels are filled up to a multiple of it
typedef float vf __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

FLA_INLINE vf load(const float* x) { return *(const vf*)x; }
FLA_INLINE void store(float* x, vf y) { *(vf*)x = y; }
FLA_INLINE vf splat(float x) { return vf{} + x; }

// In halves, the same order for every compiler.
FLA_INLINE float sum(vf x) {
  float y[LANES];
  store(y, x);
  for (int s = LANES / 2; s > 0; s /= 2)
    for (int i = 0; i < s; i++) y[i] += y[i + s];
  return y[0];
}

// exp to about one unit in the last place: 2^n times the Taylor series on [-ln2/2, ln2/2].
FLA_INLINE vf exponential(vf x) {
  const vf top = splat(89.f), bottom = splat(-104.f), round = splat(12582912.f);  // 1.5 * 2^23
  const vf y = x > top ? top : (x < bottom ? bottom : x);
  const vf n = (y * 1.44269504088896341f + round) - round;
  const vf r = (y - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;  // ln 2 in two parts
  vf p = splat(1.f / 5040);
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + .5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const vi i = __builtin_convertvector(n, vi), half = i >> 1;  // two powers: one may be denormal
  p = p * (vf)((half + 127) << 23) * (vf)((i - half + 127) << 23);
  p = x < bottom ? vf{} : p;
  return x != x ? x : p;
}

FLA_INLINE vf sigmoid(vf x) { return 1.f / (1.f + exponential(-x)); }

// what a product is added to: nothing, C, or C times a factor of each row or of each column
enum Start { ZERO, KEEP, BY_ROW, BY_COLUMN };

// C[ROWS, VECTORS registers] (+)= A B. C is added last: sums of products are short, and rounded
// once into what may be a large state. The loops are unrolled so that acc stays in registers.
template <int ROWS, int VECTORS, Start START>
FLA_INLINE void tile(int inner,
                     const float* a,                // A(i, k) = a[i a_row + k a_col], [ROWS, inner]
                     int64_t a_row, int64_t a_col,
                     const float* b, int64_t ldb,   // [inner, VECTORS registers]
                     float* c, int64_t ldc,         // [ROWS, VECTORS registers]
                     const float* factor) {         // [ROWS] or [VECTORS registers], by START
  vf acc[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) acc[i][j] = vf{};
  for (int k = 0; k < inner; k++) {
    vf row[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) row[j] = load(b + k * ldb + j * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) acc[i][j] += a[i * a_row + k * a_col] * row[j];
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) {
      float* at = c + i * ldc + j * LANES;
      if (START == KEEP) acc[i][j] += load(at);
      if (START == BY_ROW) acc[i][j] += load(at) * factor[i];
      if (START == BY_COLUMN) acc[i][j] += load(at) * load(factor + j * LANES);
      store(at, acc[i][j]);
    }
}

// The last, fewer than TILE_ROWS rows: the tile of as many rows, found by recursion, since a tile's
// height must be known to the compiler. Arguments as in `tile`.
template <int ROWS, int VECTORS, Start START>
struct Rest {
  static void run(int rows, int inner, const float* a, int64_t a_row, int64_t a_col, const float* b,
                  int64_t ldb, float* c, int64_t ldc, const float* factor) {
    if (rows == ROWS)
      return tile<ROWS, VECTORS, START>(inner, a, a_row, a_col, b, ldb, c, ldc, factor);
    Rest<ROWS - 1, VECTORS, START>::run(rows, inner, a, a_row, a_col, b, ldb, c, ldc, factor);
  }
};
template <int VECTORS, Start START>
struct Rest<0, VECTORS, START> {
  static void run(int, int, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t,
                  const float*) {}
};

// All rows of VECTORS registers of columns. Arguments as in `tile`, with `rows` rows.
template <int VECTORS, Start START>
static void columns(int rows, int inner, const float* a, int64_t a_row, int64_t a_col,
                    const float* b, int64_t ldb, float* c, int64_t ldc, const float* factor) {
  const int step = START == BY_ROW;
  int i = 0;
  for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
    tile<TILE_ROWS, VECTORS, START>(inner, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc,
                                    factor + i * step);
  Rest<TILE_ROWS - 1, VECTORS, START>::run(rows - i, inner, a + i * a_row, a_row, a_col, b, ldb,
                                           c + i * ldc, ldc, factor + i * step);
}

constexpr int INNER = 128;  // products of one sum at most: longer sums lose more digits

// C (+)= A B for width a multiple of PAD. A may be read by rows or by columns (transposed), B and C
// have their columns side by side.
template <Start START>
static void product(int rows, int width, int inner,
                    const float* a,                   // A(i, k) = a[i a_row + k a_col]
                    int64_t a_row, int64_t a_col,     // [rows, inner]
                    const float* b, int64_t ldb,      // [inner, width]
                    float* c, int64_t ldc,            // [rows, width]
                    const float* factor = nullptr) {  // [rows] or [width], for BY_ROW, BY_COLUMN
  if (inner > INNER) {
    product<START>(rows, width, INNER, a, a_row, a_col, b, ldb, c, ldc, factor);
    return product<KEEP>(rows, width, inner - INNER, a + INNER * a_col, a_row, a_col,
                         b + INNER * ldb, ldb, c, ldc);
  }
  const int step = START == BY_COLUMN;
  int j = 0;
  for (; j + TILE_VECTORS * LANES <= width; j += TILE_VECTORS * LANES)
    columns<TILE_VECTORS, START>(rows, inner, a, a_row, a_col, b + j, ldb, c + j, ldc,
                                 factor + j * step);
  for (; j < width; j += LANES)
    columns<1, START>(rows, inner, a, a_row, a_col, b + j, ldb, c + j, ldc, factor + j * step);
}

// Below, x and y are [n], n a multiple of PAD.
FLA_INLINE float dot(const float* x, const float* y, int n) {
  vf acc = vf{};
  for (int i = 0; i < n; i += LANES) acc += load(x + i) * load(y + i);
  return sum(acc);
}

FLA_INLINE void axpy(float a, const float* x, float* y, int n) {  // y += a x
  for (int i = 0; i < n; i += LANES) store(y + i, load(y + i) + a * load(x + i));
}

FLA_INLINE void scale_into(float a, const float* x, float* y, int n) {  // y = a x
  for (int i = 0; i < n; i += LANES) store(y + i, a * load(x + i));
}

FLA_INLINE void multiply_into(const float* a, const float* x, float* y, int n) {  // y = a x, a [n]
  for (int i = 0; i < n; i += LANES) store(y + i, load(a + i) * load(x + i));
}

// In stripes of 8 rows, of which a column fills half a cache line of y.
static void transpose(int rows, int cols,
                      const float* x, int64_t ldx,  // [rows, cols]
                      float* y, int64_t ldy) {      // [cols, rows]
  for (int i0 = 0; i0 < rows; i0 += 8)
    for (int j = 0; j < cols; j++)
      for (int i = i0; i < i0 + 8 && i < rows; i++) y[j * ldy + i] = x[i * ldx + j];
}

}  // namespace FLA_ISA
