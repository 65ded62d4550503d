// Waiting: a bounded spin, then a futex. Linux only, as the whole host side is.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace omniserve {

inline constexpr uint64_t kSpinNs = 48'000;  // spin at most this long before parking

/// CLOCK_MONOTONIC, nanoseconds; the same clock in every process of the machine.
inline uint64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return uint64_t(t.tv_sec) * 1'000'000'000u + uint64_t(t.tv_nsec);
}

inline void cpu_pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline void sleep_ns(uint64_t ns) {
    timespec t{time_t(ns / 1'000'000'000u), long(ns % 1'000'000'000u)};
    nanosleep(&t, nullptr);
}

/// Polls `done` for at most `ns` nanoseconds; the clock is read every 64 polls.
template <class Done>
bool spin_until(uint64_t ns, Done&& done) {
    const uint64_t end = now_ns() + ns;
    do {
        for (int i = 0; i < 64; ++i) {
            if (done()) return true;
            cpu_pause();
        }
    } while (now_ns() < end);
    return done();
}

enum class FutexScope { process, machine };

inline constexpr uint32_t kAnySleeper = ~uint32_t{0};

/// Sleeps while *word == expected, at most timeout_ns. May return early for no reason: callers look again.
/// `bits` say which wake-ups are meant for this sleeper.
inline void futex_wait(std::atomic<uint32_t>& word, uint32_t expected, uint64_t timeout_ns, FutexScope scope,
                       uint32_t bits = kAnySleeper) {
    const uint64_t end = now_ns() + timeout_ns;  // this form of the call takes a point in time
    timespec t{time_t(end / 1'000'000'000u), long(end % 1'000'000'000u)};
    const int op = FUTEX_WAIT_BITSET | (scope == FutexScope::process ? FUTEX_PRIVATE_FLAG : 0);
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), op, expected, &t, nullptr, bits);
}

/// Wakes up to `count` sleepers that have one of the bits; returns how many.
inline int futex_wake(std::atomic<uint32_t>& word, int count, FutexScope scope, uint32_t bits = kAnySleeper) {
    const int op = FUTEX_WAKE_BITSET | (scope == FutexScope::process ? FUTEX_PRIVATE_FLAG : 0);
    return int(syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), op, count, nullptr, nullptr, bits));
}

}  // namespace omniserve
