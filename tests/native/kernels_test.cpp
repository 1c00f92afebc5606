// Every kernel of every instruction set this CPU offers: it reads and writes exactly its operands, its
// results obey the bounds of docs/numerics.md, and a row or a token has the same bits alone as in company.
//
// Operands lie in three ways: in heap blocks of exactly their size, which AddressSanitizer watches, and
// right before or behind a page that cannot be touched, since masked instructions are not instrumented.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "kernels/mask.h"
#include "kernels/table.h"

namespace {

using k2::bf16;
using k2::Int4Matrix;
using k2::KernelTable;
using k2::test::Step;

char case_name[160];

void Check(bool holds, const char* what) {
  if (!holds) std::fprintf(stderr, "%s\n", case_name);
  k2::test::Check(holds, what);
}

struct sigaction before;

// Names the case, then lets the fault happen again with whoever reports faults.
void OnFault(int signal) {
  constexpr char kWhat[] = "failed: touched what is not its own: ";
  if (write(2, kWhat, sizeof(kWhat) - 1) < 0 || write(2, case_name, std::strlen(case_name)) < 0) _exit(3);
  if (write(2, "\n", 1) < 0) _exit(3);
  sigaction(signal, &before, nullptr);
}

enum class Home { kHeap, kBeforeGuard, kBehindGuard };
constexpr Home kHomes[] = {Home::kHeap, Home::kBeforeGuard, Home::kBehindGuard};

// `count` elements that start `shift` bytes after a multiple of 64 (beside a guard page the size decides).
template <typename T>
class Operand {
 public:
  Operand(Home home, size_t count, size_t shift = 0) : count_(count) {
    const size_t bytes = count * sizeof(T);
    if (home == Home::kHeap) {
      if (posix_memalign(&start_, 64, shift + bytes) != 0) std::abort();
      data_ = reinterpret_cast<T*>(static_cast<char*>(start_) + shift);
    } else {
      const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      const size_t room = (bytes + page - 1) / page * page;
      mapped_ = room + page;
      start_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (start_ == MAP_FAILED) std::abort();
      char* const first = static_cast<char*>(start_);
      const bool behind = home == Home::kBehindGuard;
      if (mprotect(behind ? first : first + room, page, PROT_NONE) != 0) std::abort();
      data_ = reinterpret_cast<T*>(behind ? first + page : first + room - bytes);
    }
    std::memset(static_cast<void*>(data_), kUntouched, bytes);
  }
  Operand(Home home, const std::vector<T>& values, size_t shift = 0) : Operand(home, values.size(), shift) {
    std::copy(values.begin(), values.end(), data_);
  }
  Operand(Operand&& other) noexcept
      : count_(other.count_), start_(other.start_), data_(other.data_), mapped_(other.mapped_) {
    other.start_ = nullptr;
  }
  ~Operand() {
    if (start_ == nullptr) return;
    if (mapped_ == 0)
      std::free(start_);
    else
      munmap(start_, mapped_);
  }
  Operand& operator=(Operand&&) = delete;

  T* get() const { return data_; }
  size_t size() const { return count_; }
  T operator[](size_t i) const { return data_[i]; }
  bool Untouched(size_t i) const {
    unsigned char bytes[sizeof(T)];
    std::memcpy(bytes, data_ + i, sizeof(T));
    for (unsigned char byte : bytes)
      if (byte != kUntouched) return false;
    return true;
  }

