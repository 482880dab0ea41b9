// Sources: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention"
// (2023), the cache; Dao et al., "Flash-Decoding for long-context inference" (2023), keys split among threads
// and merged by their log-sum-exp; Athiwaratkun et al., "Bifurcated Attention" (2024), keys that many rows
// share read once.
#include "paged_attention.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "paged_attention_task.hpp"

#if defined(HAVE_AMX)

namespace {

using namespace amx;

constexpr long kMergeRows = 16;  // of a task

long merges_of(long tokens) { return (tokens + kMergeRows - 1) / kMergeRows; }

// Tasks are in the order of their groups, so that merging can begin while others are computed.
Place place_of(const Plan& plan, long task) {
  const long items = static_cast<long>(plan.items.size());
  const Plan::Item& item = plan.items[task % items];
  return {&item, task / items, std::max(0L, item.split)};
}

// Folds a result into another, as `fold` does with tiles.
template <int D>
AMX_INLINE void fold_result(__m512* sums, __m512& most, __m512& total, const __m512* added, __m512 most_added,
                            __m512 total_added) {
  const Weights w = weigh(most, total, most_added, total_added);
  for (int i = 0; i < D / 16; ++i)
    sums[i] = _mm512_fmadd_ps(added[i], w.added, _mm512_mul_ps(sums[i], w.old));
}

template <int D>
AMX_TARGET void merge_head(const Call<D>& call, long row, long group, long n) {
  __m512 sums[D / 16], most = _mm512_set1_ps(kNone), total = _mm512_setzero_ps();
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (long i = call.plan.seen_first[row]; i < call.plan.seen_first[row + 1]; ++i) {
    const auto [piece, place] = call.plan.seen[i];
    __m512 part[D / 16], part_most = _mm512_set1_ps(kNone), part_total = _mm512_setzero_ps();
    for (auto& sum : part) sum = _mm512_setzero_ps();
    for (long split = 0; split < call.plan.partials[piece]; ++split) {
      const float* from = call.result(group, piece, split, place * call.share + n);
      __m512 added[D / 16];
      for (int d = 0; d < D / 16; ++d) added[d] = _mm512_load_ps(from + d * 16);
      fold_result<D>(part, part_most, part_total, added, _mm512_set1_ps(from[D]),
                     _mm512_set1_ps(from[D + 1]));
    }
    fold_result<D>(sums, most, total, part, part_most, part_total);
  }
  const __mmask16 any = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_GT_OQ);
  const __m512 inverse = _mm512_maskz_div_ps(any, _mm512_set1_ps(1.0f), total);
  bf16* to = call.output + (row * call.shape.heads + group * call.share + n) * D;
  for (int i = 0; i < D / 16; i += 2)
    store(to + i * 16, _mm512_mul_ps(sums[i], inverse), _mm512_mul_ps(sums[i + 1], inverse));
}

// What one thread does: tasks `next()` of all groups, then the merging of all groups by kMergeRows rows.
// Merging waits for the group's tasks. They come before it, so threads have them all, and none of those
// waits.
template <int D, typename Next>
AMX_TARGET void work(const Call<D>& call, long tokens, Next next, std::atomic<long>* done,
                     Worker<D>& worker) {
  const Tiles configured;
  const long items = static_cast<long>(call.plan.items.size());
  const long computed = call.shape.groups * items, merges = merges_of(tokens);
  long task = next();
  while (task >= 0 && task < computed) {
    const Plan::Item& item = call.plan.items[task % items];
    // The next task is taken early, to fetch what it needs, unless it could wait long for this one.
    const bool early = item.end - item.column <= 32 * kFewTiles;
    const long after = early ? next() : -1;
    Place to_come{nullptr, 0, 0};
    if (after >= 0 && after < computed) to_come = place_of(call.plan, after);
    run_item<D>(call, place_of(call.plan, task), to_come, worker);
    done[task / items].fetch_add(1, std::memory_order_release);
    task = early ? after : next();
  }
  for (; task >= 0; task = next()) {
    const long group = (task - computed) / merges, row = (task - computed) % merges * kMergeRows;
    while (done[group].load(std::memory_order_acquire) < items) std::this_thread::yield();
    for (long r = row; r < std::min(tokens, row + kMergeRows); ++r)
      for (long n = 0; n < call.share; ++n) merge_head<D>(call, r, group, n);
  }
}

template <int D>
void attention(const Team& team, const PagedShape& shape, long tokens, const bf16* query,
               const std::int64_t* positions, const Pool& pool, const Pieces& pieces, const Plan& plan,
               bf16* output) {
  const Buffer<float> results(shape.groups * plan.results * kResult<D>);
  const Call<D> call{shape, query, positions, pool, pieces, plan, output, results.data()};
  const long tasks = shape.groups * (static_cast<long>(plan.items.size()) + merges_of(tokens));
  std::vector<Worker<D>> workers(team.workers(tasks));
  std::vector<std::atomic<long>> done(shape.groups);
  for (auto& each : done) each.store(0, std::memory_order_relaxed);
  team.run(tasks, [&](int worker, auto next) { work<D>(call, tokens, next, done.data(), workers[worker]); });
}

}  // namespace

void paged_attention(const Team& team, const PagedShape& shape, long tokens, const bf16* query,
                     const std::int64_t* positions, const Pool& pool, const Pieces& pieces, bf16* output) {
  if (tokens == 0) return;
  const Plan plan(shape, tokens, pool, pieces, team.workers(1024));
  const auto compute = shape.width == 32 ? attention<32> : shape.width == 64 ? attention<64> : attention<128>;
  compute(team, shape, tokens, query, positions, pool, pieces, plan, output);
}

#else

void paged_attention(const Team&, const PagedShape&, long, const std::uint16_t*, const std::int64_t*,
                     const Pool&, const Pieces&, std::uint16_t*) {
  std::abort();  // has_amx() is false
}

#endif
