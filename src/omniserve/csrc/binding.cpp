// Python's view: checks arguments, turns addresses into pointers, releases the GIL around what takes long.
//
// Hot calls take raw addresses (torch's data_ptr) as integers: unpacking a tensor costs more than the call itself. The
// caller vouches for them. The documented signatures are in _native.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>

#include "attention.h"
#include "dense.h"
#include "errors.h"
#include "host_workers.h"
#include "lane_port.h"
#include "paged_attention.h"
#include "park.h"
#include "prompt_attention.h"
#include "row_ops.h"
#include "stream_read.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace omniserve;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

template <class Function>
auto without_gil(Function&& function) {
    nb::gil_scoped_release release;
    return function();
}

using FloatArray = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
using FloatInput = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ChunkInput = nb::ndarray<const int64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;
using TableInput = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::object to_numpy(std::vector<float> values, std::vector<size_t> shape) {
    auto* owned = new std::vector<float>(std::move(values));
    nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, float>(owned->data(), shape.size(), shape.data(), owner));
}

/// Attention of one query token with the pieces [bounds[i], bounds[i + 1]) explicit, for tests of the state algebra.
nb::tuple attention_pieces(const PagedKv& kv, int layer, FloatInput q, TableInput table, std::vector<int64_t> bounds,
                           float scale) {
    const KvGeometry& g = kv.geometry;
    const int num_heads = static_cast<int>(q.shape(0));
    if (int(q.shape(1)) != g.head_dim)
        refuse("q must be [num_heads][" + std::to_string(g.head_dim) + "]");
    if (bounds.empty() || bounds.front() < 0 || !std::is_sorted(bounds.begin(), bounds.end()))
        refuse("bounds must rise from 0 or more");
    const int32_t length = static_cast<int32_t>(bounds.back());
    std::vector<float> out(size_t(num_heads) * g.head_dim), lse(num_heads);
    check({&kv, layer, 1, num_heads, q.data(), table.data(), ptrdiff_t(table.shape(0)), &length, out.data(), scale});
    const StateShape shape{g.num_kv_heads, num_heads / g.num_kv_heads, g.head_dim};
    std::vector<float> merged(shape.floats()), piece(shape.floats());
    std::vector<float> scratch(scratch_floats(shape.num_heads, shape.group, shape.head_dim));
    clear_states(merged.data(), shape);
    for (size_t i = 0; i + 1 < bounds.size(); ++i) {
        attend({&kv, table.data(), layer, 0, shape.num_heads, bounds[i], bounds[i + 1], q.data(), shape.group, scale,
                piece.data(), scratch.data()});
        merge_states(merged.data(), piece.data(), shape);
    }
    finish_states(merged.data(), shape, out.data(), lse.data());
    return nb::make_tuple(to_numpy(std::move(out), {size_t(num_heads), size_t(g.head_dim)}),
                          to_numpy(std::move(lse), {size_t(num_heads)}));
}

/// One pass over the memory with plain loads; bytes read per second / 1e9.
double stream_read_gbps(Address address, size_t bytes, ThreadTeam* team) {
    return without_gil([&] {
        ThreadTeam alone(1);
        const uint64_t began = now_ns();
        volatile uint64_t sum = stream_read(team ? *team : alone, at<std::byte>(address), bytes);
        (void)sum;
        return double(bytes) / double(std::max<uint64_t>(1, now_ns() - began));
    });
}

