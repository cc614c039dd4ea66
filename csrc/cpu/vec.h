// Vectors of the instruction set a kernel file is compiled for (MC_ISA): loads and stores of every storage type,
// exponential, logarithm, reductions. No torch header; everything is inline in the instruction set's own namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define MC_INLINE inline __attribute__((always_inline))
#define MC_INLINED __attribute__((always_inline))  // of a lambda; what it captures by reference would be read through two pointers at each use

namespace memcore {
namespace MC_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class C> struct Lanes;
template <> struct Lanes<float> {
  static constexpr int n = kBytes / 4;
  typedef float V __attribute__((vector_size(kBytes)));
  typedef float Anywhere __attribute__((vector_size(kBytes), aligned(4)));
  typedef int32_t I __attribute__((vector_size(kBytes)));
  typedef uint32_t U __attribute__((vector_size(kBytes)));
};
template <> struct Lanes<double> {
  static constexpr int n = kBytes / 8;
  typedef double V __attribute__((vector_size(kBytes)));
  typedef double Anywhere __attribute__((vector_size(kBytes), aligned(8)));
  typedef int64_t I __attribute__((vector_size(kBytes)));
};
template <class C> using Vec = typename Lanes<C>::V;
template <class C> using IVec = typename Lanes<C>::I;
typedef Lanes<float>::U UVec;  // bit patterns: their arithmetic wraps

// The dtype sums are taken in: float, or double for double.
template <class T> struct AccOf { typedef float type; };
template <> struct AccOf<double> { typedef double type; };
template <class T> using Acc = typename AccOf<T>::type;

#if defined(__AVX512F__)
MC_INLINE Vec<float> splat(float x) { return (Vec<float>)_mm512_set1_ps(x); }
MC_INLINE Vec<double> splat(double x) { return (Vec<double>)_mm512_set1_pd(x); }
#elif defined(__AVX2__)
MC_INLINE Vec<float> splat(float x) { return (Vec<float>)_mm256_set1_ps(x); }
MC_INLINE Vec<double> splat(double x) { return (Vec<double>)_mm256_set1_pd(x); }
#else
MC_INLINE Vec<float> splat(float x) { return Vec<float>{x, x, x, x}; }
MC_INLINE Vec<double> splat(double x) { return Vec<double>{x, x}; }
#endif
template <class C> constexpr C infinity() { return (C)__builtin_inf(); }

MC_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// Rows of scratch arrays are padded so that every access is a whole vector.
template <class C> MC_INLINE int64_t padded(int64_t n) { return round_up(n, Lanes<C>::n); }

// As vectors of C, not as bytes: a store of bytes may change anything, sizes and pointers too, which would then be read again after each.
template <class C> MC_INLINE Vec<C> load(const C* p) { return *(const typename Lanes<C>::Anywhere*)p; }
template <class C> MC_INLINE void store(C* p, Vec<C> v) { *(typename Lanes<C>::Anywhere*)p = v; }

// A bit for each lane of x that is less than t's.
#if defined(__AVX512F__)
MC_INLINE uint32_t below(Vec<float> x, Vec<float> t) { return _mm512_cmp_ps_mask((__m512)x, (__m512)t, _CMP_LT_OQ); }
MC_INLINE uint32_t below(Vec<double> x, Vec<double> t) { return _mm512_cmp_pd_mask((__m512d)x, (__m512d)t, _CMP_LT_OQ); }
#elif defined(__AVX2__)
MC_INLINE uint32_t below(Vec<float> x, Vec<float> t) { return (uint32_t)_mm256_movemask_ps((__m256)(x < t)); }
MC_INLINE uint32_t below(Vec<double> x, Vec<double> t) { return (uint32_t)_mm256_movemask_pd((__m256d)(x < t)); }
#elif defined(__SSE2__)
MC_INLINE uint32_t below(Vec<float> x, Vec<float> t) { return (uint32_t)_mm_movemask_ps((__m128)(x < t)); }
MC_INLINE uint32_t below(Vec<double> x, Vec<double> t) { return (uint32_t)_mm_movemask_pd((__m128d)(x < t)); }
#else
template <class V> MC_INLINE uint32_t below(V x, V t) {
  uint32_t bits = 0;
  for (int i = 0; i < (int)(sizeof(V) / sizeof(x[0])); i++) bits |= (uint32_t)(x[i] < t[i]) << i;
  return bits;
}
#endif

#if defined(__AVX512F__)
MC_INLINE Vec<float> load_part(const float* p, int n) { return (Vec<float>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
MC_INLINE Vec<double> load_part(const double* p, int n) { return (Vec<double>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p); }
// Piecewise: masked stores cost many times a plain one on some CPUs.
MC_INLINE void store_part(float* p, Vec<float> v, int n) {
  __m256 y = _mm512_castps512_ps256((__m512)v);
  if (n & 8) {
    _mm256_storeu_ps(p, y);
    y = _mm512_extractf32x8_ps((__m512)v, 1), p += 8;
  }
  __m128 x = _mm256_castps256_ps128(y);
  if (n & 4) {
    _mm_storeu_ps(p, x);
    x = _mm256_extractf128_ps(y, 1), p += 4;
  }
  if (n & 2) {
    _mm_storel_pi((__m64*)p, x);
    x = _mm_movehl_ps(x, x), p += 2;
  }
  if (n & 1) _mm_store_ss(p, x);
}
MC_INLINE void store_part(double* p, Vec<double> v, int n) {
  __m256d y = _mm512_castpd512_pd256((__m512d)v);
  if (n & 4) {
    _mm256_storeu_pd(p, y);
    y = _mm512_extractf64x4_pd((__m512d)v, 1), p += 4;
  }
  __m128d x = _mm256_castpd256_pd128(y);
  if (n & 2) {
    _mm_storeu_pd(p, x);
    x = _mm256_extractf128_pd(y, 1), p += 2;
  }
  if (n & 1) _mm_store_sd(p, x);
}
#else
#if defined(__AVX2__)
MC_INLINE Vec<float> load_part(const float* p, int n) {
  static const int32_t mask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
  return (Vec<float>)_mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i*)(mask + 8 - n)));
}
MC_INLINE Vec<double> load_part(const double* p, int n) {
  static const int64_t mask[8] = {-1, -1, -1, -1, 0, 0, 0, 0};
  return (Vec<double>)_mm256_maskload_pd(p, _mm256_loadu_si256((const __m256i*)(mask + 4 - n)));
}
#else
template <class C> MC_INLINE Vec<C> load_part(const C* p, int n) {
  Vec<C> v{};
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
}
#endif
// Piecewise: masked stores are microcoded on some CPUs.
#if defined(__AVX2__)
MC_INLINE void store_part(float* p, Vec<float> v, int n) {
  __m128 x = _mm256_castps256_ps128((__m256)v);
  if (n & 4) {
    _mm_storeu_ps(p, x);
    x = _mm256_extractf128_ps((__m256)v, 1), p += 4;
  }
  if (n & 2) {
    _mm_storel_pi((__m64*)p, x);
    x = _mm_movehl_ps(x, x), p += 2;
  }
  if (n & 1) _mm_store_ss(p, x);
}
MC_INLINE void store_part(double* p, Vec<double> v, int n) {
  __m128d x = _mm256_castpd256_pd128((__m256d)v);
  if (n & 2) {
    _mm_storeu_pd(p, x);
    x = _mm256_extractf128_pd((__m256d)v, 1), p += 2;
  }
  if (n & 1) _mm_store_sd(p, x);
}
#else
template <class C> MC_INLINE void store_part(C* p, Vec<C> v, int n) {
  for (int i = 0; i < n; i++) p[i] = v[i];
}
#endif
#endif

