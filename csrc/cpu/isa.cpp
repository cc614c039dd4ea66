#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>

#include "common.h"
#include "pages.h"

#ifdef MC_HAS_AVX2
#include <cpuid.h>
#endif

namespace memcore {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
constexpr int kUnset = -1;
std::atomic<int> current{kUnset};
std::atomic<int> ahead{kUnset};  // what reads_ahead() says; set by tests

bool supported(int level) {
  if (level == kBaseline) return true;
#ifdef MC_HAS_AVX2
  unsigned a, b, c = 0, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

std::string usable(const char* separator) {
  std::string names = kNames[kBaseline];
  for (int level = kAvx2; level <= kAvx512; ++level)
    if (supported(level)) names += std::string(separator) + kNames[level];
  return names;
}

int parse(const std::string& name, const char* source) {
  if (name == "auto") return supported(kAvx512) ? kAvx512 : supported(kAvx2) ? kAvx2 : kBaseline;
  for (int level = kBaseline; level <= kAvx512; ++level)
    if (name == kNames[level] && supported(level)) return level;
  fail("memcore: " + std::string(source) + " must be one of auto, " + usable(", ") + " on this machine, got '" + name + "'");
}

}  // namespace

int isa() {
  int level = current.load(std::memory_order_relaxed);
  if (level == kUnset) {
    if (!wrong_block_limit().empty()) fail(wrong_block_limit());
    const char* asked = std::getenv("MEMCORE_CPU_ISA");
    level = parse(asked && *asked ? asked : "auto", "MEMCORE_CPU_ISA");
    current.store(level, std::memory_order_relaxed);
  }
  return level;
}

bool reads_ahead() {
  int does = ahead.load(std::memory_order_relaxed);
  if (does == kUnset) {
#ifdef MC_HAS_AVX2
    does = __builtin_cpu_is("amd") && supported(kAvx512);
#else
    does = false;
#endif
    ahead.store(does, std::memory_order_relaxed);
  }
  return does;
}

namespace {

std::string cpu_isa() { return kNames[isa()]; }

std::string cpu_isas() { return usable(","); }

std::string set_cpu_isa(const std::string& name) {
  const int wanted = parse(name, "the instruction set");
  const int previous = current.exchange(wanted, std::memory_order_relaxed);
  return previous == kUnset ? "auto" : kNames[previous];
}

bool set_reads_ahead(bool does) {
  const bool did = reads_ahead();
  ahead.store(does, std::memory_order_relaxed);
  return did;
}

bool set_allocate_by_aten(bool wanted) { return allocate_by_aten.exchange(wanted); }

// Of a dense tensor that nobody has written yet.
void ask_huge_pages_of(Tensor t) { ask_huge_pages(t.mutable_data_ptr(), t.numel() * (int64_t)t.element_size()); }

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_FRAGMENT(memcore, m) {
  m.def("_cpu_isa() -> str");
  m.def("_cpu_isas() -> str");
  m.def("_set_cpu_isa(str name) -> str");
  m.def("_set_allocate_by_aten(bool wanted) -> bool");
  m.def("_set_reads_ahead(bool does) -> bool");
  m.def("_ask_huge_pages(Tensor t) -> ()");
  m.def("_limit_blocks(int bytes) -> int");
  m.def("_block_limit() -> int");
  m.def("_kept_blocks() -> int");
  m.def("_drop_blocks() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) { m.impl("_ask_huge_pages", TORCH_BOX(&memcore::ask_huge_pages_of)); }

STABLE_TORCH_LIBRARY_IMPL(memcore, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&memcore::cpu_isa));
  m.impl("_cpu_isas", TORCH_BOX(&memcore::cpu_isas));
  m.impl("_set_cpu_isa", TORCH_BOX(&memcore::set_cpu_isa));
  m.impl("_set_allocate_by_aten", TORCH_BOX(&memcore::set_allocate_by_aten));
  m.impl("_set_reads_ahead", TORCH_BOX(&memcore::set_reads_ahead));
  m.impl("_limit_blocks", TORCH_BOX(&memcore::limit_blocks));
  m.impl("_block_limit", TORCH_BOX(&memcore::block_limit));
  m.impl("_kept_blocks", TORCH_BOX(&memcore::kept_blocks));
  m.impl("_drop_blocks", TORCH_BOX(&memcore::drop_blocks));
}
