// Persistent threads of the device process that share one piece of work at a time.
//
// The caller is member 0 and always takes part, so a team of one runs everything in the caller. Members spin at most
// 50 microseconds for the next piece of work, then park. A run ends when the work is done and everybody who joined has
// left: a member that was still waking up is never waited for.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "gate.h"

namespace omniserve {

class ThreadTeam {
public:
    /// Members beyond the caller inherit its CPU affinity, or are pinned to cpus[i % cpus.size()] (member i; the caller
    /// stays where it is). Throws std::invalid_argument when num_threads is not 1 .. 1024.
    explicit ThreadTeam(int num_threads, std::vector<int> cpus = {});
    ~ThreadTeam();
    ThreadTeam(const ThreadTeam&) = delete;
    ThreadTeam& operator=(const ThreadTeam&) = delete;

    int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

    /// Calls work(member) on the caller and on any members that arrive in time; each call must return only when no work
    /// is left to take. One run at a time.
    void run(const std::function<void(int member)>& work);

    /// Floats that belong to one member, kept between runs.
    float* scratch(int member, size_t floats);

private:
    void loop(int member, int cpu);

    std::vector<std::thread> threads_;
    std::vector<std::vector<float>> scratch_;
    const std::function<void(int)>* work_ = nullptr;  // valid inside the gate
    Gate gate_;
    alignas(64) std::atomic<uint32_t> generation_{0};  // futex: one more per run
    std::atomic<uint32_t> sleepers_{0};
    std::atomic<bool> stop_{false};
};

/// Pins the calling thread to one CPU; failure (a CPU outside the allowed set) is ignored.
void pin_this_thread(int cpu);

}  // namespace omniserve
