#include "least_used.h"

#include "addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

// Numbers that ascend by (usage, index), NaN last: a whole-number comparison instead of three branches.
typedef unsigned __int128 Rank;
MC_INLINE Rank rank(float usage, int64_t i) {
  const float x = usage + 0;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = x != x ? ~0u : bits ^ (bits >> 31 ? ~0u : 1u << 31);
  return (Rank)bits << 64 | (uint64_t)i;
}
MC_INLINE Rank rank(double usage, int64_t i) {
  const double x = usage + 0;
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  bits = x != x ? ~0ull : bits ^ (bits >> 63 ? ~0ull : 1ull << 63);
  return (Rank)bits << 64 | (uint64_t)i;
}

// Puts x into the heap's top, the greatest of each branch above the others.
MC_INLINE void replace_top(Rank* heap, int64_t size, Rank x) {
  int64_t i = 0;
  for (int64_t child; (child = 2 * i + 1) < size; i = child) {
    if (child + 1 < size) child += heap[child] < heap[child + 1];
    if (heap[child] <= x) break;
    heap[i] = heap[child];
  }
  heap[i] = x;
}

template <class T> void forward(const LeastArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  constexpr int L = Lanes<C>::n;
  C* u;
  Rank* heap;
  Arena arena([&](Arena& x) { x.take(u, a.N), x.take(heap, a.n); });
  for (int64_t b = begin; b < end; b++) {
    const C* usage = widened((const T*)a.usage + b * a.N, a.N, u);
    // A heap of the n least so far, the greatest of them on top.
    int64_t size = 0, i = 0;
    for (; i < a.N && size < a.n; i++) {
      const Rank x = rank(usage[i], i);
      int64_t at = size++;
      for (; at > 0 && heap[(at - 1) / 2] < x; at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
      heap[at] = x;
    }
    for (; i < a.N && size > 0; i++) {
      if (const C top = usage[(int64_t)(uint64_t)heap[0]]; top == top) {  // most vectors have no slot below it
        uint32_t hits = 0;
        while (i + L <= a.N && !(hits = below(load(usage + i), splat(top)))) i += L;
        if (hits) i += __builtin_ctz(hits);
        if (i == a.N) break;
      }
      if (const Rank x = rank(usage[i], i); x < heap[0]) replace_top(heap, size, x);
    }
    int64_t* to = a.indices + b * a.n;
    for (; size > 0; size--) {
      to[size - 1] = (int64_t)(uint64_t)heap[0];
      replace_top(heap, size - 1, heap[size - 1]);
    }
  }
}

}  // namespace

void least_used_fwd(const LeastArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}

}  // namespace MC_ISA
}  // namespace memcore