 private:
  static constexpr unsigned char kUntouched = 0xA5;
  size_t count_;
  void* start_ = nullptr;
  T* data_ = nullptr;
  size_t mapped_ = 0;
};

bool SameBits(float a, float b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

constexpr double kHalfUlp = 0x1p-24;  // fp32 to nearest
constexpr double kFlushed = 1e-36;    // AVX-512's dot product flushes subnormals

// |sum of rounded steps - exact| <= steps * 2^-24 * sum of magnitudes, to first order; 1% covers the rest.
bool Near(float got, double want, double magnitude, double steps) {
  return std::abs(got - want) <= 1.01 * steps * kHalfUlp * magnitude + kFlushed;
}

// Sets with exact products promise the bits of plain C++: the first one's results are kept for the others.
class ExactSets {
 public:
  void Compare(const KernelTable& table, const Operand<float>& y) {
    if (std::strstr(table.name, "_bf16") != nullptr) return;  // adds a pair of products in one step
    if (bits_.empty()) {
      bits_.assign(y.get(), y.get() + y.size());
      return;
    }
    Check(bits_.size() == y.size() && std::memcmp(bits_.data(), y.get(), bits_.size() * sizeof(float)) == 0,
          "all sets with exact products have the same bits");
  }

 private:
  std::vector<float> bits_;
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int Below(int n) { return static_cast<int>(engine_() % static_cast<unsigned>(n)); }
  // Of both signs, now and then zero, with magnitudes over a few powers of two.
  std::vector<bf16> Values(size_t count) {
    std::vector<bf16> values(count);
    for (bf16& value : values) {
      const float magnitude = std::ldexp(1.0f + static_cast<float>(Below(128)) / 128.0f, Below(6) - 4);
      value = Below(16) == 0 ? bf16{0} : k2::ToBf16(Below(2) == 0 ? magnitude : -magnitude);
    }
    return values;
  }
  std::vector<bf16> Scales(size_t count) {
    std::vector<bf16> scales(count);
    for (bf16& scale : scales) scale = k2::ToBf16(0.01f + 0.001f * static_cast<float>(Below(100)));
    return scales;
  }
  std::vector<uint8_t> Bytes(size_t count) {
    std::vector<uint8_t> bytes(count);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(Below(256));
    return bytes;
  }

 private:
  std::mt19937 engine_;
};

struct Shape {
  int in;
  int rows;
  int tokens;
  bool guards;  // beside guard pages too
};

// Rows around the one to four of a tile and the 64 and 128 of panels; tokens around every tile.
std::vector<Shape> Shapes(const std::vector<int>& widths, int wide) {
  std::vector<Shape> shapes;
  const std::vector<int> all_rows = {1, 2, 3, 4, 5, 130, 131};
  for (int in : widths)
    for (int rows : all_rows) {
      for (int tokens = 1; tokens <= 11; ++tokens)
        shapes.push_back({in, rows, tokens, (rows == 1 || rows == 3 || rows == 130) && tokens % 3 != 1});
      shapes.push_back({in, rows, 64, rows == 5});
    }
  for (int tokens : {1, 2, 5, 9}) shapes.push_back({wide, 3, tokens, true});
  return shapes;
}

// Which rows and tokens are computed once more alone.
std::vector<int> Some(int count, Random& random) {
  if (count <= 11) {
    std::vector<int> all(count);
    for (int i = 0; i < count; ++i) all[i] = i;
    return all;
  }
  std::vector<int> some = {0, 1, count / 2, count - 2, count - 1};
  for (int i = 0; i < 6; ++i) some.push_back(random.Below(count));
  return some;
}

std::vector<const bf16*> Pointers(const std::vector<Operand<bf16>>& operands) {
  std::vector<const bf16*> pointers;
  for (const auto& operand : operands) pointers.push_back(operand.get());
  return pointers;
}

// y[t * ldy + r] for some rows (from, count) and tokens, as one of the two row kernels computes it.
using Compute = std::function<void(int from, int count, const bf16* const* x, int tokens, float* y, int ldy)>;

void CheckRows(const KernelTable& table, Home home, const Shape& shape, const Compute& compute,
               const std::vector<Operand<bf16>>& x, const std::vector<double>& want,
               const std::vector<double>& magnitude, double steps, Random& random, ExactSets& exact) {
  const auto [in, rows, tokens, guards] = shape;
  const std::vector<const bf16*> at = Pointers(x);
  const int gap = random.Below(4);
  const int ldy = rows + gap;
  const size_t shift = 4 * static_cast<size_t>(random.Below(16));
  const Operand<float> y(home, static_cast<size_t>(tokens - 1) * ldy + rows, shift);
  compute(0, rows, at.data(), tokens, y.get(), ldy);
  for (int t = 0; t < tokens; ++t) {
    for (int r = 0; r < rows; ++r) {
      const size_t i = static_cast<size_t>(t) * rows + r;
      Check(Near(y[static_cast<size_t>(t) * ldy + r], want[i], magnitude[i], steps),
            "the result obeys its bound");
    }
    if (t + 1 < tokens)
      for (int r = rows; r < ldy; ++r)
        Check(y.Untouched(static_cast<size_t>(t) * ldy + r), "nothing is written between two tokens' rows");
  }
  for (int r : Some(rows, random)) {
    const Operand<float> row(home, tokens, shift);
    compute(r, 1, at.data(), tokens, row.get(), 1);
    for (int t = 0; t < tokens; ++t)
      Check(SameBits(row[t], y[static_cast<size_t>(t) * ldy + r]), "a row alone has the same bits");
  }
  for (int t : Some(tokens, random)) {
    const Operand<float> token(home, rows, shift);
    compute(0, rows, &at[t], 1, token.get(), rows);
    for (int r = 0; r < rows; ++r)
      Check(SameBits(token[r], y[static_cast<size_t>(t) * ldy + r]), "a token alone has the same bits");
  }
  if (gap == 0 && home == Home::kHeap) exact.Compare(table, y);
}

void TestInt4(const Shape& shape, unsigned seed) {
  const auto [in, rows, tokens, guards] = shape;
  Random random(seed);
  const int row0 = static_cast<int>(seed % 3);
  const size_t out = static_cast<size_t>(row0) + rows;
  const std::vector<uint8_t> packed = random.Bytes(out * in / 2);
  const std::vector<bf16> scales = random.Scales(out * in / k2::kGroup);
  std::vector<std::vector<bf16>> plain;
  for (int t = 0; t < tokens; ++t) plain.push_back(random.Values(in));

  std::vector<double> want, magnitude, weight(in);
  want.resize(static_cast<size_t>(tokens) * rows);
  magnitude.resize(want.size());
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < in; ++i) {
      const size_t at = (static_cast<size_t>(row0) + r) * in + i;
      const int nibble = packed[at / 2] >> (4 * (at % 2)) & 15;
      weight[i] = (nibble - 8) * static_cast<double>(k2::ToFloat(scales[at / k2::kGroup]));
    }
    for (int t = 0; t < tokens; ++t)
      for (int i = 0; i < in; ++i) {
        const double term = weight[i] * k2::ToFloat(plain[t][i]);
        want[static_cast<size_t>(t) * rows + r] += term;
        magnitude[static_cast<size_t>(t) * rows + r] += std::abs(term);
      }
  }
  // A lane: eight products a block, one fused step for each block; then four levels of the tree.
  const double steps = 8 + k2::PaddedBlocks(in) + 4;