template <class C> MC_INLINE Vec<C> load_n(const C* p, int n) { return n >= Lanes<C>::n ? load(p) : load_part(p, n); }
template <class C> MC_INLINE void store_n(C* p, Vec<C> v, int n) {
  if (n >= Lanes<C>::n) store(p, v);
  else store_part(p, v, n);
}

// The cache lines of `bytes` bytes, to be read once or (WRITE) overwritten soon.
template <bool WRITE> MC_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    if (WRITE) __builtin_prefetch((const char*)p + i, 1, 3);
    else __builtin_prefetch((const char*)p + i, 0, 0);
  }
}
// Into the second cache.
MC_INLINE void fetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i, 0, 2);
}

// Stores past the caches what nobody reads soon, at p aligned to whole vectors; `stream_fence` before another thread reads it, as after stream_copy.
template <class C> MC_INLINE void stream_store(C* p, Vec<C> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps((float*)p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps((float*)p, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps((float*)p, (__m128)v);
#else
  store(p, v);
#endif
}
template <class C> MC_INLINE void stream_copy(C* to, const C* from, int64_t n) {
  constexpr int L = Lanes<C>::n;
  int64_t i = 0;
  if ((uintptr_t)to % kBytes == 0)
    for (; i + L <= n; i += L) stream_store(to + i, load(from + i));
  for (; i < n; i++) to[i] = from[i];
}
MC_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- storage types ----

MC_INLINE float to_float(bf16 x) {
  const uint32_t u = (uint32_t)x.bits << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
MC_INLINE float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = (uint32_t)(x.bits & 0x7fff) << 13;
  uint32_t u;
  float f;
  if (rest >= 0x0f800000) {  // infinity, NaN
    u = rest | 0x7f800000;
    std::memcpy(&f, &u, 4);
  } else {  // the power of two shifts the exponent's bias and makes subnormals normal
    std::memcpy(&f, &rest, 4);
    f *= 5.192296858534828e33f;  // 2^112
  }
  std::memcpy(&u, &f, 4);
  u |= sign;
  std::memcpy(&f, &u, 4);
  return f;
#endif
}
MC_INLINE bf16 to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if (f != f) return bf16{0x7fc0};
  return bf16{(uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
MC_INLINE f16 to_f16(float f) {
#if defined(__F16C__)
  return f16{(uint16_t)_cvtss_sh(f, 0)};
#else
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint32_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return f16{(uint16_t)(sign | 0x7e00)};
  if (u >= 0x477ff000) return f16{(uint16_t)(sign | 0x7c00)};  // rounds to infinity
  if (u < 0x38800000) {  // subnormal: let the adder round at 2^-24
    float a;
    std::memcpy(&a, &u, 4);
    a += 0.5f;
    std::memcpy(&u, &a, 4);
    return f16{(uint16_t)(sign | (u - 0x3f000000))};
  }
  return f16{(uint16_t)(sign | ((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13))};
#endif
}

// Contiguous conversion between storage and the accumulation type; a plain copy where they are the same. Empty tensors have no
// address, which memcpy may not be given.
template <class C> MC_INLINE void copy(C* to, const C* from, int64_t n) {
  if (n > 0) std::memcpy(to, from, (size_t)n * sizeof(C));
}
template <class T> MC_INLINE void clear(T* to, int64_t n) {
  if (n > 0) std::memset((void*)to, 0, (size_t)n * sizeof(T));
}
MC_INLINE void widen(float* to, const float* from, int64_t n) { copy(to, from, n); }
MC_INLINE void widen(double* to, const double* from, int64_t n) { copy(to, from, n); }
template <class T> MC_INLINE void widen(float* to, const T* from, int64_t n) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128((const __m128i*)(from + i));
    if constexpr (__is_same(T, f16)) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(h));
    else _mm256_storeu_ps(to + i, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)));
  }
#endif
  for (; i < n; i++) to[i] = to_float(from[i]);
}
MC_INLINE void narrow(float* to, const float* from, int64_t n) { copy(to, from, n); }
MC_INLINE void narrow(double* to, const double* from, int64_t n) { copy(to, from, n); }
MC_INLINE void narrow(bf16* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = to_bf16(from[i]);
}
MC_INLINE void narrow(f16* to, const float* from, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__) && defined(__AVX2__)
  for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; i++) to[i] = to_f16(from[i]);
}
MC_INLINE float wide(float x) { return x; }
MC_INLINE double wide(double x) { return x; }
MC_INLINE float wide(bf16 x) { return to_float(x); }
MC_INLINE float wide(f16 x) { return to_float(x); }
MC_INLINE void put(float* p, float x) { *p = x; }
MC_INLINE void put(double* p, double x) { *p = x; }
MC_INLINE void put(bf16* p, float x) { *p = to_bf16(x); }
MC_INLINE void put(f16* p, float x) { *p = to_f16(x); }