void bind_kernel(nb::module_& m) {
    nb::class_<KvGeometry>(m, "KvGeometry")
        .def("__init__",
             [](KvGeometry* self, int num_layers, int num_kv_heads, int head_dim, int page_size,
                const std::string& dtype) {
                 const KvGeometry g{num_layers, num_kv_heads, head_dim, page_size, parse_stored_dtype("dtype", dtype)};
                 g.check();
                 new (self) KvGeometry(g);
             },
             nb::kw_only(), "num_layers"_a, "num_kv_heads"_a, "head_dim"_a, "page_size"_a, "dtype"_a)
        .def_ro("num_layers", &KvGeometry::num_layers)
        .def_ro("num_kv_heads", &KvGeometry::num_kv_heads)
        .def_ro("head_dim", &KvGeometry::head_dim)
        .def_ro("page_size", &KvGeometry::page_size)
        .def_prop_ro("dtype", [](const KvGeometry& g) { return dtype_name(g.dtype); })
        .def_prop_ro("page_bytes", &KvGeometry::page_bytes);

    nb::class_<PagedKv>(m, "PagedKv")
        .def("__init__",
             [](PagedKv* self, const KvGeometry& geometry, Address address, int64_t num_pages) {
                 if (address == 0 || address % 4) refuse("address must be a multiple of 4, not 0");
                 require_range("num_pages", num_pages, 1, INT32_MAX);
                 new (self) PagedKv{geometry, at<std::byte>(address), num_pages};
             },
             "geometry"_a, "address"_a, "num_pages"_a)
        .def_ro("geometry", &PagedKv::geometry)
        .def_ro("num_pages", &PagedKv::num_pages)
        .def("page_address",
             [](const PagedKv& kv, int64_t id) {
                 require_index("id: page", id, kv.num_pages);
                 return reinterpret_cast<Address>(kv.page(id));
             },
             "id"_a)
        .def("write",
             [](const PagedKv& kv, int layer, int n, Address k, ptrdiff_t k_stride, Address v, ptrdiff_t v_stride,
                const std::string& act_dtype, Address page_ids, Address offsets) {
                 const KvRows rows{at<void>(k), k_stride, at<void>(v), v_stride, parse_dtype("act_dtype", act_dtype)};
                 const auto write = [&] {
                     write_rows(kv, layer, n, rows, at<int32_t>(page_ids), at<int32_t>(offsets));
                 };
                 n <= 16 ? write() : without_gil(write);  // a few rows take a few microseconds
             },
             "layer"_a, "n"_a, "k_addr"_a, "k_stride"_a, "v_addr"_a, "v_stride"_a, "act_dtype"_a, "page_ids_addr"_a,
             "offsets_addr"_a)
        .def("gather",
             [](const PagedKv& kv, int layer, Address table, int64_t num_tokens, Address k_out, Address v_out,
                int64_t first_token) {
                 without_gil([&] {
                     gather_tokens(kv, layer, at<int32_t>(table), first_token, num_tokens, at<void>(k_out),
                                   at<void>(v_out));
                 });
             },
             "layer"_a, "table_addr"_a, "num_tokens"_a, "k_out_addr"_a, "v_out_addr"_a, "first_token"_a = 0);

    nb::class_<ThreadTeam>(m, "ThreadTeam")
        .def(nb::init<int, std::vector<int>>(), "num_threads"_a, "cpus"_a = std::vector<int>{})
        .def_prop_ro("num_threads", &ThreadTeam::num_threads);

    m.def("paged_attention",
          [](ThreadTeam& team, const PagedKv& kv, int layer, int n, Address q, Address tables, ptrdiff_t table_stride,
             Address context_lens, Address out, int num_heads, float scale, int window) {
              const PagedAttentionArgs args{&kv, layer, n, num_heads, at<float>(q), at<int32_t>(tables), table_stride,
                                            at<int32_t>(context_lens), at<float>(out), scale, window};
              without_gil([&] {
                  check(args);
                  paged_attention(team, args);
              });
          },
          "team"_a, "kv"_a, "layer"_a, "n"_a, "q_addr"_a, "tables_addr"_a, "table_stride"_a, "context_lens_addr"_a,
          "out_addr"_a, "num_heads"_a, "scale"_a, "window"_a = 0);
    m.def("prompt_attention",
          [](ThreadTeam& team, const PagedKv& kv, int layer, ChunkInput chunks, Address tables,
             ptrdiff_t table_stride, const std::string& dtype, Address q, ptrdiff_t q_stride, Address out,
             ptrdiff_t out_stride, int num_heads, float scale, int window) {
              std::vector<PromptChunk> list(chunks.shape(0));
              for (size_t i = 0; i < list.size(); ++i) {
                  for (int field : {0, 1}) require_range("chunks: row", chunks(i, field), INT32_MIN, INT32_MAX);
                  list[i] = {int32_t(chunks(i, 0)), int32_t(chunks(i, 1)), chunks(i, 2)};
              }
              const PromptAttentionArgs args{&kv, layer, int32_t(list.size()), num_heads, list.data(),
                                             at<int32_t>(tables), table_stride, parse_dtype("dtype", dtype),
                                             at<void>(q), q_stride, at<void>(out), out_stride, scale, window};
              without_gil([&] {
                  check(args);
                  prompt_attention(team, args);
              });
          },
          "team"_a, "kv"_a, "layer"_a, "chunks"_a, "tables_addr"_a, "table_stride"_a, "dtype"_a, "q_addr"_a,
          "q_stride"_a, "out_addr"_a, "out_stride"_a, "num_heads"_a, "scale"_a, "window"_a = 0);
    nb::class_<DenseWeight>(m, "DenseWeight")
        .def("__init__",
             [](DenseWeight* self, Address weights, const std::string& from, ptrdiff_t stride, int num_out, int num_in,
                const std::string& dtype) {
                 const DType kept = parse_stored_dtype("dtype", dtype), given = parse_dtype("from_dtype", from);
                 nb::gil_scoped_release release;
                 new (self) DenseWeight(at<void>(weights), given, stride, num_out, num_in, kept);
             },
             "address"_a, "from_dtype"_a, "stride"_a, "num_out"_a, "num_in"_a, "dtype"_a)
        .def_prop_ro("num_out", &DenseWeight::num_out)
        .def_prop_ro("num_in", &DenseWeight::num_in)
        .def_prop_ro("dtype", [](const DenseWeight& w) { return dtype_name(w.dtype()); })
        .def_prop_ro("bytes", &DenseWeight::bytes);
    m.def("dense",
          [](ThreadTeam& team, const DenseWeight& weight, int n, Address x, ptrdiff_t x_stride, Address y,
             ptrdiff_t y_stride, const std::string& dtype, Address bias, const DenseWeight* gate, Address gate_bias) {
              const DenseArgs args{&weight, n, at<void>(x), x_stride, at<void>(y), y_stride,
                                   parse_dtype("dtype", dtype), at<float>(bias), gate, at<float>(gate_bias)};
              without_gil([&] { dense(team, args); });
          },
          "team"_a, "weight"_a, "n"_a, "x_addr"_a, "x_stride"_a, "y_addr"_a, "y_stride"_a, "dtype"_a,
          "bias_addr"_a = 0, "gate"_a = nb::none(), "gate_bias_addr"_a = 0);
    m.def("rms_norm",
          [](int n, int groups, int size, Address x, ptrdiff_t x_stride, Address weight, float eps, Address y,
             ptrdiff_t y_stride, const std::string& dtype) {
              const DType type = parse_dtype("dtype", dtype);
              const auto run = [&] {
                  rms_norm(n, groups, size, {at<void>(x), x_stride, type}, at<void>(weight), eps,
                           {at<void>(y), y_stride, type});
              };
              n <= 16 ? run() : without_gil(run);  // a few rows take a few microseconds
          },
          "n"_a, "groups"_a, "size"_a, "x_addr"_a, "x_stride"_a, "weight_addr"_a, "eps"_a, "y_addr"_a, "y_stride"_a,
          "dtype"_a);
    m.def("rotate_heads",
          [](int n, int heads, int head_dim, Address x, ptrdiff_t x_stride, Address cos, Address sin, Address positions,
             const std::string& dtype) {
              const RowSpan rows{at<void>(x), x_stride, parse_dtype("dtype", dtype)};
              const auto run = [&] {
                  rotate_heads(n, heads, head_dim, rows, at<void>(cos), at<void>(sin), at<int64_t>(positions));
              };
              n <= 16 ? run() : without_gil(run);
          },
          "n"_a, "heads"_a, "head_dim"_a, "x_addr"_a, "x_stride"_a, "cos_addr"_a, "sin_addr"_a, "positions_addr"_a,
          "dtype"_a);
    m.def("attention_pieces", &attention_pieces, "kv"_a, "layer"_a, "q"_a, "table"_a, "bounds"_a, "scale"_a);
    m.def("exp_nonpositive",
          [](nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu> x) {
              std::vector<float> y(x.shape(0));
              kernels().exp_nonpositive(x.data(), y.data(), y.size());
              const size_t count = y.size();
              return to_numpy(std::move(y), {count});
          },
          "x"_a);
    m.def("set_simd", [](const std::string& name) { set_simd(name); }, "name"_a);
    m.def("simd", [] { return kernels().name; });
    m.def("stream_read_gbps", &stream_read_gbps, "address"_a, "bytes"_a, "team"_a.none() = nb::none());
}

