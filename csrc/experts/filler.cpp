#include "experts/filler.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <system_error>

namespace k2 {
namespace {

constexpr auto kStep = std::chrono::milliseconds(5);
constexpr auto kLongest = std::chrono::milliseconds(100);  // of stepping back before each expert
constexpr int kOnTheirWay = 3;                             // experts of one thread
constexpr int kNice = 10;

void Bind(const std::vector<int>& cpus) {
  if (cpus.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);  // refused: it floats
}

// Copies what the page cache holds whole. It is asked first: a read that may not wait would begin to read ahead.
bool TakeCached(const Read& read) {
  static const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(read.mapped);
  const uintptr_t first = address / page * page;
  std::vector<unsigned char> held((address + read.needed - first + page - 1) / page);
  if (mincore(reinterpret_cast<void*>(first), held.size() * page, held.data()) != 0 ||
      !std::all_of(held.begin(), held.end(), [](unsigned char page) { return (page & 1) != 0; }))
    return false;
  const std::shared_ptr<OpenFile> file = read.source->file();
  for (uint64_t got = 0; got < read.needed;) {
    iovec room{read.into + got, static_cast<size_t>(read.needed - got)};
    const ssize_t result = preadv2(file->cached, &room, 1, static_cast<off_t>(read.offset + got), RWF_NOWAIT);
    if (result <= 0) return false;  // dropped meanwhile
    got += static_cast<uint64_t>(result);
  }
  return true;
}

}  // namespace

Filler::Filler(ExpertStore& store, std::vector<std::pair<int, int>> order, std::vector<std::vector<int>> cpus,
               int threads)
    : store_(store),
      order_(std::move(order)),
      cpus_(std::move(cpus)),
      work_(order_.size()),
      next_(cpus_.size()) {
  Require(store.has_slots(), "the store has no slots");
  Require(static_cast<int>(cpus_.size()) == store.layout().nodes(), "every node needs its CPUs");
  Require(threads >= 1 && threads <= 64, "a node is filled by 1 to 64 threads");
  for (Work& work : work_) work.nodes_left.store(store.layout().nodes());
  for (const auto& [layer, expert] : order_) store.pins(layer, expert);  // throws if there is no such expert
  left_ = static_cast<int>(cpus_.size()) * threads;
  running_.store(left_ + 1);
  std::unique_lock lock(mutex_);  // no thread begins before all are there
  try {
    for (int node = 0; node < static_cast<int>(cpus_.size()); ++node)
      for (int i = 0; i < threads; ++i) threads_.emplace_back([this, node] { Loop(node); });
    threads_.emplace_back([this] { Forget(); });
  } catch (const std::system_error&) {
    stop_.store(true);
    left_ = static_cast<int>(threads_.size());
    lock.unlock();
    Stop();
    throw Error("the system refuses threads that fill slots; let this process have more");
  }
}

Filler::~Filler() { Stop(); }

void Filler::Stop() {
  stop_.store(true);
  for (std::thread& thread : threads_)
    if (thread.joinable()) thread.join();
}

FillProgress Filler::progress() const {
  return {static_cast<int64_t>(order_.size()), done_.load(), failed_.load(), running_.load() > 0};
}

void Filler::StepBack() {
  for (auto waited = std::chrono::milliseconds(0); waited < kLongest && store_.busy() && !stop_.load();
       waited += kStep)
    std::this_thread::sleep_for(kStep);
}

void Filler::Loop(int node) {
  Bind(cpus_[node]);
  // A thread's own priority, where the system allows: requests compute on the same cores.
  setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kNice);
  std::array<Coming, kOnTheirWay> reads;
  const auto settle = [&](Coming& read) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return read.done; });
  };
  const int count = static_cast<int>(order_.size());
  for (size_t turn = 0;; ++turn) {
    Coming& read = reads[turn % kOnTheirWay];
    settle(read);
    const int i = next_[node].fetch_add(1);
    if (i >= count) break;
    // Not before an expert that another node began: a ticket may wait for it.
    if (!stop_.load() && work_[i].slot.load() == -2) StepBack();
    Begin(i, node, &read);
  }
  for (Coming& read : reads) settle(read);
  {
    const std::lock_guard lock(mutex_);
    --left_;
    changed_.notify_all();
  }
  running_.fetch_sub(1);
}

void Filler::Forget() {
  setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kNice);
  for (bool last = false; !last;) {
    std::vector<int> items;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return !filled_.empty() || left_ == 0; });
      items.swap(filled_);
      last = left_ == 0;
    }
    for (const int i : items) store_.DropCached(order_[i].first, order_[i].second);
  }
  store_.DropCached();  // with the pages that neighbours share
  running_.fetch_sub(1);
}

void Filler::Begin(int i, int node, Coming* read) {
  const auto [layer, expert] = order_[i];
  Work& work = work_[i];
  int slot;
  {
    const std::lock_guard lock(mutex_);
    slot = work.slot.load();
    if (slot == -2) {
      // Whoever comes first asks for the slot. After a stop only what other nodes began is finished.
      slot = stop_.load() ? -1 : store_.BeginFill(layer, expert);
      work.slot.store(slot);
    }
  }
  if (slot < 0) {
    if (work.nodes_left.fetch_sub(1) == 1) done_.fetch_add(1);
    return;
  }
  read->filler = this;
  read->item = i;
  std::vector<Read> left;
  // Pages that come when they are touched are still in the core's caches when they are copied to.
  const bool on_touch = store_.memory().arena(node).on_touch();
  if (!on_touch && !store_.Ensure(slot, node)) {
    Finished(i, false);
    return;
  }
  for (const Read& part : store_.Reads(layer, expert, slot, node))
    if (!TakeCached(part)) left.push_back(part);
  if (left.empty()) {
    Finished(i, true);
    return;
  }
  if (on_touch && !store_.Ensure(slot, node)) {  // not by the thread that begins the reads
    Finished(i, false);
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    read->done = false;
  }
  read->fetch.context = read;
  read->fetch.done = [](void* context, bool whole) {
    auto* own = static_cast<Coming*>(context);
    Filler* filler = own->filler;
    filler->Finished(own->item, whole);
    {
      const std::lock_guard lock(filler->mutex_);
      own->done = true;
      filler->changed_
          .notify_all();  // within the lock: the thread that waits may be the last thing that needs it
    }
  };
  store_.reader().Submit(&read->fetch, left, Urgency::kBackground);
}

void Filler::Finished(int i, bool whole) {
  Work& work = work_[i];
  if (!whole) work.failed.store(true);
  if (work.nodes_left.fetch_sub(1) != 1) return;
  const bool good = !work.failed.load();
  if (!good) failed_.fetch_add(1);
  store_.EndFill(order_[i].first, order_[i].second, good);
  if (good) {
    const std::lock_guard lock(mutex_);
    filled_.push_back(i);
    changed_.notify_all();
  }
  done_.fetch_add(1);
}

}  // namespace k2
