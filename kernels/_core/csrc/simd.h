// Sixteen floats (or eight doubles) at a time, in plain GCC/Clang vector types of the width that the instruction set
// has: wider ones the compilers take apart, comparisons and what loops hold number by number. One source serves every
// instruction set.
//
// Include after the standard headers and inside a translation unit that names its instruction set in
// MMVSSM_ISA, and the bytes of its vectors in MMVSSM_VECTOR; see isa_*.cpp.
#pragma once

#if defined(__clang__)
#define MMVSSM_SHUFFLE(INDICES, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MMVSSM_SHUFFLE(INDICES, a, b, ...) __builtin_shuffle(a, b, INDICES{__VA_ARGS__})
#endif

// What is passed on by value would go through memory.
#define MMVSSM_INLINE inline __attribute__((always_inline))

namespace mmvssm {
namespace MMVSSM_ISA {

// 64 bytes in vectors of type V, element by element what V itself is.
template <typename V>
struct pack {
  static constexpr int parts = 64 / sizeof(V);
  using element = decltype(V{}[0] + 0);
  V part[parts];
};

#define MMVSSM_OPERATOR(OP)                                                      \
  template <typename V>                                                          \
  MMVSSM_INLINE pack<V> operator OP(pack<V> a, pack<V> b) {                      \
    for (int i = 0; i < pack<V>::parts; ++i) a.part[i] = a.part[i] OP b.part[i]; \
    return a;                                                                    \
  }                                                                              \
  template <typename V>                                                          \
  MMVSSM_INLINE pack<V> operator OP(pack<V> a, typename pack<V>::element b) {    \
    for (int i = 0; i < pack<V>::parts; ++i) a.part[i] = a.part[i] OP b;         \
    return a;                                                                    \
  }                                                                              \
  template <typename V>                                                          \
  MMVSSM_INLINE pack<V> operator OP(typename pack<V>::element a, pack<V> b) {    \
    for (int i = 0; i < pack<V>::parts; ++i) b.part[i] = a OP b.part[i];         \
    return b;                                                                    \
  }
MMVSSM_OPERATOR(+)
MMVSSM_OPERATOR(-)
MMVSSM_OPERATOR(*)
MMVSSM_OPERATOR(/)
#undef MMVSSM_OPERATOR

template <typename V, typename B>
MMVSSM_INLINE pack<V>& operator+=(pack<V>& a, B b) {
  return a = a + b;
}
template <typename V, typename B>
MMVSSM_INLINE pack<V>& operator-=(pack<V>& a, B b) {
  return a = a - b;
}
template <typename V, typename B>
MMVSSM_INLINE pack<V>& operator*=(pack<V>& a, B b) {
  return a = a * b;
}
template <typename V>
MMVSSM_INLINE pack<V> operator-(pack<V> a) {
  for (V& part : a.part) part = -part;
  return a;
}
template <typename V>
MMVSSM_INLINE pack<V> operator<<(pack<V> a, int bits) {
  for (V& part : a.part) part <<= bits;
  return a;
}
template <typename V>
MMVSSM_INLINE pack<V> operator>>(pack<V> a, int bits) {
  for (V& part : a.part) part >>= bits;
  return a;
}

// a < b ? yes : no, and so on.
#define MMVSSM_WHERE(NAME, OP)                                                                        \
  template <typename C, typename V>                                                                   \
  MMVSSM_INLINE pack<V> NAME(pack<C> a, typename pack<C>::element b, pack<V> yes, pack<V> no) {       \
    for (int i = 0; i < pack<V>::parts; ++i) yes.part[i] = a.part[i] OP b ? yes.part[i] : no.part[i]; \
    return yes;                                                                                       \
  }
MMVSSM_WHERE(where_less, <)
MMVSSM_WHERE(where_greater, >)
MMVSSM_WHERE(where_equal, ==)
#undef MMVSSM_WHERE

template <typename T>
struct simd;
template <>
struct simd<float> {
  typedef float native __attribute__((vector_size(MMVSSM_VECTOR)));
  typedef int32_t inative __attribute__((vector_size(MMVSSM_VECTOR)));
  typedef float quarter __attribute__((vector_size(16)));
  typedef int32_t iquarter __attribute__((vector_size(16)));
  static constexpr int lanes = 16, mantissa = 23, bias = 127, exp_terms = 7, log_terms = 6;
  static constexpr float round_magic = 12582912.f;  // 1.5 * 2^23
  static constexpr float ln2_hi = 0.693145751953125f, ln2_lo = 1.42860682030941723212e-6f;
  static constexpr float exp_min = -87.f, exp_max = 88.f;
  static constexpr int32_t sqrt_half = 0x3f3504f3;
  // The numbers of a and b by turns, of their first and of their second halves.
  static quarter zip_first(quarter a, quarter b) { return MMVSSM_SHUFFLE(iquarter, a, b, 0, 4, 1, 5); }
  static quarter zip_second(quarter a, quarter b) { return MMVSSM_SHUFFLE(iquarter, a, b, 2, 6, 3, 7); }
};
template <>
struct simd<double> {
  typedef double native __attribute__((vector_size(MMVSSM_VECTOR)));
  typedef int64_t inative __attribute__((vector_size(MMVSSM_VECTOR)));
  typedef double quarter __attribute__((vector_size(16)));
  typedef int64_t iquarter __attribute__((vector_size(16)));
  static constexpr int lanes = 8, mantissa = 52, bias = 1023, exp_terms = 14, log_terms = 13;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_hi = 0.69314718036912381649, ln2_lo = 1.9082149292705877e-10;
  static constexpr double exp_min = -708.0, exp_max = 709.0;
  static constexpr int64_t sqrt_half = 0x3fe6a09e667f3bcdLL;
  static quarter zip_first(quarter a, quarter b) { return MMVSSM_SHUFFLE(iquarter, a, b, 0, 2); }
  static quarter zip_second(quarter a, quarter b) { return MMVSSM_SHUFFLE(iquarter, a, b, 1, 3); }
};

template <typename T>
using vec = pack<typename simd<T>::native>;
template <typename T>
using ivec = pack<typename simd<T>::inative>;
// A fourth of a vec: what all instruction sets rearrange.
template <typename T>
using quarter = typename simd<T>::quarter;
template <typename T>
constexpr int kQuarter = simd<T>::lanes / 4;

// The same bits.
template <typename To, typename From>
MMVSSM_INLINE pack<To> as(pack<From> from) {
  pack<To> to;
  for (int i = 0; i < pack<To>::parts; ++i) to.part[i] = (To)from.part[i];
  return to;
}

template <typename T>
MMVSSM_INLINE vec<T> splat(T value) {
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
MMVSSM_INLINE vec<T> load(const T* p, int count = simd<T>::lanes) {
  vec<T> v{};
  if (count == simd<T>::lanes) {
    for (auto& part : v.part) {
      __builtin_memcpy(&part, p, sizeof(part));
      p += sizeof(part) / sizeof(T);
    }
  } else {
    T lanes[simd<T>::lanes] = {};
    __builtin_memcpy(lanes, p, count * sizeof(T));
    v = load(lanes);
  }
  return v;
}

template <typename T>
MMVSSM_INLINE void store(T* p, vec<T> v, int count = simd<T>::lanes) {
  if (count == simd<T>::lanes) {
    for (const auto& part : v.part) {
      __builtin_memcpy(p, &part, sizeof(part));
      p += sizeof(part) / sizeof(T);
    }
  } else {
    T lanes[simd<T>::lanes];
    store(lanes, v);
    __builtin_memcpy(p, lanes, count * sizeof(T));
  }
}

// Pairwise, in a fixed order.
template <typename T>
MMVSSM_INLINE T sum(vec<T> v) {
  T s[simd<T>::lanes];
  store(s, v);
  for (int width = simd<T>::lanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}

// The sums of a quarter's number of vectors, each in a fixed order.
template <typename T>
MMVSSM_INLINE quarter<T> sum_each(const vec<T>* v) {
  using S = simd<T>;
  quarter<T> q[kQuarter<T>];
  for (int i = 0; i < kQuarter<T>; ++i) {
    T lanes[simd<T>::lanes];
    quarter<T> parts[4];
    store(lanes, v[i]);
    for (int k = 0; k < 4; ++k) __builtin_memcpy(parts + k, lanes + k * kQuarter<T>, sizeof(parts[k]));
    q[i] = (parts[0] + parts[2]) + (parts[1] + parts[3]);
  }
  for (int count = kQuarter<T> / 2; count > 0; count /= 2)
    for (int i = 0; i < count; ++i) q[i] = S::zip_first(q[i], q[i + count]) + S::zip_second(q[i], q[i + count]);
  return q[0];
}

// out[j * out_row + i] = in[i * in_row + j] for i below `rows` and j below `columns`.
template <typename T>
inline void transpose(const T* in, int64_t in_row, int64_t rows, int64_t columns, T* out, int64_t out_row) {
  using S = simd<T>;
  constexpr int Q = kQuarter<T>;
  const int64_t whole_rows = rows - rows % Q, whole_columns = columns - columns % Q;
  for (int64_t i = 0; i < whole_rows; i += Q)
    for (int64_t j = 0; j < whole_columns; j += Q) {
      quarter<T> a[Q], b[Q];
      for (int k = 0; k < Q; ++k) __builtin_memcpy(a + k, in + (i + k) * in_row + j, sizeof(a[k]));
      for (int round = 1; round < Q; round *= 2) {
        for (int k = 0; k < Q / 2; ++k) {
          b[2 * k] = S::zip_first(a[k], a[k + Q / 2]);
          b[2 * k + 1] = S::zip_second(a[k], a[k + Q / 2]);
        }
        for (int k = 0; k < Q; ++k) a[k] = b[k];
      }
      for (int k = 0; k < Q; ++k) __builtin_memcpy(out + (j + k) * out_row + i, a + k, sizeof(a[k]));
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) out[j * out_row + i] = in[i * in_row + j];
}

// exp(x) = 2^n exp(r), |r| <= ln(2)/2, with the Taylor series of exp(r). Clamped where the result would
// leave the normal range; NaN passes through.
template <typename T>
MMVSSM_INLINE vec<T> exp(vec<T> x) {
  using S = simd<T>;
  x = where_less(x, S::exp_min, splat<T>(S::exp_min), x);
  x = where_greater(x, S::exp_max, splat<T>(S::exp_max), x);
  const vec<T> shifted = x * T(1.44269504088896340736) + S::round_magic;  // n in the low mantissa bits
  const vec<T> n = shifted - S::round_magic;
  const vec<T> r = (x - n * S::ln2_hi) - n * S::ln2_lo;
  T inverse_factorial[S::exp_terms + 1] = {1};
  for (int i = 1; i <= S::exp_terms; ++i) inverse_factorial[i] = inverse_factorial[i - 1] / T(i);
  vec<T> p = splat<T>(inverse_factorial[S::exp_terms]);
  for (int i = S::exp_terms - 1; i >= 0; --i) p = p * r + inverse_factorial[i];
  using I = typename ivec<T>::element;
  const ivec<T> power = (as<typename S::inative>(shifted) << S::mantissa) + (I(S::bias) << S::mantissa);
  return p * as<typename S::native>(power);
}

// log(1 + e) for e >= 0: 1 + e = 2^k m, log m = 2 atanh((m - 1) / (m + 1)). For k = 0, m - 1 is e itself,
// so that small e keep their relative precision.
template <typename T>
MMVSSM_INLINE vec<T> log1p_nonnegative(vec<T> e) {
  using S = simd<T>;
  const vec<T> u = T(1) + e;
  const ivec<T> bits = as<typename S::inative>(u), k = (bits - S::sqrt_half) >> S::mantissa;
  const vec<T> m = as<typename S::native>(bits - (k << S::mantissa));
  const vec<T> f = where_equal(k, 0, e, m - T(1));
  const vec<T> s = f / (T(2) + f);
  const vec<T> s2 = s * s;
  vec<T> p = splat<T>(T(1) / T(2 * S::log_terms - 1));
  for (int i = S::log_terms - 2; i >= 0; --i) p = p * s2 + T(1) / T(2 * i + 1);
  vec<T> exponent;
  for (int i = 0; i < vec<T>::parts; ++i) exponent.part[i] = __builtin_convertvector(k.part[i], typename S::native);
  return exponent * T(0.69314718055994530942) + T(2) * s * p;
}

// softplus(x), exact up to 20 and the identity above, as in the publication's code; `slope` is its
// derivative.
template <typename T>
MMVSSM_INLINE vec<T> softplus(vec<T> x, vec<T>* slope = nullptr) {
  const vec<T> e = exp<T>(x);
  if (slope) *slope = where_greater(x, T(20), splat<T>(1), e / (T(1) + e));
  return where_greater(x, T(20), x, log1p_nonnegative<T>(e));
}

template <typename T>
MMVSSM_INLINE vec<T> sigmoid(vec<T> x) {
  return T(1) / (T(1) + exp<T>(-x));
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
