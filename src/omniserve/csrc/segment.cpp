#include "segment.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <new>
#include <string>

#include "errors.h"
#include "park.h"

namespace omniserve {
namespace {

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);

constexpr size_t align_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

void check_alignment(const void* address) {
    if (!address || reinterpret_cast<uintptr_t>(address) % kLine != 0) refuse("address must be 64-byte aligned");
}

}  // namespace

void LaneGeometry::check() const {
    host_kv().check();
    require_range("num_heads", num_heads, 1, 1 << 16);
    if (num_heads % num_kv_heads != 0)
        refuse("num_heads must be a multiple of num_kv_heads " + std::to_string(num_kv_heads) + ", not " +
               std::to_string(num_heads));
    if (act_dtype == DType::i8 || kv_dtype == DType::i8)
        refuse("act_dtype and kv_dtype must be float32, bfloat16 or float16: int8 is for host_kv_dtype alone");
    if (host_kv_dtype != kv_dtype && host_kv_dtype != DType::i8)
        refuse(std::string("host_kv_dtype must be kv_dtype ") + dtype_name(kv_dtype) + " or int8, not " +
               dtype_name(host_kv_dtype));
    require_range("hidden_size", hidden_size, 1, 1 << 24);
    require_range("max_lanes", max_lanes, 1, 1 << 20);
    require_range("host_page_size", host_page_size, 1, kMaxPageSize);
    require_range("max_pages_per_lane", max_pages_per_lane, 1, 1 << 24);
    require_range("num_host_pages", num_host_pages, 1, INT32_MAX);
    require_range("device_page_size", device_page_size, 1, kMaxPageSize);
    require_range("num_frames", num_frames, 0, 1 << 16);
    require_range("num_partitions", num_partitions, 1, std::min(kMaxPartitions, num_host_pages));
    require_range("window", window, 0, INT32_MAX);
    if (window > 0) require_range("num_layers (with a window)", num_layers, 1, kMaxWindowLayers);
    if (!(scale >= 0.0f && std::isfinite(scale))) refuse("scale must be positive, or 0 for 1 / sqrt(head_dim)");
}

float LaneGeometry::score_scale() const { return scale > 0.0f ? scale : 1.0f / std::sqrt(float(head_dim)); }

void Ring::write(uint64_t ahead, Item item) {
    const uint64_t tail = ends_->tail.load(std::memory_order_relaxed) + ahead;
    if (tail - ends_->head.load(std::memory_order_acquire) > mask_)
        throw std::logic_error("ring full: more than one row in flight per lane");
    RingEntry& entry = entries_[tail & mask_];
    entry.index.store(item.index, std::memory_order_relaxed);
    entry.ticket.store(item.ticket, std::memory_order_relaxed);
    entry.number.store(item.number, std::memory_order_relaxed);
    entry.prefix.store(item.prefix, std::memory_order_relaxed);
}

void Ring::publish(uint64_t count) {
    ends_->tail.store(ends_->tail.load(std::memory_order_relaxed) + count, std::memory_order_release);
}

bool Ring::read(uint64_t head, Item& item) const {
    if (head == ends_->tail.load(std::memory_order_acquire)) return false;
    // The producer may overwrite the entry meanwhile, but only after `head` has moved on: then the caller's
    // compare-exchange fails (or, for a peek, the hint is stale) and the values are dropped.
    const RingEntry& entry = entries_[head & mask_];
    item = {entry.index.load(std::memory_order_relaxed), entry.ticket.load(std::memory_order_relaxed),
            entry.number.load(std::memory_order_relaxed), entry.prefix.load(std::memory_order_relaxed)};
    return true;
}

bool Ring::read_behind_head(uint64_t at, Item& item) const {
    // The values are of one item if `head` has not passed it after they were read: until then nobody overwrites them.
    // (A read-modify-write, because it may not move before the reads above; the thread sanitizer knows no fences.)
    return read(at, item) && ends_->head.fetch_add(0, std::memory_order_acq_rel) <= at;
}

bool Ring::peek(Item& item) const { return read(ends_->head.load(std::memory_order_acquire), item); }

bool Ring::pop(Item& item) {
    uint64_t head = ends_->head.load(std::memory_order_acquire);
    while (read(head, item))
        if (ends_->head.compare_exchange_weak(head, head + 1, std::memory_order_acq_rel, std::memory_order_acquire))
            return true;
    return false;
}

