// Loops that the front end unrolls, so that arrays of vectors become registers whatever is done with them.
//
// A pragma unrolls later in the compiler, after the pass that splits arrays into scalars: it is enough, and compiles
// many times faster, as long as nothing takes an array's address. Everything is in an unnamed namespace, see
// attend_loop.h.
#pragma once

#include <utility>

#define OMNI_INLINE __attribute__((always_inline))

namespace omniserve {
namespace {

/// A constant that a generic lambda can take: `i()` is kValue.
template <int kValue>
struct Index {
    constexpr OMNI_INLINE int operator()() const { return kValue; }
};

template <class Body, int... kIndices>
OMNI_INLINE inline void unroll_over(Body&& body, std::integer_sequence<int, kIndices...>) {
    (body(Index<kIndices>{}), ...);
}

/// body(Index<0>), ..., body(Index<kCount - 1>).
template <int kCount, class Body>
OMNI_INLINE inline void unrolled(Body&& body) {
    unroll_over(body, std::make_integer_sequence<int, kCount>{});
}

/// body(i, j, k) for all i < kFirst, j < kSecond, k < kThird, the last index fastest.
template <int kFirst, int kSecond, int kThird, class Body>
OMNI_INLINE inline void each(Body&& body) {
    unrolled<kFirst>([&](auto i) OMNI_INLINE {
        unrolled<kSecond>([&](auto j) OMNI_INLINE { unrolled<kThird>([&](auto k) OMNI_INLINE { body(i, j, k); }); });
    });
}

}  // namespace
}  // namespace omniserve
