// Where the bytes of every routed expert lie.
//
// An expert is in one place at a time; a hand-off pins the experts it reads, and only an unpinned expert may
// be moved. In this version every expert is `mapped`: read in place from the checkpoint's file.
//
//   Put(layer, expert) ──► mapped ──Pin──► read by a ticket ──Unpin──► mapped
#pragma once

#include <atomic>
#include <memory>

#include "kernels/layout.h"

namespace k2 {

struct ExpertView {
  Int4Matrix gate;  // [inter, hidden]
  Int4Matrix up;    // [inter, hidden]
  Int4Matrix down;  // [hidden, inter]
  bool present() const { return gate.packed != nullptr; }
  int64_t Bytes() const { return gate.Bytes() + up.Bytes() + down.Bytes(); }
};

struct ExpertSizes {
  int layers;
  int experts;
  int hidden;
  int inter;
};

class ExpertStore {
 public:
  explicit ExpertStore(const ExpertSizes& sizes);

  const ExpertSizes& sizes() const { return sizes_; }

  // The bytes must stay where they are for as long as the store lives. Throws if the expert is pinned.
  void Put(int layer, int expert, const uint8_t* const packed[3], const bf16* const scale[3]);

  // Throws if the expert was never put.
  const ExpertView& Pin(int layer, int expert);
  void Unpin(int layer, int expert);
  int pins(int layer, int expert) const;
  int64_t expert_bytes() const;

 private:
  struct Slot {
    ExpertView view;
    std::atomic<int> pins{0};
  };
  Slot& At(int layer, int expert) const;

  ExpertSizes sizes_;
  std::unique_ptr<Slot[]> slots_;
};

}  // namespace k2
