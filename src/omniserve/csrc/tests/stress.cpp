#include "stress.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "tolerance.h"

namespace omniserve::testing {
namespace {

constexpr double kPatienceS = 60.0;  // a result that takes longer than this is lost
constexpr int kShortAnswer = 30;     // tokens that a lane without a long context decodes
constexpr uint64_t kContextIds = uint64_t{1} << 32;  // copy ids of their contexts: plus the slot

/// Writes small random tokens [0, n) to one page, as any row is written, in every layer.
void write_random(const PagedKv& kv, int page, int n, std::mt19937& random) {
    const ptrdiff_t stride = ptrdiff_t(kv.geometry.num_kv_heads) * kv.geometry.head_dim;
    std::vector<float> k(n * stride), v(n * stride);
    const std::vector<int32_t> pages(n, page);
    std::vector<int32_t> offsets(n);
    for (int i = 0; i < n; ++i) offsets[i] = i;
    for (int layer = 0; layer < kv.geometry.num_layers; ++layer) {
        for (auto* values : {&k, &v})
            for (float& value : *values) value = float(int(random() % 17) - 8) / 16;
        write_rows(kv, layer, n, {k.data(), stride, v.data(), stride, DType::f32}, pages.data(), offsets.data());
    }
}

/// How far two rows of the same numbers may lie apart, once rounded to the act dtype: where one of them was served with
/// others that share a prefix, its text was cut into other tiles, and the queries of a head were more than its group.
double tolerance(const LaneGeometry& g, double value) {
    const double relative = g.act_dtype == DType::bf16 ? 0x1p-7 : g.act_dtype == DType::f16 ? 0x1p-10 : 0.0;
    return attention_tolerance(g.host_kv(), std::max(2, g.num_heads / g.num_kv_heads)) + relative * std::abs(value);
}

}  // namespace

StressRun::StressRun(const StressConfig& config)
    : config_(config), random_(config.seed), eventfd_(eventfd(0, EFD_NONBLOCK)),
      live_(config.geometry, {.eventfd = eventfd_}), shadow_(config.shadow_geometry()) {
    set_simd(config.simd);
    fill_pages();
    lanes_.resize(config.geometry.max_lanes);
    trips_.resize(config.num_trips);
    const int pages_per_trip = config.geometry.max_pages_per_frame();
    for (int i = 0; i < config.num_trips; ++i)
        for (int page = pages_per_trip - 1; page >= 0; --page)
            trips_[i].host_pages.push_back(config.first_page_of_copies() + i * pages_per_trip + page);
    live_.host.start(config.num_threads);
}

StressRun::~StressRun() {
    live_.host.stop();
    close(eventfd_);
    set_simd("auto");
}

/// Contexts that lanes start from: the same on both sides.
void StressRun::fill_pages() {
    const PagedKv& kv = live_.host.arena().kv();
    for (int page = 0; page < kv.num_pages; ++page) {
        write_random(kv, page, kv.geometry.page_size, random_);
        std::memcpy(shadow_.host.arena().kv().page(page), kv.page(page), kv.geometry.page_bytes());
    }
}

void StressRun::run() {
    for (int step = 0; step < config_.num_steps; ++step) {
        if (step % 20 < 14) walk();
        else pass();
        if (one_in(config_.cancel_one_in)) cancel(int(random_() % lanes_.size()));
        free_drained();
        copies();
    }
    while (settle()) {
    }
    CHECK(stats().submitted_rows == counts_.rows + stats().cancelled_rows);
}

void StressCounts::add(const StressCounts& more) {
    for (auto field : {&StressCounts::rows, &StressCounts::cancelled_rows, &StressCounts::cancelled_sharers,
                       &StressCounts::pieces, &StressCounts::shared_rows, &StressCounts::copies,
                       &StressCounts::landed_beside_rows})
        this->*field += more.*field;
}

StressCounts StressRun::counts() const {
    StressCounts counts = counts_;
    counts.cancelled_rows = stats().cancelled_rows;
    for (int i = 0; i < config_.num_threads; ++i) {
        counts.pieces += live_.host.header().workers[i].pieces;
        counts.shared_rows += live_.host.header().workers[i].shared_rows;
    }
    return counts;
}

void StressRun::begin(int slot) {
    if (slot >= StressConfig::kLongLanes || config_.landing == 0) return open(slot);
    lanes_[slot] = {.state = Lane::landing, .sent = config_.long_context - config_.landing};
}

void StressRun::open(int slot) {
    const LaneGeometry& g = live_.geometry;
    const int position = config_.context_of(slot), most = g.max_pages_per_lane * g.host_page_size;
    const int end = slot < StressConfig::kLongLanes ? most : std::min(most, position + kShortAnswer);
    lanes_[slot] = {.state = Lane::idle, .position = position, .end = end};
    const std::vector<int32_t> table = table_of(slot);
    live_.open_lane(slot, position, table);
    shadow_.open_lane(slot, position, table);
}

/// The lane's own pages, after all or some of those of its prefix. They are full: no lane writes to them.
std::vector<int32_t> StressRun::table_of(int slot) {
    std::vector<int32_t> table = live_.pages_of(slot);
    const int prefix = config_.prefix_of(slot), count = config_.pages_per_prefix();
    if (prefix < 0) return table;
    const int common = one_in(3) ? 1 + int(random_() % count) : count;
    const int end = config_.pages_of_lanes() + (prefix + 1) * count;
    for (int i = 0; i < common; ++i) table[i] = end - 1 - i;
    return table;
}

/// Sends what frames allow of a long context, and opens the lane when everything has landed.
void StressRun::land_context(int slot) {
    Lane& lane = lanes_[slot];
    const KvGeometry device = live_.geometry.device_kv(), host = live_.geometry.host_kv();
    const std::vector<int32_t> table = live_.pages_of(slot);
    while (lane.sent < config_.long_context && live_.port.free_frames() > 0) {
        const int count = std::min(device.page_size, config_.long_context - lane.sent);
        const std::vector<std::byte> page = random_device_page(count);
        const int first = lane.sent / host.page_size, last = (lane.sent + count - 1) / host.page_size;
        const PageCopy copy{kContextIds + slot, 0, count, lane.sent % host.page_size,
                            {table.begin() + first, table.begin() + last + 1}};
        live_.port.land(copy, page.data());
        land_in_shadow(copy, page);
        ++lane.arriving;
        lane.sent += count;
    }
    if (lane.sent == config_.long_context && lane.arriving == 0) open(slot);
}

/// Token by token, as no worker does it.
void StressRun::land_in_shadow(const PageCopy& copy, const std::vector<std::byte>& page) {
    const KvGeometry device = live_.geometry.device_kv(), host = live_.geometry.host_kv();
    for (int t = 0; t < copy.num_tokens; ++t) {
        const int at = copy.host_offset + t;
        repack(device, page.data(), t, host, shadow_.host.arena().kv().page(copy.host_pages[at / host.page_size]),
               at % host.page_size, 1);
    }
}

std::vector<std::byte> StressRun::random_device_page(int num_tokens) {
    const KvGeometry device = live_.geometry.device_kv();
    std::vector<std::byte> page(device.page_bytes());
    write_random({device, page.data(), 1}, 0, num_tokens, random_);
    return page;
}

void StressRun::exit(int layer) {
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
        const auto attn = taken.attn.begin() + i * live_.geometry.q_elements();
        const auto x = taken.x.begin() + i * live_.geometry.hidden_size;
        expected_[taken.slots[i]] = {{attn, attn + live_.geometry.q_elements()}, {x, x + live_.geometry.hidden_size}};
    }
}

