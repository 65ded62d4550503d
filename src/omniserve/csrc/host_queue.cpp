#include "host_queue.h"

#include <bit>

#include "park.h"

namespace omniserve {

template <class Look>
bool HostQueue::any_partition(const Seat& seat, Look&& look) const {
    const int count = segment_.geometry().num_partitions;
    for (int i = 0; i < count; ++i) {
        const int partition = (seat.partition + i) % count;
        if (may_serve(seat, partition) && look(partition)) return true;
    }
    return false;
}

bool HostQueue::pop(Seat& seat, Task& task) {
    const uint32_t turn = seat.turn++;
    if (turn % kTurnsAtHome == kTurnsAtHome - 1) {
        const int partition = int(turn / kTurnsAtHome % uint32_t(segment_.geometry().num_partitions));
        if (may_serve(seat, partition) && pop_partition(partition, task)) return true;
    }
    return any_partition(seat, [&](int partition) { return pop_partition(partition, task); });
}

bool HostQueue::pop_partition(int partition, Task& task) {
    const int current_layer = segment_.header().current_layer.load(std::memory_order_relaxed);
    return current_layer < 0 ? pop_oldest(partition, task) : pop_by_deadline(partition, current_layer, task);
}

int HostQueue::next_nonempty(int partition, int from) const {
    for (int word = from / 64; word < segment_.num_bitmap_words(); ++word) {
        uint64_t bits = segment_.nonempty_word(partition, word).load(std::memory_order_acquire);
        if (word == from / 64) bits &= ~uint64_t{0} << (from % 64);
        if (bits) return word * 64 + std::countr_zero(bits);
    }
    return -1;
}

bool HostQueue::claim(int partition, int layer, const Ring::Item& item, Task& task) {
    std::atomic<uint64_t>& claimed = claimed_[item.index];
    uint64_t last = claimed.load(std::memory_order_relaxed);
    do {
        if (last >= item.ticket) return false;
    } while (!claimed.compare_exchange_weak(last, item.ticket, std::memory_order_acq_rel, std::memory_order_relaxed));
    task = {layer, static_cast<int32_t>(item.index), item.ticket, item.number, partition, item.prefix};
    return true;
}

void HostQueue::claim_sharers(const Task& task, int limit, std::vector<Task>& sharers) {
    const Ring ring = segment_.layer_ring(task.partition, task.layer);
    ring.for_each_of(task.prefix, 2 * uint64_t(segment_.geometry().max_lanes), [&](const Ring::Item& item) {
        Task sharer;
        if (claim(task.partition, task.layer, item, sharer)) {
            sharers.push_back(sharer);
            --limit;
        }
        return limit > 0;
    });
}

bool HostQueue::pop_layer(int partition, int layer, Task& task) {
    Ring ring = segment_.layer_ring(partition, layer);
    Ring::Item item;
    while (ring.pop(item))
        if (claim(partition, layer, item, task)) return true;  // else served out of turn
    // Empty: clear the bit, then look again. A push that came before the clear is seen now; one that comes after it
    // sets the bit itself.
    const uint64_t bit = uint64_t{1} << (layer % 64);
    std::atomic<uint64_t>& word = segment_.nonempty_word(partition, layer / 64);
    word.fetch_and(~bit, std::memory_order_acq_rel);
    if (!ring.is_empty()) word.fetch_or(bit, std::memory_order_acq_rel);
    return false;
}

bool HostQueue::can_meet(int layer, const Ring::Item& item, uint64_t began_ns) const {
    const uint64_t gap = segment_.header().attention_gap_ns.load(std::memory_order_relaxed);
    const float ns_per_token = ns_per_token_.load(std::memory_order_relaxed);
    if (began_ns == 0 || gap == 0 || ns_per_token == 0.0f) return true;  // nothing to predict from yet
    const int64_t tokens = segment_.order(int(item.index)).position.load(std::memory_order_relaxed) + 1;
    const int64_t attended = tokens - segment_.geometry().first_token(layer, tokens);
    return double(now_ns()) + double(attended) * ns_per_token <= double(began_ns + gap);
}

bool HostQueue::pop_by_deadline(int partition, int current_layer, Task& task) {
    const int num_layers = segment_.geometry().num_layers;
    const int start = current_layer % num_layers;
    const uint64_t began_ns = segment_.header().attention_began_ns.load(std::memory_order_relaxed);
    Ring::Item item;
    const bool is_deferred = current_layer < num_layers && segment_.layer_ring(partition, start).peek(item) &&
                             !can_meet(start, item, began_ns);
    // From the current layer on, then the layers before it, whose turn comes in the next walk.
    const auto pop_between = [&](int first, int last) {
        for (int layer = next_nonempty(partition, first); layer >= 0 && layer < last;
             layer = next_nonempty(partition, layer + 1))
            if (pop_layer(partition, layer, task)) return true;
        return false;
    };
    return pop_between(start + is_deferred, num_layers) || pop_between(0, start) ||
           (is_deferred && pop_layer(partition, start, task));
}

bool HostQueue::pop_oldest(int partition, Task& task) {
    while (true) {
        int oldest_layer = -1;
        uint64_t oldest = UINT64_MAX;
        for (int layer = next_nonempty(partition, 0); layer >= 0; layer = next_nonempty(partition, layer + 1)) {
            const Ring ring = segment_.layer_ring(partition, layer);
            Ring::Item item;
            if (ring.peek(item) && item.number < oldest) {
                oldest = item.number;
                oldest_layer = layer;
            } else if (ring.is_empty() && pop_layer(partition, layer, task)) {
                return true;  // clears the stale bit; may find a row that came just now
            }
        }
        if (oldest_layer < 0) return false;
        if (pop_layer(partition, oldest_layer, task)) return true;  // else another worker was faster: look again
    }
}

bool HostQueue::pop_frame(const Seat& seat, int& frame) {
    Ring::Item item;
    const auto pop = [&](int partition) { return segment_.frame_ring(partition).pop(item); };
    if (!any_partition(seat, pop)) return false;
    frame = static_cast<int>(item.index);
    return true;
}

bool HostQueue::has_work(const Seat& seat) const {
    return any_partition(seat, [this](int partition) {
        return next_nonempty(partition, 0) >= 0 || !segment_.frame_ring(partition).is_empty();
    });
}

void HostQueue::observe_service(uint64_t ns, int64_t attended_tokens) {
    // A lost update between two workers costs a little accuracy of a guess.
    const float sample = float(ns) / float(attended_tokens), average = ns_per_token_.load(std::memory_order_relaxed);
    ns_per_token_.store(average == 0.0f ? sample : average + (sample - average) / 8, std::memory_order_relaxed);
}

bool HostQueue::note_served(const Task& task) {
    std::atomic<uint64_t>& newest_served = newest_served_[task.partition];
    uint64_t newest = newest_served.load(std::memory_order_relaxed);
    while (task.number > newest)
        if (newest_served.compare_exchange_weak(newest, task.number, std::memory_order_relaxed)) return false;
    return task.number < newest;
}

}  // namespace omniserve