  ExactSets exact;
  for (const KernelTable* table : k2::AvailableKernels())
    for (Home home : kHomes) {
      if (home != Home::kHeap && !guards) continue;
      std::snprintf(case_name, sizeof(case_name), "%s int4_rows in=%d row0=%d rows=%d tokens=%d home=%d",
                    table->name, in, row0, rows, tokens, static_cast<int>(home));
      Random draws(seed);
      const Operand<uint8_t> nibbles(home, packed, 8 * (seed % 8));
      const Operand<bf16> scale(home, scales, 4 * (seed % 5) + 2 * (seed % 2));
      std::vector<Operand<bf16>> x;
      for (int t = 0; t < tokens; ++t) {
        const Operand<bf16> from(home, plain[t], 2 * (seed % 7));
        x.emplace_back(home, static_cast<size_t>(k2::PreparedSize(in)));
        table->prepare(from.get(), in, x.back().get());
        for (int i = 0; i < k2::PreparedSize(in); ++i)
          Check(x.back()[k2::PreparedIndex(i)] == (i < in ? plain[t][i] : 0),
                "prepare puts each in its place");
      }
      const Int4Matrix matrix{nibbles.get(), scale.get(), static_cast<int>(out), in};
      const Compute compute = [&](int from, int count, const bf16* const* at, int n, float* y, int ldy) {
        table->int4_rows(matrix, row0 + from, count, at, n, y, ldy);
      };
      CheckRows(*table, home, shape, compute, x, want, magnitude, steps, draws, exact);
    }
}