Segment::Offsets Segment::lay_out(const LaneGeometry& g) {
    Offsets o{};
    o.q_bytes = g.q_elements() * item_size(g.act_dtype);
    o.kv_bytes = g.kv_elements() * item_size(g.act_dtype);
    o.qkv_row = align_up(o.q_bytes + 2 * o.kv_bytes, kLine);
    o.result_row = align_up(o.q_bytes, kLine);
    o.table_row = align_up(size_t(g.max_pages_per_lane) * sizeof(int32_t), kLine);
    o.bitmap_row = align_up((g.num_layers + 63) / 64 * sizeof(uint64_t), kLine);
    o.command_row = align_up(sizeof(FrameCommand) + g.max_pages_per_frame() * sizeof(int32_t), kLine);
    o.frame_bytes = align_up(g.device_kv().page_bytes(), kLine);
    o.lane_capacity = std::bit_ceil(4 * uint64_t(g.max_lanes));  // see HostQueue::claim_sharers
    o.frame_capacity = std::bit_ceil(uint64_t(g.num_frames) + 1);

    size_t at = align_up(sizeof(SegmentHeader), kLine);
    const auto place = [&at](size_t& offset, size_t bytes) {
        offset = at;
        at += align_up(bytes, kLine);
    };
    const size_t lanes = g.max_lanes, partitions = g.num_partitions;
    place(o.bitmap, partitions * o.bitmap_row);
    place(o.orders, lanes * sizeof(SlotOrder));
    place(o.answers, lanes * sizeof(SlotAnswer));
    place(o.ring_ends, partitions * (g.num_layers + 1) * sizeof(RingEnds));
    place(o.ring_entries, partitions * (g.num_layers * o.lane_capacity + o.frame_capacity) * sizeof(RingEntry));
    place(o.tables, lanes * o.table_row);
    place(o.commands, g.num_frames * o.command_row);
    place(o.qkv, lanes * o.qkv_row);
    place(o.result, lanes * o.result_row);
    place(o.frames, g.num_frames * o.frame_bytes);
    o.total = at;
    return o;
}

size_t segment_bytes(const LaneGeometry& geometry) {
    geometry.check();
    return Segment::lay_out(geometry).total;
}

// A partition's layer rings, then its frame ring.
Ring Segment::ring(int index, size_t first_entry, uint64_t capacity) const {
    return Ring(row<RingEnds>(offsets_.ring_ends, index, sizeof(RingEnds)),
                row<RingEntry>(offsets_.ring_entries, 0, 0) + first_entry, capacity);
}

Ring Segment::layer_ring(int partition, int layer) const {
    const size_t layers = geometry_.num_layers, capacity = offsets_.lane_capacity;
    return ring(partition * (geometry_.num_layers + 1) + layer,
                partition * (layers * capacity + offsets_.frame_capacity) + layer * capacity, capacity);
}

Ring Segment::frame_ring(int partition) const {
    const size_t layers = geometry_.num_layers, lane_entries = layers * offsets_.lane_capacity;
    return ring(partition * (geometry_.num_layers + 1) + geometry_.num_layers,
                partition * (lane_entries + offsets_.frame_capacity) + lane_entries, offsets_.frame_capacity);
}

Segment Segment::create(const LaneGeometry& geometry, void* address) {
    geometry.check();
    check_alignment(address);
    Segment segment(geometry, address);
    // Everything up to the rows is words and tables, for which zero is the right start. Rows are touched here so that
    // the first walk need not fault their pages in, one by one; frames, which may be large, are not.
    std::memset(address, 0, segment.offsets_.frames);
    SegmentHeader& header = *new (address) SegmentHeader{};
    header.version = kSegmentVersion;
    header.geometry = geometry;
    header.total_bytes = segment.offsets_.total;
    header.current_layer.store(-1, std::memory_order_relaxed);
    header.magic.store(kSegmentMagic, std::memory_order_release);
    return segment;
}

Segment Segment::attach(void* address) {
    check_alignment(address);
    const SegmentHeader& header = *static_cast<const SegmentHeader*>(address);
    if (header.magic.load(std::memory_order_acquire) != kSegmentMagic) refuse("address holds no lane segment");
    if (header.version != kSegmentVersion)
        refuse("segment version is " + std::to_string(header.version) + ", this build speaks " +
               std::to_string(kSegmentVersion));
    header.geometry.check();
    return Segment(header.geometry, address);
}

void Segment::notify_workers(int partition, int count) const {
    // Sequentially consistent on both sides: either the worker about to park sees work_seq move, or we see the sleeper.
    SegmentHeader& h = header();
    h.work_seq.fetch_add(1, std::memory_order_seq_cst);
    if (h.sleepers.load(std::memory_order_seq_cst) == 0) return;
    const int woken = futex_wake(h.work_seq, count, FutexScope::machine, sleeper_bit(partition));
    // Its own workers are busy, or too few for this much work: others may help.
    if (woken < count && geometry_.num_partitions > 1)
        futex_wake(h.work_seq, count - woken, FutexScope::machine);
}

void Segment::notify_all_workers() const {
    header().work_seq.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(header().work_seq, kMaxWorkers, FutexScope::machine);
}

}  // namespace omniserve