// ---- reductions, always in the same order ----

template <class C> MC_INLINE C sum(Vec<C> v) {
  C x[Lanes<C>::n];
  std::memcpy(x, &v, sizeof v);
  for (int half = Lanes<C>::n / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
}
#if defined(__SSE2__)
MC_INLINE __m128 fold4(Vec<float> v);
template <> MC_INLINE float sum<float>(Vec<float> v) {
  const __m128 x = fold4(v), y = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}
MC_INLINE __m128 fold4(Vec<float> v) {
#if defined(__AVX512F__)
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#elif defined(__AVX2__)
  return _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  return (__m128)v;
#endif
}
// Four sums at once; each in the order of `sum`.
MC_INLINE void sum4(Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d, float* out) {
  const __m128 x = fold4(a), y = fold4(b), z = fold4(c), w = fold4(d);
  const __m128 s = _mm_add_ps(_mm_movelh_ps(x, y), _mm_movehl_ps(y, x));  // x0+x2 x1+x3 y0+y2 y1+y3
  const __m128 t = _mm_add_ps(_mm_movelh_ps(z, w), _mm_movehl_ps(w, z));
  _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(s, t, _MM_SHUFFLE(2, 0, 2, 0)), _mm_shuffle_ps(s, t, _MM_SHUFFLE(3, 1, 3, 1))));
}
#else
MC_INLINE void sum4(Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d, float* out) {
  out[0] = sum<float>(a), out[1] = sum<float>(b), out[2] = sum<float>(c), out[3] = sum<float>(d);
}
#endif
MC_INLINE void sum4(Vec<double> a, Vec<double> b, Vec<double> c, Vec<double> d, double* out) {
  out[0] = sum<double>(a), out[1] = sum<double>(b), out[2] = sum<double>(c), out[3] = sum<double>(d);
}
#if defined(__AVX2__)
// Eight sums at once by adding while transposing: a fifth fewer instructions than two sum4, in an order of their own.
MC_INLINE __m256 fold8(Vec<float> v) {
#if defined(__AVX512F__)
  return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
  return (__m256)v;
#endif
}
MC_INLINE void sum8(const Vec<float>* v, float* out) {
  const auto two = [](__m256 a, __m256 b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); };
  const auto four = [&](const Vec<float>* p) {
    const __m256d x = _mm256_castps_pd(two(fold8(p[0]), fold8(p[1]))), y = _mm256_castps_pd(two(fold8(p[2]), fold8(p[3])));
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  };
  const __m256 x = four(v), y = four(v + 4);
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31)));
}
#else
MC_INLINE void sum8(const Vec<float>* v, float* out) {
  sum4(v[0], v[1], v[2], v[3], out);
  sum4(v[4], v[5], v[6], v[7], out + 4);
}
#endif
MC_INLINE void sum8(const Vec<double>* v, double* out) {
  for (int i = 0; i < 8; i++) out[i] = sum<double>(v[i]);
}
// The sums of n vectors; `out` has room for n + 4.
template <int n, class V, class C> MC_INLINE void sum_all(const V* v, C* out) {
  if constexpr (n >= 8) {
    sum8(v, out);
    sum_all<n - 8>(v + 8, out + 8);
  } else if constexpr (n >= 4) {
    sum4(v[0], v[1], v[2], v[3], out);
    sum_all<n - 4>(v + 4, out + 4);
  } else if constexpr (n > 0) {
    sum4(v[0], v[n > 1 ? 1 : 0], v[n > 2 ? 2 : 0], v[0], out);
  }
}
MC_INLINE float root(float x) { return __builtin_sqrtf(x); }
MC_INLINE double root(double x) { return __builtin_sqrt(x); }
// 1 / sqrt(x) for x > 0 and finite, 1 / x for normal x with a normal reciprocal: where the division unit is slow, from the approximation
// (14 bits) by a Newton step, to about a unit in the last place.
MC_INLINE Vec<float> inverse_root(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> y = (Vec<float>)_mm512_rsqrt14_ps((__m512)x);
  return y + y * (0.5f - 0.5f * x * y * y);
#elif defined(__AVX2__)
  return 1 / (Vec<float>)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < Lanes<float>::n; i++) x[i] = 1 / root((float)x[i]);
  return x;