void StressRun::take(int layer, int cap, bool same_iteration) {
    const Rig::Taken taken = live_.take(layer, cap, same_iteration);
    for (size_t i = 0; i < taken.slots.size(); ++i) {
        const int slot = taken.slots[i];
        CHECK(lanes_[slot].state == Lane::waiting && lanes_[slot].layer == layer);
        check_row(slot, &taken.attn[i * live_.geometry.q_elements()], &taken.x[i * live_.geometry.hidden_size]);
        advance(slot);
        ++counts_.rows;
    }
}

void StressRun::check_row(int slot, const float* attn, const float* x) {
    const Expected& expected = expected_.at(slot);
    for (size_t d = 0; d < expected.attn.size(); ++d)
        CHECK_NEAR(attn[d], expected.attn[d], tolerance(live_.geometry, expected.attn[d]));
    CHECK(std::equal(expected.x.begin(), expected.x.end(), x));
}

void StressRun::advance(int slot) {
    Lane& lane = lanes_[slot];
    lane.state = Lane::idle;
    lane.layer = (lane.layer + 1) % live_.geometry.num_layers;
    if (lane.layer > 0) return;
    if (++lane.position >= lane.end) {
        lane.state = Lane::free;
        return;
    }
    live_.port.start_token(slot, lane.position);
    shadow_.port.start_token(slot, lane.position);
}

void StressRun::walk() {
    for (int slot = 0; slot < int(lanes_.size()); ++slot)
        if (lanes_[slot].state == Lane::free && one_in(3)) begin(slot);
    live_.port.begin_walk();
    const bool same_iteration = random_() % 2;
    for (int layer = 0; layer < live_.geometry.num_layers; ++layer) {
        exit(layer);
        if (one_in(4)) CHECK(live_.port.wait_all(layer, kPatienceS));
        take(layer, int(random_() % (lanes_.size() + 1)), same_iteration);
    }
    live_.port.end_walk();
}

