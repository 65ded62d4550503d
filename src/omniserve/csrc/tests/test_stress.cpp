// Races: a device thread that submits, takes, cancels and copies at random against running workers. Every result is
// compared with a shadow, a second segment that gets the same rows and is served by hand.
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "gate.h"
#include "rig.h"
#include "thread_team.h"

using namespace omniserve;
using namespace omniserve::testing;

namespace {

/// Tokens that make a split task of 2 x 64 elements.
constexpr int long_context(DType host_kv_dtype) { return host_kv_dtype == DType::i8 ? 2100 : 700; }

LaneGeometry stress_geometry(DType host_kv_dtype = DType::f32) {
    LaneGeometry g = small_geometry();
    g.host_kv_dtype = host_kv_dtype;
    g.max_lanes = 6;
    g.host_page_size = 16;
    g.max_pages_per_lane = (long_context(host_kv_dtype) + 60) / 16 + 1;
    g.num_host_pages = g.max_lanes * g.max_pages_per_lane + 8;  // the last 8 belong to copies
    g.device_page_size = 10;
    return g;
}

class Device {
public:
    Device(unsigned seed, int eventfd, DType host_kv_dtype)
        : random_(seed), eventfd_(eventfd), live_(stress_geometry(host_kv_dtype), {.eventfd = eventfd}),
          shadow_(stress_geometry(host_kv_dtype)), page_(live_.geometry.device_kv().page_bytes()) {
        fill_contexts();
        lanes_.resize(live_.geometry.max_lanes);
        live_.host.start(3);
    }

    ~Device() { live_.host.stop(); }

    void run(int num_steps) {
        for (int step = 0; step < num_steps; ++step) {
            if (step % 20 < 14) walk();
            else pass();
            if (random_() % 8 == 0) cancel(int(random_() % lanes_.size()));
            for (int32_t slot : live_.port.drained()) lanes_[slot].state = Lane::free;
            copies();
        }
        while (settle()) {
        }
    }

    uint64_t num_taken = 0, num_copies = 0;
    LaneStats stats() const { return live_.port.stats(); }
    uint64_t num_pieces() const {
        uint64_t pieces = 0;
        for (int i = 0; i < 3; ++i) pieces += live_.host.header().workers[i].pieces;
        return pieces;
    }

private:
    struct Lane {
        enum State { free, idle, waiting, draining } state = free;
        int layer = 0;
        int position = 0;
    };

    /// Contexts that lanes start from: the same small values on both sides.
    void fill_contexts() {
        const KvGeometry g = live_.geometry.host_kv();
        const size_t width = live_.geometry.kv_elements();
        std::vector<float> rows(g.page_size * width);
        std::vector<int32_t> offsets(g.page_size);
        std::iota(offsets.begin(), offsets.end(), 0);
        for (int page = 0; page < live_.geometry.num_host_pages; ++page) {
            for (float& value : rows) value = float(int(random_() % 17) - 8) / 16;
            const std::vector<int32_t> pages(g.page_size, page);
            for (int layer = 0; layer < g.num_layers; ++layer)
                for (const Rig* rig : {&live_, &shadow_})
                    write_rows(rig->host.arena().kv(), layer, g.page_size,
                               {rows.data(), ptrdiff_t(width), rows.data(), ptrdiff_t(width)}, pages.data(),
                               offsets.data());
        }
    }

    void open(int slot) {
        Lane& lane = lanes_[slot];
        lane = {Lane::idle, 0, slot < 2 ? long_context(live_.geometry.host_kv_dtype) : 0};
        live_.open_lane(slot, lane.position);
        shadow_.open_lane(slot, lane.position);
    }

    void exit(int layer) {
        std::vector<int32_t> slots;
        for (int slot = 0; slot < int(lanes_.size()); ++slot)
            if (lanes_[slot].state == Lane::idle && lanes_[slot].layer == layer) slots.push_back(slot);
        std::shuffle(slots.begin(), slots.end(), random_);
        const Rows rows = random_rows(live_.geometry, int(slots.size()), random_);
        for (int32_t slot : slots) lanes_[slot].state = Lane::waiting;
        live_.exit(layer, slots, rows);
        shadow_.exit(layer, slots, rows);
        shadow_.serve_all();
        const Rig::Taken taken = shadow_.take(layer, int(lanes_.size()));
        for (size_t i = 0; i < taken.slots.size(); ++i) {
            const auto* attn = &taken.attn[i * live_.geometry.q_elements()];
            const auto* x = &taken.x[i * live_.geometry.hidden_size];
            expected_[taken.slots[i]] = {std::vector<float>(attn, attn + live_.geometry.q_elements()),
                                         std::vector<float>(x, x + live_.geometry.hidden_size)};
        }
    }