void TestDense(const Shape& shape, unsigned seed) {
  const auto [in, rows, tokens, guards] = shape;
  Random random(seed);
  const int ldw = in + static_cast<int>(seed % 3) * static_cast<int>(seed % 4);
  const std::vector<bf16> weights = random.Values(static_cast<size_t>(rows - 1) * ldw + in);
  std::vector<std::vector<bf16>> plain;
  for (int t = 0; t < tokens; ++t) plain.push_back(random.Values(in));

  std::vector<double> want(static_cast<size_t>(tokens) * rows), magnitude(want.size()), weight(in);
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < in; ++i) weight[i] = k2::ToFloat(weights[static_cast<size_t>(r) * ldw + i]);
    for (int t = 0; t < tokens; ++t)
      for (int i = 0; i < in; ++i) {
        const double term = weight[i] * k2::ToFloat(plain[t][i]);
        want[static_cast<size_t>(t) * rows + r] += term;
        magnitude[static_cast<size_t>(t) * rows + r] += std::abs(term);
      }
  }
  // A lane: two products a block of 32; then four levels of the tree.
  const double steps = 2 * ((in + 31) / 32) + 4;

  ExactSets exact;
  for (const KernelTable* table : k2::AvailableKernels())
    for (Home home : kHomes) {
      if (home != Home::kHeap && !guards) continue;
      std::snprintf(case_name, sizeof(case_name), "%s dense_rows in=%d ldw=%d rows=%d tokens=%d home=%d",
                    table->name, in, ldw, rows, tokens, static_cast<int>(home));
      Random draws(seed);
      const Operand<bf16> w(home, weights, 4 * (seed % 16));
      std::vector<Operand<bf16>> x;
      for (int t = 0; t < tokens; ++t) x.emplace_back(home, plain[t], 2 * (seed % 9));
      const Compute compute = [&](int from, int count, const bf16* const* at, int n, float* y, int ldy) {
        table->dense_rows(w.get() + static_cast<ptrdiff_t>(from) * ldw, ldw, in, count, at, n, y, ldy);
      };
      CheckRows(*table, home, shape, compute, x, want, magnitude, steps, draws, exact);
    }
}

double FromE4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double size = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (bits & 0x80) == 0 ? size : -size;
}

// Weights of a byte, all of its values among them but the two NaN of e4m3.
void TestDense8(const Shape& shape, bool e4m3, unsigned seed) {
  const auto [in, rows, tokens, guards] = shape;
  Random random(seed);
  const int ldw = in + static_cast<int>(seed % 3) * static_cast<int>(seed % 4);
  std::vector<uint8_t> weights = random.Bytes(static_cast<size_t>(rows - 1) * ldw + in);
  if (e4m3)
    for (uint8_t& bits : weights)
      if ((bits & 0x7F) == 0x7F) bits = 0x80;
  std::vector<float> scales;
  for (int r = 0; r < rows; ++r) scales.push_back(0.003f + 0.0007f * static_cast<float>(random.Below(100)));
  std::vector<std::vector<bf16>> plain;
  for (int t = 0; t < tokens; ++t) plain.push_back(random.Values(in));

  std::vector<double> want(static_cast<size_t>(tokens) * rows), magnitude(want.size()), weight(in);
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < in; ++i) {
      const uint8_t bits = weights[static_cast<size_t>(r) * ldw + i];
      weight[i] = scales[r] * (e4m3 ? FromE4m3(bits) : static_cast<double>(static_cast<int8_t>(bits)));
    }
    for (int t = 0; t < tokens; ++t)
      for (int i = 0; i < in; ++i) {
        const double term = weight[i] * k2::ToFloat(plain[t][i]);
        want[static_cast<size_t>(t) * rows + r] += term;
        magnitude[static_cast<size_t>(t) * rows + r] += std::abs(term);
      }
  }
  // As of bf16, then the scale.
  const double steps = 2 * ((in + 31) / 32) + 4 + 1;

  ExactSets exact;
  for (const KernelTable* table : k2::AvailableKernels())
    for (Home home : kHomes) {
      if (home != Home::kHeap && !guards) continue;
      std::snprintf(case_name, sizeof(case_name), "%s %s_rows in=%d ldw=%d rows=%d tokens=%d home=%d",
                    table->name, e4m3 ? "e4m3" : "int8", in, ldw, rows, tokens, static_cast<int>(home));
      Random draws(seed);
      const Operand<uint8_t> w(home, weights, seed % 64);
      const Operand<float> scale(home, scales, 4 * (seed % 5));
      std::vector<Operand<bf16>> x;
      for (int t = 0; t < tokens; ++t) x.emplace_back(home, plain[t], 2 * (seed % 9));
      const Compute compute = [&](int from, int count, const bf16* const* at, int n, float* y, int ldy) {
        const void* const row = w.get() + static_cast<ptrdiff_t>(from) * ldw;
        const float* const s = scale.get() + from;
        if (e4m3)
          table->e4m3_rows(static_cast<const k2::E4m3*>(row), s, ldw, in, count, at, n, y, ldy);
        else
          table->int8_rows(static_cast<const int8_t*>(row), s, ldw, in, count, at, n, y, ldy);
      };
      CheckRows(*table, home, shape, compute, x, want, magnitude, steps, draws, exact);
    }
}

