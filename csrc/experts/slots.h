// What a slot looks like: room for one expert, dealt by output rows over the nodes, filled by direct reads.
//
// On each node a slot has six segments: the packed rows and the scales of gate, up and down that fall to the node. A
// direct read brings whole blocks, so a segment lies at its file offset's place within a block and has a block of room
// more than it needs. The bytes are those of the file: nothing is repacked.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "cpu/arena.h"
#include "cpu/pool.h"
#include "io/reader.h"
#include "kernels/layout.h"

namespace k2 {

struct ExpertSizes {
  int layers;
  int experts;
  int hidden;
  int inter;
};

// Output rows by node: node n has rows [gate[n], gate[n + 1]) of gate and up, and [down[n], down[n + 1]) of down.
struct RowShards {
  std::vector<int> gate;
  std::vector<int> down;
  int nodes() const { return static_cast<int>(gate.size()) - 1; }
};

// The rows of one expert that each node reads, wherever they lie. A matrix begins with its node's first row.
struct ExpertView {
  std::array<Int4Matrix, kMaxNodes> gate;  // [gate rows of the node, hidden]
  std::array<Int4Matrix, kMaxNodes> up;
  std::array<Int4Matrix, kMaxNodes> down;  // [down rows of the node, inter]
};

struct MemorySpan {
  const void* begin;
  size_t bytes;
};

// Where an expert's bytes are, in memory: gate, up, down.
struct ExpertBytes {
  const uint8_t* packed[3] = {};
  const bf16* scale[3] = {};
};

// Where they are in files; `source` is an index.
struct ExpertSpans {
  struct Span {
    int source = -1;
    uint64_t offset = 0;
  };
  Span packed[3];
  Span scale[3];
  bool known() const { return packed[0].source >= 0; }
};

class SlotLayout {
 public:
  // Throws Error if the shards do not cover the rows.
  SlotLayout(const ExpertSizes& sizes, const RowShards& shards);

  int nodes() const { return shards_.nodes(); }
  const RowShards& shards() const { return shards_; }
  size_t slot_bytes(int node) const { return slot_bytes_[node]; }

  // Rows of each node in the bytes of a whole expert.
  void ViewWhole(const ExpertBytes& bytes, ExpertView* view) const;
  // In a slot; `base` is its first byte on each node.
  void ViewSlot(const ExpertSpans& spans, uint8_t* const* base, ExpertView* view) const;
  // What fills the given matrices of a slot on one node (0: gate, 1: up, 2: down): two reads each.
  void AddReads(const ExpertSpans& spans, const ExpertBytes& bytes,
                const std::vector<std::unique_ptr<Source>>& sources, int node, uint8_t* base,
                std::initializer_list<int> matrices, std::vector<Read>* to) const;

 private:
  struct Segment {
    uint64_t skip;   // bytes of the tensor before the node's rows
    uint64_t bytes;  // of the node's rows
    size_t at;       // in the slot
  };
  int columns(int matrix) const { return matrix == 2 ? sizes_.inter : sizes_.hidden; }

  const ExpertSizes sizes_;
  const RowShards shards_;
  std::vector<std::array<Segment, 6>> segments_;  // by node: packed of gate, up, down, then their scales
  std::vector<size_t> slot_bytes_;
};

// Slots of all nodes. In files they outlive the process, with a mark for every slot that is filled.
class SlotMemory {
 public:
  struct Options {
    int count = 0;
    std::vector<int> node_ids;  // NUMA node of each shard; -1: not bound
    std::string folder;         // of files, on hugetlbfs or shared memory; empty: anonymous memory
    std::string digest;         // of what the slots are filled from; files of another one are emptied
  };
  SlotMemory(const SlotLayout& layout, const Options& options);

  int count() const { return count_; }
  uint8_t* at(int slot, int node) const { return arenas_[node]->data() + offset(slot, node); }
  const Arena& arena(int node) const { return *arenas_[node]; }
  bool Ensure(int slot, int node) {
    return arenas_[node]->Ensure(offset(slot, node), layout_.slot_bytes(node));
  }
  void Forget(int slot, int node) { arenas_[node]->Forget(offset(slot, node), layout_.slot_bytes(node)); }

  bool lasting() const { return marks_ != nullptr; }
  bool marked(int slot) const { return marks_ != nullptr && marks_[slot] == 1; }
  void Mark(int slot, bool filled);

 private:
  size_t offset(int slot, int node) const { return static_cast<size_t>(slot) * layout_.slot_bytes(node); }

  const SlotLayout& layout_;
  const int count_;
  std::vector<std::unique_ptr<Arena>> arenas_;
  uint8_t* marks_ = nullptr;
};

}  // namespace k2
