// bf16 in AVX-512 registers and AMX tiles: loads, stores, transposition, products of 32 x 32.
//
// A tile is 1 KiB in one piece: 16 rows of 64 bytes. As the left factor it holds 16 rows of 32 columns; as the
// right factor 16 pairs of rows of 16 columns, the two rows of a pair side by side in each 32-bit word.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#define HAVE_AMX 1

#include <immintrin.h>

#include <cstdint>

#define AMX_TARGET \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define AMX_INLINE AMX_TARGET inline __attribute__((always_inline))

namespace amx {

using bf16 = std::uint16_t;
constexpr long kTile = 512;  // bf16 numbers in a tile

AMX_INLINE __m512 load(const bf16* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// 32 numbers, `low` first, to the nearest, ties to even.
AMX_INLINE __m512i round(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

AMX_INLINE void store(bf16* to, __m512 low, __m512 high) { _mm512_storeu_si512(to, round(low, high)); }

AMX_INLINE void store(bf16* to, __m512 numbers) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(numbers));
}

// 2 to the power of x, to 3e-6 relative: Taylor of degree 5 around the nearest integer. Very small x give 0.
AMX_INLINE __m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.3333558e-3f);
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(9.6181291e-3f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(5.5504109e-2f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(2.4022651e-1f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(6.9314718e-1f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
}

// The two halves of a register, their 16-bit numbers in turn.
AMX_INLINE __m512i interleave_halves(__m512i halves) {
  alignas(64) static constexpr std::uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
}

// A 16 x 16 matrix of 32-bit words; strides in bytes.
AMX_INLINE void transpose(const void* from, long from_stride, void* to, long to_stride) {
  __m512i r[16], t[16];
  const char* source = static_cast<const char*>(from);
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(source + i * from_stride);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  char* target = static_cast<char*>(to);
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(target + i * to_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(target + (i + 8) * to_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
  }
}

// While it lives, the eight tiles of this thread have 16 rows of 64 bytes; those for left factors and sums have
// `first` rows (0, 1 and 4) and `second` (2, 3 and 5). Then all are as they were, since other libraries use them
// too.
class Tiles {
 public:
  AMX_TARGET explicit Tiles(int first = 16, int second = 16) {
    _tile_storeconfig(before_);
    alignas(64) Configuration ours{};
    ours.palette = 1;
    for (int i = 0; i < 8; ++i) ours.row_bytes[i] = 64, ours.rows[i] = 16;
    for (int i : {0, 1, 4}) ours.rows[i] = static_cast<std::uint8_t>(first);
    for (int i : {2, 3, 5}) ours.rows[i] = static_cast<std::uint8_t>(second);
    __asm__ volatile("" ::"r"(&ours) : "memory");
    _tile_loadconfig(&ours);
  }
  AMX_TARGET ~Tiles() {
    if (before_[0] != 0)
      _tile_loadconfig(before_);
    else
      _tile_release();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct Configuration {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
  };
  alignas(64) char before_[64];
};

// C [32, 32], fp32 rows of c_stride numbers, = or += the sum over k of A(k) B(k): factors of 2 x 2 tiles, of
// which the second lies left_next or right_next numbers after the first, and those of k + 1 left_k and right_k.
AMX_INLINE void product(float* c, long c_stride, const bf16* left, long left_next, long left_k, const bf16* right,
                        long right_next, long right_k, long count, bool add) {
  const long bytes = c_stride * 4;
  // The loads of tiles are invisible to GCC: what they read has to be in memory.
  __asm__ volatile("" ::: "memory");
  if (add) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + 16, bytes);
    _tile_loadd(2, c + 16 * c_stride, bytes);
    _tile_loadd(3, c + 16 * c_stride + 16, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long k = 0; k < count; ++k) {
    _tile_loadd(4, left + k * left_k, 64);
    _tile_loadd(6, right + k * right_k, 64);
    _tile_loadd(7, right + k * right_k + right_next, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, left + k * left_k + left_next, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + 16, bytes);
  _tile_stored(2, c + 16 * c_stride, bytes);
  _tile_stored(3, c + 16 * c_stride + 16, bytes);
  __asm__ volatile("" ::: "memory");
}

}  // namespace amx

#endif