// One column whose activation is 1: the weights themselves.
void TestEveryByte() {
  std::vector<uint8_t> bytes(256);
  for (int i = 0; i < 256; ++i) bytes[i] = static_cast<uint8_t>(i);
  const std::vector<float> ones(256, 1.0f);
  const bf16 one = k2::ToBf16(1.0f);
  const bf16* x = &one;
  float y[256];
  for (const KernelTable* table : k2::AvailableKernels()) {
    std::snprintf(case_name, sizeof(case_name), "%s every byte", table->name);
    table->int8_rows(reinterpret_cast<const int8_t*>(bytes.data()), ones.data(), 1, 1, 256, &x, 1, y, 256);
    for (int i = 0; i < 256; ++i) Check(y[i] == static_cast<float>(i < 128 ? i : i - 256), "int8 is exact");
    table->e4m3_rows(reinterpret_cast<const k2::E4m3*>(bytes.data()), ones.data(), 1, 1, 256, &x, 1, y, 256);
    for (int i = 0; i < 256; ++i)
      if ((i & 0x7F) != 0x7F) Check(y[i] == FromE4m3(static_cast<uint8_t>(i)), "e4m3 is exact");
  }
}

void TestDenseColumns(int in, int columns, unsigned seed) {
  Random random(seed);
  const int ldw = columns + static_cast<int>(seed % 3);
  const std::vector<bf16> weights = random.Values(static_cast<size_t>(in - 1) * ldw + columns);
  const std::vector<bf16> values = random.Values(in);
  ExactSets exact;
  for (const KernelTable* table : k2::AvailableKernels())
    for (Home home : kHomes) {
      std::snprintf(case_name, sizeof(case_name), "%s dense_columns in=%d ldw=%d columns=%d home=%d",
                    table->name, in, ldw, columns, static_cast<int>(home));
      const Operand<bf16> w(home, weights, 4 * (seed % 16));
      const Operand<bf16> x(home, values, 2 * (seed % 8));
      const Operand<float> y(home, columns, 4 * (seed % 8));
      table->dense_columns(w.get(), ldw, in, columns, x.get(), y.get());
      for (int n = 0; n < columns; ++n) {
        double want = 0, magnitude = 0;
        for (int k = 0; k < in; ++k) {
          const double term = static_cast<double>(k2::ToFloat(values[k])) * k2::ToFloat(weights[k * ldw + n]);
          want += term;
          magnitude += std::abs(term);
        }
        Check(Near(y[n], want, magnitude, in), "the result obeys its bound");
      }
      if (home == Home::kHeap) exact.Compare(*table, y);
    }
}

