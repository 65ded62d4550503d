// The shared segment: everything the device process (the engine) and the host process say to each other.
//
// The engine creates it (a memfd) and lays it out; the host attaches and reads the geometry from it. Who writes what:
//
//     engine   q, k, v, position, page table, epoch of a slot; submissions; frame commands; walk words;
//              engine_waiting = 1
//     host     result and done of a slot; frame state `done`; counters; engine_waiting = 0 (exchange)
//
// One row in flight per lane bounds everything: a slot's arrays are rewritten only after its last ticket was
// acknowledged, a frame ring holds as many entries as there are frames, and a lane ring four for each slot (rows served
// out of turn leave theirs behind for a while, see HostQueue::claim_sharers), so that none can overflow.
//
// All shared words are lock-free std::atomic. A submission publishes with the release store of a ring's tail, a
// completion with the store of the slot's done word; whatever lies in the plain arrays is ordered by those two.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "kv.h"

namespace omniserve {

inline constexpr uint64_t kSegmentMagic = 0x4f4d4e4953455256;  // "OMNISERV"
inline constexpr uint32_t kSegmentVersion = 3;
inline constexpr size_t kLine = 64;  // bytes of a cache line
inline constexpr int kMaxWorkers = 1024;
inline constexpr int kMaxPartitions = 32;  // a futex tells as many sleepers apart
inline constexpr int kMaxWindowLayers = 1024;

struct LaneGeometry {
    int32_t num_layers = 0;
    int32_t num_heads = 0;
    int32_t num_kv_heads = 0;
    int32_t head_dim = 0;
    int32_t hidden_size = 0;
    DType act_dtype = DType::f32;  // of q, k, v, attention result and residual rows, in the model and in slots
    DType kv_dtype = DType::f32;   // of KV on the device
    DType host_kv_dtype = DType::f32;  // of KV on the host: kv_dtype, or int8, from which nothing returns
    int32_t max_lanes = 0;
    int32_t host_page_size = 0;    // tokens
    int32_t max_pages_per_lane = 0;  // host pages
    int32_t num_host_pages = 0;
    int32_t device_page_size = 0;  // tokens
    int32_t num_frames = 0;        // staging areas of one device page each; 0 when nothing moves
    float scale = 0.0f;            // of attention scores; 0 means 1 / sqrt(head_dim)
    int32_t num_partitions = 1;    // of the host pages: NUMA nodes that the host's CPUs span
    int32_t window = 0;            // tokens a row attends to at most, its own included, in some layers; 0: no limit
    std::array<uint64_t, kMaxWindowLayers / 64> window_layers = {};  // bit l % 64 of word l / 64: layer l has it

    /// Throws std::invalid_argument naming the field and its limit.
    void check() const;

    int group() const { return num_heads / num_kv_heads; }
    size_t q_elements() const { return size_t(num_heads) * head_dim; }
    size_t kv_elements() const { return size_t(num_kv_heads) * head_dim; }
    float score_scale() const;
    bool has_window(int layer) const { return window > 0 && (window_layers[layer / 64] >> layer % 64 & 1) != 0; }
    /// First token that a row attends to in this layer, when its own is the last of `tokens`.
    int64_t first_token(int layer, int64_t tokens) const {
        return has_window(layer) && tokens > window ? tokens - window : 0;
    }
    KvGeometry host_kv() const { return {num_layers, num_kv_heads, head_dim, host_page_size, host_kv_dtype}; }
    KvGeometry device_kv() const { return {num_layers, num_kv_heads, head_dim, device_page_size, kv_dtype}; }
    // Partition p owns the host pages [first_page(p), first_page(p + 1)); all but equally many.
    int partition_of_page(int64_t page) const { return static_cast<int>(page * num_partitions / num_host_pages); }
    int64_t first_page(int partition) const {
        return (int64_t{partition} * num_host_pages + num_partitions - 1) / num_partitions;
    }
    bool is_host_kv_lossy() const { return host_kv_dtype != kv_dtype; }
    /// Host pages that one device page can touch.
    int max_pages_per_frame() const { return (device_page_size + host_page_size - 1) / host_page_size + 1; }
};

/// Bytes of a segment of this geometry. Throws like LaneGeometry::check.
size_t segment_bytes(const LaneGeometry& geometry);

/// A ticket names one row in flight: a completion of an older epoch never matches the one being waited for.
constexpr uint64_t make_ticket(uint32_t epoch, uint32_t sequence) { return uint64_t{epoch} << 32 | sequence; }
constexpr uint32_t ticket_epoch(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }

/// Written by the engine, read by the host.
struct alignas(kLine) SlotOrder {
    std::atomic<uint32_t> epoch;
    std::atomic<int32_t> position;  // index of the token in flight: the last one that it attends to
};

/// Written by the host, read by the engine: ticket of the last task that the slot's host memory is free of.
struct alignas(kLine) SlotAnswer {
    std::atomic<uint64_t> done;
};

struct RingEntry {
    std::atomic<uint32_t> index;   // slot or frame
    std::atomic<uint64_t> ticket;  // 0 in a frame ring
    std::atomic<uint64_t> number;  // counts submissions over all partitions and layers (or frames), in order
    std::atomic<uint32_t> prefix;  // first page of the lane's table, the same for lanes that share tokens; 0 for frames
};

struct alignas(kLine) RingEnds {
    alignas(kLine) std::atomic<uint64_t> head;  // moved by consumers, by compare and exchange
    alignas(kLine) std::atomic<uint64_t> tail;  // moved by the one producer
};

/// A queue in shared memory: one producer, any number of consumers. Head and tail only grow.
class Ring {
public:
    struct Item {
        uint32_t index;
        uint64_t ticket;
        uint64_t number;
        uint32_t prefix;
    };

