#include "elementwise.hpp"

#include <cstdlib>
#include <vector>

#include "amx.hpp"
#include "buffer.hpp"

namespace {

constexpr long kRows = 32;  // of a task

}  // namespace

#if defined(HAVE_AMX)

namespace {

using namespace amx;

// Sources: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4; Shazeer, "GLU Variants
// Improve Transformer" (2020), section 2.
AMX_TARGET void norm_row(long width, float epsilon, const bf16* x, const bf16* weight, bf16* y, float* scale) {
  __m512 even = _mm512_setzero_ps(), odd = even;
  for (long i = 0; i < width; i += 32) {
    const __m512 a = load(x + i), b = load(x + i + 16);
    even = _mm512_fmadd_ps(a, a, even), odd = _mm512_fmadd_ps(b, b, odd);
  }
  const float mean = _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) / static_cast<float>(width);
  *scale = 1.0f / __builtin_sqrtf(mean + epsilon);
  const __m512 factor = _mm512_set1_ps(*scale);
  for (long i = 0; i < width; i += 32)
    store(y + i, _mm512_mul_ps(_mm512_mul_ps(load(x + i), factor), load(weight + i)),
          _mm512_mul_ps(_mm512_mul_ps(load(x + i + 16), factor), load(weight + i + 16)));
}

AMX_TARGET void norm_row_backward(long width, const bf16* x, const bf16* weight, float scale, const bf16* to_y,
                                  bf16* to_x, float* to_weight) {
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 sum = _mm512_setzero_ps();
  for (long i = 0; i < width; i += 16) {
    const __m512 gradient_normed = _mm512_mul_ps(load(to_y + i), _mm512_mul_ps(load(x + i), factor));
    _mm512_storeu_ps(to_weight + i, _mm512_add_ps(_mm512_loadu_ps(to_weight + i), gradient_normed));
    sum = _mm512_fmadd_ps(gradient_normed, load(weight + i), sum);
  }
  const __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / static_cast<float>(width));
  for (long i = 0; i < width; i += 32) {
    __m512 result[2];
    for (int t = 0; t < 2; ++t) {
      const __m512 normed = _mm512_mul_ps(load(x + i + t * 16), factor);
      const __m512 inward = _mm512_mul_ps(load(to_y + i + t * 16), load(weight + i + t * 16));
      result[t] = _mm512_mul_ps(_mm512_fnmadd_ps(normed, along, inward), factor);
    }
    store(to_x + i, result[0], result[1]);
  }
}

AMX_TARGET void add_rows(long rows, long width, const float* from, bf16* to) {
  for (long i = 0; i < width; i += 16) {
    __m512 sum = _mm512_setzero_ps();
    for (long r = 0; r < rows; ++r) sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + r * width + i));
    store(to + i, sum);
  }
}

AMX_INLINE __m512 sigmoid(__m512 x) {
  const __m512 power = amx::exp2(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
  return _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_add_ps(power, _mm512_set1_ps(1.0f)));
}

AMX_TARGET void swiglu_row(long width, const bf16* gate_and_up, bf16* y) {
  for (long i = 0; i < width; i += 32) {
    __m512 result[2];
    for (int t = 0; t < 2; ++t) {
      const __m512 gate = load(gate_and_up + i + t * 16), up = load(gate_and_up + width + i + t * 16);
      result[t] = _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up);
    }
    store(y + i, result[0], result[1]);
  }
}

AMX_TARGET void swiglu_row_backward(long width, const bf16* gate_and_up, const bf16* to_y, bf16* result) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (long i = 0; i < width; i += 32) {
    __m512 to_gate[2], to_up[2];
    for (int t = 0; t < 2; ++t) {
      const __m512 gate = load(gate_and_up + i + t * 16), up = load(gate_and_up + width + i + t * 16);
      const __m512 gradient = load(to_y + i + t * 16), part = sigmoid(gate);
      to_up[t] = _mm512_mul_ps(gradient, _mm512_mul_ps(gate, part));
      const __m512 slope = _mm512_mul_ps(part, _mm512_fmadd_ps(gate, _mm512_sub_ps(one, part), one));
      to_gate[t] = _mm512_mul_ps(_mm512_mul_ps(gradient, up), slope);
    }
    store(result + i, to_gate[0], to_gate[1]);
    store(result + width + i, to_up[0], to_up[1]);
  }
}

// Calls body(task, first row, end of rows) for tasks of kRows rows.
template <typename Body>
void over_rows(const Team& team, long rows, const Body& body) {
  team.run((rows + kRows - 1) / kRows, [&](int, auto next) {
    for (long task; (task = next()) >= 0;)
      body(task, task * kRows, (task + 1) * kRows < rows ? (task + 1) * kRows : rows);
  });
}

}  // namespace

void rms_norm_forward(const Team& team, long rows, long width, float epsilon, const bf16* x, const bf16* weight,
                      bf16* y, float* scale) {
  over_rows(team, rows, [&](long, long first, long end) {
    for (long r = first; r < end; ++r) norm_row(width, epsilon, x + r * width, weight, y + r * width, scale + r);
  });
}

void rms_norm_backward(const Team& team, long rows, long width, const bf16* x, const bf16* weight,
                       const float* scale, const bf16* to_y, bf16* to_x, bf16* to_weight) {
  // One sum for each task, added up in their order: the same bits whatever the number of threads.
  const long tasks = (rows + kRows - 1) / kRows;
  const Buffer<float> sums(tasks * width);
  over_rows(team, rows, [&](long task, long first, long end) {
    float* sum = sums.data() + task * width;
    for (long i = 0; i < width; ++i) sum[i] = 0.0f;
    for (long r = first; r < end; ++r)
      norm_row_backward(width, x + r * width, weight, scale[r], to_y + r * width, to_x + r * width, sum);
  });
  add_rows(tasks, width, sums.data(), to_weight);
}

void swiglu_forward(const Team& team, long rows, long width, const bf16* gate_and_up, bf16* y) {
  over_rows(team, rows, [&](long, long first, long end) {
    for (long r = first; r < end; ++r) swiglu_row(width, gate_and_up + r * 2 * width, y + r * width);
  });
}

void swiglu_backward(const Team& team, long rows, long width, const bf16* gate_and_up, const bf16* to_y,
                     bf16* to_gate_and_up) {
  over_rows(team, rows, [&](long, long first, long end) {
    for (long r = first; r < end; ++r)
      swiglu_row_backward(width, gate_and_up + r * 2 * width, to_y + r * width, to_gate_and_up + r * 2 * width);
  });
}

#else

// has_amx() is false here, and nobody calls these.
void rms_norm_forward(const Team&, long, long, float, const std::uint16_t*, const std::uint16_t*, std::uint16_t*,
                      float*) {
  std::abort();
}
void rms_norm_backward(const Team&, long, long, const std::uint16_t*, const std::uint16_t*, const float*,
                       const std::uint16_t*, std::uint16_t*, std::uint16_t*) {
  std::abort();
}
void swiglu_forward(const Team&, long, long, const std::uint16_t*, std::uint16_t*) { std::abort(); }
void swiglu_backward(const Team&, long, long, const std::uint16_t*, const std::uint16_t*, std::uint16_t*) {
  std::abort();
}

#endif
