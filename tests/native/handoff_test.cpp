// The hand-off of a stream, with this thread as the device: bits, rows that are lost, aborts from elsewhere,
// rings out of turn, workers that get stuck in the middle of an expert and come back, an end in the middle of
// a step.
#include "gpu/handoff.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/fault.h"

namespace {

using k2::bf16;
using k2::gpu::Handoff;
using k2::gpu::HandoffStep;
using k2::test::Check;
using k2::test::CheckRefused;
using k2::test::Step;

constexpr k2::ExpertSizes kSizes = {4, 6, 160, 96};
constexpr int kTopK = 2;
constexpr int kMaxRows = 6;
const std::vector<int> kLayers = {1, 2, 3};
constexpr double kPatient = 60'000;  // ms that no test waits
constexpr double kShort = 400;       // ms within which even a loaded machine answers
constexpr size_t kMapBytes = 64 << 10;

struct Input {
  int rows;
  std::vector<bf16> x;
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

using Output = std::vector<float>;

// Experts of random bytes; a dispatcher of one thread says what a hand-off makes of them.
struct Model {
  Model() : store(kSizes), machine(1, "", {}), dispatcher(store, machine, kMaxRows, kTopK, 1) {
    const size_t packed = static_cast<size_t>(kSizes.inter) * kSizes.hidden / 2,
                 scales = packed * 2 / k2::kGroup;
    for (const int layer : kLayers)
      for (int expert = 0; expert < kSizes.experts; ++expert) {
        k2::ExpertBytes& bytes = experts.emplace_back();
        for (int part = 0; part < 3; ++part) {
          auto& q = nibbles.emplace_back(std::make_unique<uint8_t[]>(packed));
          auto& s = scale.emplace_back(std::make_unique<bf16[]>(scales));
          for (size_t i = 0; i < packed; ++i) q[i] = static_cast<uint8_t>(random());
          for (size_t i = 0; i < scales; ++i)
            s[i] = k2::ToBf16(0.01f + static_cast<float>(random() % 100) / 2000);
          bytes.packed[part] = q.get();
          bytes.scale[part] = s.get();
        }
        store.Put(layer, expert, bytes);
      }
  }

  k2::ExpertBytes& Expert(int layer, int expert) { return experts[(layer - 1) * kSizes.experts + expert]; }

  Input Random(int rows) {
    Input input{rows, std::vector<bf16>(rows * kSizes.hidden), std::vector<int32_t>(rows * kTopK),
                std::vector<float>(rows * kTopK)};
    for (bf16& value : input.x) value = k2::ToBf16(static_cast<float>(random() % 4001) / 1000 - 2);
    for (int32_t& id : input.ids)
      id = static_cast<int32_t>(random() % (kSizes.experts + 1)) - 1;  // padding, too
    for (float& weight : input.weights) weight = static_cast<float>(random() % 100) / 100;
    return input;
  }

  Output Want(int layer, const Input& input) {
    const int slot = dispatcher.Acquire();
    Fill(dispatcher.buffers(slot), input);
    std::vector<uint8_t> status(input.rows);
    dispatcher.Collect(slot, dispatcher.Submit(slot, layer, input.rows), input.rows, status.data());
    const float* out = dispatcher.buffers(slot).out;
    return {out, out + input.rows * kSizes.hidden};
  }

  static void Fill(const k2::SlotBuffers& to, const Input& input) {
    std::copy(input.x.begin(), input.x.end(), to.x);
    std::copy(input.ids.begin(), input.ids.end(), to.ids);
    std::copy(input.weights.begin(), input.weights.end(), to.weights);
  }

  std::mt19937 random{11};
  std::vector<std::unique_ptr<uint8_t[]>> nibbles;
  std::vector<std::unique_ptr<bf16[]>> scale;
  std::vector<k2::ExpertBytes> experts;
  k2::ExpertStore store;
  k2::Machine machine;
  k2::Dispatcher dispatcher;
};

// A hand-off and the device that rings it.
struct Device {
  Device(Model& model, k2::Machine& machine, double timeout_ms)
      : words(static_cast<char*>(std::aligned_alloc(128, k2::gpu::DoorbellBytes(kLayers.size()))),
              &std::free),
        handoff(std::make_unique<Handoff>(model.store, machine, kMaxRows, kTopK, kLayers, words.get(),
                                          timeout_ms)) {}

