// Lanes that begin with the same pages, served together.
#include <algorithm>
#include <thread>

#include "host_job.h"
#include "rig.h"

using namespace omniserve;
using namespace omniserve::testing;

namespace {

constexpr int kPage = 16;

LaneGeometry sharing_geometry(int lanes) {
    LaneGeometry g = small_geometry();
    g.max_lanes = lanes;
    g.host_page_size = kPage;
    g.max_pages_per_lane = 24;
    g.num_host_pages = 24 * lanes;
    return g;
}

/// Lanes of which each has its first `shared[slot]` pages in common with slot 0, and a context of `tokens[slot]`.
struct SharingRig : Rig {
    SharingRig(std::vector<int> shared, std::vector<int> tokens)
        : SharingRig(shared, tokens, sharing_geometry(int(shared.size()))) {}
    SharingRig(std::vector<int> shared, std::vector<int> tokens, const LaneGeometry& g)
        : Rig(g), rows(random_rows(geometry, int(shared.size()), random)) {
        fill_arena();
        for (int slot = 0; slot < int(shared.size()); ++slot) {
            std::vector<int32_t> table;
            for (int i = 0; i < geometry.max_pages_per_lane; ++i)
                table.push_back(i < shared[slot] ? i : slot * geometry.max_pages_per_lane + i);
            port.reset(slot);
            port.set_pages(slot, 0, table);
            port.start_token(slot, tokens[slot] - 1);
            slots.push_back(slot);
        }
    }

    void fill_arena() {
        std::normal_distribution<float> normal;
        const PagedKv& kv = host.arena().kv();
        auto* values = reinterpret_cast<float*>(kv.base);
        for (size_t i = 0; i < kv.num_pages * kv.geometry.page_bytes() / sizeof(float); ++i) values[i] = normal(random);
    }

    uint64_t sum(std::atomic<uint64_t> WorkerStats::*counter) const {
        uint64_t total = 0;
        for (int i = 0; i < 4; ++i) total += (host.header().workers[i].*counter).load();
        return total;
    }

    /// All rows at layer 1, submitted before the workers start, so that the first one finds all the others.
    Taken serve_with(int num_workers) {
        exit(1, slots, rows);
        host.start(num_workers);
        CHECK(port.wait_all(1, 60.0));
        host.stop();
        return take(1, int(slots.size()));
    }

    Taken serve_by_hand() {
        exit(1, slots, rows);
        serve_all();
        return take(1, int(slots.size()));
    }

    std::mt19937 random{3};
    Rows rows;
    std::vector<int32_t> slots;
};

void check_equal(const Rig::Taken& together, const Rig::Taken& alone) {
    CHECK(together.slots == alone.slots && together.x == alone.x);
    for (size_t i = 0; i < alone.attn.size(); ++i) CHECK_NEAR(together.attn[i], alone.attn[i], 3e-6);
}

/// Attention of the slot's row at layer 1 over the last `count` of its `tokens`, straight from the kernel.
std::vector<float> attend_last(const SharingRig& rig, int slot, int count, int tokens) {
    const LaneGeometry& g = rig.geometry;
    const StateShape shape{g.num_kv_heads, g.group(), g.head_dim};
    std::vector<float> states(shape.floats()), scratch(scratch_floats(shape.num_heads, shape.group, shape.head_dim));
    std::vector<float> out(g.q_elements());
    attend({.kv = &rig.host.arena().kv(),
            .page_table = rig.port.segment().page_table(slot),
            .layer = 1,
            .first_head = 0,
            .num_heads = g.num_kv_heads,
            .first = tokens - count,
            .last = tokens,
            .q = &rig.rows.q[slot * g.q_elements()],
            .group = g.group(),
            .scale = g.score_scale(),
            .state = states.data(),
            .scratch = scratch.data()});
    finish_states(states.data(), shape, out.data());
    return out;
}

}  // namespace

TEST(lanes_that_share_pages_get_the_results_they_get_alone) {
    for (int workers : {1, 3})
        for (const auto& [shared, tokens] : std::vector<std::pair<std::vector<int>, std::vector<int>>>{
                 {{20, 20, 20, 20}, {320 + 5, 320 + 40, 321, 384}},  // each its own end; one on its first own token
                 {{20, 20, 0, 8}, {330, 340, 350, 360}},             // one shares nothing, one less
                 {{23, 23}, {384, 380}},                             // all pages but the one that tokens go to
                 {{1, 1, 1}, {17, 20, 33}}}) {                       // too little to be worth it
            SharingRig together(shared, tokens), alone(shared, tokens);
            check_equal(together.serve_with(workers), alone.serve_by_hand());
        }
}

