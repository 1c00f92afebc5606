#include "experts/slots.h"

#include <algorithm>
#include <cstring>

#include "base.h"

namespace k2 {
namespace {

constexpr char kMagic[8] = {'k', '2', 's', 'l', 'o', 't', 's', '1'};
constexpr size_t kDigestBytes = 64;

bool Covers(const std::vector<int>& bounds, int rows) {
  return bounds.size() >= 2 && bounds.front() == 0 && bounds.back() == rows &&
         std::is_sorted(bounds.begin(), bounds.end());
}

}  // namespace

SlotLayout::SlotLayout(const ExpertSizes& sizes, const RowShards& shards) : sizes_(sizes), shards_(shards) {
  Require(shards.gate.size() == shards.down.size() && shards.nodes() >= 1 && shards.nodes() <= kMaxNodes,
          "experts are dealt over 1 to 16 nodes");
  Require(Covers(shards.gate, sizes.inter) && Covers(shards.down, sizes.hidden),
          "the nodes' rows must be all rows of the experts, in order");
  for (int node = 0; node < nodes(); ++node) {
    std::array<Segment, 6> segments;
    size_t at = 0;
    for (int part = 0; part < 6; ++part) {
      const int matrix = part % 3;
      const std::vector<int>& bounds = matrix == 2 ? shards.down : shards.gate;
      const uint64_t row =
          static_cast<uint64_t>(part < 3 ? columns(matrix) / 2 : columns(matrix) / kGroup * 2);
      segments[part] = {row * static_cast<uint64_t>(bounds[node]),
                        row * static_cast<uint64_t>(bounds[node + 1] - bounds[node]), at};
      at += BlockCeil(segments[part].bytes) + kBlock4k;
    }
    segments_.push_back(segments);
    slot_bytes_.push_back(at);
  }
}

void SlotLayout::ViewWhole(const ExpertBytes& bytes, ExpertView* view) const {
  std::array<Int4Matrix, kMaxNodes>* const matrices[] = {&view->gate, &view->up, &view->down};
  for (int node = 0; node < nodes(); ++node)
    for (int m = 0; m < 3; ++m) {
      const std::vector<int>& bounds = m == 2 ? shards_.down : shards_.gate;
      const Int4Matrix whole{bytes.packed[m], bytes.scale[m], bounds.back(), columns(m)};
      (*matrices[m])[node] = {whole.PackedRow(bounds[node]), whole.ScaleRow(bounds[node]),
                              bounds[node + 1] - bounds[node], columns(m)};
    }
}

void SlotLayout::ViewSlot(const ExpertSpans& spans, uint8_t* const* base, ExpertView* view) const {
  std::array<Int4Matrix, kMaxNodes>* const matrices[] = {&view->gate, &view->up, &view->down};
  for (int node = 0; node < nodes(); ++node)
    for (int m = 0; m < 3; ++m) {
      const std::vector<int>& bounds = m == 2 ? shards_.down : shards_.gate;
      const auto place = [&](const ExpertSpans::Span& span, const Segment& segment) {
        return base[node] + segment.at + (span.offset + segment.skip) % kBlock4k;
      };
      (*matrices[m])[node] = {place(spans.packed[m], segments_[node][m]),
                              reinterpret_cast<const bf16*>(place(spans.scale[m], segments_[node][m + 3])),
                              bounds[node + 1] - bounds[node], columns(m)};
    }
}

void SlotLayout::AddReads(const ExpertSpans& spans, const ExpertBytes& bytes,
                          const std::vector<std::unique_ptr<Source>>& sources, int node, uint8_t* base,
                          std::initializer_list<int> matrices, std::vector<Read>* to) const {
  const auto add = [&](const ExpertSpans::Span& span, const void* mapped, const Segment& segment) {
    if (segment.bytes == 0) return;
    const uint64_t begin = span.offset + segment.skip, first = BlockFloor(begin);
    to->push_back({sources[span.source].get(), first, BlockCeil(begin + segment.bytes) - first,
                   begin + segment.bytes - first, base + segment.at,
                   static_cast<const uint8_t*>(mapped) + segment.skip - (begin - first)});
  };
  for (const int m : matrices) {
    add(spans.packed[m], bytes.packed[m], segments_[node][m]);
    add(spans.scale[m], bytes.scale[m], segments_[node][m + 3]);
  }
}

SlotMemory::SlotMemory(const SlotLayout& layout, const Options& options)
    : layout_(layout), count_(options.count) {
  Require(count_ >= 1, "there must be a slot");
  Require(static_cast<int>(options.node_ids.size()) == layout.nodes(),
          "every shard needs its NUMA node, or -1");
  Require(options.digest.size() <= kDigestBytes, "a digest has 64 characters at most");
  const bool files = !options.folder.empty();
  char digest[kDigestBytes] = {};
  std::memcpy(digest, options.digest.data(), options.digest.size());
  bool same = files;
  std::vector<uint8_t*> headers;
  for (int node = 0; node < layout.nodes(); ++node) {
    const size_t slots = static_cast<size_t>(count_) * layout.slot_bytes(node);
    const size_t tail = files ? sizeof(kMagic) + kDigestBytes + static_cast<size_t>(count_) : 0;
    ArenaOptions arena{options.node_ids[node], ""};
    if (files)
      arena.file = options.folder + "/k2hybrid-experts-node" + std::to_string(node) + "of" +
                   std::to_string(layout.nodes());
    arenas_.push_back(std::make_unique<Arena>(slots + tail, arena));
    if (!files) continue;
    Require(arenas_.back()->Ensure(slots, tail), options.folder + " has no room left");
    headers.push_back(arenas_.back()->data() + slots);
    same = same && arenas_.back()->found() && std::memcmp(headers.back(), kMagic, sizeof(kMagic)) == 0 &&
           std::memcmp(headers.back() + sizeof(kMagic), digest, kDigestBytes) == 0;
  }
  if (!files) return;
  marks_ = headers.front() + sizeof(kMagic) + kDigestBytes;
  if (same) return;
  std::memset(marks_, 0,
              static_cast<size_t>(count_));  // before the digest, should the process end in between
  for (uint8_t* header : headers) {
    std::memcpy(header + sizeof(kMagic), digest, kDigestBytes);
    std::memcpy(header, kMagic, sizeof(kMagic));
  }
}

void SlotMemory::Mark(int slot, bool filled) {
  if (marks_ != nullptr) __atomic_store_n(marks_ + slot, filled ? 1 : 0, __ATOMIC_RELEASE);
}

}  // namespace k2