void bind_geometry(nb::module_& m) {
    nb::class_<LaneGeometry>(m, "LaneGeometry")
        .def("__init__",
             [](LaneGeometry* self, int num_layers, int num_heads, int num_kv_heads, int head_dim, int hidden_size,
                const std::string& act_dtype, const std::string& kv_dtype, int max_lanes, int host_page_size,
                int max_pages_per_lane, int num_host_pages, int device_page_size, int num_frames, float scale,
                int num_partitions, const std::string& host_kv_dtype, int window,
                const std::vector<int>& window_layers) {
                 const DType device_kv = parse_dtype("kv_dtype", kv_dtype);
                 const DType host_kv =
                     host_kv_dtype == "auto" ? device_kv : parse_stored_dtype("host_kv_dtype", host_kv_dtype);
                 LaneGeometry g{num_layers, num_heads, num_kv_heads, head_dim, hidden_size,
                                      parse_dtype("act_dtype", act_dtype), device_kv, host_kv, max_lanes,
                                      host_page_size, max_pages_per_lane, num_host_pages, device_page_size, num_frames,
                                      scale, num_partitions, window};
                 for (int layer : window_layers) {
                     require_index("window_layers: layer", layer, std::min(num_layers, kMaxWindowLayers));
                     g.window_layers[layer / 64] |= uint64_t{1} << layer % 64;
                 }
                 g.check();
                 new (self) LaneGeometry(g);
             },
             nb::kw_only(), "num_layers"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "hidden_size"_a,
             "act_dtype"_a, "kv_dtype"_a, "max_lanes"_a, "host_page_size"_a, "max_pages_per_lane"_a,
             "num_host_pages"_a, "device_page_size"_a, "num_frames"_a = 0, "scale"_a = 0.0f,
             "num_partitions"_a = 1, "host_kv_dtype"_a = "auto", "window"_a = 0,
             "window_layers"_a = std::vector<int>{})
        .def_ro("num_layers", &LaneGeometry::num_layers)
        .def_ro("num_heads", &LaneGeometry::num_heads)
        .def_ro("num_kv_heads", &LaneGeometry::num_kv_heads)
        .def_ro("head_dim", &LaneGeometry::head_dim)
        .def_ro("hidden_size", &LaneGeometry::hidden_size)
        .def_prop_ro("act_dtype", [](const LaneGeometry& g) { return dtype_name(g.act_dtype); })
        .def_prop_ro("kv_dtype", [](const LaneGeometry& g) { return dtype_name(g.kv_dtype); })
        .def_prop_ro("host_kv_dtype", [](const LaneGeometry& g) { return dtype_name(g.host_kv_dtype); })
        .def_ro("max_lanes", &LaneGeometry::max_lanes)
        .def_ro("host_page_size", &LaneGeometry::host_page_size)
        .def_ro("max_pages_per_lane", &LaneGeometry::max_pages_per_lane)
        .def_ro("num_host_pages", &LaneGeometry::num_host_pages)
        .def_ro("device_page_size", &LaneGeometry::device_page_size)
        .def_ro("num_frames", &LaneGeometry::num_frames)
        .def_prop_ro("scale", &LaneGeometry::score_scale)
        .def_ro("num_partitions", &LaneGeometry::num_partitions)
        .def_ro("window", &LaneGeometry::window)
        .def("first_token",
             [](const LaneGeometry& g, int layer, int64_t tokens) {
                 require_index("layer", layer, g.num_layers);
                 return g.first_token(layer, tokens);
             },
             "layer"_a, "tokens"_a)
        .def("partition_of_page",
             [](const LaneGeometry& g, int64_t page) {
                 require_index("page", page, g.num_host_pages);
                 return g.partition_of_page(page);
             },
             "page"_a)
        .def_prop_ro("host_page_bytes", [](const LaneGeometry& g) { return g.host_kv().page_bytes(); })
        .def_prop_ro("device_page_bytes", [](const LaneGeometry& g) { return g.device_kv().page_bytes(); });
    m.def("segment_bytes", &segment_bytes, "geometry"_a);
    m.def("segment_geometry", [](Address address) { return Segment::attach(at<void>(address)).geometry(); },
          "address"_a);
}