    Ring(RingEnds* ends, RingEntry* entries, uint64_t capacity) : ends_(ends), entries_(entries), mask_(capacity - 1) {}

    bool is_empty() const {
        return ends_->head.load(std::memory_order_acquire) == ends_->tail.load(std::memory_order_acquire);
    }
    /// Writes the item `ahead` places behind the last one published; no consumer sees it before `publish`. Throws
    /// std::logic_error when full, which one row in flight per lane rules out.
    void write(uint64_t ahead, Item item);
    /// Publishes the next `count` items, all written, with one release store: it orders them, and whatever the producer
    /// wrote before, ahead of the tail that consumers acquire.
    void publish(uint64_t count);
    void push(Item item) {
        write(0, item);
        publish(1);
    }
    /// Reads the oldest item without taking it; another consumer may take it at any time.
    bool peek(Item& item) const;
    bool pop(Item& item);
    /// look(item) for each item of this prefix from the oldest on, none of which is taken, until it returns false. None
    /// when there are more than `most` items. One that another consumer pops meanwhile is left out.
    template <class Look>
    void for_each_of(uint32_t prefix, uint64_t most, Look&& look) const {
        Item item;
        uint64_t at = ends_->head.load(std::memory_order_acquire);
        const uint64_t tail = ends_->tail.load(std::memory_order_acquire);
        if (tail - at > most) return;
        for (; at < tail; ++at) {
            // First a look without any order: a wrong one leaves out an item, or ends at the next line.
            if (entries_[at & mask_].prefix.load(std::memory_order_relaxed) != prefix) continue;
            if (read_behind_head(at, item) && item.prefix == prefix && !look(item)) return;
        }
    }

private:
    bool read(uint64_t head, Item& item) const;
    bool read_behind_head(uint64_t at, Item& item) const;

    RingEnds* ends_;
    RingEntry* entries_;
    uint64_t mask_;
};

enum class CopyKind : uint32_t { land = 1, fetch = 2 };
enum class FrameState : uint32_t { free = 0, submitted = 1, done = 2 };

/// What to do with one frame; followed in memory by max_pages_per_frame host page ids.
struct alignas(kLine) FrameCommand {
    std::atomic<uint32_t> state;  // FrameState: engine sets free and submitted, host sets done
    CopyKind kind;                // land: frame -> host pages; fetch: host pages -> frame
    int32_t token_offset;         // first token within the frame
    int32_t num_tokens;
    int32_t host_offset;          // first token within the first host page
    uint64_t id;
    uint64_t number;              // counts commands, in order
    int32_t* host_pages() { return reinterpret_cast<int32_t*>(this + 1); }
};

/// Counters of one host worker; only that worker writes them.
struct alignas(kLine) WorkerStats {
    std::atomic<uint64_t> busy_ns;        // serving tasks, pieces and copies
    std::atomic<uint64_t> tasks;          // answered with a result
    std::atomic<uint64_t> pieces;         // parts of jobs
    std::atomic<uint64_t> shared_rows;    // served with others that share a prefix, opened by this worker
    std::atomic<uint64_t> stale_tasks;    // of an old epoch: acknowledged, not computed
    std::atomic<uint64_t> out_of_order;   // tasks served after one submitted later
    std::atomic<uint64_t> kv_bytes_read;
    std::atomic<uint64_t> copies;
    std::atomic<uint64_t> copied_bytes;
};

struct SegmentHeader {
    std::atomic<uint64_t> magic;  // stored last by the engine
    uint32_t version;
    LaneGeometry geometry;
    uint64_t total_bytes;