    void take(int layer, int cap, bool same_iteration) {
        const Rig::Taken taken = live_.take(layer, cap, same_iteration);
        for (size_t i = 0; i < taken.slots.size(); ++i) {
            Lane& lane = lanes_[taken.slots[i]];
            CHECK(lane.state == Lane::waiting && lane.layer == layer);
            const auto& [attn, x] = expected_.at(taken.slots[i]);
            for (size_t d = 0; d < attn.size(); ++d)
                CHECK_NEAR(taken.attn[i * attn.size() + d], attn[d], 2e-6);
            CHECK(std::equal(x.begin(), x.end(), &taken.x[i * x.size()]));
            advance(taken.slots[i]);
            ++num_taken;
        }
    }

    void advance(int slot) {
        Lane& lane = lanes_[slot];
        lane.state = Lane::idle;
        lane.layer = (lane.layer + 1) % live_.geometry.num_layers;
        if (lane.layer > 0) return;
        if (++lane.position >= live_.geometry.max_pages_per_lane * live_.geometry.host_page_size ||
            (slot >= 2 && lane.position > 30)) {
            lane.state = Lane::free;
            return;
        }
        live_.port.start_token(slot, lane.position);
        shadow_.port.start_token(slot, lane.position);
    }

    void walk() {
        for (int slot = 0; slot < int(lanes_.size()); ++slot)
            if (lanes_[slot].state == Lane::free && random_() % 3 == 0) open(slot);
        live_.port.begin_walk();
        const bool same_iteration = random_() % 2;
        for (int layer = 0; layer < live_.geometry.num_layers; ++layer) {
            exit(layer);
            if (random_() % 4 == 0) CHECK(live_.port.wait_all(layer, 60.0));
            take(layer, int(random_() % 7), same_iteration);
        }
        live_.port.end_walk();
    }

    /// Sleeps for a ready lane as the engine does, then serves the layer with the most.
    void pass() {
        if (stats().waiting_lanes == 0) return;
        std::vector<int32_t> ready(live_.geometry.num_layers), waiting(ready.size());
        std::vector<uint64_t> oldest(ready.size());
        while (true) {
            live_.port.scan(ready.data(), waiting.data(), oldest.data());
            if (*std::max_element(ready.begin(), ready.end()) > 0) break;
            if (!live_.port.arm()) sleep();
            for (int32_t slot : live_.port.drained()) lanes_[slot].state = Lane::free;
            copies();
        }
        const int layer = int(std::max_element(ready.begin(), ready.end()) - ready.begin());
        take(layer, 6, true);
        exit((layer + 1) % live_.geometry.num_layers);
    }