  void Ring(int layer, const Input& input) {
    // A real one would overwrite what an aborted answer may still read, and both would compute garbage.
    if (!poisoned) Model::Fill(handoff->buffers(), input);
    k2::gpu::RingSlot(words.get(), static_cast<uint32_t>(layer - 1), 0);
  }
  // The reply; what came out is left in `out`.
  uint32_t Wait(int layer, const Input& input) {
    const uint32_t reply = k2::gpu::WaitReply(words.get(), static_cast<uint32_t>(layer - 1), kPatient);
    Check(reply != k2::gpu::kIdle, "every wait completes");
    const float* from = handoff->buffers().out;
    poisoned = reply == k2::gpu::kPoisoned;
    if (!poisoned) out.assign(from, from + input.rows * kSizes.hidden);
    return reply;
  }
  uint32_t Run(int layer, const Input& input) {
    Ring(layer, input);
    return Wait(layer, input);
  }
  // Once the threads are back, which takes them a moment.
  void Recover() {
    for (int i = 0; i < 10'000; ++i) {
      try {
        handoff->Reset();
        poisoned = false;
        return;
      } catch (const k2::Error&) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    }
    Check(false, "a hand-off recovers");
  }

  std::unique_ptr<char, void (*)(void*)> words;
  std::unique_ptr<Handoff> handoff;
  Output out;
  bool poisoned = false;
};

bool SameBits(const Output& a, const Output& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void GoodStep(Model& model, Device& device, const std::vector<int>& layers, int rows) {
  device.handoff->Begin(layers, rows);
  for (const int layer : layers) {
    const Input input = model.Random(rows);
    Check(device.Run(layer, input) == k2::gpu::kAnswered, "a ring is answered");
    Check(SameBits(device.out, model.Want(layer, input)), "with the bits of the dispatcher");
  }
  const HandoffStep step = device.handoff->End();
  Check(step.outcome.answered == layers.size() && step.outcome.abort_reason == k2::gpu::kNotAborted,
        "all went well");
  Check(step.lost.empty() && step.error.empty() && step.next_layer == -1, "and nothing was lost");
  Check(step.total.busy_ns >= step.total.wait_ns && step.total.wait_ns > 0, "a step reports its time");
}

void TestSteps(Model& model, k2::Machine& machine, int rounds) {
  Device device(model, machine, kPatient);
  const std::vector<std::vector<int>> pieces = {{1, 2, 3}, {2}, {3}, {1, 3}, {3, 1, 2}};
  for (int round = 0; round < rounds; ++round)
    GoodStep(model, device, pieces[round % pieces.size()], 1 + round % kMaxRows);
}

void TestErrors(Model& model, k2::Machine& machine) {
  Device device(model, machine, kPatient);
  Handoff& handoff = *device.handoff;
  CheckRefused([&] { handoff.End(); }, "no step is open");
  CheckRefused([&] { handoff.Begin({0}, 1); }, "layer 0 has no routed experts");
  CheckRefused([&] { handoff.Begin({2, 2}, 1); }, "listed twice");
  CheckRefused([&] { handoff.Begin({}, 1); }, "0 layers for 3 slots");
  for (int rows : {0, -1, kMaxRows + 1})
    CheckRefused([&] { handoff.Begin({1}, rows); }, "rows must lie in 1..6");
  handoff.Begin({1, 2}, 2);
  CheckRefused([&] { handoff.Begin({1}, 1); }, "is open");
  Input bad = model.Random(2);
  Check(device.Run(1, bad) == k2::gpu::kAnswered, "the first layer is fine");
  CheckRefused([&] { handoff.End(); }, "1 slots were not rung");
  bad.ids[1] = kSizes.experts;
  Check(device.Run(2, bad) == k2::gpu::kPoisoned, "a bad id poisons the step");
  const HandoffStep step = handoff.End();
  Check(step.outcome.abort_reason == k2::gpu::kAbortAnswerThrew && step.next_layer == 2, "which says where");
  Check(step.error == "layer 2: expert id 6 is out of range", "and why");
  CheckRefused([&] { handoff.Begin({1}, 1); }, "aborted");
  device.Recover();
  GoodStep(model, device, kLayers, 3);

  std::vector<uint8_t> words(k2::gpu::DoorbellBytes(1) + 128);
  void* at = words.data() + (128 - reinterpret_cast<uintptr_t>(words.data()) % 128) % 128;
  CheckRefused([&] { Handoff(model.store, machine, 1, 1, {4}, at, 1000); }, "layer 4 is out of range");
  device.handoff->Close();
  CheckRefused([&] { device.handoff->Begin({1}, 1); }, "closed");
}

void TestAbort(Model& model, k2::Machine& machine, int rounds) {
  Device device(model, machine, kPatient);
  for (int round = 0; round < rounds; ++round) {
    device.handoff->Begin(kLayers, kMaxRows);
    std::thread other([&] {
      std::this_thread::sleep_for(std::chrono::microseconds(round % 8 * 100));
      device.handoff->Abort();
    });
    bool poisoned = false;
    for (const int layer : kLayers) {
      const Input input = model.Random(kMaxRows);
      const bool good = device.Run(layer, input) == k2::gpu::kAnswered;
      Check(!good || !poisoned, "an abort lasts");
      Check(!good || SameBits(device.out, model.Want(layer, input)), "what was answered before it is right");
      poisoned = !good;
    }
    other.join();
    const HandoffStep step = device.handoff->End();
    Check(!poisoned || step.outcome.abort_reason == k2::gpu::kAbortAsked, "and its reason is kept");
    device.Recover();
    GoodStep(model, device, {2}, 1);
  }
}

void TestOutOfTurn(Model& model, k2::Machine& machine) {
  Device device(model, machine, kShort);
  device.handoff->Begin({1, 2}, 1);
  const Input input = model.Random(1);
  Check(device.Run(2, input) == k2::gpu::kPoisoned, "a ring out of turn does not wait for good");
  HandoffStep step = device.handoff->End();
  Check(step.outcome.abort_reason == k2::gpu::kAbortWatchdog && step.next_layer == 1, "and is an error");
  device.Recover();
  device.handoff->Begin({1}, 1);
  Check(device.Run(1, input) == k2::gpu::kAnswered, "a step");
  Check(device.Run(3, input) == k2::gpu::kPoisoned, "a ring too many neither");
  step = device.handoff->End();
  Check(step.outcome.abort_reason == k2::gpu::kAbortWatchdog, "which is an error of its step");
  device.Recover();
  GoodStep(model, device, kLayers, 2);
}

void TestStall(Model& model, k2::Machine& machine) {
  Device device(model, machine, kShort);
  device.handoff->StallAt(2);
  device.handoff->Begin(kLayers, 1);
  const Input input = model.Random(1);
  Check(device.Run(1, input) == k2::gpu::kAnswered, "before the stall");
  Check(device.Run(2, input) == k2::gpu::kPoisoned && device.Run(3, input) == k2::gpu::kPoisoned,
        "and behind it");
  const HandoffStep step = device.handoff->End();
  Check(step.outcome.abort_reason == k2::gpu::kAbortWatchdog && step.next_layer == 2,
        "the watchdog says where");
  CheckRefused([&] { device.handoff->Reset(); }, "has not come back");
  device.handoff->StallAt(-1);
  device.Recover();
  GoodStep(model, device, kLayers, 1);
}

// A page that holds up whoever reads it, as a disk that hangs does.
struct Trap {
  static inline std::atomic<bool> armed, released;
  static inline std::atomic<int> inside;
  static inline std::atomic<pid_t> victim;  // 0: the first that comes
  static inline void* page;

  static void Open() { mprotect(page, kMapBytes, PROT_READ); }
  static void Nap() {
    const timespec pause = {0, 1'000'000};
    nanosleep(&pause, nullptr);
  }
  static void Handle(int, siginfo_t* info, void*) {
    const char* at = static_cast<const char*>(info->si_addr);
    if (!armed.load() || at < page || at >= static_cast<char*>(page) + kMapBytes) _exit(3);
    pid_t first = 0;
    victim.compare_exchange_strong(first, gettid());
    if (victim.load() == gettid()) {
      inside.fetch_add(1);
      while (!released.load()) Nap();
      Open();
    } else {
      while (inside.load() == 0) Nap();  // others wait until it is caught, and go on
      Open();
    }
  }
};

// `stuck` is the thread that gets stuck in expert 0 of layer 2; 0: whoever comes first.
void TestStuckWorker(Model& model, k2::Machine& machine, pid_t stuck, double timeout_ms) {
  struct sigaction action{}, before{};
  action.sa_sigaction = Trap::Handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before);
  Trap::page = mmap(nullptr, kMapBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  k2::ExpertBytes bytes = model.Expert(2, 0);
  const size_t nbytes = static_cast<size_t>(kSizes.inter) * kSizes.hidden / 2;
  std::copy_n(bytes.packed[0], nbytes, static_cast<uint8_t*>(Trap::page));
  bytes.packed[0] = static_cast<const uint8_t*>(Trap::page);
  model.store.Put(2, 0, bytes);
  Input input = model.Random(2);
  std::fill(input.ids.begin(), input.ids.end(), 0);

  Device device(model, machine, timeout_ms);
  Trap::released = false;
  Trap::inside = 0;
  Trap::victim = stuck;
  Trap::armed = true;
  mprotect(Trap::page, kMapBytes, PROT_NONE);
  device.handoff->Begin(kLayers, 2);
  Check(device.Run(1, input) == k2::gpu::kAnswered, "the layer before");
  Check(device.Run(2, input) == k2::gpu::kPoisoned && device.Run(3, input) == k2::gpu::kPoisoned,
        "a stuck worker poisons what is left");
  const HandoffStep step = device.handoff->End();
  Check(step.outcome.abort_reason == k2::gpu::kAbortWatchdog && step.next_layer == 2, "as the watchdog's");
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CheckRefused([&] { device.handoff->Reset(); }, "hand-off:");
  CheckRefused([&] { device.handoff->Begin(kLayers, 2); }, "aborted");
  Trap::released = true;
  device.Recover();
  Trap::armed = false;
  GoodStep(model, device, kLayers, 2);

  model.store.Put(2, 0, model.Expert(2, 0));
  sigaction(SIGSEGV, &before, nullptr);
  munmap(Trap::page, kMapBytes);
}

pid_t ThreadOfWorkerOne(k2::Machine& machine) {
  static std::atomic<pid_t> found{0};
  found = 0;
  while (found.load() == 0) {
    k2::Job job;
    job.Reset(nullptr, {{[](void*, int, int worker) {
                           if (worker == 1) found = gettid();
                           std::this_thread::yield();
                         },
                         64}});
    machine.pool().Run(&job);
  }
  return found.load();
}

// The file of an expert shrinks: its rows are lost, in the layer that reads it, and the step is good.
void TestLostRows(Model& model, k2::Machine& machine) {
  constexpr int kLost = 3;
  const size_t nbytes = static_cast<size_t>(kSizes.inter) * kSizes.hidden / 2;
  k2::ExpertBytes bytes = model.Expert(2, kLost);
  std::FILE* file = std::tmpfile();
  Check(file != nullptr && std::fwrite(bytes.packed[0], 1, nbytes, file) == nbytes && std::fflush(file) == 0,
        "a file for an expert");
  void* map = mmap(nullptr, nbytes, PROT_READ, MAP_SHARED, fileno(file), 0);
  const int id = k2::FileMaps::Register(map, nbytes, fileno(file));
  bytes.packed[0] = static_cast<const uint8_t*>(map);
  model.store.Put(2, kLost, bytes);
  Device device(model, machine, kPatient);
  GoodStep(model, device, kLayers, kMaxRows);
  Check(ftruncate(fileno(file), 0) == 0, "the file shrinks");
  Input input = model.Random(4);
  for (int i = 0; i < 4 * kTopK; ++i) input.ids[i] = i == 2 || i == 7 ? kLost : i % 2;
  device.handoff->Begin(kLayers, 4);
  for (const int layer : kLayers)
    Check(device.Run(layer, input) == k2::gpu::kAnswered, "a lost expert is no abort");
  const HandoffStep step = device.handoff->End();
  Check(step.lost == std::vector<int>({1, 3}) && step.outcome.answered == 3, "rows 1 and 3 asked for it");
  model.store.Put(2, kLost, model.Expert(2, kLost));
  GoodStep(model, device, kLayers, kMaxRows);
  k2::FileMaps::Unregister(id);
  munmap(map, nbytes);
  std::fclose(file);
}

void TestEndInside(Model& model, k2::Machine& machine, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    Device device(model, machine, kPatient);
    GoodStep(model, device, {1}, 1);
    if (round % 2 == 0) device.handoff->StallAt(2);
    device.handoff->Begin(kLayers, 2);
    const Input input = model.Random(2);
    Check(device.Run(1, input) == k2::gpu::kAnswered, "the step has begun");
    std::thread waiting;
    if (round % 3 != 0) {
      device.Ring(2, input);
      waiting = std::thread([&] {
        const uint32_t reply = k2::gpu::WaitReply(device.words.get(), 1, kPatient);
        Check(reply != k2::gpu::kIdle, "the device is let go");
      });
    }
    device.handoff.reset();
    if (waiting.joinable()) waiting.join();
  }
}

}  // namespace

int main(int argc, char** argv) {
  const k2::test::Effort effort(argc, argv);
  Model model;
  for (int threads : {1, 2}) {
    std::printf("%d threads\n", threads);
    k2::Machine machine(threads, "", {});
    Step("steps", [&] { TestSteps(model, machine, effort.Rounds(200)); });
    Step("errors", [&] { TestErrors(model, machine); });
    Step("abort", [&] { TestAbort(model, machine, effort.Rounds(40)); });
    Step("out of turn", [&] { TestOutOfTurn(model, machine); });
    Step("stall", [&] { TestStall(model, machine); });
    Step("lost rows", [&] { TestLostRows(model, machine); });
    Step("end inside", [&] { TestEndInside(model, machine, effort.Rounds(20)); });
    // The thread that answers, which its ticket's watchdog cannot see, or a worker beside it, which it can.
    if (threads == 1) Step("stuck inside", [&] { TestStuckWorker(model, machine, 0, kShort); });
    if (threads == 2)
      Step("stuck worker", [&] { TestStuckWorker(model, machine, ThreadOfWorkerOne(machine), kPatient); });
  }
  std::puts("all held");
}