// A block of context whose last page ends with its last row; queries and sums of exactly their size.
void TestAttend(int heads, int latent, int rope, int rows, unsigned seed) {
  Random random(seed);
  const int width = latent + rope, pages = (rows + k2::kAttendPage - 1) / k2::kAttendPage;
  const std::vector<bf16> queries = random.Values(static_cast<size_t>(heads) * width);
  std::vector<std::vector<bf16>> context;
  for (int page = 0; page < pages; ++page)
    context.push_back(
        random.Values(static_cast<size_t>(std::min(k2::kAttendPage, rows - page * k2::kAttendPage)) * width));
  ExactSets exact;
  for (const KernelTable* table : k2::AvailableKernels())
    for (Home home : kHomes) {
      std::snprintf(case_name, sizeof(case_name), "%s attend heads=%d latent=%d rope=%d rows=%d home=%d",
                    table->name, heads, latent, rope, rows, static_cast<int>(home));
      const Operand<bf16> q(home, queries);
      std::vector<Operand<bf16>> held;
      std::vector<const bf16*> q_rows, page_rows;
      for (int h = 0; h < heads; ++h) q_rows.push_back(q.get() + static_cast<ptrdiff_t>(h) * width);
      for (const auto& page : context) page_rows.push_back(held.emplace_back(home, page).get());
      const Operand<float> scores(home, static_cast<size_t>(heads) * k2::kAttendRows);
      const Operand<float> peak(home, std::vector<float>(heads, -std::numeric_limits<float>::infinity()));
      const Operand<float> total(home, std::vector<float>(heads, 0.0f));
      const Operand<float> out(home, std::vector<float>(static_cast<size_t>(heads) * latent, 0.0f));
      table->attend({q_rows.data(), heads, page_rows.data(), rows, latent, rope, 0.1f}, scores.get(),
                    {peak.get(), total.get(), out.get()});
      for (int h = 0; h < heads; ++h) {
        Check(total[h] >= 0.9999f && total[h] <= static_cast<float>(rows) * 1.0001f,
              "the greatest weight is one");
        for (int i = 0; i < latent; ++i) Check(std::isfinite(out[h * latent + i]), "sums are finite");
      }
      if (home == Home::kHeap) exact.Compare(*table, out);
    }
}

void TestDecodeRows(int latent, int rope, int rows, unsigned seed) {
  Random random(seed);
  const int groups = (latent + k2::kScaleGroup - 1) / k2::kScaleGroup;
  const ptrdiff_t row_bytes = latent + 4 * groups + 2 * rope;
  std::vector<uint8_t> stored(static_cast<size_t>(rows * row_bytes));
  for (size_t i = 0; i < stored.size(); ++i) stored[i] = static_cast<uint8_t>(i * 37 % 0x7F);
  for (int r = 0; r < rows; ++r)
    for (int g = 0; g < groups; ++g) {
      const float scale = std::ldexp(1.0f, (r + g) % 9 - 4);
      std::memcpy(stored.data() + r * row_bytes + latent + 4 * g, &scale, sizeof(scale));
    }
  for (const KernelTable* table : k2::AvailableKernels())
    for (Home home : kHomes) {
      std::snprintf(case_name, sizeof(case_name), "%s decode_rows latent=%d rope=%d rows=%d home=%d",
                    table->name, latent, rope, rows, static_cast<int>(home));
      const Operand<uint8_t> from(home, stored);
      const Operand<bf16> to(home, static_cast<size_t>(rows) * (latent + rope));
      table->decode_rows(from.get(), row_bytes, rows, latent, rope, to.get());
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < latent; ++i) {
          const double scale = std::ldexp(1.0, (r + i / k2::kScaleGroup) % 9 - 4);
          Check(k2::ToFloat(to[static_cast<size_t>(r) * (latent + rope) + i]) ==
                    FromE4m3(stored[r * row_bytes + i]) * scale,
                "a value is its scale times its e4m3");
        }
    }
}

// The values of a float at which e^x, the division or the rounding to bf16 turn a corner.
std::vector<float> Corners() {
  return {0.0f,  -0.0f,  1.0f,  -1.0f,  1e-38f, -1e-38f, 1e-45f,  0x1p-126f, 0.346f,  -0.347f,
          20.0f, -20.0f, 86.9f, -87.1f, 88.1f,  -88.1f,  -104.0f, 200.0f,    -200.0f, 3e4f};
}

