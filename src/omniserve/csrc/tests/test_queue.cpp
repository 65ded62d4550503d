// The order in which workers serve.
#include <random>
#include <vector>

#include "host_queue.h"
#include "park.h"
#include "rig.h"

using namespace omniserve;
using namespace omniserve::testing;

namespace {

/// Lanes submitted at chosen layers; the queue popped beside the host, which stays idle.
struct QueueRig : Rig {
    QueueRig() : Rig(small_geometry()), queue(port.segment()) {
        for (int slot = 0; slot < geometry.max_lanes; ++slot) open_lane(slot);
    }
    void submit(int layer, int slot) { exit(layer, {slot}, random_rows(geometry, 1, random)); }
    void device_is_at(int layer) { exit(layer, {}, random_rows(geometry, 0, random)); }
    std::vector<int> served_slots() {
        std::vector<int> slots;
        for (Task task; queue.pop(task);) slots.push_back(task.slot);
        return slots;
    }
    std::mt19937 random;
    HostQueue queue;
};

}  // namespace

TEST(without_a_walk_the_oldest_is_served_first) {
    QueueRig rig;
    rig.submit(2, 0);
    rig.submit(0, 1);
    rig.submit(1, 2);
    rig.submit(0, 3);
    CHECK(rig.served_slots() == std::vector<int>({0, 1, 2, 3}));
    CHECK(!rig.queue.has_work());
}

TEST(in_a_walk_the_next_entry_is_served_first) {
    QueueRig rig;
    rig.submit(0, 0);
    rig.submit(2, 1);
    rig.submit(1, 2);
    rig.submit(1, 3);
    rig.port.begin_walk();
    rig.device_is_at(1);
    CHECK(rig.served_slots() == std::vector<int>({2, 3, 1, 0}));
    CHECK(!rig.queue.has_work());
}

TEST(after_the_last_layer_the_next_walk_counts) {
    QueueRig rig;
    rig.submit(2, 0);
    rig.submit(0, 1);
    rig.port.begin_walk();
    rig.take(2, 1);
    CHECK(rig.served_slots() == std::vector<int>({1, 0}));
}

TEST(a_task_too_long_for_this_entry_is_served_last) {
    QueueRig rig;
    rig.port.begin_walk();
    rig.submit(1, 0);
    rig.submit(2, 1);
    rig.submit(0, 2);
    rig.device_is_at(1);
    rig.port.segment().header().attention_gap_ns = 1'000'000'000;
    rig.queue.observe_service(3'600'000'000'000, 1);  // an hour a token
    CHECK(rig.served_slots() == std::vector<int>({1, 2, 0}));
}

TEST(a_task_in_time_for_this_entry_is_served_first) {
    QueueRig rig;
    rig.port.begin_walk();
    rig.submit(2, 1);
    rig.submit(1, 0);
    rig.device_is_at(1);
    rig.port.segment().header().attention_gap_ns = 3'600'000'000'000;
    rig.queue.observe_service(1, 1);
    CHECK(rig.served_slots() == std::vector<int>({0, 1}));
}

TEST(serving_after_a_later_submission_is_noted) {
    const Rig rig(small_geometry());
    HostQueue queue(rig.port.segment());
    CHECK(!queue.note_served(3));
    CHECK(queue.note_served(2));
    CHECK(!queue.note_served(7));
}

TEST(more_than_64_layers_are_found) {
    LaneGeometry geometry = small_geometry();
    geometry.num_layers = 130;
    Rig rig(geometry);
    HostQueue queue(rig.port.segment());
    std::mt19937 random;
    for (int slot = 0; slot < 3; ++slot) rig.open_lane(slot);
    rig.exit(129, {0}, random_rows(geometry, 1, random));
    rig.exit(64, {1}, random_rows(geometry, 1, random));
    rig.exit(63, {2}, random_rows(geometry, 1, random));
    rig.port.begin_walk();
    rig.exit(64, {}, random_rows(geometry, 0, random));
    std::vector<int> layers;
    for (Task task; queue.pop(task);) layers.push_back(task.layer);
    CHECK(layers == std::vector<int>({64, 129, 63}));
}
