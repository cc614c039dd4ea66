#include "knn_search.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "knn_glue.h"

namespace memcore {
namespace {

constexpr int64_t kChunk = 480, kWave = 64 << 20;  // queries of a job; bytes of scratch at a time

int64_t up(int64_t n, int64_t by) { return (n + by - 1) / by; }

enum Products : int64_t { kWidened, kPairs, kTiles };  // of bfloat16
std::atomic<int64_t> products_wanted{kTiles};          // at most; for tests
std::atomic<int64_t> rescanned{0};

// Whether AMX's products of bfloat16 are there and wanted. A process must ask Linux for the tile registers.
bool has_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  static const bool has = [] {
    unsigned a, b, c, d;
    constexpr unsigned needed = 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & needed) == needed && syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return has && isa() == kAvx512 && products_wanted >= kTiles;
#else
  return false;
#endif
}

// The same of AVX512-BF16.
bool has_pairs() {
#if defined(__x86_64__)
  static const bool has = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
  }();
  return has && isa() == kAvx512 && products_wanted >= kPairs;
#else
  return false;
#endif
}

void search(KnnArgs& a) {
  if (a.A * a.Q * a.k == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  a.chunks = up(a.Q, kChunk), a.chunk = up(a.Q, a.chunks);
  const int64_t jobs = a.A * a.chunks;
  a.shards = 1;
  if (jobs < 2 * threads) {
    a.shards = up(2 * threads, jobs);
    const int64_t most = a.N * a.D * (a.chunk < 8 ? a.chunk : a.chunk / 4 + 6) / 500000;  // a shard is worth a thread's while
    a.shards = threads == 1 || most < 2 ? 1 : a.shards < most ? a.shards : most;
  }
  a.lanes = MC_PICK(knn_lanes)(a);
  const bool tiles = a.mirror && has_tiles();
  a.pairs = a.mirror && !tiles && (a.lanes || a.chunk == 1) && has_pairs();
  a.halves = tiles || a.pairs;
  if (a.mirror && a.lanes && !a.halves) a.mirror = nullptr;  // float32 products of the keys are as quick
  a.lanes |= a.halves;
  a.keep = a.k + (a.mirror ? 64 + a.k / 4 : a.k > 128 ? a.k / 4 : 32);
  a.capacity = 2 * a.keep + 128;
  a.scratch_size = MC_PICK(knn_scratch)(a);
  const int64_t wave = jobs * a.scratch_size <= kWave ? jobs : a.scratch_size < kWave ? kWave / a.scratch_size : 1;
  const std::unique_ptr<char[]> scratch(new char[(size_t)(wave * a.scratch_size) + 64]);
  a.scratch = (char*)(((uintptr_t)scratch.get() + 63) / 64 * 64);
  auto *prepare = MC_PICK(knn_prepare), *scan = MC_PICK(knn_scan), *finish = MC_PICK(knn_finish);
  for (a.first = 0; a.first < jobs; a.first += wave) {
    const int64_t last = a.first + wave < jobs ? a.first + wave : jobs;
    const auto each = [&](int64_t per, int64_t cost, void (*f)(const KnnArgs&, int64_t, int64_t)) {
      parallel((last - a.first) * per, cost, [&](int64_t b, int64_t e) { f(a, a.first * per + b, a.first * per + e); });
    };
    each(1, a.chunk * a.D, prepare);
    each(a.shards, a.chunk * (a.N / a.shards) * a.D, scan);
    each(a.chunk, 4 * a.keep * (a.D + 16), finish);
  }
}

// The neighbours that the mirror did not prove, by the float32 keys.
void search_again(const KnnArgs& a) {
  const int64_t row = a.D;
  for (int64_t d = 0; d < a.A; d++) {
    std::vector<int64_t> which;
    for (int64_t q = 0; q < a.Q; q++)
      if (a.uncertain[d * a.Q + q]) which.push_back(q);
    if (which.empty()) continue;
    const int64_t U = (int64_t)which.size();
    std::vector<float> queries((size_t)(U * row)), distances((size_t)(U * a.k));
    std::vector<int64_t> indices((size_t)(U * a.k));
    for (int64_t u = 0; u < U; u++) std::copy_n((const float*)a.query + d * a.query_stride + which[(size_t)u] * row, row, queries.data() + u * row);
    KnnArgs b = a;
    b.A = 1, b.Q = U, b.query_stride = 0, b.query = queries.data(), b.keys = (const float*)a.keys + d * a.N * row;
    b.count = a.count ? a.count + d : nullptr, b.norms = a.norms ? (const float*)a.norms + d * a.N : nullptr, b.mirror = nullptr;
    b.distances = distances.data(), b.indices = indices.data(), b.uncertain = nullptr;
    search(b);
    for (int64_t u = 0; u < U; u++) {
      const int64_t to = (d * a.Q + which[(size_t)u]) * a.k;
      std::copy_n(distances.data() + u * a.k, a.k, (float*)a.distances + to);
      std::copy_n(indices.data() + u * a.k, a.k, a.indices + to);
    }
  }
}

void run(KnnArgs& a) {
  std::vector<uint8_t> uncertain((size_t)(a.A * a.Q));
  a.uncertain = uncertain.data();
  search(a);
  rescanned += std::count(uncertain.begin(), uncertain.end(), 1);
  if (a.mirror) search_again(a);
}

Tensor integers(const Tensor& like, const std::vector<int64_t>& shape) {
  return make(like, Sizes(shape.data(), shape.size()), torch::headeronly::ScalarType::Long);
}

std::vector<int64_t> result_shape(const Tensor& query, const Tensor& keys, int64_t k) {
  std::vector<int64_t> shape;
  if (keys.dim() == 3) shape.push_back(keys.size(0));
  shape.push_back(query.size(query.dim() - 2)), shape.push_back(k);
  return shape;
}

}  // namespace

