#include "cpu/machine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <utility>

#include "cpu/fault.h"

namespace k2 {
namespace {

// For one tile of tokens a chunk's weights are read once: the longer the stream, the less its beginning costs. For
// more they stay in a core's L2 while the tokens pass by, as many as fit, since the tokens come from a farther cache.
constexpr ptrdiff_t kFewTokensChunkBytes = 1536 << 10;
constexpr ptrdiff_t kChunkBytes = 384 << 10;
constexpr int kFewTokens = 8;
// Few enough multiply-adds for one thread: microseconds with weights in a cache, about what it takes the pool to come
// together. Linears of large models are far above it.
constexpr int64_t kAloneOps = 1 << 19;
constexpr int kTokenTile = 64;

struct LinearCall {
  const KernelTable& kernels;
  const Activations& x;
  const Weights& w;
  float* y;
  int rows_per_chunk;
  int chunks_per_head;
};

void RunLinear(void* context, int chunk, int) {
  auto& call = *static_cast<LinearCall*>(context);
  const int head = chunk / call.chunks_per_head;
  const int row = chunk % call.chunks_per_head * call.rows_per_chunk;
  const int rows = std::min(call.rows_per_chunk, call.w.rows - row);
  const ptrdiff_t ldy = static_cast<ptrdiff_t>(call.w.heads) * call.w.rows;
  const ptrdiff_t at = head * call.w.head_stride + row * call.w.row_stride;
  const int in = call.w.columns;
  for (int t = 0; t < call.x.tokens; t += kTokenTile) {
    const int tokens = std::min(kTokenTile, call.x.tokens - t);
    const bf16* x[kTokenTile];
    for (int i = 0; i < tokens; ++i)
      x[i] = call.x.data + (t + i) * call.x.token_stride + head * call.x.head_stride;
    float* const y = call.y + t * ldy + static_cast<ptrdiff_t>(head) * call.w.rows + row;
    const void* const w = static_cast<const char*>(call.w.data) + at * call.w.ElementBytes();
    const ptrdiff_t ldw = call.w.row_stride;
    switch (call.w.kind) {
      case WeightKind::kBf16:
        call.kernels.dense_rows(static_cast<const bf16*>(w), ldw, in, rows, x, tokens, y, ldy);
        break;
      case WeightKind::kInt8:
        call.kernels.int8_rows(static_cast<const int8_t*>(w), call.w.scale + row, ldw, in, rows, x, tokens, y,
                               ldy);
        break;
      case WeightKind::kE4m3:
        call.kernels.e4m3_rows(static_cast<const E4m3*>(w), call.w.scale + row, ldw, in, rows, x, tokens, y,
                               ldy);
        break;
    }
  }
}

void RunTransposed(void* context, int head, int) {
  auto& call = *static_cast<LinearCall*>(context);
  const ptrdiff_t ldy = static_cast<ptrdiff_t>(call.w.heads) * call.w.columns;
  for (int t = 0; t < call.x.tokens; ++t)
    call.kernels.dense_columns(static_cast<const bf16*>(call.w.data) + head * call.w.head_stride,
                               call.w.row_stride, call.w.rows, call.w.columns,
                               call.x.data + t * call.x.token_stride + head * call.x.head_stride,
                               call.y + t * ldy + static_cast<ptrdiff_t>(head) * call.w.columns);
}

// After they were read.
void RequireReadable(const Weights& w) {
  if (w.rows == 0 || w.heads == 0) return;
  const ptrdiff_t last = (w.heads - 1) * w.head_stride + (w.rows - 1) * w.row_stride + w.columns;
  Require(!FileMaps::Failed(w.data, static_cast<size_t>(last * w.ElementBytes())),
          "weights could not be read: their file shrank or its disk failed; put the whole file back in its "
          "place");
}

// A query's context is cut into stretches that threads take one by one: whole pages, as many as blocks of a cache's
// size make, but no more than kMostStretches, whose sums must be kept until they meet.
constexpr int kMostStretches = 64;
constexpr int kHeadGroup = 32;    // heads that one thread takes at a time
constexpr int kSumsAtOnce = 512;  // stretches of one job: 67 MB of sums at 64 heads of 512 values

int StretchRows(int context) {
  const int even = (context + kMostStretches - 1) / kMostStretches;
  return std::max(kAttendRows, (even + kAttendPage - 1) / kAttendPage * kAttendPage);
}

struct Stretch {
  const int64_t* table;
  int query;
  int begin;  // rows
  int end;
};

struct AttendCall {
  const KernelTable& kernels;
  const LatentRows& rows;
  const bf16* q;
  int heads;
  float scale;
  float* out;
  std::vector<Stretch> stretches;
  std::vector<std::pair<int, int>> queries;  // the first stretch of each, and one past the last
  float* sums;                               // of each stretch: peaks, totals [heads], out [heads][latent]
  std::vector<std::vector<float>>& scratch;

