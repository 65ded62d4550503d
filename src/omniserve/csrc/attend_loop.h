// The loop over tiles that every instruction set shares. Included once by each attention_*.cpp, whose `Ops` supplies:
//
//     using T                                     storage type of one KV element
//     scores(tile, ...)                           scores[group][kScoreStride] of the tile's tokens
//     softmax(row, count, m, l)                   turns a score row into weights, returns the factor for older sums
//     accumulate(tile, next, ...)                 acc[group][head_dim] = acc * rescale + weights * V; fetches next's K
//
// Everything is in an unnamed namespace and avoids std:: functions: code compiled for AVX2 must never be what the
// linker keeps for callers on a CPU without it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace omniserve {
namespace {

// One softmax step. K and V of a tile together fit a first-level cache at head_dim 128 in 16 bits, so that V,
// prefetched while scores are computed, and K, prefetched while values are summed, are still there when needed.
constexpr int kTile = 64;
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
    [[no_unique_address]] RunScales<T> scales;
};

template <class T>
struct Tile {
    Run<T> runs[kTile];
    int32_t num_runs = 0;
    int32_t num_tokens = 0;
};

/// Scales of `count` tokens of a page, on their way into the cache: they lie apart from K and V.
template <class T>
RunScales<T> scales_of(const AttendArgs& args, int64_t page, int32_t offset, int32_t count) {
    RunScales<T> scales;
    if constexpr (kHasScales<T>) {
        scales = {args.kv->k_scales(page, args.layer, args.kv_head) + offset,
                  args.kv->v_scales(page, args.layer, args.kv_head) + offset};
        for (int32_t t = 0; t < count; t += 16) {
            __builtin_prefetch(scales.k + t);
            __builtin_prefetch(scales.v + t);
        }
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
        tile.runs[tile.num_runs++] = {args.kv->k_block<T>(page, args.layer, args.kv_head) + offset,
                                      args.kv->v_block<T>(page, args.layer, args.kv_head) +
                                          size_t(offset) * args.kv->geometry.head_dim,
                                      static_cast<int32_t>(count),
                                      scales_of<T>(args, page, offset, static_cast<int32_t>(count))};
        tile.num_tokens += static_cast<int32_t>(count);
        t += count;
    }
}

template <class Ops>
void attend_loop(const AttendArgs& args) {
    using T = typename Ops::T;
    const int group = args.group, head_dim = args.kv->geometry.head_dim;
    float* q = args.scratch;                                // [group][head_dim], scaled
    float* scores = q + size_t(group) * head_dim;           // [group][kScoreStride]
    float* rescale = scores + size_t(group) * kScoreStride; // [group]
    float* acc = args.state;
    float* m = acc + size_t(group) * head_dim;
    float* l = m + group;
    clear_state(args.state, group, head_dim);
    for (int i = 0; i < group * head_dim; ++i) q[i] = args.q[i] * args.scale;

    Tile<T> tiles[2];
    Tile<T>*now = &tiles[0], *next = &tiles[1];
    fill_tile(*now, args, args.first);
    for (int64_t t = args.first; now->num_tokens > 0;) {
        t += now->num_tokens;
        fill_tile(*next, args, t);
        Ops::scores(*now, args.kv->geometry.page_size, head_dim, q, group, scores);
        if constexpr (kHasScales<T>) multiply_by_scales(*now, &RunScales<T>::k, scores, group);
        for (int g = 0; g < group; ++g)
            rescale[g] = Ops::softmax(scores + g * kScoreStride, now->num_tokens, m[g], l[g]);
        if constexpr (kHasScales<T>) multiply_by_scales(*now, &RunScales<T>::v, scores, group);
        Ops::accumulate(*now, *next, args.kv->geometry.page_size, head_dim, scores, group, rescale, acc);
        Tile<T>* done = now;
        now = next;
        next = done;
    }
}

}  // namespace
}  // namespace omniserve
