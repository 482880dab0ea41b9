// Between the projection of a layer and its attention: one pass over the new tokens.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "amx.hpp"
#include "paged_attention.hpp"

#if defined(HAVE_AMX)

namespace {

using namespace amx;

// Halves turned by the angles of one position (Su et al., "RoFormer" (2021), as Llama applies it).
AMX_INLINE void rotate(const bf16* from, long width, const float* cos, const float* sin, bf16* to) {
  const long half = width / 2;
  for (long i = 0; i < half; i += 16) {
    const __m512 first = load(from + i), second = load(from + half + i);
    const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
    store(to + i, _mm512_fnmadd_ps(second, s, _mm512_mul_ps(first, c)));
    store(to + half + i, _mm512_fmadd_ps(first, s, _mm512_mul_ps(second, c)));
  }
}

AMX_TARGET void rotate_token(const PagedShape& shape, const bf16* qkv, const float* cos, const float* sin,
                             std::int64_t slot, const Pool& pool, bf16* query) {
  const long d = shape.width, share = shape.heads / shape.groups;
  for (long g = 0; g < shape.groups; ++g) {
    for (long n = 0; n < share; ++n, qkv += d, query += d) rotate(qkv, d, cos, sin, query);
    if (slot >= 0) {
      const long at = ((slot / shape.block * shape.groups + g) * shape.block + slot % shape.block) * d;
      rotate(qkv, d, cos, sin, pool.keys + at);
      std::memcpy(pool.values + at, qkv + d, d * sizeof(bf16));
    }
    qkv += 2 * d;
  }
}

}  // namespace

void rotate_and_store(const Team& team, const PagedShape& shape, long tokens, const bf16* qkv,
                      const AngleTable& angles, const std::int64_t* positions, const std::int64_t* slots,
                      const Pool& pool, bf16* query) {
  for (long t = 0; t < tokens; ++t) {
    if (slots[t] >= pool.blocks * shape.block) throw std::invalid_argument("a slot is not in the pool");
    if (positions[t] < 0 || positions[t] >= angles.positions)
      throw std::invalid_argument("a position is not in the table of angles");
  }
  const long width = (shape.heads + 2 * shape.groups) * shape.width;
  const long share =
      width > 32768 ? 1 : 32768 / width;  // tokens of a task: fewer are not worth a second thread
  team.run((tokens + share - 1) / share, [&](int, auto next) {
    for (long task; (task = next()) >= 0;)
      for (long t = task * share; t < tokens && t < (task + 1) * share; ++t) {
        const long at = positions[t] * (shape.width / 2);
        rotate_token(shape, qkv + t * width, angles.cos + at, angles.sin + at, slots[t], pool,
                     query + t * shape.heads * shape.width);
      }
  });
}

#else

void rotate_and_store(const Team&, const PagedShape&, long, const std::uint16_t*, const AngleTable&,
                      const std::int64_t*, const std::int64_t*, const Pool&, std::uint16_t*) {
  std::abort();  // has_amx() is false
}

#endif
