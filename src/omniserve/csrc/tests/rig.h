// Both ends of a segment in one process, and rows to send through it.
#pragma once

#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "attention.h"
#include "check.h"
#include "host_workers.h"
#include "lane_port.h"

namespace omniserve::testing {

/// Rows as float32, whatever the act dtype of the geometry they travel in.
struct Rows {
    int n;
    std::vector<float> q, k, v, x;
};

inline std::vector<std::byte> narrowed(const std::vector<float>& values, DType dtype) {
    std::vector<std::byte> bytes(values.size() * item_size(dtype));
    if (!values.empty()) kernels().from_f32(values.data(), bytes.data(), dtype, values.size());
    return bytes;
}

inline std::vector<float> widened(const std::vector<std::byte>& bytes, DType dtype) {
    std::vector<float> values(bytes.size() / item_size(dtype));
    if (!values.empty()) kernels().to_f32(bytes.data(), dtype, values.data(), values.size());
    return values;
}

/// A port and a host over memory of exactly the size the segment asks for.
struct Rig {
    explicit Rig(const LaneGeometry& g, HostOptions options = {})
        : geometry(g), memory(std::aligned_alloc(kLine, segment_bytes(g)), &std::free), port(g, memory.get()),
          host(memory.get(), options) {}

    /// New owner with a page table of its own pages, slot, slot + max_lanes, ..., begun at another place by each slot.
    void open_lane(int slot, int position = 0) { open_lane(slot, position, pages_of(slot)); }
    void open_lane(int slot, int position, const std::vector<int32_t>& table) {
        port.reset(slot);
        port.set_pages(slot, 0, table);
        port.start_token(slot, position);
    }
    std::vector<int32_t> pages_of(int slot) const {
        std::vector<int32_t> pages;
        const int count = geometry.max_pages_per_lane, first = slot * count / geometry.max_lanes;
        for (int i = 0; i < count; ++i) pages.push_back(slot + (first + i) % count * geometry.max_lanes);
        return pages;
    }

    void exit(int layer, const std::vector<int32_t>& slots, const Rows& rows) {
        const auto q = narrowed(rows.q, geometry.act_dtype), k = narrowed(rows.k, geometry.act_dtype),
                   v = narrowed(rows.v, geometry.act_dtype), x = narrowed(rows.x, geometry.act_dtype);
        port.exit(layer, rows.n, slots.data(), {q.data(), ptrdiff_t(geometry.q_elements())},
                  {k.data(), ptrdiff_t(geometry.kv_elements())}, {v.data(), ptrdiff_t(geometry.kv_elements())},
                  {x.data(), geometry.hidden_size});
    }

    struct Taken {
        std::vector<int32_t> slots;
        std::vector<float> attn, x;
    };
    Taken take(int layer, int cap, bool same_iteration = true) {
        const size_t item = item_size(geometry.act_dtype);
        std::vector<std::byte> attn(cap * geometry.q_elements() * item), x(size_t(cap) * geometry.hidden_size * item);
        Taken taken{std::vector<int32_t>(cap), {}, {}};
        const int n = port.take(layer, cap, same_iteration, taken.slots.data(),
                                {attn.data(), ptrdiff_t(geometry.q_elements())}, {x.data(), geometry.hidden_size});
        taken.slots.resize(n);
        attn.resize(n * geometry.q_elements() * item);
        x.resize(size_t(n) * geometry.hidden_size * item);
        taken.attn = widened(attn, geometry.act_dtype);
        taken.x = widened(x, geometry.act_dtype);
        return taken;
    }

    void serve_all() {
        for (const auto& [layer, slot] : host.pending()) CHECK(host.serve(slot));
    }

    LaneGeometry geometry;
    std::unique_ptr<void, decltype(&std::free)> memory;
    LanePort port;
    HostWorkers host;
};

inline Rows random_rows(const LaneGeometry& g, int n, std::mt19937& random) {
    std::normal_distribution<float> normal;
    const auto fill = [&](size_t count) {
        std::vector<float> values(count);
        for (float& value : values) value = normal(random);
        return values;
    };
    return {n, fill(n * g.q_elements()), fill(n * g.kv_elements()), fill(n * g.kv_elements()),
            fill(size_t(n) * g.hidden_size)};
}

inline LaneGeometry small_geometry() {
    return {.num_layers = 3,
            .num_heads = 4,
            .num_kv_heads = 2,
            .head_dim = 64,
            .hidden_size = 16,
            .act_dtype = DType::f32,
            .kv_dtype = DType::f32,
            .max_lanes = 5,
            .host_page_size = 4,
            .max_pages_per_lane = 4,
            .num_host_pages = 20,
            .device_page_size = 6,
            .num_frames = 3};
}

}  // namespace omniserve::testing