    // Where the device is. Hints for the order of service: races between them cost order, never results.
    alignas(kLine) std::atomic<int32_t> current_layer;  // -1: no walk
    std::atomic<uint64_t> attention_began_ns;           // at current_layer; 0: not yet
    std::atomic<uint64_t> attention_gap_ns;             // moving average of exit(l) -> take(l); 0: unknown

    alignas(kLine) std::atomic<uint32_t> work_seq;        // futex of the workers: one more per batch of work
    alignas(kLine) std::atomic<uint32_t> sleepers;        // workers parked on it
    alignas(kLine) std::atomic<uint32_t> engine_waiting;  // 1: the engine sleeps until the host writes its eventfd

    alignas(kLine) std::atomic<uint32_t> host_ready;  // workers are running
    std::atomic<int32_t> host_pid;
    std::atomic<uint32_t> num_workers;  // started last; their counters stay after they stop
    // KV memory as the host last looked; bytes.
    alignas(kLine) std::atomic<uint64_t> arena_bytes;
    std::atomic<uint64_t> arena_resident;
    std::atomic<uint64_t> arena_huge;
    alignas(kLine) WorkerStats workers[kMaxWorkers];
};

/// The bit under which a worker of this partition parks.
constexpr uint32_t sleeper_bit(int partition) { return 1u << partition; }

/// A view of one mapped segment: addresses, no ownership.
class Segment {
public:
    /// Lays out a new segment at `address` (segment_bytes(geometry) bytes, 64-byte aligned). Throws like check().
    static Segment create(const LaneGeometry& geometry, void* address);
    /// Throws std::invalid_argument when there is no segment of this version at `address`.
    static Segment attach(void* address);

    const LaneGeometry& geometry() const { return geometry_; }
    SegmentHeader& header() const { return *reinterpret_cast<SegmentHeader*>(base_); }

    // Act dtype, as the model has them. q, k and v of a slot follow each other: where they do so in the model's rows
    // too, one copy moves all three.
    std::byte* q(int slot) const { return row<std::byte>(offsets_.qkv, slot, offsets_.qkv_row); }
    std::byte* k(int slot) const { return q(slot) + offsets_.q_bytes; }
    std::byte* v(int slot) const { return k(slot) + offsets_.kv_bytes; }
    std::byte* result(int slot) const { return row<std::byte>(offsets_.result, slot, offsets_.result_row); }
    int32_t* page_table(int slot) const { return row<int32_t>(offsets_.tables, slot, offsets_.table_row); }
    SlotOrder& order(int slot) const { return *row<SlotOrder>(offsets_.orders, slot, sizeof(SlotOrder)); }
    SlotAnswer& answer(int slot) const { return *row<SlotAnswer>(offsets_.answers, slot, sizeof(SlotAnswer)); }

    // Queues: a partition holds the rows of lanes whose first host page is its own, and the copies that begin there.
    Ring layer_ring(int partition, int layer) const;
    Ring frame_ring(int partition) const;
    /// Bit l % 64 of word l / 64: layer l's ring may hold something. Set after a push; cleared by who finds it empty.
    std::atomic<uint64_t>& nonempty_word(int partition, int word) const {
        return row<std::atomic<uint64_t>>(offsets_.bitmap, partition, offsets_.bitmap_row)[word];
    }
    int num_bitmap_words() const { return (geometry_.num_layers + 63) / 64; }

    std::byte* frame(int index) const { return row<std::byte>(offsets_.frames, index, offsets_.frame_bytes); }
    FrameCommand& command(int index) const {
        return *row<FrameCommand>(offsets_.commands, index, offsets_.command_row);
    }

    /// Wakes up to `count` parked workers, those of the partition first; call after publishing work there.
    void notify_workers(int partition, int count) const;
    void notify_all_workers() const;

private:
    struct Offsets {
        size_t orders, answers, qkv, result, tables, bitmap, ring_ends, ring_entries, commands, frames, total;
        size_t q_bytes, kv_bytes;  // of one row
        size_t qkv_row, result_row, table_row, bitmap_row, command_row, frame_bytes;  // bytes from one to the next
        uint64_t lane_capacity, frame_capacity;                     // entries, powers of two
    };
    friend size_t segment_bytes(const LaneGeometry& geometry);
    static Offsets lay_out(const LaneGeometry& geometry);

    Segment(const LaneGeometry& geometry, void* address)
        : base_(static_cast<std::byte*>(address)), geometry_(geometry), offsets_(lay_out(geometry)) {}

    template <class T>
    T* row(size_t offset, int index, size_t row_bytes) const {
        return reinterpret_cast<T*>(base_ + offset + size_t(index) * row_bytes);
    }
    Ring ring(int index, size_t first_entry, uint64_t capacity) const;

    std::byte* base_;
    LaneGeometry geometry_;
    Offsets offsets_;
};

}  // namespace omniserve
