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

/// Sleeps while *word == expected, at most timeout_ns. May return early for no reason: callers look again.
inline void futex_wait(std::atomic<uint32_t>& word, uint32_t expected, uint64_t timeout_ns, FutexScope scope) {
    timespec t{time_t(timeout_ns / 1'000'000'000u), long(timeout_ns % 1'000'000'000u)};
    const int op = FUTEX_WAIT | (scope == FutexScope::process ? FUTEX_PRIVATE_FLAG : 0);
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), op, expected, &t, nullptr, 0);
}

inline void futex_wake(std::atomic<uint32_t>& word, int count, FutexScope scope) {
    const int op = FUTEX_WAKE | (scope == FutexScope::process ? FUTEX_PRIVATE_FLAG : 0);
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), op, count, nullptr, nullptr, 0);
}

}  // namespace omniserve
