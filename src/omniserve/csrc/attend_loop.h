// The loop over tiles that every instruction set shares. Included once by each attention_*.cpp, whose `Ops` supplies:
//
//     using T                                     storage type of one KV element
//     queries(args, scratch)                      the queries [num_heads][group][head_dim] as `scores` wants them
//     scores(tile, ..., scale, ...)               scores[group][kScoreStride] of the tile's tokens, scaled
//     softmax(row, count, m, l)                   turns a score row into weights, returns the factor for older sums
//     accumulate(tile, ...)                       acc[group][head_dim] = acc * rescale + weights * V
//
// Everything is in an unnamed namespace and avoids std:: functions: code compiled for AVX2 must never be what the
// linker keeps for callers on a CPU without it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "unrolled.h"

namespace omniserve {
namespace {

constexpr int kTile = 64;                       // tokens of one softmax step
constexpr int kChunk = 16;                      // tokens whose scores are computed together
constexpr int kScoreStride = kTile + kChunk;    // a chunk may write past the tile's last token

/// What a storage type keeps beside its elements: for int8 the scales of a run's tokens, else nothing.
template <class T>
struct RunScales {};
template <>
struct RunScales<int8_t> {
    const float* k;
    const float* v;
};
template <class T>
constexpr bool kHasScales = false;
template <>
constexpr bool kHasScales<int8_t> = true;

/// Tokens of a tile that lie in one page.
template <class T>
struct Run {
    const T* k;     // dimension 0 of the first token; dimension d is page_size * d further on
    const T* v;     // first token's row; the next token's is head_dim further on
    int32_t count;  // tokens
    // What lies this many elements further on is read one tile later: whoever reads an element fetches that one into
    // the second-level cache (the first one may be too small for two tiles). 0 when there is no next tile.
    ptrdiff_t k_ahead, v_ahead;
    [[no_unique_address]] RunScales<T> scales;
};

template <class T>
struct Tile {
    Run<T> runs[kTile];
    int32_t num_runs = 0;
    int32_t num_tokens = 0;
};

/// Asks for the scales of `count` tokens: they lie apart from K and V.
inline void fetch_scales(const RunScales<int8_t>& scales, int32_t count) {
    for (int32_t t = 0; t < count; t += 16) {
        __builtin_prefetch(scales.k + t);
        __builtin_prefetch(scales.v + t);
    }
}

/// Scales of `count` tokens of a page, on their way into the cache.
template <class T>
RunScales<T> scales_of(const AttendArgs& args, int64_t page, int32_t offset, int32_t count, int kv_head) {
    RunScales<T> scales;
    if constexpr (kHasScales<T>) {
        scales = {args.kv->k_scales(page, args.layer, kv_head) + offset,
                  args.kv->v_scales(page, args.layer, kv_head) + offset};
        fetch_scales(scales, count);
    }
    return scales;
}

/// Multiplies column t of rows [group][kScoreStride] by token t's scale: scores of integers by those of K, weights of
/// integers by those of V.
template <class T>
void multiply_by_scales(const Tile<T>& tile, const float* RunScales<T>::*which, float* rows, int group) {
    for (int r = 0; r < tile.num_runs; ++r) {
        const float* scales = tile.runs[r].scales.*which;
        const int32_t count = tile.runs[r].count;
        for (int g = 0; g < group; ++g)
            for (int32_t t = 0; t < count; ++t) rows[g * kScoreStride + t] *= scales[t];
        rows += count;
    }
}

/// The tile from token `first` on, of KV head args.first_head.
template <class T>
void fill_tile(Tile<T>& tile, const AttendArgs& args, int64_t first) {
    const int32_t page_size = args.kv->geometry.page_size;
    tile.num_runs = tile.num_tokens = 0;
    for (int64_t t = first; t < args.last && tile.num_tokens < kTile;) {
        const int64_t page = args.page_table[t / page_size];
        const int32_t offset = static_cast<int32_t>(t % page_size);
        int64_t count = page_size - offset;
        if (count > args.last - t) count = args.last - t;
        if (count > kTile - tile.num_tokens) count = kTile - tile.num_tokens;
        tile.runs[tile.num_runs++] = {args.kv->k_block<T>(page, args.layer, args.first_head) + offset,
                                      args.kv->v_block<T>(page, args.layer, args.first_head) +
                                          size_t(offset) * args.kv->geometry.head_dim,
                                      static_cast<int32_t>(count), 0, 0,
                                      scales_of<T>(args, page, offset, static_cast<int32_t>(count), args.first_head)};
        tile.num_tokens += static_cast<int32_t>(count);
        t += count;
    }
}

/// The same tokens of the next KV head.
template <class T>
void next_head(Tile<T>& tile, const Tile<T>& from, const KvGeometry& kv) {
    tile.num_runs = from.num_runs;
    tile.num_tokens = from.num_tokens;
    for (int r = 0; r < from.num_runs; ++r) {
        Run<T>& run = tile.runs[r] = from.runs[r];
        run.k += kv.head_elements();
        run.v += kv.head_elements();
        run.k_ahead = run.v_ahead = 0;
        if constexpr (kHasScales<T>) {
            run.scales.k += kv.page_size;
            run.scales.v += kv.page_size;
            fetch_scales(run.scales, run.count);
        }
    }
}

template <class T>
void look_ahead(Tile<T>& tile, const Tile<T>& next) {
    for (int r = 0; r < tile.num_runs && r < next.num_runs; ++r) {
        tile.runs[r].k_ahead = next.runs[r].k - tile.runs[r].k;
        tile.runs[r].v_ahead = next.runs[r].v - tile.runs[r].v;
    }
}

/// Size of the next part when `total` is cut into the fewest parts of at most `limit`, as equal as can be.
inline int next_part(int total, int limit) {
    const int parts = (total + limit - 1) / limit;
    return (total + parts - 1) / parts;
}

/// body(Index<count>) for a count from 1 to kMax.
template <int kMax, class Body>
void with_count(int count, Body&& body) {
    if constexpr (kMax > 1) {
        if (count < kMax) return with_count<kMax - 1>(count, body);
    }
    body(Index<kMax>{});
}

/// body(first, Index<count>) for every part of `group` queries, at most kMax of them, whose sums fit the registers.
template <int kMax, class Body>
void each_subgroup(int group, Body&& body) {
    for (int first = 0, size; first < group; first += size) {
        size = next_part(group - first, kMax);
        with_count<kMax>(size, [&](auto count) { body(first, count); });
    }
}

/// Scores [first, last) of a tile that a query may look at.
struct Visible {
    int first, last;

