// A gate lets any number of threads into one job while it is open, and says who left last.
//
// It replaces barriers: nobody waits for a thread that never came in, and the job's memory is reused only after
// everybody who did come in has left.
#pragma once

#include <atomic>
#include <cstdint>

namespace omniserve {

class Gate {
public:
    /// free -> owned by the caller, who then fills in the job. False when somebody else owns it.
    bool try_claim() {
        uint32_t free = 0;
        return word_.compare_exchange_strong(free, kClaimed | 1u, std::memory_order_acquire, std::memory_order_relaxed);
    }

    /// Lets others in; the caller counts as the first inside. Everything written before is visible to those who enter.
    void open() { word_.store(kClaimed | kOpen | 1u, std::memory_order_release); }

    bool is_open() const { return word_.load(std::memory_order_relaxed) & kOpen; }

    bool try_enter() {
        uint32_t word = word_.load(std::memory_order_relaxed);
        while (word & kOpen)
            if (word_.compare_exchange_weak(word, word + 1, std::memory_order_acquire, std::memory_order_relaxed))
                return true;
        return false;
    }

    /// Nobody enters any more. Called by anyone inside who finds no work left.
    void close() { word_.fetch_and(~kOpen, std::memory_order_relaxed); }

    /// Leaves the gate. True for the last one out, after which the gate is free.
    bool leave() {
        const uint32_t left = word_.fetch_sub(1, std::memory_order_acq_rel) - 1;
        if (left != kClaimed) return false;
        word_.store(0, std::memory_order_release);
        return true;
    }

    bool is_free() const { return word_.load(std::memory_order_acquire) == 0; }

private:
    static constexpr uint32_t kClaimed = 1u << 31;
    static constexpr uint32_t kOpen = 1u << 30;
    std::atomic<uint32_t> word_{0};  // flags and the number of threads inside
};

}  // namespace omniserve