void knn_check(const Tensor& query, const Tensor& keys, const Tensor* values, const OptionalTensor& count, const OptionalTensor& norms,
               const OptionalTensor& mirror, const OptionalTensor& rounding, int64_t k, int64_t metric) {
  const auto q = query.sizes(), s = keys.sizes();
  const size_t dims = s.size();
  const auto type = keys.scalar_type();
  // The first `n` sizes are those of the keys.
  const auto leading = [&](const Tensor& t, size_t n) {
    const auto sizes = t.sizes();
    for (size_t i = 0; i < n; i++)
      if (sizes[i] != s[i]) return false;
    return true;
  };
  const auto also = [&](const OptionalTensor& t, size_t n, torch::headeronly::ScalarType of) {
    return !t || (t->is_cpu() && t->scalar_type() == of && t->sizes().size() == n && leading(*t, n));
  };
  using torch::headeronly::ScalarType;
  const bool fit = query.is_cpu() && keys.is_cpu() && query.scalar_type() == type && k >= 0 && metric >= 0 && metric < 3 && (dims == 2 || dims == 3) &&
      (q.size() == 2 || (q.size() == 3 && dims == 3 && q[0] == s[0])) && q[q.size() - 1] == s[dims - 1] &&
      (!values || (values->is_cpu() && values->scalar_type() == type && values->sizes().size() == dims && leading(*values, dims - 1))) &&
      (!count || (count->is_cpu() && count->scalar_type() == ScalarType::Long && count->numel() == (dims == 3 ? s[0] : 1))) &&
      also(norms, dims - 1, type == ScalarType::Double ? ScalarType::Double : ScalarType::Float) && also(mirror, dims, ScalarType::BFloat16) &&
      also(rounding, dims - 2, ScalarType::Float);
  if (!fit) fail("memcore: the arguments of this search do not fit each other");
}