  int groups() const { return (heads + kHeadGroup - 1) / kHeadGroup; }
  ptrdiff_t sum_floats() const { return static_cast<ptrdiff_t>(heads) * (2 + rows.latent); }
  AttendSums SumsOf(int stretch, int head) const {
    float* base = sums + stretch * sum_floats();
    return {base + head, base + heads + head, base + 2 * heads + static_cast<ptrdiff_t>(head) * rows.latent};
  }
};

void RunStretch(void* context, int chunk, int worker) {
  auto& call = *static_cast<AttendCall*>(context);
  const int number = chunk / call.groups(), head = chunk % call.groups() * kHeadGroup;
  const Stretch& stretch = call.stretches[number];
  const LatentRows& rows = call.rows;
  const int width = rows.latent + rows.rope, heads = std::min(kHeadGroup, call.heads - head);
  const bf16* q[kHeadGroup];
  for (int h = 0; h < heads; ++h)
    q[h] = call.q + (static_cast<ptrdiff_t>(stretch.query) * call.heads + head + h) * width;
  const AttendSums sums = call.SumsOf(number, head);
  std::fill(sums.peak, sums.peak + heads, -std::numeric_limits<float>::infinity());
  std::fill(sums.total, sums.total + heads, 0.0f);
  std::fill(sums.out, sums.out + static_cast<ptrdiff_t>(heads) * rows.latent, 0.0f);
  float* scores = call.scratch[worker].data();
  auto* decoded = reinterpret_cast<bf16*>(scores + kHeadGroup * kAttendRows);
  for (int begin = stretch.begin; begin < stretch.end; begin += kAttendRows) {
    const int count = std::min(kAttendRows, stretch.end - begin);
    const bf16* pages[kAttendRows / kAttendPage];
    for (int at = 0; at < count; at += kAttendPage) {
      const int64_t page = stretch.table[(begin + at) / kAttendPage];
      const uint8_t* stored = rows.base + page * kAttendPage * rows.row_bytes;
      if (rows.fp8) {
        bf16* here = decoded + static_cast<ptrdiff_t>(at) * width;
        call.kernels.decode_rows(stored, rows.row_bytes, std::min(kAttendPage, count - at), rows.latent,
                                 rows.rope, here);
        pages[at / kAttendPage] = here;
      } else {
        pages[at / kAttendPage] = reinterpret_cast<const bf16*>(stored);
      }
    }
    call.kernels.attend({q, heads, pages, count, rows.latent, rows.rope, call.scale}, scores, sums);
  }
}

// Brings the sums of a query's stretches together, in their order.
void RunMeet(void* context, int chunk, int) {
  auto& call = *static_cast<AttendCall*>(context);
  const auto [first, last] = call.queries[chunk / call.groups()];
  const int latent = call.rows.latent;
  const int begin = chunk % call.groups() * kHeadGroup, end = std::min(call.heads, begin + kHeadGroup);
  for (int head = begin; head < end; ++head) {
    float peak = *call.SumsOf(first, head).peak, total = 0.0f;
    for (int s = first + 1; s < last; ++s) peak = std::max(peak, *call.SumsOf(s, head).peak);
    float* out =
        call.out + (static_cast<ptrdiff_t>(call.stretches[first].query) * call.heads + head) * latent;
    std::fill(out, out + latent, 0.0f);
    for (int s = first; s < last; ++s) {
      const AttendSums sums = call.SumsOf(s, head);
      const float fade = std::exp(*sums.peak - peak);
      total += *sums.total * fade;
      for (int i = 0; i < latent; ++i) out[i] += sums.out[i] * fade;
    }
    for (int i = 0; i < latent; ++i) out[i] /= total;
  }
}

}  // namespace

Machine::Machine(int threads, const std::string& isa, const std::vector<int>& cpus,
                 const std::vector<int>& groups)
    : kernels_(PickKernels(isa)), pool_(threads, cpus, groups), attend_scratch_(pool_.threads()) {}

void Machine::Linear(const Activations& x, const Weights& w, float* y) {
  if (x.tokens == 0 || w.rows == 0) return;
  const ptrdiff_t row_bytes = w.columns * w.ElementBytes();
  const ptrdiff_t chunk_bytes = x.tokens <= kFewTokens ? kFewTokensChunkBytes : kChunkBytes;
  const int fit = static_cast<int>(std::max<ptrdiff_t>(2, chunk_bytes / std::max<ptrdiff_t>(1, row_bytes)));
  const int fair = std::max(2, w.rows * w.heads / (8 * pool_.threads()));
  const int rows = std::min(std::min(fit, fair) & ~1, w.rows + 1);
  LinearCall call{kernels_, x, w, y, rows, (w.rows + rows - 1) / rows};
  const int chunks = call.chunks_per_head * w.heads;
  if (static_cast<int64_t>(w.rows) * w.heads * w.columns * x.tokens <= kAloneOps) {
    for (int chunk = 0; chunk < chunks; ++chunk) RunLinear(&call, chunk, 0);
  } else {
    Job job;
    job.Reset(&call, {{RunLinear, chunks}});
    pool_.Run(&job);
  }
  RequireReadable(w);
}

void Machine::LinearTransposed(const Activations& x, const Weights& w, float* y) {
  LinearCall call{kernels_, x, w, y, w.rows, 1};
  Job job;
  job.Reset(&call, {{RunTransposed, x.tokens == 0 ? 0 : w.heads}});
  pool_.Run(&job);
  RequireReadable(w);
}

void Machine::Attend(const LatentRows& rows, const std::vector<AttendSpan>& spans, const bf16* q, int heads,
                     float scale, float* out) {
  const auto began = std::chrono::steady_clock::now();
  Require(rows.latent % 16 == 0 && rows.latent > 0 && rows.rope >= 0 && heads > 0,
          "attention takes a latent of a multiple of 16 values");
  const size_t scratch =
      kHeadGroup * kAttendRows + (rows.fp8 ? kAttendRows * (rows.latent + rows.rope) / 2 + 1 : 0);
  for (auto& each : attend_scratch_)
    if (each.size() < scratch) each.resize(scratch);
  AttendCall call{kernels_, rows, q, heads, scale, out, {}, {}, nullptr, attend_scratch_};
  const auto run = [&] {
    const size_t floats = call.stretches.size() * static_cast<size_t>(call.sum_floats());
    if (attend_sums_.size() < floats) attend_sums_.resize(floats);
    call.sums = attend_sums_.data();
    Job job;
    job.Reset(&call, {{RunStretch, static_cast<int>(call.stretches.size()) * call.groups()},
                      {RunMeet, static_cast<int>(call.queries.size()) * call.groups()}});
    pool_.Run(&job);
    call.stretches.clear();
    call.queries.clear();
  };
  int query = 0;
  for (const AttendSpan& span : spans) {
    for (int i = 0; i < (span.start + span.count + kAttendPage - 1) / kAttendPage; ++i)
      Require(span.table[i] >= 0 && span.table[i] < rows.pages,
              "a page table names a page that is not there");
    for (int i = 0; i < span.count; ++i, ++query) {
      const int context = span.start + i + 1, step = StretchRows(context);
      const int first = static_cast<int>(call.stretches.size());
      for (int begin = 0; begin < context; begin += step)
        call.stretches.push_back({span.table, query, begin, std::min(context, begin + step)});
      call.queries.emplace_back(first, static_cast<int>(call.stretches.size()));
      if (call.stretches.size() >= kSumsAtOnce) run();
    }
  }
  if (!call.stretches.empty()) run();
  attend_ns_ += std::chrono::nanoseconds(std::chrono::steady_clock::now() - began).count();
}

}  // namespace k2
