// Huge pages for large arrays: a page fault for 2 MiB instead of 512, and one entry of the TLB.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace memcore {

constexpr uintptr_t kHugePage = 2 << 20;

// Asks for them where an array will lie. Systems that give them to whoever asks are the rule.
inline void ask_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t from = ((uintptr_t)p + kHugePage - 1) / kHugePage * kHugePage, to = ((uintptr_t)p + (uintptr_t)bytes) / kHugePage * kHugePage;
  if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);  // a hint: nothing depends on its success
#endif
}

}  // namespace memcore
