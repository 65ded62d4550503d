#include "kv.h"

#include <algorithm>
#include <cstring>

#include "errors.h"
#include "kv_int8.h"

namespace omniserve {
namespace {

template <class Out, class In>
Out convert(In value, DType from, DType to) {
    if constexpr (sizeof(Out) == sizeof(In)) {
        if (from == to) return std::bit_cast<Out>(value);
    }
    float wide;
    if constexpr (sizeof(In) == 4) {
        wide = value;
    } else {
        wide = from == DType::bf16 ? bf16_to_f32(value) : f16_to_f32(value);
    }
    if constexpr (sizeof(Out) == 4) {
        return wide;
    } else {
        return to == DType::bf16 ? f32_to_bf16(wide) : f32_to_f16(wide);
    }
}

template <class Out, class In>
void write_rows_as(const PagedKv& kv, int layer, int num_rows, const KvRows& rows, const int32_t* page_ids,
                   const int32_t* offsets) {
    const KvGeometry& g = kv.geometry;
    for (int i = 0; i < num_rows; ++i) {
        const In* k = static_cast<const In*>(rows.k) + i * rows.k_stride;
        const In* v = static_cast<const In*>(rows.v) + i * rows.v_stride;
        for (int head = 0; head < g.num_kv_heads; ++head, k += g.head_dim, v += g.head_dim) {
            Out* k_to = kv.k_block<Out>(page_ids[i], layer, head) + offsets[i];
            Out* v_to = kv.v_block<Out>(page_ids[i], layer, head) + size_t(offsets[i]) * g.head_dim;
            for (int d = 0; d < g.head_dim; ++d) {
                k_to[size_t(d) * g.page_size] = convert<Out>(k[d], rows.dtype, g.dtype);
                v_to[d] = convert<Out>(v[d], rows.dtype, g.dtype);
            }
        }
    }
}

/// Transposes K columns [head_dim][page_size] to rows [count][head_dim], in blocks that stay in the first-level cache.
template <class T>
void transpose_columns(const T* from, int page_size, int count, int head_dim, T* to) {
    constexpr int kBlock = 8;
    for (int t0 = 0; t0 < count; t0 += kBlock) {
        const int t1 = std::min(count, t0 + kBlock);
        for (int d0 = 0; d0 < head_dim; d0 += kBlock)  // head_dim is a multiple of 8
            for (int t = t0; t < t1; ++t)
                for (int d = d0; d < d0 + kBlock; ++d) to[size_t(t) * head_dim + d] = from[size_t(d) * page_size + t];
    }
}

template <class T>
void gather_as(const PagedKv& kv, int layer, const int32_t* page_table, int64_t first, int64_t last, T* k_out,
               T* v_out) {
    const KvGeometry& g = kv.geometry;
    const size_t head_stride = size_t(last - first) * g.head_dim;
    for (int64_t t = first; t < last;) {
        const int64_t page_index = t / g.page_size;
        const int offset = static_cast<int>(t % g.page_size);
        const int count = static_cast<int>(std::min<int64_t>(g.page_size - offset, last - t));
        for (int head = 0; head < g.num_kv_heads; ++head) {
            const size_t to = head * head_stride + size_t(t - first) * g.head_dim;
            transpose_columns(kv.k_block<T>(page_table[page_index], layer, head) + offset, g.page_size, count,
                              g.head_dim, k_out + to);
            std::memcpy(v_out + to, kv.v_block<T>(page_table[page_index], layer, head) + size_t(offset) * g.head_dim,
                        size_t(count) * g.head_dim * sizeof(T));
        }
        t += count;
    }
}

}  // namespace

void KvGeometry::check() const {
    require_range("num_layers", num_layers, 1, 1 << 16);
    require_range("num_kv_heads", num_kv_heads, 1, 1 << 16);
    if (head_dim < kMinHeadDim || head_dim > kMaxHeadDim || head_dim % 8 != 0)
        refuse("head_dim must be a multiple of 8 from 64 to 256, not " + std::to_string(head_dim));
    require_range("page_size", page_size, 1, kMaxPageSize);
}

void require_groups(const KvGeometry& geometry, int num_heads) {
    if (num_heads < 1 || num_heads % geometry.num_kv_heads != 0)
        refuse("num_heads must be a positive multiple of num_kv_heads " + std::to_string(geometry.num_kv_heads) +
               ", not " + std::to_string(num_heads));
}

void require_pages(const PagedKv& kv, const char* field, int index, int64_t num_tokens, const int32_t* page_table,
                   ptrdiff_t table_size) {
    const int64_t pages = num_tokens / kv.geometry.page_size + (num_tokens % kv.geometry.page_size != 0);
    if (num_tokens < 0) refuse(std::string(field) + "[" + std::to_string(index) + "] must not be negative");
    if (pages > table_size)
        refuse(std::string(field) + "[" + std::to_string(index) + "] needs " + std::to_string(pages) +
               " pages, more than the page table's " + std::to_string(table_size));
    for (int64_t page = 0; page < pages; ++page) require_index("tables: page", page_table[page], kv.num_pages);
}

void prefetch_token(const PagedKv& kv, int layer, int64_t page, int offset) {
    const KvGeometry& g = kv.geometry;
    const size_t item = item_size(g.dtype), v_row = g.head_dim * item;
    const std::byte* k = kv.layer_of_page(page, layer) + offset * item;
    const size_t k_row = g.page_size * item;
    for (int row = 0; row < g.num_kv_heads * g.head_dim; ++row) __builtin_prefetch(k + row * k_row, 1);
    const std::byte* v = kv.layer_of_page(page, layer) + g.block_elements() * item + offset * v_row;
    for (int head = 0; head < g.num_kv_heads; ++head, v += g.head_elements() * item)
        for (size_t at = 0; at < v_row; at += 64) __builtin_prefetch(v + at, 1);
}

void write_rows(const PagedKv& kv, int layer, int num_rows, const KvRows& rows, const int32_t* page_ids,
                const int32_t* offsets) {
    require_index("layer", layer, kv.geometry.num_layers);
    for (int i = 0; i < num_rows; ++i) {
        require_index("page_ids: page", page_ids[i], kv.num_pages);
        require_index("offsets: token", offsets[i], kv.geometry.page_size);
    }
    if (kv.geometry.has_scales()) return write_rows_int8(kv, layer, num_rows, rows, page_ids, offsets);
    const bool wide_out = kv.geometry.dtype == DType::f32;
    const bool wide_in = rows.dtype == DType::f32;
    if (wide_out && wide_in) write_rows_as<float, float>(kv, layer, num_rows, rows, page_ids, offsets);
    else if (wide_out) write_rows_as<float, uint16_t>(kv, layer, num_rows, rows, page_ids, offsets);
    else if (wide_in) write_rows_as<uint16_t, float>(kv, layer, num_rows, rows, page_ids, offsets);
    else write_rows_as<uint16_t, uint16_t>(kv, layer, num_rows, rows, page_ids, offsets);
}

void gather_tokens(const PagedKv& kv, int layer, const int32_t* page_table, int64_t first, int64_t last, void* k_out,
                   void* v_out) {
    const KvGeometry& g = kv.geometry;
    require_index("layer", layer, g.num_layers);
    if (g.has_scales()) refuse("dtype: int8 KV cannot be gathered; keep the KV in floating point for that");
    if (first < 0 || first > last)
        refuse("tokens [" + std::to_string(first) + ", " + std::to_string(last) + ") are not a range");
    for (int64_t page = first / g.page_size; page * g.page_size < last; ++page)
        require_index("page_table: page", page_table[page], kv.num_pages);
    if (g.dtype == DType::f32)
        gather_as(kv, layer, page_table, first, last, static_cast<float*>(k_out), static_cast<float*>(v_out));
    else
        gather_as(kv, layer, page_table, first, last, static_cast<uint16_t*>(k_out), static_cast<uint16_t*>(v_out));
}

void repack(const KvGeometry& from, const std::byte* from_page, int from_offset, const KvGeometry& to,
            std::byte* to_page, int to_offset, int num_tokens) {
    if (to.has_scales() && !from.has_scales())
        return quantise_page(from, from_page, from_offset, to, to_page, to_offset, num_tokens);
    if (from.dtype != to.dtype || from.has_scales()) throw std::logic_error("repack: KV does not return from int8");
    const size_t item = item_size(from.dtype);
    const size_t from_block = from.block_elements() * item;
    const size_t to_block = to.block_elements() * item;
    const size_t num_rows = size_t(from.num_kv_heads) * from.head_dim;
    for (int layer = 0; layer < from.num_layers; ++layer) {
        const std::byte* k_from = from_page + layer * 2 * from_block + from_offset * item;
        std::byte* k_to = to_page + layer * 2 * to_block + to_offset * item;
        for (size_t row = 0; row < num_rows; ++row)
            std::memcpy(k_to + row * to.page_size * item, k_from + row * from.page_size * item, num_tokens * item);
        const size_t row_bytes = from.head_dim * item;
        const std::byte* v_from = from_page + (layer * 2 + 1) * from_block + from_offset * row_bytes;
        std::byte* v_to = to_page + (layer * 2 + 1) * to_block + to_offset * row_bytes;
        for (int head = 0; head < from.num_kv_heads; ++head)
            std::memcpy(v_to + head * to.head_elements() * item, v_from + head * from.head_elements() * item,
                        num_tokens * row_bytes);
    }
}

}  // namespace omniserve
