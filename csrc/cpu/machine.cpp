#include "cpu/machine.h"

#include <algorithm>

#include "cpu/fault.h"

namespace k2 {
namespace {

// For one tile of tokens a chunk's weights are read once: the longer the stream, the less its beginning costs. For
// more they stay in a core's L2 while the tokens pass by, as many as fit, since the tokens come from a farther cache.
constexpr ptrdiff_t kFewTokensChunkBytes = 1536 << 10;
constexpr ptrdiff_t kChunkBytes = 384 << 10;
constexpr int kFewTokens = 8;
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

}  // namespace

Machine::Machine(int threads, const std::string& isa, const std::vector<int>& cpus,
                 const std::vector<int>& groups)
    : kernels_(PickKernels(isa)), pool_(threads, cpus, groups) {}

void Machine::Linear(const Activations& x, const Weights& w, float* y) {
  if (x.tokens == 0 || w.rows == 0) return;
  const ptrdiff_t row_bytes = w.columns * w.ElementBytes();
  const ptrdiff_t chunk_bytes = x.tokens <= kFewTokens ? kFewTokensChunkBytes : kChunkBytes;
  const int fit = static_cast<int>(std::max<ptrdiff_t>(2, chunk_bytes / std::max<ptrdiff_t>(1, row_bytes)));
  const int fair = std::max(2, w.rows * w.heads / (8 * pool_.threads()));
  const int rows = std::min(std::min(fit, fair) & ~1, w.rows + 1);
  LinearCall call{kernels_, x, w, y, rows, (w.rows + rows - 1) / rows};
  Job job;
  job.Reset(&call, {{RunLinear, call.chunks_per_head * w.heads}});
  pool_.Run(&job);
  RequireReadable(w);
}

void Machine::LinearTransposed(const Activations& x, const Weights& w, float* y) {
  LinearCall call{kernels_, x, w, y, w.rows, 1};
  Job job;
  job.Reset(&call, {{RunTransposed, x.tokens == 0 ? 0 : w.heads}});
  pool_.Run(&job);
  RequireReadable(w);
}

}  // namespace k2
