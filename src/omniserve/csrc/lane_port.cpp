#include "lane_port.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "errors.h"
#include "park.h"

namespace omniserve {
namespace {

constexpr uint64_t kSleepStepNs = 20'000;  // of the waits, after their spin

void require_state(bool holds, int slot, const char* message) {
    if (!holds) throw std::logic_error("slot " + std::to_string(slot) + " " + message);
}

template <class Done>
bool wait_until(double timeout_s, Done&& done) {
    const uint64_t end = now_ns() + static_cast<uint64_t>(std::clamp(timeout_s, 0.0, 1e9) * 1e9);
    if (spin_until(kSpinNs, done)) return true;
    while (!done()) {
        if (now_ns() >= end) return false;
        sleep_ns(kSleepStepNs);
    }
    return true;
}

}  // namespace

LanePort::LanePort(const LaneGeometry& geometry, void* address) : segment_(Segment::create(geometry, address)) {
    lanes_.resize(geometry.max_lanes);
    waiting_.resize(geometry.num_layers);
    residual_.resize(size_t(geometry.max_lanes) * geometry.hidden_size * item_size(geometry.act_dtype));
    for (int frame = geometry.num_frames - 1; frame >= 0; --frame) free_frames_.push_back(frame);
    for (int slot = 0; slot < geometry.max_lanes; ++slot) segment_.order(slot).epoch.store(1);
}

void LanePort::begin_walk() {
    ++iteration_;
    in_walk_ = true;
    SegmentHeader& h = segment_.header();
    h.attention_began_ns.store(0, std::memory_order_relaxed);
    h.current_layer.store(0, std::memory_order_relaxed);
}

void LanePort::end_walk() {
    ++iteration_;
    in_walk_ = false;
    segment_.header().current_layer.store(-1, std::memory_order_relaxed);
}

void LanePort::exit(int layer, int n, const int32_t* slots, ActRows q, ActRows k, ActRows v, ActRows x) {
    check_layer(layer);
    claim_lanes(layer, n, slots);
    publish_exit(layer);
    const size_t item = item_size(geometry().act_dtype), residual_bytes = geometry().hidden_size * item;
    const auto row = [item](ActRows rows, int i) {
        return static_cast<const std::byte*>(rows.data) + i * rows.stride * ptrdiff_t(item);
    };
    const size_t q_bytes = geometry().q_elements() * item, kv_bytes = geometry().kv_elements() * item;
    int counts[kMaxPartitions] = {};
    for (int i = 0; i < n; ++i) {
        const int slot = slots[i];
        const std::byte *from_q = row(q, i), *from_k = row(k, i), *from_v = row(v, i);
        if (from_k == from_q + q_bytes && from_v == from_k + kv_bytes) {
            std::memcpy(segment_.q(slot), from_q, q_bytes + 2 * kv_bytes);
        } else {
            std::memcpy(segment_.q(slot), from_q, q_bytes);
            std::memcpy(segment_.k(slot), from_k, kv_bytes);
            std::memcpy(segment_.v(slot), from_v, kv_bytes);
        }
        std::memcpy(residual_.data() + slot * residual_bytes, row(x, i), residual_bytes);
    }
    for (int i = 0; i < n; ++i) write_submission(layer, slots[i], counts);
    publish_submissions(layer, counts);
}

void LanePort::claim_lanes(int layer, int n, const int32_t* slots) {
    int claimed = 0;
    try {
        for (; claimed < n; ++claimed) {
            const int slot = slots[claimed];
            Lane& here = lane(slot);
            require_state(here.state == LaneState::idle, slot, "already has a row in flight");
            require_state(segment_.order(slot).position.load(std::memory_order_relaxed) / geometry().host_page_size <
                              here.num_pages, slot, "has no host page for its token");
            here.state = LaneState::waiting;
            here.layer = layer;
        }
    } catch (...) {
        while (claimed-- > 0) lanes_[slots[claimed]].state = LaneState::idle;
        throw;
    }
}

void LanePort::write_submission(int layer, int slot, int* counts) {
    Lane& here = lanes_[slot];
    const int32_t first_page = segment_.page_table(slot)[0];
    const int partition = geometry().partition_of_page(first_page);
    here.ticket = make_ticket(segment_.order(slot).epoch.load(std::memory_order_relaxed), ++here.sequence);
    segment_.layer_ring(partition, layer)
        .write(counts[partition]++, {uint32_t(slot), here.ticket, next_number_, uint32_t(first_page)});
    waiting_[layer].push_back({slot, iteration_, next_number_});
    ++next_number_;
    ++stats_.submitted_rows;
}

void LanePort::publish_submissions(int layer, const int* counts) {
    const uint64_t bit = uint64_t{1} << (layer % 64);
    for (int partition = 0; partition < geometry().num_partitions; ++partition) {
        if (counts[partition] == 0) continue;
        segment_.layer_ring(partition, layer).publish(counts[partition]);
        segment_.nonempty_word(partition, layer / 64).fetch_or(bit, std::memory_order_acq_rel);
        segment_.notify_workers(partition, counts[partition]);
    }
}

int LanePort::take(int layer, int cap, bool same_iteration, int32_t* slots_out, MutableActRows attn, MutableActRows x) {
    check_layer(layer);
    publish_take(layer);
    const size_t item = item_size(geometry().act_dtype);
    const size_t q_bytes = geometry().q_elements() * item, residual_bytes = geometry().hidden_size * item;
    const auto row = [item](MutableActRows rows, int i) {
        return static_cast<std::byte*>(rows.data) + i * rows.stride * ptrdiff_t(item);
    };
    std::vector<Waiting>& queue = waiting_[layer];
    int taken = 0;
    size_t kept = 0;
    for (const Waiting& entry : queue) {
        const bool is_earlier = !in_walk_ || entry.iteration < iteration_;
        if (taken >= cap || !(is_earlier || same_iteration) || !is_done(entry.slot)) {
            queue[kept++] = entry;
            continue;
        }
        std::memcpy(row(attn, taken), segment_.result(entry.slot), q_bytes);
        std::memcpy(row(x, taken), residual_.data() + entry.slot * residual_bytes, residual_bytes);
        lanes_[entry.slot].state = LaneState::idle;
        slots_out[taken++] = entry.slot;
        stats_.same_iteration_entries += !is_earlier;
    }
    queue.resize(kept);
    stats_.lane_entries += taken;
    return taken;
}

void LanePort::publish_exit(int layer) {
    if (!in_walk_) return;
    exit_ns_ = now_ns();
    exit_layer_ = layer;
    segment_.header().attention_began_ns.store(exit_ns_, std::memory_order_relaxed);
    segment_.header().current_layer.store(layer, std::memory_order_relaxed);
}

void LanePort::publish_take(int layer) {
    if (!in_walk_) return;
    SegmentHeader& h = segment_.header();
    if (exit_layer_ == layer) {
        const uint64_t gap = now_ns() - exit_ns_, average = h.attention_gap_ns.load(std::memory_order_relaxed);
        h.attention_gap_ns.store(average == 0 ? gap : (average * 7 + gap) / 8, std::memory_order_relaxed);
        exit_layer_ = -1;
    }
    h.attention_began_ns.store(0, std::memory_order_relaxed);
    h.current_layer.store(layer + 1, std::memory_order_relaxed);
}

bool LanePort::is_done(int slot) const {
    return segment_.answer(slot).done.load(std::memory_order_acquire) == lanes_[slot].ticket;
}

bool LanePort::wait_all(int layer, double timeout_s) const {
    check_layer(layer);
    return wait_until(timeout_s, [&] {
        return std::all_of(waiting_[layer].begin(), waiting_[layer].end(),
                           [&](const Waiting& entry) { return is_done(entry.slot); });
    });
}

bool LanePort::any_ready() const {
    for (const std::vector<Waiting>& queue : waiting_)
        for (const Waiting& entry : queue)
            if (is_done(entry.slot)) return true;
    return false;
}

bool LanePort::wait_any(double timeout_s) const {
    return wait_until(timeout_s, [&] { return any_ready(); });
}

void LanePort::scan(int32_t* ready, int32_t* waiting, uint64_t* oldest_ready) const {
    for (int layer = 0; layer < geometry().num_layers; ++layer) {
        ready[layer] = 0;
        waiting[layer] = static_cast<int32_t>(waiting_[layer].size());
        oldest_ready[layer] = UINT64_MAX;
        for (const Waiting& entry : waiting_[layer]) {
            if (!is_done(entry.slot)) continue;
            ++ready[layer];
            oldest_ready[layer] = std::min(oldest_ready[layer], entry.number);
        }
    }
}

LanePort::Lane& LanePort::lane(int slot) {
    require_index("slot", slot, geometry().max_lanes);
    return lanes_[slot];
}

void LanePort::check_layer(int layer) const { require_index("layer", layer, geometry().num_layers); }

void LanePort::set_pages(int slot, int start, const std::vector<int32_t>& ids) {
    Lane& here = lane(slot);
    require_state(here.state != LaneState::draining, slot, "is draining: the host may still read its page table");
    require_range("start", start, 0, here.num_pages);  // no gap after the pages already set
    if (start + ids.size() > size_t(geometry().max_pages_per_lane))
        refuse("ids: a lane has at most " + std::to_string(geometry().max_pages_per_lane) + " host pages");
    const int position = segment_.order(slot).position.load(std::memory_order_relaxed);
    require_state(here.state == LaneState::idle || start > position / geometry().host_page_size, slot,
                  "has a row in flight that reads this part of its page table");
    for (int32_t id : ids) require_index("ids: host page", id, geometry().num_host_pages);
    std::copy(ids.begin(), ids.end(), segment_.page_table(slot) + start);
    here.num_pages = start + static_cast<int>(ids.size());
}

void LanePort::start_token(int slot, int position) {
    Lane& here = lane(slot);
    require_state(here.state == LaneState::idle, slot, "has a row in flight");
    if (position < 0 || position / geometry().host_page_size >= here.num_pages)
        refuse("position " + std::to_string(position) + " is outside the " + std::to_string(here.num_pages) +
               " host pages of slot " + std::to_string(slot));
    segment_.order(slot).position.store(position, std::memory_order_relaxed);
}

void LanePort::reset(int slot) {
    Lane& here = lane(slot);
    require_state(here.state == LaneState::idle, slot, "has a row in flight");
    here = Lane{};
    segment_.order(slot).epoch.fetch_add(1, std::memory_order_release);
}

bool LanePort::cancel(int slot) {
    Lane& here = lane(slot);
    if (here.state == LaneState::draining) return false;
    segment_.order(slot).epoch.fetch_add(1, std::memory_order_release);
    if (here.state == LaneState::idle) return true;
    std::erase_if(waiting_[here.layer], [slot](const Waiting& entry) { return entry.slot == slot; });
    ++stats_.cancelled_rows;
    const bool is_free = is_done(slot);
    here.state = is_free ? LaneState::idle : LaneState::draining;
    if (!is_free) draining_.push_back(slot);
    return is_free;
}

std::vector<int32_t> LanePort::drained() {
    std::vector<int32_t> slots;
    std::erase_if(draining_, [&](int32_t slot) {
        if (!is_done(slot)) return false;
        lanes_[slot].state = LaneState::idle;
        slots.push_back(slot);
        return true;
    });
    return slots;
}

void LanePort::check_copy(const PageCopy& copy) const {
    const int page = geometry().device_page_size, host_page = geometry().host_page_size;
    require_index("token_offset", copy.token_offset, page);
    require_range("num_tokens", copy.num_tokens, 1, page - copy.token_offset);
    require_index("host_offset", copy.host_offset, host_page);
    const int needed = (copy.host_offset + copy.num_tokens + host_page - 1) / host_page;
    if (int(copy.host_pages.size()) != needed)
        refuse("host_pages must name " + std::to_string(needed) + " pages, not " +
               std::to_string(copy.host_pages.size()));
    for (int32_t id : copy.host_pages) require_index("host_pages: page", id, geometry().num_host_pages);
}

LanePort::FrameJob& LanePort::submit_copy(const PageCopy& copy, CopyKind kind, const void* device_page) {
    check_copy(copy);
    if (free_frames_.empty()) throw std::logic_error("no free frame: ask free_frames first");

    const int frame = free_frames_.back();
    free_frames_.pop_back();
    if (kind == CopyKind::land) std::memcpy(segment_.frame(frame), device_page, geometry().device_kv().page_bytes());
    FrameCommand& command = segment_.command(frame);
    command.kind = kind;
    command.token_offset = copy.token_offset;
    command.num_tokens = copy.num_tokens;
    command.host_offset = copy.host_offset;
    command.id = copy.id;
    command.number = next_command_++;
    std::copy(copy.host_pages.begin(), copy.host_pages.end(), command.host_pages());
    command.state.store(uint32_t(FrameState::submitted), std::memory_order_relaxed);
    const int partition = geometry().partition_of_page(copy.host_pages[0]);
    segment_.frame_ring(partition).push({uint32_t(frame), 0, command.number, 0});
    segment_.notify_workers(partition, 1);
    return frame_jobs_.emplace_back(FrameJob{frame, false, copy, nullptr});
}

void LanePort::land(const PageCopy& copy, const void* device_page) {
    submit_copy(copy, CopyKind::land, device_page);
}

void LanePort::fetch(const PageCopy& copy, void* device_page) {
    if (geometry().is_host_kv_lossy())
        throw std::logic_error("fetch: host_kv_dtype is int8, and no page returns from there to the device");
    submit_copy(copy, CopyKind::fetch, device_page).device_page = static_cast<std::byte*>(device_page);
}

void LanePort::cancel_fetch(uint64_t id) {
    for (FrameJob& job : frame_jobs_)
        if (job.copy.id == id && job.device_page) job.is_discarded = true;
}

std::vector<uint64_t> LanePort::collect_copies() {
    std::vector<uint64_t> ids;
    const KvGeometry kv = geometry().device_kv();
    std::erase_if(frame_jobs_, [&](const FrameJob& job) {
        FrameCommand& command = segment_.command(job.frame);
        if (command.state.load(std::memory_order_acquire) != uint32_t(FrameState::done)) return false;
        if (job.device_page && !job.is_discarded)
            repack(kv, segment_.frame(job.frame), job.copy.token_offset, kv, job.device_page, job.copy.token_offset,
                   job.copy.num_tokens);
        job.device_page ? ++stats_.fetched_pages : ++stats_.landed_pages;
        command.state.store(uint32_t(FrameState::free), std::memory_order_relaxed);
        free_frames_.push_back(job.frame);
        ids.push_back(job.copy.id);
        return true;
    });
    return ids;
}

bool LanePort::any_complete() const {
    // seq_cst loads: arm's store of engine_waiting must not pass them (see HostWorkers' wake_engine).
    const auto is_answered = [&](int slot) {
        return segment_.answer(slot).done.load(std::memory_order_seq_cst) == lanes_[slot].ticket;
    };
    for (const std::vector<Waiting>& queue : waiting_)
        for (const Waiting& entry : queue)
            if (is_answered(entry.slot)) return true;
    for (int32_t slot : draining_)
        if (is_answered(slot)) return true;
    return std::any_of(frame_jobs_.begin(), frame_jobs_.end(), [&](const FrameJob& job) {
        return segment_.command(job.frame).state.load(std::memory_order_seq_cst) == uint32_t(FrameState::done);
    });
}

bool LanePort::arm() {
    segment_.header().engine_waiting.store(1, std::memory_order_seq_cst);
    if (!any_complete()) return false;
    disarm();
    return true;
}

void LanePort::disarm() { segment_.header().engine_waiting.store(0, std::memory_order_relaxed); }

LaneStats LanePort::stats() const {
    LaneStats s = stats_;
    for (const std::vector<Waiting>& queue : waiting_) s.waiting_lanes += static_cast<int32_t>(queue.size());
    s.draining_lanes = static_cast<int32_t>(draining_.size());
    s.free_frames = free_frames();
    return s;
}

}  // namespace omniserve