    static Visible of(const AttendArgs& args, int query, int64_t tile_first, int num_tokens) {
        const int64_t behind = args.first_position + query / args.queries_per_token + 1 - tile_first;
        const int last = behind < 0 ? 0 : behind < num_tokens ? int(behind) : num_tokens;
        const int64_t first = args.window > 0 ? behind - args.window : 0;
        return {first < 0 ? 0 : first < last ? int(first) : last, last};
    }
};

/// Softmax of a row of which only a part is visible; the rest weighs nothing (its values must be finite: they are
/// multiplied by 0). Ops::softmax may write up to kChunk - 1 scores behind its part: the zeros come after it.
template <class Ops>
float visible_softmax(float* row, int num_tokens, Visible seen, float& m, float& l) {
    float rescale = 1.0f;
    if (seen.first < seen.last) rescale = Ops::softmax(row + seen.first, seen.last - seen.first, m, l);
    for (int t = 0; t < seen.first; ++t) row[t] = 0.0f;
    for (int t = seen.last; t < num_tokens; ++t) row[t] = 0.0f;
    return rescale;
}

/// The scores of a tile become weights; rescale[g] is the factor for the older sums of query g.
template <class Ops>
void softmax_rows(const AttendArgs& args, int64_t tile_first, int num_tokens, float* scores, float* m,
                  float* rescale) {
    float* l = m + args.group;
    for (int g = 0; g < args.group; ++g) {
        float* row = scores + g * kScoreStride;
        rescale[g] = args.queries_per_token == 0
                         ? Ops::softmax(row, num_tokens, m[g], l[g])
                         : visible_softmax<Ops>(row, num_tokens, Visible::of(args, g, tile_first, num_tokens), m[g],
                                                l[g]);
    }
}

/// Queries as they come: what Ops needs that multiply float32.
struct PlainQueries {
    static const float* queries(const AttendArgs& args, float*) { return args.q; }
    static int query_stride(int head_dim) { return head_dim; }
};

template <class Ops>
void attend_loop(const AttendArgs& args) {
    using T = typename Ops::T;
    const KvGeometry& kv = args.kv->geometry;
    const int group = args.group, head_dim = kv.head_dim;
    const size_t q_floats = size_t(group) * head_dim, state = state_floats(group, head_dim);
    float* scores = args.scratch;                            // [group][kScoreStride]
    float* rescale = scores + size_t(group) * kScoreStride;  // [group]
    const auto* q = Ops::queries(args, rescale + group);     // [num_heads][group] of Ops::query_stride(head_dim)
    const size_t query = size_t(group) * Ops::query_stride(head_dim);
    clear_states(args.state, {args.num_heads, group, head_dim});

    // Heads inside tiles: the pages' K and V are then read in the order in which they lie.
    Tile<T> tiles[2];
    Tile<T>*now = &tiles[0], *next = &tiles[1];
    fill_tile(*now, args, args.first);
    for (int64_t t = args.first; now->num_tokens > 0;) {
        t += now->num_tokens;
        for (int head = 0; head < args.num_heads; ++head) {
            if (head + 1 < args.num_heads) next_head(*next, *now, kv);
            else fill_tile(*next, args, t);
            look_ahead(*now, *next);
            float* acc = args.state + head * state;
            float* m = acc + q_floats;
            Ops::scores(*now, kv.page_size, head_dim, q + head * query, group, args.scale, scores);
            if constexpr (kHasScales<T>) multiply_by_scales(*now, &RunScales<T>::k, scores, group);
            softmax_rows<Ops>(args, t - now->num_tokens, now->num_tokens, scores, m, rescale);
            if constexpr (kHasScales<T>) multiply_by_scales(*now, &RunScales<T>::v, scores, group);
            Ops::accumulate(*now, head_dim, scores, group, rescale, acc);
            Tile<T>* done = now;
            now = next;
            next = done;
        }
    }
}

}  // namespace
}  // namespace omniserve
