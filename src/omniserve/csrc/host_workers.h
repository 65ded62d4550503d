// The host process's end of the segment: persistent workers, or one call at a time for tests and scripted hosts.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#include "host_arena.h"
#include "host_queue.h"
#include "host_task.h"

namespace omniserve {

struct HostOptions {
    int eventfd = -1;            // wakes the engine; -1: nobody to wake
    std::vector<int> cpus = {};  // worker i is pinned to cpus[i % size]; empty: inherits
    std::vector<int> partitions = {};  // worker i belongs to partitions[i % size]; empty: to i % num_partitions
    int nice = 0;                // added priority value of worker threads, 0 .. 19
    size_t arena_bytes = 0;      // upper limit of KV memory; 0: none
    ArenaOptions arena = {};
};

class HostWorkers {
public:
    /// Attaches to the segment at `address` and maps the KV arena. Throws std::invalid_argument when the segment is not
    /// one of this version or the arena would exceed its limit, std::bad_alloc when it cannot be mapped.
    HostWorkers(void* address, const HostOptions& options);
    ~HostWorkers();
    HostWorkers(const HostWorkers&) = delete;
    HostWorkers& operator=(const HostWorkers&) = delete;

    /// 1 .. kMaxWorkers threads. Throws std::logic_error when they run already.
    void start(int num_threads);
    /// Returns when every worker has finished what it was serving. What is still queued stays queued.
    void stop();
    int num_workers() const { return static_cast<int>(threads_.size()); }

    // One at a time, by hand; std::logic_error while threads run.
    std::vector<std::pair<int32_t, int32_t>> pending();  // (layer, slot), oldest first
    bool serve(int slot);                                // false: nothing pending there
    std::vector<uint64_t> pending_copies();              // ids, oldest first
    bool serve_copy(uint64_t id);

    const LaneGeometry& geometry() const { return segment_.geometry(); }
    const SegmentHeader& header() const { return segment_.header(); }
    const HostArena& arena() const { return arena_; }
    /// Puts the arena's usage where the engine's statistics find it. Takes as long as HostArena::usage.
    void publish_memory();

private:
    void loop(int index);
    bool serve_next(WorkerContext& worker);
    /// Spins for work, then parks. `seen`: work_seq as it was before the queues were looked at.
    void idle(const Seat& seat, uint32_t seen);
    void park(const Seat& seat, uint32_t seen);
    int partition_of_worker(int index) const;
    bool has_work(const Seat& seat) const { return runner_.has_open_job() || queue_.has_work(seat); }
    void drain_queue();

    Segment segment_;
    HostOptions options_;
    HostArena arena_;
    HostQueue queue_;
    TaskRunner runner_;
    std::vector<std::thread> threads_;
    std::atomic<bool> stop_{false};
    // Popped by hand and not yet served.
    std::vector<Task> stashed_tasks_;
    std::vector<int> stashed_frames_;
    WorkerContext by_hand_;
};

}  // namespace omniserve
