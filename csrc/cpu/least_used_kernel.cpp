#include "least_used.h"

#include "addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

// Ascending by (usage, index), NaN last.
template <class C> MC_INLINE bool before(const C* u, int64_t i, int64_t j) {
  const C x = u[i], y = u[j];
  if (x < y) return true;
  if (y < x) return false;
  const bool nx = x != x, ny = y != y;
  return nx != ny ? ny : i < j;
}

template <class C> MC_INLINE void sift_down(const C* u, int64_t* heap, int64_t size) {
  for (int64_t i = 0;;) {
    int64_t child = 2 * i + 1;
    if (child >= size) return;
    if (child + 1 < size && before(u, heap[child], heap[child + 1])) child++;
    if (!before(u, heap[i], heap[child])) return;
    const int64_t t = heap[i];
    heap[i] = heap[child], heap[child] = t;
    i = child;
  }
}

template <class T> void forward(const LeastArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  constexpr int L = Lanes<C>::n;
  C* u;
  Arena arena([&](Arena& x) { x.take(u, a.N); });
  for (int64_t b = begin; b < end; b++) {
    widen(u, (const T*)a.usage + b * a.N, a.N);
    // A heap of the n least so far, the greatest of them on top.
    int64_t *heap = a.indices + b * a.n, size = 0, i = 0;
    for (; i < a.N && size < a.n; i++) {
      int64_t at = size++;
      for (; at > 0 && before(u, heap[(at - 1) / 2], i); at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
      heap[at] = i;
    }
    for (; i < a.N && size > 0; i++) {
      if (const C top = u[heap[0]]; top == top) {  // most vectors have no slot below it
        uint32_t hits = 0;
        while (i + L <= a.N && !(hits = below(load(u + i), splat(top)))) i += L;
        if (hits) i += __builtin_ctz(hits);
      }
      if (i == a.N || !before(u, i, heap[0])) continue;
      heap[0] = i;
      sift_down(u, heap, size);
    }
    while (size > 1) {
      const int64_t top = heap[0];
      heap[0] = heap[--size], heap[size] = top;
      sift_down(u, heap, size);
    }
  }
}

}  // namespace

void least_used_fwd(const LeastArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}

}  // namespace MC_ISA
}  // namespace memcore