    void sleep() {
        pollfd fd{eventfd_, POLLIN, 0};
        CHECK(poll(&fd, 1, 60'000) == 1);  // a lost wake-up would sleep for ever
        uint64_t count;
        CHECK(read(eventfd_, &count, sizeof(count)) == sizeof(count));
        live_.port.disarm();
    }

    void cancel(int slot) {
        Lane& lane = lanes_[slot];
        if (lane.state == Lane::free || lane.state == Lane::draining) return;
        lane.state = live_.port.cancel(slot) ? Lane::free : Lane::draining;
        CHECK(shadow_.port.cancel(slot));
        expected_.erase(slot);
    }

    /// A page of bytes travels to the host and back; one round trip at a time.
    void copies() {
        const std::vector<int32_t> pages = {live_.geometry.num_host_pages - 1, live_.geometry.num_host_pages - 5};
        for (uint64_t id : live_.port.collect_copies()) {
            ++num_copies;
            if (live_.geometry.is_host_kv_lossy()) {  // no way back: looked at where it landed
                check_landed(pages);
                is_copying_ = false;
                continue;
            }
            if (id % 2 == 0) {
                live_.port.fetch({id + 1, 0, 10, 9, pages}, page_.data());
                if (random_() % 4 == 0) live_.port.cancel_fetch(id + 1);
                else expected_page_ = sent_;
                std::fill(page_.begin(), page_.end(), std::byte{0});
                continue;
            }
            if (!expected_page_.empty()) CHECK(page_ == expected_page_);
            else CHECK(std::all_of(page_.begin(), page_.end(), [](std::byte b) { return b == std::byte{0}; }));
            expected_page_.clear();
            is_copying_ = false;
        }
        if (is_copying_) return;
        sent_.resize(page_.size());
        if (live_.geometry.is_host_kv_lossy())
            for (size_t i = 0; i < sent_.size(); i += sizeof(float)) {
                const float value = float(int(random_() % 2001) - 1000) / 64;
                std::memcpy(&sent_[i], &value, sizeof(value));
            }
        else
            for (std::byte& value : sent_) value = std::byte(random_());
        live_.port.land({next_copy_ += 2, 0, 10, 9, pages}, sent_.data());
        is_copying_ = true;
    }

    /// The pages of the last copy hold what the shadow's do when the same page lands there by hand.
    void check_landed(const std::vector<int32_t>& pages) {
        shadow_.port.land({1, 0, 10, 9, pages}, sent_.data());
        CHECK(shadow_.host.serve_copy(1));
        CHECK(shadow_.port.collect_copies().size() == 1);
        const PagedKv &here = live_.host.arena().kv(), &there = shadow_.host.arena().kv();
        for (int32_t page : pages)
            CHECK(std::memcmp(here.page(page), there.page(page), here.geometry.page_bytes()) == 0);
    }

    /// Serves out what is in flight; false when nothing is.
    bool settle() {
        for (int layer = 0; layer < live_.geometry.num_layers; ++layer) {
            CHECK(live_.port.wait_all(layer, 60.0));
            take(layer, 6, true);
        }
        for (int32_t slot : live_.port.drained()) lanes_[slot].state = Lane::free;
        const LaneStats now = stats();
        return now.waiting_lanes > 0 || now.draining_lanes > 0;
    }

    std::mt19937 random_;
    int eventfd_;
    Rig live_, shadow_;
    std::vector<Lane> lanes_;
    std::map<int, std::pair<std::vector<float>, std::vector<float>>> expected_;
    std::vector<std::byte> page_, sent_, expected_page_;
    uint64_t next_copy_ = 0;
    bool is_copying_ = false;
};

}  // namespace

static void survive_random_walks(DType host_kv_dtype) {
    uint64_t taken = 0, pieces = 0, copies = 0, cancelled = 0;
    for (unsigned seed = 1; seed <= 4; ++seed) {
        const int fd = eventfd(0, EFD_NONBLOCK);
        Device device(seed, fd, host_kv_dtype);
        device.run(250);
        taken += device.num_taken;
        pieces += device.num_pieces();
        copies += device.num_copies;
        cancelled += device.stats().cancelled_rows;
        CHECK(device.stats().submitted_rows == device.num_taken + device.stats().cancelled_rows);
        close(fd);
    }
    CHECK(taken > 500 && pieces > 100 && copies > 100 && cancelled > 10);  // the test tested something
}

TEST(lanes_survive_random_walks_cancels_and_copies) { survive_random_walks(DType::f32); }

TEST(lanes_of_an_int8_host_survive_random_walks_cancels_and_copies) { survive_random_walks(DType::i8); }

TEST(workers_stop_and_start_again_with_work_queued) {
    Rig rig(stress_geometry());
    std::mt19937 random;
    for (int round = 0; round < 10; ++round) {
        for (int slot = 0; slot < 6; ++slot) rig.open_lane(slot);
        rig.exit(round % 3, {0, 1, 2, 3, 4, 5}, random_rows(rig.geometry, 6, random));
        rig.host.start(1 + round % 3);
        CHECK(rig.port.wait_all(round % 3, 60.0));
        CHECK(rig.take(round % 3, 6).slots.size() == 6);
        rig.host.stop();
    }
}

TEST(a_team_runs_every_piece_once) {
    ThreadTeam team(4);
    for (int round = 0; round < 2000; ++round) {
        const int num_pieces = round % 37;
        std::atomic<int> next{0}, done{0};
        int plain[4] = {};  // one per member: a race here is a second thread in one member's place
        team.run([&](int member) {
            while (next.fetch_add(1) < num_pieces) {
                ++plain[member];
                done.fetch_add(1);
            }
        });
        CHECK(done == num_pieces);
        CHECK(plain[0] + plain[1] + plain[2] + plain[3] == num_pieces);
    }
}

TEST(a_gate_is_reused_only_when_everybody_left) {
    Gate gate;
    int job = 0;  // plain on purpose: written by the owner, read by visitors
    std::atomic<bool> stop{false};
    std::atomic<int> visits{0};
    std::vector<std::thread> visitors;
    for (int i = 0; i < 3; ++i)
        visitors.emplace_back([&] {
            while (!stop) {
                if (!gate.try_enter()) continue;
                visits += job > 0;
                gate.close();
                gate.leave();
            }
        });
    for (int round = 1; round <= 3000; ++round) {
        while (!gate.try_claim()) std::this_thread::yield();
        job = round;
        const int visits_before = visits;
        gate.open();
        while (round % 8 == 0 && visits == visits_before) std::this_thread::yield();
        gate.close();
        gate.leave();
    }
    stop = true;
    for (std::thread& visitor : visitors) visitor.join();
    CHECK(gate.is_free() && visits >= 3000 / 8);
}