#endif
}
MC_INLINE Vec<double> inverse_root(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::n; i++) x[i] = 1 / root((double)x[i]);
  return x;
}
MC_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> y = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return y + y * (1 - x * y);
#else
  return 1 / x;
#endif
}
MC_INLINE Vec<double> reciprocal(Vec<double> x) { return 1 / x; }
// Running extremes pass over NaN in `x`.
#if defined(__AVX512F__)
MC_INLINE Vec<float> running_max(Vec<float> m, Vec<float> x) { return (Vec<float>)_mm512_max_ps((__m512)x, (__m512)m); }
MC_INLINE Vec<float> running_min(Vec<float> m, Vec<float> x) { return (Vec<float>)_mm512_min_ps((__m512)x, (__m512)m); }
#elif defined(__AVX2__)
MC_INLINE Vec<float> running_max(Vec<float> m, Vec<float> x) { return (Vec<float>)_mm256_max_ps((__m256)x, (__m256)m); }
MC_INLINE Vec<float> running_min(Vec<float> m, Vec<float> x) { return (Vec<float>)_mm256_min_ps((__m256)x, (__m256)m); }
#else
MC_INLINE Vec<float> running_max(Vec<float> m, Vec<float> x) { return x > m ? x : m; }
MC_INLINE Vec<float> running_min(Vec<float> m, Vec<float> x) { return x < m ? x : m; }
#endif
MC_INLINE Vec<double> running_max(Vec<double> m, Vec<double> x) { return x > m ? x : m; }
MC_INLINE Vec<double> running_min(Vec<double> m, Vec<double> x) { return x < m ? x : m; }
template <class C> MC_INLINE C max_of(Vec<C> v) {
#if defined(__AVX512F__)
  if constexpr (__is_same(C, float)) return _mm512_reduce_max_ps((__m512)v);
#endif
  C m = v[0];
  for (int i = 1; i < Lanes<C>::n; i++) m = v[i] > m ? v[i] : m;
  return m;
}
template <class C> MC_INLINE C min_of(Vec<C> v) {
#if defined(__AVX512F__)
  if constexpr (__is_same(C, float)) return _mm512_reduce_min_ps((__m512)v);
#endif
  C m = v[0];
  for (int i = 1; i < Lanes<C>::n; i++) m = v[i] < m ? v[i] : m;
  return m;
}

