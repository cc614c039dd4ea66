#include "interpolate.h"

#include "addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

// One row at a time; where storage is the accumulation type already, without copies.
template <class T> void forward(const WeightArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  constexpr int L = Lanes<C>::n;
  C *first, *second, *result;
  Arena arena([&](Arena& x) { x.take(first, a.N), x.take(second, a.N), x.take(result, a.N); });
  for (int64_t r = begin; r < end; r++) {
    const C* content = widened((const T*)a.first + r * a.N, a.N, first);
    const C* previous = widened((const T*)a.second + r * a.N, a.N, second);
    const Vec<C> gate = splat((C)wide(((const T*)a.parameter)[r])), keep = 1 - gate;
    C* out = result;
    if constexpr (__is_same(T, C)) out = (T*)a.result + r * a.N;
    int64_t n = 0;
    for (; n + L <= a.N; n += L) store(out + n, gate * load(content + n) + keep * load(previous + n));
    if (n < a.N) {
      const int part = (int)(a.N - n);
      store_part(out + n, gate * load_part(content + n, part) + keep * load_part(previous + n, part), part);
    }
    if constexpr (!__is_same(T, C)) narrow((T*)a.result + r * a.N, out, a.N);
  }
}

template <class T> void backward(const WeightArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  constexpr int L = Lanes<C>::n;
  C *first, *second, *third;
  Arena arena([&](Arena& x) { x.take(first, a.N), x.take(second, a.N), x.take(third, a.N); });
  for (int64_t r = begin; r < end; r++) {
    const C* content = widened((const T*)a.first + r * a.N, a.N, first);
    const C* previous = widened((const T*)a.second + r * a.N, a.N, second);
    const C* grad = widened((const T*)a.grad + r * a.N, a.N, third);
    const Vec<C> gate = splat((C)wide(((const T*)a.parameter)[r])), keep = 1 - gate;
    C *dcontent = first, *dprevious = second;
    if constexpr (__is_same(T, C)) dcontent = (T*)a.dfirst + r * a.N, dprevious = (T*)a.dsecond + r * a.N;
    Total<C> t;
    for (int64_t n = 0; n < a.N; n += L) {
      const int part = a.N - n < L ? (int)(a.N - n) : L;
      const Vec<C> d = load_n(grad + n, part);
      t.add(d * (load_n(content + n, part) - load_n(previous + n, part)));
      store_n(dcontent + n, gate * d, part);
      store_n(dprevious + n, keep * d, part);
    }
    if constexpr (!__is_same(T, C)) {
      narrow((T*)a.dfirst + r * a.N, dcontent, a.N);
      narrow((T*)a.dsecond + r * a.N, dprevious, a.N);
    }
    put((T*)a.dparameter + r, t.value());
  }
}

}  // namespace

void interpolate_fwd(const WeightArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}
void interpolate_bwd(const WeightArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

}  // namespace MC_ISA
}  // namespace memcore
