// The device process's end of the segment: rows leave at exit, enter again at take, and nobody waits unless asked to.
//
// Used by one thread. Everything a decision depends on (which slots wait where, since which walk, in which order) is
// private to this class; the segment only carries data and words the host needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "segment.h"

namespace omniserve {

/// Activation rows of the model: row i at data + i * stride, stride in elements of the activation dtype.
struct ActRows {
    const void* data = nullptr;
    ptrdiff_t stride = 0;
};
struct MutableActRows {
    void* data = nullptr;
    ptrdiff_t stride = 0;
};

/// A copy between a device page and host pages, tokens [token_offset, token_offset + num_tokens) of the device page and
/// as many from token host_offset of the first host page on.
struct PageCopy {
    uint64_t id = 0;  // the caller's
    int32_t token_offset = 0;
    int32_t num_tokens = 0;
    int32_t host_offset = 0;
    std::vector<int32_t> host_pages;
};

struct LaneStats {
    uint64_t submitted_rows = 0;
    uint64_t lane_entries = 0;            // rows taken
    uint64_t same_iteration_entries = 0;  // rows taken in the walk that submitted them
    uint64_t cancelled_rows = 0;          // in flight when cancelled
    uint64_t landed_pages = 0;
    uint64_t fetched_pages = 0;
    int32_t waiting_lanes = 0;
    int32_t draining_lanes = 0;
    int32_t free_frames = 0;
};

class LanePort {
public:
    /// Lays out a fresh segment at `address` (zero or reused memory). Throws std::invalid_argument naming the field.
    LanePort(const LaneGeometry& geometry, void* address);

    // A walk visits the layers in order with device rows; between walks only passes of lanes run.
    void begin_walk();
    void end_walk();

    /// n rows leave the batch after pre_attention(layer): q, k, v and the residual x of slot slots[i] are copied from
    /// row i and submitted. Throws std::logic_error when a slot already has a row in flight.
    void exit(int layer, int n, const int32_t* slots, ActRows q, ActRows k, ActRows v, ActRows x);

    /// At most `cap` slots waiting at `layer` whose result is there now, oldest first; with same_iteration false only
    /// those submitted before this walk began. Fills slots_out[i] and row i of attn and x; returns how many.
    int take(int layer, int cap, bool same_iteration, int32_t* slots_out, MutableActRows attn, MutableActRows x);

    /// Waits until every slot waiting at `layer` has its result. False after timeout_s seconds.
    bool wait_all(int layer, double timeout_s) const;
    /// Waits until some slot anywhere has its result. False after timeout_s seconds.
    bool wait_any(double timeout_s) const;

    /// Per layer: number of slots whose result is there, number waiting (those included), and the submission number of
    /// the oldest ready one, UINT64_MAX when none. Arrays of num_layers.
    void scan(int32_t* ready, int32_t* waiting, uint64_t* oldest_ready) const;

    // Slots. Errors are std::invalid_argument for values, std::logic_error for a slot in the wrong state.
    void set_pages(int slot, int start, const std::vector<int32_t>& ids);
    void start_token(int slot, int position);
    /// New owner: new epoch, no pages. The slot must have nothing in flight.
    void reset(int slot);
    /// Forgets the row in flight, if any. True: the slot and its host pages are free now; false: they are once
    /// `drained` names the slot.
    bool cancel(int slot);
    /// Slots cancelled in flight that the host has acknowledged since the last call.
    std::vector<int32_t> drained();

    // Copies. `free_frames` of them can be submitted now; std::logic_error beyond that.
    int free_frames() const { return static_cast<int>(free_frames_.size()); }
    /// Device page -> host pages. The page may be reused as soon as this returns.
    void land(const PageCopy& copy, const void* device_page);
    /// Host pages -> device page; the device page is written by collect_copies. Throws std::logic_error when the host
    /// keeps int8: what it holds is not what the device held.
    void fetch(const PageCopy& copy, void* device_page);
    /// The device page of this fetch is no longer wanted; its id is still reported when the frame is free again.
    void cancel_fetch(uint64_t id);
    /// Ids of copies completed since the last call.
    std::vector<uint64_t> collect_copies();

    /// Asks the host to write its eventfd at the next completion. True: something is complete already, do not sleep.
    bool arm();
    void disarm();

    LaneStats stats() const;
    const Segment& segment() const { return segment_; }

private:
    enum class LaneState : uint8_t { idle, waiting, draining };
    struct Lane {
        LaneState state = LaneState::idle;
        int32_t layer = 0;      // where it waits
        int32_t num_pages = 0;  // set in its page table
        uint32_t sequence = 0;  // rows submitted in this epoch
        uint64_t ticket = 0;    // of the row in flight
    };
    struct Waiting {
        int32_t slot;
        uint64_t iteration;
        uint64_t number;
    };
    struct FrameJob {
        int32_t frame;
        bool is_discarded;
        PageCopy copy;
        std::byte* device_page;  // null for land
    };

    Lane& lane(int slot);
    const LaneGeometry& geometry() const { return segment_.geometry(); }
    void check_layer(int layer) const;
    bool is_done(int slot) const;
    bool any_ready() const;
    bool any_complete() const;
    /// All of the slots are marked waiting at `layer`, or none and an exception.
    void claim_lanes(int layer, int n, const int32_t* slots);
    /// Writes the row behind the counts[p] already written to the ring of its partition p, and counts it.
    void write_submission(int layer, int slot, int* counts);
    void publish_submissions(int layer, const int* counts);
    void publish_exit(int layer);
    void publish_take(int layer);
    void check_copy(const PageCopy& copy) const;
    FrameJob& submit_copy(const PageCopy& copy, CopyKind kind, const void* device_page);

    Segment segment_;
    std::vector<Lane> lanes_;
    std::vector<std::vector<Waiting>> waiting_;  // per layer, oldest first
    std::vector<std::byte> residual_;            // [max_lanes][hidden_size], act dtype
    std::vector<int32_t> draining_;
    std::vector<int32_t> free_frames_;
    std::vector<FrameJob> frame_jobs_;
    uint64_t iteration_ = 0;
    uint64_t next_number_ = 0;
    uint64_t next_command_ = 0;
    uint64_t exit_ns_ = 0;
    int32_t exit_layer_ = -1;
    bool in_walk_ = false;
    LaneStats stats_;
};

}  // namespace omniserve