nb::list worker_stats(const SegmentHeader& header) {
    nb::list workers;
    const uint32_t shown = std::max<uint32_t>(1, header.num_workers.load(std::memory_order_relaxed));
    for (uint32_t i = 0; i < std::min<uint32_t>(shown, kMaxWorkers); ++i) {
        const WorkerStats& w = header.workers[i];
        nb::dict stats;
        stats["busy_s"] = double(w.busy_ns.load(std::memory_order_relaxed)) * 1e-9;
        stats["tasks"] = w.tasks.load(std::memory_order_relaxed);
        stats["pieces"] = w.pieces.load(std::memory_order_relaxed);
        stats["shared_rows"] = w.shared_rows.load(std::memory_order_relaxed);
        stats["stale_tasks"] = w.stale_tasks.load(std::memory_order_relaxed);
        stats["out_of_order_tasks"] = w.out_of_order.load(std::memory_order_relaxed);
        stats["kv_bytes_read"] = w.kv_bytes_read.load(std::memory_order_relaxed);
        stats["copies"] = w.copies.load(std::memory_order_relaxed);
        stats["copied_bytes"] = w.copied_bytes.load(std::memory_order_relaxed);
        workers.append(stats);
    }
    return workers;
}

nb::dict port_stats(const LanePort& port) {
    const LaneStats s = port.stats();
    const SegmentHeader& header = port.segment().header();
    nb::dict stats;
    stats["submitted_rows"] = s.submitted_rows;
    stats["lane_entries"] = s.lane_entries;
    stats["same_iteration_entries"] = s.same_iteration_entries;
    stats["cancelled_rows"] = s.cancelled_rows;
    stats["landed_pages"] = s.landed_pages;
    stats["fetched_pages"] = s.fetched_pages;
    stats["waiting_lanes"] = s.waiting_lanes;
    stats["draining_lanes"] = s.draining_lanes;
    stats["free_frames"] = s.free_frames;
    stats["current_layer"] = header.current_layer.load(std::memory_order_relaxed);
    stats["attention_gap_s"] = double(header.attention_gap_ns.load(std::memory_order_relaxed)) * 1e-9;
    stats["host_ready"] = header.host_ready.load(std::memory_order_acquire) != 0;
    stats["host_pid"] = header.host_pid.load(std::memory_order_relaxed);
    stats["arena_bytes"] = header.arena_bytes.load(std::memory_order_relaxed);
    stats["arena_resident_bytes"] = header.arena_resident.load(std::memory_order_relaxed);
    stats["arena_huge_bytes"] = header.arena_huge.load(std::memory_order_relaxed);
    stats["workers"] = worker_stats(header);
    return stats;
}