void TestSwiGlu(int n, unsigned seed) {
  Random random(seed);
  std::vector<float> gates(n), ups(n);
  const std::vector<float> corners = Corners();
  for (int i = 0; i < n; ++i) {
    gates[i] = i % 3 == 0 ? corners[random.Below(static_cast<int>(corners.size()))]
                          : k2::ToFloat(random.Values(1)[0]) * 1.0037f;
    ups[i] = k2::ToFloat(random.Values(1)[0]) * 1.0011f;
  }
  for (const KernelTable* table : k2::AvailableKernels())
    for (Home home : kHomes) {
      std::snprintf(case_name, sizeof(case_name), "%s swiglu n=%d home=%d", table->name, n,
                    static_cast<int>(home));
      const Operand<float> gate(home, gates, 4 * (seed % 16));
      const Operand<float> up(home, ups, 4 * (seed % 5));
      const Operand<bf16> out(home, n, 2 * (seed % 11));
      table->swiglu(gate.get(), up.get(), n, out.get());
      for (int i = 0; i < n; ++i) {
        const double g = gates[i];
        const double want = g / (1.0 + std::exp(-g)) * ups[i];
        // A few roundings of fp32, then one to bf16; beyond e^88 the result is tiny instead of zero.
        const double slack = 0x1p-20 * std::abs(want) + 1e-30;
        const float got = k2::ToFloat(out[i]);
        Check(k2::ToFloat(k2::ToBf16(static_cast<float>(want - slack))) <= got &&
                  got <= k2::ToFloat(k2::ToBf16(static_cast<float>(want + slack))),
              "silu(gate) * up obeys its bound");
      }
    }
  for (const KernelTable* table : k2::AvailableKernels()) {
    std::snprintf(case_name, sizeof(case_name), "%s swiglu of NaN", table->name);
    const Operand<float> gate(Home::kHeap, std::vector<float>(16, std::numeric_limits<float>::quiet_NaN()));
    const Operand<float> up(Home::kHeap, std::vector<float>(16, 1.0f));
    const Operand<bf16> out(Home::kHeap, 16);
    table->swiglu(gate.get(), up.get(), 16, out.get());
    for (int i = 0; i < 16; ++i) Check(std::isnan(k2::ToFloat(out[i])), "NaN stays NaN");
  }
}

void TestAddScaled(int n, unsigned seed) {
  Random random(seed);
  std::vector<float> ys(n), sums(n);
  for (int i = 0; i < n; ++i) {
    ys[i] = k2::ToFloat(random.Values(1)[0]) * 1.00371f;
    sums[i] = k2::ToFloat(random.Values(1)[0]) * 1.00117f;
  }
  const float weight = 0.731f;
  for (const KernelTable* table : k2::AvailableKernels())
    for (Home home : kHomes) {
      std::snprintf(case_name, sizeof(case_name), "%s add_scaled n=%d home=%d", table->name, n,
                    static_cast<int>(home));
      const Operand<float> y(home, ys, 4 * (seed % 16));
      const Operand<float> out(home, sums, 4 * (seed % 7));
      table->add_scaled(weight, y.get(), n, out.get());
      for (int i = 0; i < n; ++i)
        Check(SameBits(out[i], std::fma(weight, ys[i], sums[i])), "one fused step, rounded once");
    }
}

