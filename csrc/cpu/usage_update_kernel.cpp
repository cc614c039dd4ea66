#include "usage_update.h"

#include "addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

template <class T> void forward(const UsageArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  C *total, *row;
  Arena arena([&](Arena& x) { x.take(total, a.N), x.take(row, a.N); });
  for (int64_t b = begin; b < end; b++) {
    widen(total, (const T*)a.usage + b * a.N, a.N);
    for (int64_t n = 0; n < a.N; n++) total[n] *= (C)a.decay;
    for (int64_t h = 0; h < a.Hr + a.Hw; h++) {
      const T* from = h < a.Hr ? (const T*)a.reads + (b * a.Hr + h) * a.N : (const T*)a.writes + (b * a.Hw + h - a.Hr) * a.N;
      const C* w = widened(from, a.N, row);
      for (int64_t n = 0; n < a.N; n++) total[n] += w[n];
    }
    narrow((T*)a.result + b * a.N, total, a.N);
  }
}

template <class T> void backward(const UsageArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  C* row;
  Arena arena([&](Arena& x) { x.take(row, a.N); });
  for (int64_t b = begin; b < end; b++) {
    const T* grad = (const T*)a.grad + b * a.N;
    widen(row, grad, a.N);
    for (int64_t n = 0; n < a.N; n++) row[n] *= (C)a.decay;
    narrow((T*)a.dusage + b * a.N, row, a.N);
    for (int64_t h = 0; h < a.Hr; h++) copy((T*)a.dreads + (b * a.Hr + h) * a.N, grad, a.N);
    for (int64_t h = 0; h < a.Hw; h++) copy((T*)a.dwrites + (b * a.Hw + h) * a.N, grad, a.N);
  }
}

}  // namespace

void usage_update_fwd(const UsageArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}
void usage_update_bwd(const UsageArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

}  // namespace MC_ISA
}  // namespace memcore
