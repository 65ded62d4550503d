// Which submission a free worker serves next.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "segment.h"

namespace omniserve {

/// One row whose attention is asked for.
struct Task {
    int32_t layer = 0;
    int32_t slot = 0;
    uint64_t ticket = 0;
    uint64_t number = 0;  // order of submission over all partitions and layers
    int32_t partition = 0;
    uint32_t prefix = 0;  // first page of its lane
};

/// A worker's place at the queue. The worker alone uses it.
struct Seat {
    int32_t partition = 0;  // the worker's own
    uint32_t turn = 0;      // calls of pop
};

/// Deadline order. During a walk the device asks for layer `current_layer` next, then for the following ones, so the
/// rings are scanned circularly from there. A task at current_layer that would, by its predicted service time, come
/// after the device has asked, can only serve the next iteration: everything else goes first. Without a walk there are
/// no deadlines and the oldest submission goes first. Safe for any number of workers.
///
/// That is the order within one partition. A worker looks at its own partition first, whose memory is near and whose
/// pages it should be the first to touch. It takes work of another one only while nobody who belongs there is idle.
///
/// No lane starves: a ring is first in, first out, and a walk brings every layer to the front; every kTurnsAtHome-th
/// pop of a worker begins with each partition in turn, so that one without workers, or with busy ones, is served
/// however much work there is elsewhere. A partition that is left to its idle workers is served by them: they are
/// awake, or woken by whoever submits.
class HostQueue {
public:
    explicit HostQueue(const Segment& segment)
        : segment_(segment), claimed_(std::make_unique<std::atomic<uint64_t>[]>(segment.geometry().max_lanes)) {}

    bool pop(Seat& seat, Task& task);
    /// Appends at most `limit` tasks that wait at the same layer as `task`, out of turn, and begin with the same page.
    /// Their items stay in the ring, to be dropped when they come to its head. Only items among the first 2 * max_lanes
    /// of a ring are claimed so; what lies behind those is live, one for each lane at most: 3 * max_lanes in all, and
    /// the ring has room for four.
    void claim_sharers(const Task& task, int limit, std::vector<Task>& sharers);
    /// A frame whose command is to be carried out.
    bool pop_frame(const Seat& seat, int& frame);
    bool has_work(const Seat& seat) const;

    /// Between these two calls a worker of the partition has nothing to do.
    void begin_idle(int partition) { idle_[partition].workers.fetch_add(1, std::memory_order_relaxed); }
    void end_idle(int partition) { idle_[partition].workers.fetch_sub(1, std::memory_order_relaxed); }

    /// Corrects the predicted service time by one that was measured.
    void observe_service(uint64_t ns, int64_t attended_tokens);
    /// True when a task submitted later to the same partition was served before this one.
    bool note_served(const Task& task);

private:
    static constexpr uint32_t kTurnsAtHome = 8;
    struct alignas(kLine) Idle {
        std::atomic<int32_t> workers{0};  // a hint: it decides who serves, never whether
    };

    /// True for one caller per row in flight, who gets it as a task.
    bool claim(int partition, int layer, const Ring::Item& item, Task& task);
    bool pop_layer(int partition, int layer, Task& task);
    bool pop_partition(int partition, Task& task);
    bool pop_by_deadline(int partition, int current_layer, Task& task);
    bool pop_oldest(int partition, Task& task);
    bool can_meet(int layer, const Ring::Item& item, uint64_t began_ns) const;
    /// First layer at or after `from` whose bit is set, -1 when none.
    int next_nonempty(int partition, int from) const;
    /// Own partition, then the following ones as far as they may be helped; true when `look` was for one of them.
    template <class Look>
    bool any_partition(const Seat& seat, Look&& look) const;
    bool may_serve(const Seat& seat, int partition) const {
        return partition == seat.partition || idle_[partition].workers.load(std::memory_order_relaxed) <= 0;
    }

    Segment segment_;
    std::unique_ptr<std::atomic<uint64_t>[]> claimed_;  // per slot: the last ticket served or being served; they grow
    std::atomic<float> ns_per_token_{0.0f};
    std::array<std::atomic<uint64_t>, kMaxPartitions> newest_served_{};  // per partition
    std::array<Idle, kMaxPartitions> idle_{};
};

}  // namespace omniserve
