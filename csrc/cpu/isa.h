// Which instruction set the CPU kernels use. No torch header: kernel files include this for MC_ISA's neighbours.
#pragma once

namespace memcore {

enum Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The instruction set in force: the best one of this machine, or what MEMCORE_CPU_ISA or torch.ops.memcore._set_cpu_isa
// asks for. Costs one relaxed load; throws std::runtime_error at first use when MEMCORE_CPU_ISA or MEMCORE_CACHE_MB cannot be met.
int isa();

// Whether this processor reads ahead so well that reads, writes, steps and searches by one query lose by asking for the rows that come
// next: AMD's with AVX-512, measured on a Zen 4, where addressing and searches by many queries, which ask too, lose nothing. Others that were measured gain.
bool reads_ahead();

}  // namespace memcore

#if defined(MC_HAS_AVX2) && defined(MC_HAS_AVX512)
#define MC_X86_ONLY(...) __VA_ARGS__
#else
#define MC_X86_ONLY(...)
#endif

// MC_DECLARE(void read_fwd(const float* p, int64_t n);)  in namespace memcore: the function in every instruction set.
// `<op>_kernel.cpp` defines it in namespace memcore::MC_ISA and is compiled once for each.
#define MC_DECLARE(...)           \
  namespace baseline {            \
  __VA_ARGS__                     \
  }                               \
  MC_X86_ONLY(namespace avx2 {    \
    __VA_ARGS__                   \
  } namespace avx512 {            \
    __VA_ARGS__                   \
  })

// MC_PICK(read_fwd)(p, n): the version in force. Pick once, outside parallel loops.
#define MC_PICK(fn) (MC_X86_ONLY(isa() == kAvx512 ? avx512::fn : isa() == kAvx2 ? avx2::fn :) baseline::fn)