/// Sleeps for a ready lane as the engine does, then serves the layer with the most.
void StressRun::pass() {
    if (stats().waiting_lanes == 0) return;
    std::vector<int32_t> ready(live_.geometry.num_layers), waiting(ready.size());
    std::vector<uint64_t> oldest(ready.size());
    while (true) {
        live_.port.scan(ready.data(), waiting.data(), oldest.data());
        if (*std::max_element(ready.begin(), ready.end()) > 0) break;
        if (!live_.port.arm()) sleep();
        free_drained();
        copies();
    }
    const int layer = int(std::max_element(ready.begin(), ready.end()) - ready.begin());
    take(layer, int(lanes_.size()), true);
    exit((layer + 1) % live_.geometry.num_layers);
}

void StressRun::sleep() {
    pollfd fd{eventfd_, POLLIN, 0};
    CHECK(poll(&fd, 1, int(kPatienceS * 1000)) == 1);  // a lost wake-up would sleep for ever
    uint64_t count;
    CHECK(read(eventfd_, &count, sizeof(count)) == sizeof(count));
    live_.port.disarm();
}

void StressRun::cancel(int slot) {
    Lane& lane = lanes_[slot];
    if (lane.state != Lane::idle && lane.state != Lane::waiting) return;
    counts_.cancelled_sharers += lane.state == Lane::waiting && config_.prefix_of(slot) >= 0;
    lane.state = live_.port.cancel(slot) ? Lane::free : Lane::draining;
    CHECK(shadow_.port.cancel(slot));
    expected_.erase(slot);
}

void StressRun::free_drained() {
    for (int32_t slot : live_.port.drained()) lanes_[slot].state = Lane::free;
}

/// Sends pages off and checks those that came back. Frames that trips leave are for contexts.
void StressRun::copies() {
    for (uint64_t id : live_.port.collect_copies()) end_of(id);
    for (size_t i = 0; i < trips_.size(); ++i)
        if (!trips_[i].is_under_way) start(trips_[i], 2 * (next_trip_++ * trips_.size() + i));
    for (int slot = 0; slot < std::min(StressConfig::kLongLanes, int(lanes_.size())); ++slot)
        if (lanes_[slot].state == Lane::landing) land_context(slot);
}

/// Of a trip's two copies the first, with an even id, lands, and the one after it fetches. From int8 none does.
void StressRun::end_of(uint64_t id) {
    ++counts_.copies;
    if (id >= kContextIds) {
        --lanes_[id - kContextIds].arriving;
        counts_.landed_beside_rows += stats().waiting_lanes > 0;
        return;
    }
    Trip& trip = trips_[id / 2 % trips_.size()];
    if (live_.geometry.is_host_kv_lossy()) {
        check_landed(trip);
        trip.is_under_way = false;
        return;
    }
    if (id % 2 == 0) {
        std::fill(trip.page.begin(), trip.page.end(), std::byte{0});
        live_.port.fetch(copy(trip, id + 1), trip.page.data());
        trip.is_wanted = !one_in(4);
        if (!trip.is_wanted) live_.port.cancel_fetch(id + 1);
        return;
    }
    if (trip.is_wanted) CHECK(trip.page == trip.sent);
    else CHECK(std::all_of(trip.page.begin(), trip.page.end(), [](std::byte b) { return b == std::byte{0}; }));
    trip.is_under_way = false;
}

void StressRun::start(Trip& trip, uint64_t id) {
    trip.sent = random_device_page(live_.geometry.device_page_size);
    trip.page.resize(trip.sent.size());
    if (!live_.geometry.is_host_kv_lossy())  // then any bytes arrive as they were
        for (std::byte& value : trip.sent) value = std::byte(random_());
    trip.host_offset = int(random_() % live_.geometry.host_page_size);
    trip.is_under_way = true;
    live_.port.land(copy(trip, id), trip.sent.data());
}

PageCopy StressRun::copy(const Trip& trip, uint64_t id) const {
    const int tokens = live_.geometry.device_page_size, host_page = live_.geometry.host_page_size;
    const int num_pages = (trip.host_offset + tokens + host_page - 1) / host_page;
    return {id, 0, tokens, trip.host_offset, {trip.host_pages.begin(), trip.host_pages.begin() + num_pages}};
}

/// The trip's pages hold what the shadow's do when the same page lands there by hand.
void StressRun::check_landed(const Trip& trip) {
    const PageCopy landed = copy(trip, 0);
    land_in_shadow(landed, trip.sent);
    const PagedKv &here = live_.host.arena().kv(), &there = shadow_.host.arena().kv();
    for (int32_t page : landed.host_pages)
        CHECK(std::memcmp(here.page(page), there.page(page), here.geometry.page_bytes()) == 0);
}

/// Serves out what is in flight; false when nothing is.
bool StressRun::settle() {
    for (int layer = 0; layer < live_.geometry.num_layers; ++layer) {
        CHECK(live_.port.wait_all(layer, kPatienceS));
        take(layer, int(lanes_.size()), true);
    }
    free_drained();
    const LaneStats now = stats();
    return now.waiting_lanes > 0 || now.draining_lanes > 0;
}

}  // namespace omniserve::testing
