// What every computation on the CPU is handed: the picked kernels and the pool that runs them. No singletons.
#pragma once

#include <string>
#include <vector>

#include "cpu/pool.h"
#include "kernels/table.h"

namespace k2 {

// bf16 activations: element (t, h, k) at data[t * token_stride + h * head_stride + k].
struct Activations {
  const bf16* data;
  int tokens;
  ptrdiff_t token_stride;
  ptrdiff_t head_stride = 0;
};

enum class WeightKind { kBf16, kInt8, kE4m3 };

// Weights: element (h, row, column) is number h * head_stride + row * row_stride + column of `data`. Those of a byte
// have one head, and count times scale[row].
struct Weights {
  const void* data;
  int rows;
  int columns;
  ptrdiff_t row_stride;
  int heads = 1;
  ptrdiff_t head_stride = 0;
  WeightKind kind = WeightKind::kBf16;
  const float* scale = nullptr;

  ptrdiff_t ElementBytes() const { return kind == WeightKind::kBf16 ? 2 : 1; }
};

// Latent rows in pages of kAttendPage: row t of a sequence lies in page table[t / kAttendPage].
struct LatentRows {
  const uint8_t* base;
  int64_t pages;
  ptrdiff_t row_bytes;
  int latent;
  int rope;
  bool fp8;  // else bf16
};

// `count` queries of one sequence; query i sees the rows 0 .. start + i.
struct AttendSpan {
  const int64_t* table;
  int start;
  int count;
};

class Machine {
 public:
  // Worker i runs on cpus[i] and belongs to groups[i]; see Pool.
  Machine(int threads, const std::string& isa, const std::vector<int>& cpus,
          const std::vector<int>& groups = {});

  const KernelTable& kernels() const { return kernels_; }
  Pool& pool() { return pool_; }

  // y[t, h, r] = w[h, r, :] . x[t, h, :], fp32, y contiguous. A row of x gives the same bits in any company.
  // Throws if the weights lie in a map that can no longer be read.
  void Linear(const Activations& x, const Weights& w, float* y);

  // y[t, h, c] = sum_r x[t, h, r] * w[h, r, c], fp32, y contiguous, of bf16 weights.
  void LinearTransposed(const Activations& x, const Weights& w, float* y);

  // out[i, h, :] = softmax over the rows that query i sees of (scale * q[i, h, :] . row) . its latent part, fp32;
  // q bf16 [queries, heads, latent + rope], the spans' queries one after the other. What a query gets depends on its
  // own context alone.
  void Attend(const LatentRows& rows, const std::vector<AttendSpan>& spans, const bf16* q, int heads,
              float scale, float* out);

  // Nanoseconds in Attend since the start: what grows with the context, for who measures the rest.
  int64_t attend_ns() const { return attend_ns_; }

 private:
  const KernelTable& kernels_;
  Pool pool_;
  int64_t attend_ns_ = 0;
  std::vector<float> attend_sums_;                  // of stretches, kept for the next call
  std::vector<std::vector<float>> attend_scratch_;  // one per worker
};

}  // namespace k2
