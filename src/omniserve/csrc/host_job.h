// Rows of one layer that are served together, cut into pieces that any worker may take.
//
// Rows whose lanes begin with the same pages share those tokens: they are read once for the queries of all of them, and
// each row's states over the shared and over its own tokens merge as those of any two ranges do.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "gate.h"
#include "host_queue.h"
#include "segment.h"

namespace omniserve {

inline constexpr int kMaxJobRows = 64;

/// A row of a lane that has so many tokens, its own included, and the first of them that it attends to: the layer may
/// have a window.
struct Row {
    Task task;
    int64_t tokens = 0;
    int64_t first = 0;

    int64_t attended() const { return tokens - first; }
};

/// Tokens [first, last) of KV heads [first_head, first_head + num_heads), for the queries of one row, or of all rows
/// that share them. `states` is where its states begin in the job's buffer, floats.
struct Piece {
    static constexpr int32_t kShared = -1;
    int32_t row = kShared;
    int32_t first_head = 0;
    int32_t num_heads = 1;
    int64_t first = 0;
    int64_t last = 0;
    size_t states = 0;
};

class Job {
public:
    /// Takes the rows in, sharers first, and cuts their attention for so many workers. The caller owns the gate.
    void fill(const Segment& segment, std::vector<Row>& rows, int num_workers);

    const std::vector<Row>& rows() const { return rows_; }
    int num_pieces() const { return static_cast<int>(pieces_.size()); }
    /// Rows that share tokens, 0 when none do.
    int num_sharers() const { return num_sharers_; }
    /// Tokens whose KV is read, each once.
    int64_t distinct_tokens() const;

    /// Floats of scratch that any piece, or `finish`, needs.
    size_t scratch_floats(const LaneGeometry& g) const;
    /// Attends over one piece. Returns the KV bytes read.
    int64_t attend_piece(const Segment& segment, const PagedKv& arena, int piece, float* scratch);
    /// Merges the states of every row and writes the results. After the last piece.
    void finish(const Segment& segment, float* scratch);

    Gate gate;
    uint64_t began_ns = 0;
    std::atomic<int32_t> next{0};  // piece to be taken
    std::atomic<int32_t> left{0};  // pieces not finished

private:
    void find_sharers(const Segment& segment);
    void cut_shared(const LaneGeometry& g, int64_t piece_bytes);
    void cut_own(const LaneGeometry& g, int row, int64_t piece_bytes);
    void add_piece(const LaneGeometry& g, Piece piece);
    void gather_queries(const Segment& segment);
    int queries_of(const LaneGeometry& g, const Piece& piece) const;
    void add_shared(const LaneGeometry& g, int row, float* states, float* part);

    std::vector<Row> rows_;
    std::vector<Piece> pieces_;
    std::vector<float> queries_;  // of the sharers, [num_kv_heads][num_sharers][group][head_dim]
    std::vector<float> states_;
    size_t states_used_ = 0, scratch_ = 0;
    int64_t shared_tokens_ = 0;
    int num_sharers_ = 0;
};

}  // namespace omniserve