TEST(shared_tokens_are_read_once) {
    SharingRig rig({20, 20, 20, 20}, {330, 330, 330, 330});
    rig.serve_with(1);
    const uint64_t per_token = rig.host.arena().kv().geometry.token_bytes();
    CHECK(rig.sum(&WorkerStats::kv_bytes_read) == (320 + 4 * 10) * per_token);
    CHECK(rig.sum(&WorkerStats::shared_rows) == 4 && rig.sum(&WorkerStats::tasks) == 4);
}

TEST(the_prefix_that_saves_most_is_shared) {
    // Three lanes have 20 pages in common with the first one, five more only 2.
    SharingRig rig({20, 20, 20, 20, 2, 2, 2, 2, 2}, std::vector<int>(9, 330));
    rig.serve_with(1);
    CHECK(rig.sum(&WorkerStats::shared_rows) == 4);
}

TEST(rows_with_a_window_get_the_results_of_lanes_that_hold_nothing_else) {
    // Layer 1 has a window: it ends within a page, at one, covers everything. Rows of one prefix, some beyond it.
    for (int window : {1, 21, 32, 300, 1000})
        for (int workers : {1, 3}) {
            const std::vector<int> shared(4, 20), tokens = {320 + 5, 320 + 40, 321, 384};
            LaneGeometry g = sharing_geometry(4);
            g.window = window;
            g.window_layers[0] = 0b010;
            SharingRig live(shared, tokens, g), alone(shared, tokens);
            const uint64_t per_token = live.host.arena().kv().geometry.token_bytes();
            const Rig::Taken got = live.serve_with(workers);
            // The same rows without a window, on lanes from which the tokens before it are cut off.
            alone.exit(1, alone.slots, alone.rows);
            alone.serve_all();
            alone.take(1, 4);  // appends the same keys and values
            std::vector<float> expected;
            for (int slot = 0; slot < 4; ++slot) {
                const std::vector<float> row = attend_last(alone, slot, std::min(window, tokens[slot]), tokens[slot]);
                expected.insert(expected.end(), row.begin(), row.end());
            }
            for (size_t i = 0; i < expected.size(); ++i) CHECK_NEAR(got.attn[i], expected[i], 3e-6);
            if (window == 21) CHECK(live.sum(&WorkerStats::kv_bytes_read) == 4 * 21 * per_token);
            CHECK((live.sum(&WorkerStats::shared_rows) > 0) == (window == 1000));
        }
}

TEST(a_layer_without_a_window_attends_to_everything) {
    LaneGeometry g = sharing_geometry(2);
    g.window = 5;
    g.window_layers[0] = 0b101;
    SharingRig live({20, 20}, {330, 340}, g), alone({20, 20}, {330, 340});
    check_equal(live.serve_with(1), alone.serve_by_hand());
}

TEST(a_cancelled_lane_leaves_the_others_of_its_prefix_alone) {
    SharingRig rig({20, 20, 20}, {330, 340, 350}), alone({20, 20, 20}, {330, 340, 350});
    rig.exit(1, rig.slots, rig.rows);
    alone.exit(1, alone.slots, alone.rows);
    CHECK(!rig.port.cancel(0) && !alone.port.cancel(0));
    rig.host.start(2);
    alone.serve_all();
    CHECK(rig.port.wait_all(1, 60.0));
    rig.host.stop();
    CHECK(rig.port.drained() == std::vector<int32_t>{0});
    check_equal(rig.take(1, 3), alone.take(1, 3));
}

TEST(lanes_served_out_of_turn_never_fill_a_ring) {
    // Two prefixes at one layer, over and over: most items are served before they come to the head of the ring.
    LaneGeometry g = sharing_geometry(8);
    g.num_layers = 1;
    Rig rig(g);
    std::mt19937 random(5);
    const Rows row = random_rows(g, 1, random);
    for (int slot = 0; slot < 8; ++slot) {
        rig.port.reset(slot);
        std::vector<int32_t> table;
        for (int i = 0; i < 24; ++i) table.push_back(i < 4 ? slot % 2 * 24 + i : slot * 24 + i);
        rig.port.set_pages(slot, 0, table);
        rig.port.start_token(slot, 70);
        rig.exit(0, {slot}, row);
    }
    rig.host.start(3);
    for (int taken = 0; taken < 20000;) {
        const std::vector<int32_t> slots = rig.take(0, 8).slots;
        taken += int(slots.size());
        if (slots.empty()) std::this_thread::yield();
        for (int32_t slot : slots) {
            rig.port.start_token(slot, 70);
            rig.exit(0, {slot}, row);
        }
    }
    CHECK(rig.port.wait_all(0, 60.0));
    rig.host.stop();
}