// ---- exponential and logarithm ----

// These functions take n vectors statement by statement: one vector's chain of dependent operations is longer than what a processor looks ahead.
constexpr int kAbreast = 2;  // more of them spill
template <int n> struct Number {
  static constexpr int value = n;
};
// f(first, Number<how many>) over `count` numbers of a row in whole vectors, kAbreast at a time.
template <class C, class F> MC_INLINE void abreast(int64_t count, F f) {
  constexpr int L = Lanes<C>::n;
  int64_t i = 0;
  for (; i + kAbreast * L <= count; i += kAbreast * L) f(i, Number<kAbreast>{});
  for (; i + L <= count; i += L) f(i, Number<1>{});
}
template <int n, class F> MC_INLINE void each_of(F f) {
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) f(i);
}

// exp in single precision: 2^k e^r with |r| <= ln2 / 2 and Moshier's minimax coefficients (Cephes), relative error 2e-7;
// below -87.3 it is 0 (no subnormal results). For x <= 0; other x give anything but a trap, NaN gives NaN.
template <int n> MC_INLINE void exp_negatives(Vec<float>* x) {
  Vec<float> t[n], r[n], r2[n], p[n], q[n];
  each_of<n>([&](int i) MC_INLINED { t[i] = x[i] * 1.44269504088896341f + 12582912.0f; });  // the low bits hold x / ln2 to the nearest integer
  each_of<n>([&](int i) MC_INLINED { q[i] = t[i] - 12582912.0f; });
  each_of<n>([&](int i) MC_INLINED { r[i] = x[i] - q[i] * 0.693359375f; });
  each_of<n>([&](int i) MC_INLINED { r[i] = r[i] + q[i] * 2.12194440e-4f; });
  each_of<n>([&](int i) MC_INLINED { r2[i] = r[i] * r[i]; });
  each_of<n>([&](int i) MC_INLINED { p[i] = 1.9875691500e-4f * r[i] + 1.3981999507e-3f; });
  each_of<n>([&](int i) MC_INLINED { q[i] = 8.3334519073e-3f * r[i] + 4.1665795894e-2f; });
  each_of<n>([&](int i) MC_INLINED { p[i] = p[i] * r2[i] + q[i]; });
  each_of<n>([&](int i) MC_INLINED { q[i] = 1.6666665459e-1f * r[i] + 5.0000001201e-1f; });
  each_of<n>([&](int i) MC_INLINED { p[i] = p[i] * r2[i] + q[i]; });
  each_of<n>([&](int i) MC_INLINED { r[i] = r[i] + 1.0f; });
  each_of<n>([&](int i) MC_INLINED { p[i] = p[i] * r2[i] + r[i]; });
  each_of<n>([&](int i) MC_INLINED { p[i] = p[i] * (Vec<float>)(((UVec)t[i] << 23) + 0x3f800000u); });
  each_of<n>([&](int i) MC_INLINED { x[i] = x[i] < -87.33654f ? Vec<float>{} : p[i]; });
}
template <int n> MC_INLINE void exp_negatives(Vec<double>* x) {
  for (int i = 0; i < n; i++)
    for (int j = 0; j < Lanes<double>::n; j++) x[i][j] = __builtin_exp(x[i][j]);
}
template <class V> MC_INLINE V exp_negative(V x) {
  exp_negatives<1>(&x);
  return x;
}
// log of a positive number in single precision, Moshier's coefficients (relative error 2e-7), subnormals included; NaN gives NaN.
template <int n> MC_INLINE void log_positives(Vec<float>* x) {
  Vec<float> k[n], m[n], z[n], p[n], q[n];
  each_of<n>([&](int i) MC_INLINED {
    const IVec<float> tiny = x[i] < 1.17549435e-38f;
    const UVec bits = (UVec)(tiny ? x[i] * 8388608.0f : x[i]);
    const IVec<float> e = (IVec<float>)(bits - 0x3f3504f3u) >> 23;  // sqrt(1/2) <= m < sqrt(2)
    m[i] = (Vec<float>)(bits - ((UVec)e << 23)) - 1.0f;
    k[i] = __builtin_convertvector(e - (tiny & 23), Vec<float>);
  });
  each_of<n>([&](int i) MC_INLINED { z[i] = m[i] * m[i]; });
  each_of<n>([&](int i) MC_INLINED { p[i] = -1.2420140846e-1f * m[i] + 1.4249322787e-1f; });
  each_of<n>([&](int i) MC_INLINED { q[i] = -1.1514610310e-1f * m[i] + 1.1676998740e-1f; });
  each_of<n>([&](int i) MC_INLINED { p[i] = p[i] + z[i] * q[i]; });
  each_of<n>([&](int i) MC_INLINED { p[i] = p[i] + (z[i] * z[i]) * 7.0376836292e-2f; });
  each_of<n>([&](int i) MC_INLINED { q[i] = -2.4999993993e-1f * m[i] + 3.3333331174e-1f; });
  each_of<n>([&](int i) MC_INLINED { q[i] = q[i] + z[i] * (-1.6668057665e-1f * m[i] + 2.0000714765e-1f); });
  each_of<n>([&](int i) MC_INLINED { p[i] = p[i] * (z[i] * z[i]) + q[i]; });
  each_of<n>([&](int i) MC_INLINED { p[i] = p[i] * (m[i] * z[i]) + (k[i] * -2.12194440e-4f - 0.5f * z[i]); });
  each_of<n>([&](int i) MC_INLINED { x[i] = k[i] * 0.693359375f + (m[i] + p[i]) + (x[i] - x[i]); });
}
template <int n> MC_INLINE void log_positives(Vec<double>* x) {
  for (int i = 0; i < n; i++)
    for (int j = 0; j < Lanes<double>::n; j++) x[i][j] = __builtin_log(x[i][j]);
}
template <class V> MC_INLINE V log_positive(V x) {
  log_positives<1>(&x);
  return x;
}
// log(1 + e) for 0 <= e <= 1: the rounding of 1 + e is divided out again.
MC_INLINE Vec<float> log1p_unit(Vec<float> e) {
  const Vec<float> u = 1.0f + e, d = u - 1.0f;
  return d == 0 ? e : log_positive(u) * (e / d);
}
MC_INLINE Vec<double> log1p_unit(Vec<double> e) {
  for (int i = 0; i < Lanes<double>::n; i++) e[i] = __builtin_log1p(e[i]);
  return e;
}
template <int n, class V> MC_INLINE void sigmoids(V* x) {
  V e[n], s[n];
  each_of<n>([&](int i) MC_INLINED { e[i] = x[i] < 0 ? x[i] : -x[i]; });
  exp_negatives<n>(e);
  each_of<n>([&](int i) MC_INLINED { s[i] = reciprocal(1 + e[i]); });
  each_of<n>([&](int i) MC_INLINED { x[i] = x[i] < 0 ? e[i] * s[i] : s[i]; });
}
template <class V> MC_INLINE V sigmoid(V x) {
  sigmoids<1>(&x);
  return x;
}
template <class V> MC_INLINE V softplus(V x) { return (x < 0 ? V{} : x) + log1p_unit(exp_negative(x < 0 ? x : -x)); }

// f(T{}) for the storage type named by `dtype`.
template <class F> MC_INLINE void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
}

}  // namespace MC_ISA
}  // namespace memcore