void bind_lane_port(nb::module_& m) {
    nb::class_<LanePort>(m, "LanePort")
        .def("__init__",
             [](LanePort* self, const LaneGeometry& geometry, Address address) {
                 new (self) LanePort(geometry, at<void>(address));
             },
             "geometry"_a, "address"_a)
        .def("begin_walk", &LanePort::begin_walk)
        .def("end_walk", &LanePort::end_walk)
        .def("exit",
             [](LanePort& port, int layer, int n, Address slots, Address q, ptrdiff_t q_stride, Address k,
                ptrdiff_t k_stride, Address v, ptrdiff_t v_stride, Address x, ptrdiff_t x_stride) {
                 port.exit(layer, n, at<int32_t>(slots), {at<void>(q), q_stride}, {at<void>(k), k_stride},
                           {at<void>(v), v_stride}, {at<void>(x), x_stride});
             },
             "layer"_a, "n"_a, "slots_addr"_a, "q_addr"_a, "q_stride"_a, "k_addr"_a, "k_stride"_a, "v_addr"_a,
             "v_stride"_a, "x_addr"_a, "x_stride"_a)
        .def("take",
             [](LanePort& port, int layer, int cap, bool same_iteration, Address slots_out, Address attn,
                ptrdiff_t attn_stride, Address x, ptrdiff_t x_stride) {
                 return port.take(layer, cap, same_iteration, at<int32_t>(slots_out), {at<void>(attn), attn_stride},
                                  {at<void>(x), x_stride});
             },
             "layer"_a, "cap"_a, "same_iteration"_a, "slots_out_addr"_a, "attn_addr"_a, "attn_stride"_a, "x_addr"_a,
             "x_stride"_a)
        .def("wait_all", &LanePort::wait_all, "layer"_a, "timeout_s"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("wait_any", &LanePort::wait_any, "timeout_s"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("scan",
             [](const LanePort& port, Address ready, Address waiting, Address oldest) {
                 port.scan(at<int32_t>(ready), at<int32_t>(waiting), at<uint64_t>(oldest));
             },
             "ready_addr"_a, "waiting_addr"_a, "oldest_addr"_a)
        .def("set_pages", &LanePort::set_pages, "slot"_a, "start"_a, "ids"_a)
        .def("start_token", &LanePort::start_token, "slot"_a, "position"_a)
        .def("reset", &LanePort::reset, "slot"_a)
        .def("cancel", &LanePort::cancel, "slot"_a)
        .def("drained", &LanePort::drained)
        .def("free_frames", &LanePort::free_frames)
        .def("land",
             [](LanePort& port, uint64_t id, Address device_page, int token_offset, int num_tokens, int host_offset,
                std::vector<int32_t> host_pages) {
                 const PageCopy copy{id, token_offset, num_tokens, host_offset, std::move(host_pages)};
                 without_gil([&] { port.land(copy, at<void>(device_page)); });
             },
             "id"_a, "device_page_addr"_a, "token_offset"_a, "num_tokens"_a, "host_offset"_a, "host_pages"_a)
        .def("fetch",
             [](LanePort& port, uint64_t id, int token_offset, int num_tokens, int host_offset,
                std::vector<int32_t> host_pages, Address device_page) {
                 port.fetch({id, token_offset, num_tokens, host_offset, std::move(host_pages)}, at<void>(device_page));
             },
             "id"_a, "token_offset"_a, "num_tokens"_a, "host_offset"_a, "host_pages"_a, "device_page_addr"_a)
        .def("cancel_fetch", &LanePort::cancel_fetch, "id"_a)
        .def("collect_copies", &LanePort::collect_copies)
        .def("arm", &LanePort::arm)
        .def("disarm", &LanePort::disarm)
        .def("stats", &port_stats);
}

void bind_host_workers(nb::module_& m) {
    nb::class_<HostWorkers>(m, "HostWorkers")
        .def("__init__",
             [](HostWorkers* self, Address address, int eventfd, std::vector<int> cpus, int nice, size_t arena_bytes,
                std::vector<int> partitions, std::vector<int> nodes, bool lock) {
                 new (self) HostWorkers(at<void>(address), {.eventfd = eventfd,
                                                            .cpus = std::move(cpus),
                                                            .partitions = std::move(partitions),
                                                            .nice = nice,
                                                            .arena_bytes = arena_bytes,
                                                            .arena = {std::move(nodes), lock}});
             },
             "address"_a, "eventfd"_a = -1, "cpus"_a = std::vector<int>{}, "nice"_a = 0, "arena_bytes"_a = 0,
             "partitions"_a = std::vector<int>{}, "nodes"_a = std::vector<int>{}, "lock"_a = false)
        .def("start", &HostWorkers::start, "num_threads"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("stop", &HostWorkers::stop, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("num_workers", &HostWorkers::num_workers)
        .def_prop_ro("geometry", &HostWorkers::geometry)
        .def_prop_ro("arena_bytes", [](const HostWorkers& w) { return w.arena().bytes(); })
        .def_prop_ro("warnings", [](const HostWorkers& w) { return w.arena().warnings(); })
        .def("publish_memory", &HostWorkers::publish_memory, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("kv", [](const HostWorkers& w) { return w.arena().kv(); }, nb::keep_alive<0, 1>())
        .def("pending", &HostWorkers::pending)
        .def("serve", &HostWorkers::serve, "slot"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("pending_copies", &HostWorkers::pending_copies)
        .def("serve_copy", &HostWorkers::serve_copy, "id"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("stats", [](const HostWorkers& w) { return worker_stats(w.header()); });
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Host attention, the lanes between device and host, and dense work (see _native.pyi).";
    bind_kernel(m);
    bind_geometry(m);
    bind_lane_port(m);
    bind_host_workers(m);
}