Found knn_find(const Tensor& query, const Tensor& keys, const OptionalTensor& count, const OptionalTensor& norms, const OptionalTensor& mirror,
               const OptionalTensor& rounding, int64_t k, int64_t metric) {
  KnnArgs a{};
  a.dtype = dtype_of(keys), a.metric = (int)metric, a.k = k;
  a.A = keys.dim() == 3 ? keys.size(0) : 1, a.N = keys.size(keys.dim() - 2), a.D = keys.size(keys.dim() - 1);
  a.Q = query.size(query.dim() - 2), a.query_stride = query.dim() == 3 ? a.Q * a.D : 0;
  if (a.N >= (int64_t)1 << 32) fail("memcore: kNN kernels take dictionaries of up to 2^32 - 1 rows");
  const OptionalTensor rows = dense(count), squares = dense(norms), copies = dense(mirror), error = dense(rounding);
  a.query = in(query), a.keys = in(keys), a.count = (const int64_t*)in(rows), a.norms = in(squares);
  if (a.dtype == DType::f32) a.mirror = in(copies), a.rounding = (const float*)in(error);
  const std::vector<int64_t> shape = result_shape(query, keys, k);
  const Sizes sizes(shape.data(), shape.size());
  const auto type = a.dtype == DType::f64 ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
  Found found{integers(keys, shape), make(keys, sizes, type)};
  a.indices = (int64_t*)out(found.indices), a.distances = out(found.distances);
  run(a);
  return found;
}

KnnRead knn_reading(const Tensor& query, const Tensor& keys, const Tensor& indices, int64_t metric) {
  KnnRead a{};
  a.dtype = dtype_of(keys), a.metric = (int)metric, a.kernel = kSearchAlone, a.k = indices.size(indices.dim() - 1);
  a.A = keys.dim() == 3 ? keys.size(0) : 1, a.N = keys.size(keys.dim() - 2), a.D = keys.size(keys.dim() - 1);
  a.Q = query.size(query.dim() - 2), a.query_stride = query.dim() == 3 ? a.Q * a.D : 0;
  a.query = in(query), a.keys = in(keys), a.indices = (const int64_t*)in(indices);
  return a;
}

Rows::Rows(const KnnRead& a) {
  constexpr int kDigit = 11;
  int bits = 0;
  while ((a.A * a.N - 1) >> bits > 0) bits++;
  const int passes = bits > kDigit ? (int)up(bits, kDigit) : 1, digit_bits = (int)up(bits, passes);
  struct Use {
    int64_t row, place;
  };
  const int64_t per = a.Q * a.k;
  std::vector<Use> used, sorted;
  used.reserve((size_t)(a.A * per));
  for (int64_t d = 0; d < a.A; d++)
    for (int64_t i = d * per; i < (d + 1) * per; i++)
      if (a.indices[i] >= 0) used.push_back({d * a.N + a.indices[i], i});
  // By row, a digit at a time, which keeps the places of a row ascending.
  sorted.resize(used.size());
  std::array<int64_t, 1 << kDigit> at;
  for (int shift = 0; shift < bits; shift += digit_bits) {
    const auto digit = [&](const Use& use) { return (size_t)(use.row >> shift) % ((size_t)1 << digit_bits); };
    std::fill_n(at.begin(), (size_t)1 << digit_bits, 0);
    for (const Use& use : used) at[digit(use)]++;
    int64_t sum = 0;
    for (size_t i = 0; i < (size_t)1 << digit_bits; i++) sum += at[i], at[i] = sum - at[i];
    for (const Use& use : used) sorted[(size_t)at[digit(use)]++] = use;
    used.swap(sorted);
  }
  targets.reserve(used.size()), starts.reserve(used.size() + 1), places.reserve(used.size());
  for (const auto& [row, place] : used) {
    if (targets.empty() || targets.back() != row) targets.push_back(row), starts.push_back((int64_t)places.size());
    places.push_back(place);
  }
  starts.push_back((int64_t)places.size());
}

Tensor Rows::indices(const Tensor& keys) const {
  const int64_t U = size(), N = keys.size(keys.dim() - 2), dims = keys.dim() - 1;
  Tensor found = integers(keys, {dims, U});
  int64_t* to = (int64_t*)out(found);
  for (int64_t u = 0; u < U; u++) {
    if (dims == 2) to[u] = targets[(size_t)u] / N;
    to[(dims - 1) * U + u] = targets[(size_t)u] % N;
  }
  return found;
}

