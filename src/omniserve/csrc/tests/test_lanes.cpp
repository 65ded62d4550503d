// Port and host together: what small single-threaded stories can show. test_stress.cpp has the races.
#include <cstring>
#include <random>
#include <vector>

#include "rig.h"

using namespace omniserve;
using namespace omniserve::testing;

TEST(the_first_token_attends_to_itself) {
    Rig rig(small_geometry());
    std::mt19937 random;
    const Rows rows = random_rows(rig.geometry, 2, random);
    rig.open_lane(3);
    rig.open_lane(1);
    rig.exit(0, {3, 1}, rows);
    rig.serve_all();
    const Rig::Taken taken = rig.take(0, 5);
    CHECK(taken.slots == std::vector<int32_t>({3, 1}));
    for (int i = 0; i < 2; ++i)
        for (int head = 0; head < 4; ++head)
            for (int d = 0; d < 64; ++d)
                CHECK_NEAR(taken.attn[(i * 4 + head) * 64 + d], rows.v[(i * 2 + head / 2) * 64 + d], 1e-6);
    for (size_t i = 0; i < rows.x.size(); ++i) CHECK(taken.x[i] == rows.x[i]);
}

namespace {

/// One token served alone: its result is its own value, whatever the queries; rows as the model has them.
std::vector<std::byte> first_results(Rig& rig, int n, ActRows q, ActRows k, ActRows v) {
    const LaneGeometry& g = rig.geometry;
    std::vector<std::byte> x(n * g.hidden_size * item_size(g.act_dtype)), x_out(x.size());
    std::vector<std::byte> attn(n * g.q_elements() * item_size(g.act_dtype));
    std::vector<int32_t> slots;
    for (int slot = 0; slot < n; ++slot) rig.open_lane(slot), slots.push_back(slot);
    rig.port.exit(1, n, slots.data(), q, k, v, {x.data(), g.hidden_size});
    rig.serve_all();
    CHECK(rig.port.take(1, n, true, slots.data(), {attn.data(), ptrdiff_t(g.q_elements())},
                        {x_out.data(), g.hidden_size}) == n);
    return attn;
}

}  // namespace

TEST(rows_in_one_buffer_and_rows_apart_are_served_alike) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        LaneGeometry g = small_geometry();
        g.act_dtype = g.kv_dtype = g.host_kv_dtype = dtype;
        Rig rig(g);
        std::mt19937 random;
        const int n = 3;
        const Rows rows = random_rows(g, n, random);
        const auto q = narrowed(rows.q, dtype), k = narrowed(rows.k, dtype), v = narrowed(rows.v, dtype);
        const size_t q_bytes = q.size() / n, kv_bytes = k.size() / n, row_bytes = q_bytes + 2 * kv_bytes;
        std::vector<std::byte> merged(n * row_bytes);
        for (int i = 0; i < n; ++i) {
            std::memcpy(&merged[i * row_bytes], &q[i * q_bytes], q_bytes);
            std::memcpy(&merged[i * row_bytes + q_bytes], &k[i * kv_bytes], kv_bytes);
            std::memcpy(&merged[i * row_bytes + q_bytes + kv_bytes], &v[i * kv_bytes], kv_bytes);
        }
        const ptrdiff_t q_row = g.q_elements(), kv_row = g.kv_elements(), stride = q_row + 2 * kv_row;
        const auto apart = first_results(rig, n, {q.data(), q_row}, {k.data(), kv_row}, {v.data(), kv_row});
        const auto together = first_results(rig, n, {merged.data(), stride}, {&merged[q_bytes], stride},
                                            {&merged[q_bytes + kv_bytes], stride});
        CHECK(apart == together);
        for (int i = 0; i < n; ++i)
            for (int head = 0; head < g.num_heads; ++head) {
                const size_t bytes = g.head_dim * item_size(dtype);
                CHECK(std::memcmp(&apart[i * q_bytes + head * bytes], &v[i * kv_bytes + head / g.group() * bytes],
                                  bytes) == 0);
            }
    }
}

TEST(a_cancelled_row_is_acknowledged_and_its_result_never_seen) {
    Rig rig(small_geometry());
    std::mt19937 random;
    rig.open_lane(0);
    rig.exit(1, {0}, random_rows(rig.geometry, 1, random));
    CHECK(!rig.port.cancel(0));
    CHECK(rig.port.drained().empty());
    rig.serve_all();
    CHECK(rig.host.header().workers[0].stale_tasks == 1 && rig.host.header().workers[0].tasks == 0);
    CHECK(rig.take(1, 5).slots.empty());
    CHECK(rig.port.drained() == std::vector<int32_t>({0}));
    rig.open_lane(0);
    rig.exit(1, {0}, random_rows(rig.geometry, 1, random));
    CHECK(rig.take(1, 5).slots.empty());
    rig.serve_all();
    CHECK(rig.take(1, 5).slots.size() == 1);
}

TEST(a_full_house_never_overflows_a_ring) {
    Rig rig(small_geometry());
    std::mt19937 random;
    std::vector<int32_t> everyone;
    for (int slot = 0; slot < rig.geometry.max_lanes; ++slot) everyone.push_back(slot);
    for (int round = 0; round < 20; ++round) {
        for (int slot : everyone) rig.open_lane(slot);
        rig.exit(2, everyone, random_rows(rig.geometry, int(everyone.size()), random));
        if (round % 2) rig.serve_all();
        for (int slot : everyone) rig.port.cancel(slot);
        rig.serve_all();
        rig.port.drained();
    }
    CHECK(rig.port.stats().draining_lanes == 0);
}

TEST(frames_round_trip_between_page_sizes) {
    Rig rig(small_geometry());
    const size_t bytes = rig.geometry.device_kv().page_bytes();
    std::vector<std::byte> page(bytes), back(bytes);
    std::mt19937 random;
    for (std::byte& value : page) value = std::byte(random());
    rig.port.land({1, 0, 6, 3, {7, 2, 9}}, page.data());
    CHECK(rig.host.serve_copy(1));
    rig.port.fetch({2, 0, 6, 3, {7, 2, 9}}, back.data());
    CHECK(rig.host.serve_copy(2));
    CHECK(rig.port.collect_copies() == std::vector<uint64_t>({1, 2}));
    CHECK(page == back);
    CHECK(rig.port.free_frames() == 3);
}

TEST(a_segment_of_another_version_is_refused) {
    Rig rig(small_geometry());
    rig.port.segment().header().version = kSegmentVersion + 1;
    bool is_refused = false;
    try {
        Segment::attach(rig.memory.get());
    } catch (const std::invalid_argument&) {
        is_refused = true;
    }
    CHECK(is_refused);
}
