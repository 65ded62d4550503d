#include "host_job.h"

#include <algorithm>
#include <cstring>

#include "slot_rows.h"

namespace omniserve {
namespace {

constexpr int64_t kMinPieceBytes = 128 * 1024;
constexpr int kPiecesPerWorker = 4;  // enough to even out workers that join late
// Sharing has a price: queries are gathered, states taken apart. Below this many bytes saved it is not worth it.
constexpr int64_t kMinSavedBytes = 64 * 1024;
// Queries per KV element from which arithmetic, not memory, takes the time: a piece for many queries is cut as if it
// had as many bytes as would take as long to read.
constexpr int kQueriesPerRead = 8;

/// Tokens of full pages that two lanes have in common. The page that a row's own token goes to is never among them.
/// None when a row's window has moved on from the first one: each of such rows reads its own window.
int64_t common_tokens(const Segment& segment, const Row& a, const Row& b) {
    if (a.first > 0 || b.first > 0) return 0;
    const int64_t page_size = segment.geometry().host_page_size;
    const int64_t limit = (std::min(a.tokens, b.tokens) - 1) / page_size;
    const int32_t *ours = segment.page_table(a.task.slot), *theirs = segment.page_table(b.task.slot);
    return page_size * (std::mismatch(ours, ours + limit, theirs).first - ours);
}

/// Tokens of a piece when `tokens` are cut into about `parts`: whole pages, so that tiles do not straddle them.
int64_t piece_tokens(int64_t tokens, int64_t parts, int64_t page_size) {
    const int64_t step = (tokens + parts - 1) / parts;
    return (step + page_size - 1) / page_size * page_size;
}

}  // namespace

void Job::fill(const Segment& segment, std::vector<Row>& rows, int num_workers) {
    rows_.swap(rows);
    pieces_.clear();
    states_used_ = scratch_ = 0;
    find_sharers(segment);
    const LaneGeometry& g = segment.geometry();
    const int64_t bytes = distinct_tokens() * int64_t(g.host_kv().token_bytes());
    const int64_t piece_bytes = std::max(kMinPieceBytes, bytes / (num_workers * kPiecesPerWorker));
    if (num_sharers_ > 0) cut_shared(g, piece_bytes);
    for (int row = 0; row < int(rows_.size()); ++row) cut_own(g, row, piece_bytes);
    if (num_sharers_ > 0) gather_queries(segment);
    if (states_.size() < states_used_) states_.resize(states_used_);
    next.store(0, std::memory_order_relaxed);
    left.store(num_pieces(), std::memory_order_relaxed);
}

int64_t Job::distinct_tokens() const {
    int64_t tokens = num_sharers_ > 0 ? -(num_sharers_ - 1) * shared_tokens_ : 0;
    for (const Row& row : rows_) tokens += row.attended();
    return tokens;
}

/// The prefix that saves most: of all lanes that have at least so many tokens in common with the first one.
void Job::find_sharers(const Segment& segment) {
    num_sharers_ = 0;
    shared_tokens_ = 0;
    if (rows_.size() < 2) return;
    std::vector<std::pair<int64_t, int>> common;  // tokens, row
    for (int row = 1; row < int(rows_.size()); ++row)
        common.emplace_back(common_tokens(segment, rows_[0], rows_[row]), row);
    std::sort(common.begin(), common.end(), std::greater<>());
    int64_t most = kMinSavedBytes / int64_t(segment.geometry().host_kv().token_bytes());
    for (int others = 1; others <= int(common.size()); ++others) {
        const int64_t tokens = common[others - 1].first, saved = others * tokens;
        if (saved <= most) continue;
        most = saved;
        num_sharers_ = others + 1;
        shared_tokens_ = tokens;
    }
    std::vector<Row> ordered = {rows_[0]};
    for (const auto& [tokens, row] : common) ordered.push_back(rows_[row]);
    rows_.swap(ordered);
}

int Job::queries_of(const LaneGeometry& g, const Piece& piece) const {
    return piece.row == Piece::kShared ? num_sharers_ * g.group() : g.group();
}

void Job::add_piece(const LaneGeometry& g, Piece piece) {
    const int queries = queries_of(g, piece);
    piece.states = states_used_;
    states_used_ += piece.num_heads * state_floats(queries, g.head_dim);
    scratch_ = std::max(scratch_, omniserve::scratch_floats(piece.num_heads, queries, g.head_dim));
    pieces_.push_back(piece);
}

/// Head by head, so that the queries of all sharers and their sums stay in the caches.
void Job::cut_shared(const LaneGeometry& g, int64_t piece_bytes) {
    const int64_t head_bytes = int64_t(g.host_kv().token_bytes()) / g.num_kv_heads;
    const int64_t weight = std::max(1, num_sharers_ * g.group() / kQueriesPerRead);
    const int64_t parts = std::max<int64_t>(1, shared_tokens_ * head_bytes * weight / piece_bytes);
    const int64_t step = piece_tokens(shared_tokens_, parts, g.host_page_size);
    for (int head = 0; head < g.num_kv_heads; ++head)
        for (int64_t first = 0; first < shared_tokens_; first += step)
            add_piece(g, {Piece::kShared, head, 1, first, std::min(shared_tokens_, first + step)});
}

/// All heads together, in the order of memory. Only the first piece may begin within a page.
void Job::cut_own(const LaneGeometry& g, int row, int64_t piece_bytes) {
    const int64_t start = row < num_sharers_ ? shared_tokens_ : rows_[row].first, end = rows_[row].tokens;
    const int64_t parts = std::max<int64_t>(1, (end - start) * int64_t(g.host_kv().token_bytes()) / piece_bytes);
    const int64_t step = piece_tokens(end - start, parts, g.host_page_size);
    for (int64_t first = start, next; first < end; first = next) {
        next = first / g.host_page_size * g.host_page_size + step;
        add_piece(g, {row, 0, g.num_kv_heads, first, std::min(end, next)});
    }
}

void Job::gather_queries(const Segment& segment) {
    const LaneGeometry& g = segment.geometry();
    const size_t floats = size_t(g.group()) * g.head_dim;
    queries_.resize(g.num_kv_heads * num_sharers_ * floats);
    float* to = queries_.data();
    for (int head = 0; head < g.num_kv_heads; ++head)
        for (int row = 0; row < num_sharers_; ++row, to += floats)
            kernels().to_f32(segment.q(rows_[row].task.slot) + head * floats * item_size(g.act_dtype), g.act_dtype, to,
                             floats);
}

size_t Job::scratch_floats(const LaneGeometry& g) const { return g.q_elements() + scratch_; }

int64_t Job::attend_piece(const Segment& segment, const PagedKv& arena, int index, float* scratch) {
    const LaneGeometry& g = segment.geometry();
    const Piece& piece = pieces_[index];
    const bool is_shared = piece.row == Piece::kShared;
    const Task& task = rows_[is_shared ? 0 : piece.row].task;
    const int queries = queries_of(g, piece);
    const float* q = is_shared ? queries_.data() : queries_of_slot(segment, task.slot, scratch);
    attend({.kv = &arena,
            .page_table = segment.page_table(task.slot),
            .layer = task.layer,
            .first_head = piece.first_head,
            .num_heads = piece.num_heads,
            .first = piece.first,
            .last = piece.last,
            .q = q + size_t(piece.first_head) * queries * g.head_dim,
            .group = queries,
            .scale = g.score_scale(),
            .state = states_.data() + piece.states,
            .scratch = scratch + g.q_elements()});
    return (piece.last - piece.first) * int64_t(arena.geometry.token_bytes()) * piece.num_heads / g.num_kv_heads;
}

/// Merges the shared pieces into the row's states: its part of them, taken out of those of all sharers into `part`.
void Job::add_shared(const LaneGeometry& g, int row, float* states, float* part) {
    const int group = g.group(), all = num_sharers_ * group, head_dim = g.head_dim;
    const size_t floats = state_floats(group, head_dim);
    for (const Piece& piece : pieces_) {
        if (piece.row != Piece::kShared) break;  // they come first
        const float* from = states_.data() + piece.states;
        const float *m = from + size_t(all) * head_dim + row * group, *l = m + all;
        std::memcpy(part, from + size_t(row) * group * head_dim, size_t(group) * head_dim * sizeof(float));
        std::copy(m, m + group, part + size_t(group) * head_dim);
        std::copy(l, l + group, part + size_t(group) * head_dim + group);
        merge_states(states + piece.first_head * floats, part, {1, group, head_dim});
    }
}

void Job::finish(const Segment& segment, float* scratch) {
    const LaneGeometry& g = segment.geometry();
    const StateShape shape{g.num_kv_heads, g.group(), g.head_dim};
    size_t at = 0;
    while (at < pieces_.size() && pieces_[at].row == Piece::kShared) ++at;
    for (int row = 0; row < int(rows_.size()); ++row) {
        float* states = states_.data() + pieces_[at].states;  // every row has a piece: its own token is never shared
        for (++at; at < pieces_.size() && pieces_[at].row == row; ++at)
            merge_states(states, states_.data() + pieces_[at].states, shape);
        // A shared piece's scratch holds more than the part of one row.
        if (row < num_sharers_) add_shared(g, row, states, scratch + g.q_elements());
        store_result(segment, rows_[row].task.slot, states, scratch);
    }
}

}  // namespace omniserve
