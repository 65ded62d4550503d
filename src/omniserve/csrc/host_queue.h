// Which submission a free worker serves next.
#pragma once

#include <atomic>
#include <cstdint>

#include "segment.h"

namespace omniserve {

/// One row whose attention is asked for.
struct Task {
    int32_t layer = 0;
    int32_t slot = 0;
    uint64_t ticket = 0;
    uint64_t number = 0;  // order of submission over all layers
};

/// Deadline order. During a walk the device asks for layer `current_layer` next, then for the following ones, so the
/// rings are scanned circularly from there. A task at current_layer that would, by its predicted service time, come
/// after the device has asked, can only serve the next iteration: everything else goes first. Without a walk there are
/// no deadlines and the oldest submission goes first. Safe for any number of workers.
class HostQueue {
public:
    explicit HostQueue(const Segment& segment) : segment_(segment) {}

    bool pop(Task& task);
    /// A frame whose command is to be carried out.
    bool pop_frame(int& frame);
    bool has_work() const;

    /// Corrects the predicted service time by one that was measured.
    void observe_service(uint64_t ns, int64_t context_tokens);
    /// True when a task submitted later was popped before this one.
    bool note_served(uint64_t number);

private:
    bool pop_layer(int layer, Task& task);
    bool pop_by_deadline(int current_layer, Task& task);
    bool pop_oldest(Task& task);
    bool can_meet(const Ring::Item& item, uint64_t began_ns) const;
    /// First layer at or after `from` whose bit is set, -1 when none.
    int next_nonempty(int from) const;

    Segment segment_;
    std::atomic<float> ns_per_token_{0.0f};
    std::atomic<uint64_t> newest_served_{0};
};

}  // namespace omniserve
