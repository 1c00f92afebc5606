#include "experts/store.h"

namespace k2 {

ExpertStore::ExpertStore(const ExpertSizes& sizes) : sizes_(sizes) {
  Require(sizes.layers >= 1 && sizes.experts >= 1 && sizes.hidden >= kGroup && sizes.inter >= kGroup,
          "expert sizes must be positive");
  Require(sizes.hidden % kGroup == 0 && sizes.inter % kGroup == 0,
          "expert sizes must be multiples of 32, the group that shares a scale");
  slots_ = std::make_unique<Slot[]>(static_cast<size_t>(sizes.layers) * sizes.experts);
}

ExpertStore::Slot& ExpertStore::At(int layer, int expert) const {
  Require(layer >= 0 && layer < sizes_.layers, "layer " + std::to_string(layer) + " is out of range");
  Require(expert >= 0 && expert < sizes_.experts, "expert " + std::to_string(expert) + " is out of range");
  return slots_[static_cast<size_t>(layer) * sizes_.experts + expert];
}

void ExpertStore::Put(int layer, int expert, const uint8_t* const packed[3], const bf16* const scale[3]) {
  Slot& slot = At(layer, expert);
  Require(slot.pins.load() == 0, "an expert that a ticket reads cannot be moved");
  for (int i = 0; i < 3; ++i)
    Require(packed[i] != nullptr && scale[i] != nullptr, "expert bytes must not be null");
  slot.view.gate = {packed[0], scale[0], sizes_.inter, sizes_.hidden};
  slot.view.up = {packed[1], scale[1], sizes_.inter, sizes_.hidden};
  slot.view.down = {packed[2], scale[2], sizes_.hidden, sizes_.inter};
}

const ExpertView& ExpertStore::Pin(int layer, int expert) {
  Slot& slot = At(layer, expert);
  Require(slot.view.present(),
          "layer " + std::to_string(layer) + " has no expert " + std::to_string(expert) + " loaded");
  slot.pins.fetch_add(1);
  return slot.view;
}

void ExpertStore::Unpin(int layer, int expert) { At(layer, expert).pins.fetch_sub(1); }

int ExpertStore::pins(int layer, int expert) const { return At(layer, expert).pins.load(); }

int64_t ExpertStore::expert_bytes() const {
  const int64_t weights = 3ll * sizes_.hidden * sizes_.inter;
  return weights / 2 + weights / kGroup * static_cast<int64_t>(sizeof(bf16));
}

}  // namespace k2
