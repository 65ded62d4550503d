// The order in which workers serve.
#include <algorithm>
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
    explicit QueueRig(int num_partitions = 1) : Rig(partitioned(num_partitions)), queue(port.segment()) {
        for (int slot = 0; slot < geometry.max_lanes; ++slot) open_lane(slot);
    }
    static LaneGeometry partitioned(int num_partitions) {
        LaneGeometry g = small_geometry();
        g.num_partitions = num_partitions;
        return g;
    }
    void submit(int layer, int slot) { exit(layer, {slot}, random_rows(geometry, 1, random)); }
    void device_is_at(int layer) { exit(layer, {}, random_rows(geometry, 0, random)); }
    std::vector<int> served_slots(int partition = 0, size_t at_most = 100) {
        Seat seat{partition};
        std::vector<int> slots;
        for (Task task; slots.size() < at_most && queue.pop(seat, task);) slots.push_back(task.slot);
        return slots;
    }
    /// A lane that begins in the given partition.
    void open_in(int partition, int slot) {
        port.set_pages(slot, 0, {int32_t(geometry.first_page(partition))});
        CHECK(geometry.partition_of_page(geometry.first_page(partition)) == partition);
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
    CHECK(!rig.queue.has_work({}));
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
    CHECK(!rig.queue.has_work({}));
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
    CHECK(!queue.note_served({.number = 3}));
    CHECK(queue.note_served({.number = 2}));
    CHECK(!queue.note_served({.number = 7}));
    CHECK(!queue.note_served({.number = 5, .partition = 1}));  // another order
    CHECK(queue.note_served({.number = 4, .partition = 1}));
}

TEST(every_page_belongs_to_one_contiguous_partition) {
    for (int num_pages : {1, 2, 3, 7, 20, 1000})
        for (int count = 1; count <= std::min(num_pages, kMaxPartitions); ++count) {
            const LaneGeometry g{.num_host_pages = num_pages, .num_partitions = count};
            CHECK(g.first_page(0) == 0 && g.first_page(count) == num_pages);
            for (int p = 0; p < count; ++p) {
                CHECK(g.first_page(p) < g.first_page(p + 1));
                for (int64_t page = g.first_page(p); page < g.first_page(p + 1); ++page)
                    CHECK(g.partition_of_page(page) == p);
            }
        }
}

TEST(a_worker_serves_its_own_partition_first_and_then_helps_the_others) {
    QueueRig rig(3);
    for (int slot = 0; slot < 5; ++slot) rig.open_in(slot % 3, slot);  // partitions 0 1 2 0 1
    for (int slot = 0; slot < 5; ++slot) rig.submit(slot % 2, slot);
    CHECK(rig.served_slots(1, 1) == std::vector<int>({1}));
    CHECK(rig.served_slots(2, 1) == std::vector<int>({2}));
    CHECK(rig.served_slots(1) == std::vector<int>({4, 0, 3}));
    CHECK(!rig.queue.has_work({1}));
}

TEST(deadlines_hold_within_a_partition) {
    QueueRig rig(2);
    for (int slot = 0; slot < 4; ++slot) rig.open_in(slot % 2, slot);
    rig.submit(0, 0);
    rig.submit(1, 1);
    rig.submit(1, 2);
    rig.submit(2, 3);
    rig.port.begin_walk();
    rig.device_is_at(1);
    CHECK(rig.served_slots(0, 2) == std::vector<int>({2, 0}));
    CHECK(rig.served_slots(0) == std::vector<int>({1, 3}));
}

TEST(work_of_a_partition_is_left_to_its_idle_workers) {
    QueueRig rig(2);
    rig.open_in(1, 0);
    rig.queue.begin_idle(1);
    rig.submit(0, 0);
    rig.port.land({1, 0, 1, 0, {int32_t(rig.geometry.first_page(1))}}, std::vector<std::byte>(100'000).data());
    Seat here{0};
    Task task;
    int frame;
    CHECK(!rig.queue.has_work(here) && !rig.queue.pop(here, task) && !rig.queue.pop_frame(here, frame));
    CHECK(rig.queue.has_work({1}));
    rig.queue.end_idle(1);
    CHECK(rig.queue.has_work(here) && rig.queue.pop(here, task) && rig.queue.pop_frame(here, frame));
}

TEST(a_partition_without_workers_is_served_beside_endless_work_elsewhere) {
    QueueRig rig(2);
    rig.open_in(1, 0);
    rig.open_in(0, 1);
    rig.submit(0, 0);
    rig.submit(0, 1);
    Seat seat{0};
    int num_pops = 0;
    for (Task task; rig.queue.pop(seat, task) && task.slot != 0; ++num_pops) {
        rig.port.cancel(1);
        rig.port.segment().answer(1).done = task.ticket;  // as a host that acknowledges
        rig.port.drained();
        rig.submit(0, 1);
    }
    CHECK(num_pops > 0 && num_pops < 32);
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
    Seat seat;
    for (Task task; queue.pop(seat, task);) layers.push_back(task.layer);
    CHECK(layers == std::vector<int>({64, 129, 63}));
}