Gradients knn_gradients(KnnRead& a, const Tensor& query, const Tensor& keys, const OptionalTensor& values, bool sparse) {
  const Rows used(a);
  const int64_t U = used.size(), pairs = a.A * a.Q * a.k;
  const auto gradient = [&](const Tensor& t, int64_t width) { return sparse ? make(t, {U, width}) : torch::stable::new_zeros(t, t.sizes()); };
  Gradients found{make_like(query), sparse ? used.indices(keys) : integers(keys, {0}), gradient(keys, a.D), values ? gradient(*values, a.V) : make(keys, {0})};
  const std::unique_ptr<double[]> scratch(new double[(size_t)(3 * pairs + 1)]);
  a.to_query = scratch.get(), a.to_key = scratch.get() + pairs, a.weight = scratch.get() + 2 * pairs;
  a.starts = used.starts.data(), a.places = used.places.data(), a.targets = sparse ? nullptr : used.targets.data();
  a.dquery = out(found.dquery), a.dkeys = out(found.dkeys), a.dvalues = out(found.dvalues);
  auto *slopes = MC_PICK(knn_slopes), *scatter = MC_PICK(knn_scatter);
  parallel(a.query_stride ? a.A * a.Q : a.Q, (a.query_stride ? 1 : a.A) * a.k * (4 * a.D + 2 * a.V + 16), [&](int64_t b, int64_t e) { slopes(a, b, e); });
  parallel(U, (a.D + a.V) * (pairs / (U + 1) + 1), [&](int64_t b, int64_t e) { scatter(a, b, e); });
  return found;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> knn_search_fwd(Tensor query, Tensor keys, OptionalTensor count, OptionalTensor norms, OptionalTensor mirror,
                                                  OptionalTensor rounding, int64_t k, int64_t metric) {
  knn_check(query, keys, nullptr, count, norms, mirror, rounding, k, metric);
  query = dense(query), keys = dense(keys);
  const Found found = knn_find(query, keys, count, norms, mirror, rounding, k, metric);
  Tensor kept = make_like(found.indices), distances = found.distances;
  std::copy_n((const int64_t*)in(found.indices), found.indices.numel(), (int64_t*)out(kept));
  if (distances.scalar_type() != keys.scalar_type()) {
    KnnRead a = knn_reading(query, keys, found.indices, metric);
    distances = make(keys, found.indices.sizes());
    a.found = in(found.distances), a.distances = out(distances);
    auto* kernel = MC_PICK(knn_round);
    parallel(a.A * a.Q, a.k, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  }
  return {distances, found.indices, kept};
}

Gradients gradients(const OptionalTensor& grad, Tensor indices, Tensor query, Tensor keys, int64_t metric, bool sparse) {
  query = dense(query), keys = dense(keys), indices = dense(indices);
  const OptionalTensor g = dense(grad);
  KnnRead a = knn_reading(query, keys, indices, metric);
  a.grad_distances = in(g);
  return knn_gradients(a, query, keys, std::nullopt, sparse);
}

std::tuple<Tensor, Tensor> knn_search_bwd(OptionalTensor grad, OptionalTensor, Tensor indices, Tensor query, Tensor keys, OptionalTensor, OptionalTensor,
                                          OptionalTensor, OptionalTensor, int64_t, int64_t metric) {
  const Gradients found = gradients(grad, indices, query, keys, metric, false);
  return {found.dquery, found.dkeys};
}

std::tuple<Tensor, Tensor, Tensor> knn_search_rows(OptionalTensor grad, Tensor indices, Tensor query, Tensor keys, int64_t metric) {
  const Gradients found = gradients(grad, indices, query, keys, metric, true);
  return {found.dquery, found.rows, found.dkeys};
}

int64_t knn_rescans() { return rescanned; }
int64_t set_knn_products(int64_t most) { return products_wanted.exchange(most); }

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("knn_search_fwd", TORCH_BOX(&memcore::knn_search_fwd));
  m.impl("knn_search_bwd", TORCH_BOX(&memcore::knn_search_bwd));
  m.impl("knn_search_rows", TORCH_BOX(&memcore::knn_search_rows));
}

// Queries whose neighbours a mirror did not prove, so far; which products of bfloat16 may be used (`Products`).
STABLE_TORCH_LIBRARY_FRAGMENT(memcore, m) {
  m.def("_knn_rescans() -> int");
  m.def("_set_knn_products(int most) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(memcore, CompositeExplicitAutograd, m) {
  m.impl("_knn_rescans", TORCH_BOX(&memcore::knn_rescans));
  m.impl("_set_knn_products", TORCH_BOX(&memcore::set_knn_products));
}