void TestMask(int plain, unsigned seed) {
  Random random(seed);
  const int specials = random.Below(4);
  const int count = plain + specials + random.Below(70);
  std::vector<float> values(count);
  for (int i = 0; i < count; ++i) values[i] = static_cast<float>(i) - 7.5f;
  std::vector<int64_t> kept;
  for (int i = 0; i < specials; ++i) kept.push_back(count - 1 - i);
  enum Kind { kNone, kAll, kNoBits, kAllBits, kSomeBits };
  for (int kind = kNone; kind <= kSomeBits; ++kind)
    for (Home home : kHomes) {
      std::snprintf(case_name, sizeof(case_name), "mask plain=%d count=%d kind=%d home=%d", plain, count,
                    kind, static_cast<int>(home));
      std::vector<uint8_t> bits(static_cast<size_t>(plain + 7) / 8,
                                static_cast<uint8_t>(kind == kNoBits ? 0 : 255));
      if (kind == kSomeBits) bits = random.Bytes(bits.size());
      const Operand<uint8_t> allowed(home, bits, 3 * (seed % 5));
      const Operand<float> logits(home, values, 4 * (seed % 16));
      k2::MaskLogits(logits.get(), count, plain, kind < kNoBits ? nullptr : allowed.get(), kind == kAll,
                     kept);
      for (int i = 0; i < count; ++i) {
        const bool bit = i < plain && (bits[i / 8] >> (i % 8) & 1) != 0;
        const bool stays = i < plain ? (kind < kNoBits ? kind == kAll : bit) : i >= count - specials;
        Check(SameBits(logits[i], stays ? values[i] : -std::numeric_limits<float>::infinity()),
              "what is allowed stays, all else is -inf");
      }
    }
  Operand<float> logits(Home::kBeforeGuard, values);
  for (int64_t wrong : {int64_t{-1}, int64_t{plain} - 1, int64_t{count}})
    k2::test::CheckRefused([&] { k2::MaskLogits(logits.get(), count, plain, nullptr, true, {wrong}); },
                           "is no special");
  for (int wrong : {-1, count + 1})
    k2::test::CheckRefused([&] { k2::MaskLogits(logits.get(), count, wrong, nullptr, true, {}); },
                           "more plain tokens than logits");
}

void TestPick() {
  for (const KernelTable* table : k2::AvailableKernels()) {
    Check(&k2::PickKernels(table->name) == table, "each set is found by its name");
  }
  Check(&k2::PickKernels("") == k2::AvailableKernels().front(), "the best is the default");
  Check(std::strcmp(k2::AvailableKernels().back()->name, "scalar") == 0, "plain C++ is always there");
  k2::test::CheckRefused([] { k2::PickKernels("none"); }, "is unknown or more than this CPU offers");
}

}  // namespace

int main() {
  struct sigaction action = {};
  action.sa_handler = OnFault;
  sigaction(SIGSEGV, &action, &before);

  unsigned seed = 1;
  std::snprintf(case_name, sizeof(case_name), "pick");
  Step("pick", TestPick);
  Step("int4 rows", [&] {
    for (const Shape& shape : Shapes({32, 64, 96, 128, 160, 224, 416}, 7168)) TestInt4(shape, seed++);
    // Around what is unpacked once for many tokens: several parts of columns, panels of rows, tiles of tokens.
    for (int rows : {5, 67, 130})
      for (int tokens : {15, 16, 17, 31, 33, 35, 66}) TestInt4({672, rows, tokens, rows == 5}, seed++);
    TestInt4({7168, 3, 17, true}, seed++);
  });
  Step("dense rows", [&] {
    for (const Shape& shape : Shapes({1, 2, 31, 32, 33, 96, 100, 260, 416}, 7168)) TestDense(shape, seed++);
  });
  Step("dense rows of bytes", [&] {
    TestEveryByte();
    for (bool e4m3 : {false, true})
      for (const Shape& shape : Shapes({1, 31, 32, 33, 100, 260}, 7168)) TestDense8(shape, e4m3, seed++);
  });
  Step("dense columns", [&] {
    for (int in : {1, 2, 32, 129})
      for (int columns : {1, 2, 15, 16, 17, 127, 128, 129, 160, 256, 300})
        TestDenseColumns(in, columns, seed++);
  });
  Step("attention", [&] {
    for (int heads : {1, 3, 4, 9})
      for (int latent : {16, 48, 64, 144})
        for (int rows : {1, 15, 33, 64, 65, 200, 256}) TestAttend(heads, latent, latent / 8, rows, seed++);
    for (int latent : {16, 128, 144, 512})
      for (int rows : {1, 5}) TestDecodeRows(latent, latent / 8, rows, seed++);
  });
  Step("swiglu and sums", [&] {
    for (int n = 16; n <= 256; n += 16) {
      TestSwiGlu(n, seed++);
      TestAddScaled(n, seed++);
    }
  });
  Step("mask", [&] {
    for (int plain = 0; plain <= 200; ++plain) TestMask(plain, seed++);
  });
  std::puts("all held");
}
