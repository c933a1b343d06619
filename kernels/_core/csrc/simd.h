// Sixteen floats (or eight doubles) at a time, in plain GCC/Clang vector types: the compiler lowers
// them to whatever the surrounding `target` offers, so one source serves every instruction set.
//
// Include after the standard headers and inside a translation unit that names its instruction set in
// MMVSSM_ISA; see isa_*.cpp.
#pragma once

namespace mmvssm {
namespace MMVSSM_ISA {

template <typename T>
struct simd;
template <>
struct simd<float> {
  typedef float vec __attribute__((vector_size(64)));
  typedef int32_t ivec __attribute__((vector_size(64)));
  static constexpr int lanes = 16, mantissa = 23, bias = 127, exp_terms = 7, log_terms = 6;
  static constexpr float round_magic = 12582912.f;  // 1.5 * 2^23
  static constexpr float ln2_hi = 0.693145751953125f, ln2_lo = 1.42860682030941723212e-6f;
  static constexpr float exp_min = -87.f, exp_max = 88.f;
  static constexpr int32_t sqrt_half = 0x3f3504f3;
};
template <>
struct simd<double> {
  typedef double vec __attribute__((vector_size(64)));
  typedef int64_t ivec __attribute__((vector_size(64)));
  static constexpr int lanes = 8, mantissa = 52, bias = 1023, exp_terms = 14, log_terms = 13;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_hi = 0.69314718036912381649, ln2_lo = 1.9082149292705877e-10;
  static constexpr double exp_min = -708.0, exp_max = 709.0;
  static constexpr int64_t sqrt_half = 0x3fe6a09e667f3bcdLL;
};

template <typename T>
using vec = typename simd<T>::vec;
template <typename T>
using ivec = typename simd<T>::ivec;

template <typename T>
inline vec<T> splat(T value) {
  return vec<T>{} + value;
}

// A whole vector, known at compile time; where a block of channels is shorter, kernels are instantiated with an
// int in its place.
template <typename T>
struct Full {
  constexpr operator int() const { return simd<T>::lanes; }
};

// body(first channel, how many) for each block of lanes.
template <typename T, typename F>
inline void each_block(int64_t dim, F body) {
  int64_t lane = 0;
  for (; lane + simd<T>::lanes <= dim; lane += simd<T>::lanes) body(lane, Full<T>{});
  if (lane < dim) body(lane, static_cast<int>(dim - lane));
}

// The same for the block that starts at `lane`.
template <typename T, typename F>
inline void one_block(int64_t dim, int64_t lane, F body) {
  if (dim - lane >= simd<T>::lanes)
    body(Full<T>{});
  else
    body(static_cast<int>(dim - lane));
}

// The first `count` of `lanes` elements; lanes past the end read as zero and are never written.
template <typename T>
inline vec<T> load(const T* p, int count = simd<T>::lanes) {
  vec<T> v{};
  if (count == simd<T>::lanes) {
    __builtin_memcpy(&v, p, sizeof(v));
  } else {
    __builtin_memcpy(&v, p, count * sizeof(T));
  }
  return v;
}

template <typename T>
inline void store(T* p, vec<T> v, int count = simd<T>::lanes) {
  if (count == simd<T>::lanes) {
    __builtin_memcpy(p, &v, sizeof(v));
  } else {
    __builtin_memcpy(p, &v, count * sizeof(T));
  }
}

// Pairwise, in a fixed order.
template <typename T>
inline T sum(vec<T> v) {
  T s[simd<T>::lanes];
  __builtin_memcpy(s, &v, sizeof(v));
  for (int width = simd<T>::lanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}

// exp(x) = 2^n exp(r), |r| <= ln(2)/2, with the Taylor series of exp(r). Clamped where the result would
// leave the normal range; NaN passes through.
template <typename T>
inline vec<T> exp(vec<T> x) {
  using S = simd<T>;
  x = x < S::exp_min ? splat<T>(S::exp_min) : x;
  x = x > S::exp_max ? splat<T>(S::exp_max) : x;
  const vec<T> shifted = x * T(1.44269504088896340736) + S::round_magic;  // n in the low mantissa bits
  const vec<T> n = shifted - S::round_magic;
  const vec<T> r = (x - n * S::ln2_hi) - n * S::ln2_lo;
  T inverse_factorial[S::exp_terms + 1] = {1};
  for (int i = 1; i <= S::exp_terms; ++i) inverse_factorial[i] = inverse_factorial[i - 1] / T(i);
  vec<T> p = splat<T>(inverse_factorial[S::exp_terms]);
  for (int i = S::exp_terms - 1; i >= 0; --i) p = p * r + inverse_factorial[i];
  using I = decltype(ivec<T>{}[0] + 0);
  const ivec<T> power = ((ivec<T>)shifted << S::mantissa) + (I(S::bias) << S::mantissa);
  return p * (vec<T>)power;
}

// log(1 + e) for e >= 0: 1 + e = 2^k m, log m = 2 atanh((m - 1) / (m + 1)). For k = 0, m - 1 is e itself,
// so that small e keep their relative precision.
template <typename T>
inline vec<T> log1p_nonnegative(vec<T> e) {
  using S = simd<T>;
  const vec<T> u = T(1) + e;
  const ivec<T> k = ((ivec<T>)u - S::sqrt_half) >> S::mantissa;
  const vec<T> m = (vec<T>)((ivec<T>)u - (k << S::mantissa));
  const vec<T> f = k == 0 ? e : m - T(1);
  const vec<T> s = f / (T(2) + f);
  const vec<T> s2 = s * s;
  vec<T> p = splat<T>(T(1) / T(2 * S::log_terms - 1));
  for (int i = S::log_terms - 2; i >= 0; --i) p = p * s2 + T(1) / T(2 * i + 1);
  return __builtin_convertvector(k, vec<T>) * T(0.69314718055994530942) + T(2) * s * p;
}

// softplus(x), exact up to 20 and the identity above, as in the publication's code; `slope` is its
// derivative.
template <typename T>
inline vec<T> softplus(vec<T> x, vec<T>* slope = nullptr) {
  const vec<T> e = exp<T>(x);
  if (slope) *slope = x > T(20) ? splat<T>(1) : e / (T(1) + e);
  return x > T(20) ? x : log1p_nonnegative<T>(e);
}

template <typename T>
inline vec<T> sigmoid(vec<T> x) {
  return T(1) / (T(1) + exp<T>(-x));
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
