// Paged KV: where the keys and values of every token lie, and the three ways of moving them.
//
// A page is one contiguous blob holding `page_size` tokens of all layers of one request:
//
//     [layer][ K: [kv_head][head_dim][page_size] | V: [kv_head][page_size][head_dim] ]
//
// K has tokens across vector lanes, so that the scores of a group of queries need no horizontal sums; V has dimensions
// across vector lanes for the same reason. A K row may be read past its end by up to 15 elements (the V block of the
// same layer follows and is longer than that); such lanes are computed and dropped.
//
// int8 keeps the same blocks and a float32 scale per token and KV head behind them, so that one layer of a page is
//
//     [ K int8 | V int8 | K scales: [kv_head][page_size] | V scales: [kv_head][page_size] | padding to 64 bytes ]
//
// and an element is worth its integer times its token's scale (kv_int8.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace omniserve {

inline constexpr int kMinHeadDim = 64;
inline constexpr int kMaxHeadDim = 256;
inline constexpr int kMaxPageSize = 1 << 20;  // tokens

struct KvGeometry {
    int32_t num_layers = 0;
    int32_t num_kv_heads = 0;
    int32_t head_dim = 0;
    int32_t page_size = 0;  // tokens
    DType dtype = DType::f32;

    /// Throws std::invalid_argument naming the field and its limit.
    void check() const;

    /// Elements of the K (or V) block of one KV head in one layer of one page.
    size_t head_elements() const { return size_t(head_dim) * page_size; }
    /// Elements of the K (or V) block of one layer of one page.
    size_t block_elements() const { return num_kv_heads * head_elements(); }
    bool has_scales() const { return dtype == DType::i8; }
    /// Scales of K (or V) in one layer of one page.
    size_t num_scales() const { return has_scales() ? size_t(num_kv_heads) * page_size : 0; }
    size_t layer_bytes() const {
        const size_t bytes = 2 * (block_elements() * item_size(dtype) + num_scales() * sizeof(float));
        return has_scales() ? (bytes + 63) / 64 * 64 : bytes;  // the next layer's scales stay aligned
    }
    size_t page_bytes() const { return size_t(num_layers) * layer_bytes(); }
    /// Bytes of one token's K and V in one layer, scales included.
    size_t token_bytes() const {
        return 2 * num_kv_heads * (head_dim * item_size(dtype) + (has_scales() ? sizeof(float) : 0));
    }
};

/// Pages in one stretch of memory that somebody else owns. Page ids are 0 .. num_pages - 1.
struct PagedKv {
    KvGeometry geometry;
    std::byte* base = nullptr;
    int64_t num_pages = 0;

    std::byte* page(int64_t id) const { return base + size_t(id) * geometry.page_bytes(); }
    std::byte* layer_of_page(int64_t id, int layer) const { return page(id) + size_t(layer) * geometry.layer_bytes(); }

    /// K block [head_dim][page_size] of one head; the V block [page_size][head_dim] is `block_elements` further on.
    template <class T>
    T* k_block(int64_t id, int layer, int kv_head) const {
        return reinterpret_cast<T*>(layer_of_page(id, layer)) + kv_head * geometry.head_elements();
    }
    template <class T>
    T* v_block(int64_t id, int layer, int kv_head) const {
        return k_block<T>(id, layer, kv_head) + geometry.block_elements();
    }
    /// Scales [page_size] of one head's K; int8 only. Those of V are `num_scales` further on.
    float* k_scales(int64_t id, int layer, int kv_head) const {
        return reinterpret_cast<float*>(layer_of_page(id, layer) + 2 * geometry.block_elements()) +
               size_t(kv_head) * geometry.page_size;
    }
    float* v_scales(int64_t id, int layer, int kv_head) const {
        return k_scales(id, layer, kv_head) + geometry.num_scales();
    }
};

/// Throws std::invalid_argument unless `num_heads` query heads divide into groups of one size, one for each KV head.
void require_groups(const KvGeometry& geometry, int num_heads);

/// Throws std::invalid_argument, naming `field`[index], unless `num_tokens` tokens lie in pages of the store that the
/// table of `table_size` entries names.
void require_pages(const PagedKv& kv, const char* field, int index, int64_t num_tokens, const int32_t* page_table,
                   ptrdiff_t table_size);

/// Rows of keys and values as the model computes them: row i is [num_kv_heads * head_dim] at k + i * k_stride
/// (strides in elements of `dtype`).
struct KvRows {
    const void* k = nullptr;
    ptrdiff_t k_stride = 0;
    const void* v = nullptr;
    ptrdiff_t v_stride = 0;
    DType dtype = DType::f32;
};

/// Asks for the cache lines that a row written to token `offset` of the page will touch: one for each dimension of K.
/// Writing them without is a miss after another.
void prefetch_token(const PagedKv& kv, int layer, int64_t page, int offset);

/// Writes row i to token `offsets[i]` of page `page_ids[i]` in `layer`, converted to the KV dtype (rounded to int8
/// where that is int8).
/// Throws std::invalid_argument when a page or an offset is outside the store; nothing is written then.
void write_rows(const PagedKv& kv, int layer, int num_rows, const KvRows& rows, const int32_t* page_ids,
                const int32_t* offsets);

/// Copies tokens [first, last) of one sequence and layer to k_out and v_out, each
/// [num_kv_heads][last - first][head_dim] in the KV dtype. Throws std::invalid_argument when the table names a page
/// outside the store, or the store is int8.
void gather_tokens(const PagedKv& kv, int layer, const int32_t* page_table, int64_t first, int64_t last, void* k_out,
                   void* v_out);

/// Copies `num_tokens` tokens of all layers between two page blobs that differ in page size only, or from a blob of
/// floating point to one of int8. Both runs must lie inside their page. Throws std::logic_error for other types:
/// nothing returns from int8.
void repack(const KvGeometry& from, const std::byte* from_page, int from_offset, const KvGeometry& to,
            std::byte* to_page, int to_offset, int num_tokens);

}  // namespace omniserve
