#include "dense.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

#include "errors.h"
#include "simd.h"

namespace omniserve {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// Weights that a thread takes at a time: long against the taking, short against a layer.
constexpr size_t kTakenBytes = 64 << 10;

/// Zeroed memory that begins at a huge page where it is as large as one. Huge pages are asked for, not insisted on.
std::byte* map_memory(size_t bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), spare = bytes >= kHugePage ? kHugePage : 0;
    const size_t kept = (bytes + page - 1) / page * page;
    void* mapped = mmap(nullptr, kept + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    auto* begin = static_cast<std::byte*>(mapped);
    if (spare == 0) return begin;
    const size_t before = -reinterpret_cast<uintptr_t>(begin) % spare;
    if (before > 0) munmap(begin, before);
    if (before < spare) munmap(begin + before + kept, spare - before);
    madvise(begin + before, bytes, MADV_HUGEPAGE);
    return begin + before;
}

size_t bytes_of_panel(int num_in, DType dtype) {
    const size_t inputs = dtype == DType::bf16 ? (size_t(num_in) + 1) / 2 * 2 : size_t(num_in);
    return inputs * kPanel * item_size(dtype);
}

}  // namespace

DenseWeight::DenseWeight(const void* weights, DType from, ptrdiff_t stride, int num_out, int num_in, DType dtype)
    : num_out_(num_out), num_in_(num_in), dtype_(dtype), panel_bytes_(bytes_of_panel(num_in, dtype)) {
    require_range("num_out", num_out, 1, INT32_MAX / 2);
    require_range("num_in", num_in, 1, INT32_MAX / 2);
    if (from == DType::i8) refuse("weights to pack must be float32, bfloat16 or float16");
    if (dtype == DType::i8) scales_.resize(size_t(num_panels()) * kPanel);
    std::vector<float> rows(size_t(kPanel) * num_in);
    data_ = map_memory(num_panels() * panel_bytes_);  // last: nothing after it throws
    for (int index = 0; index < num_panels(); ++index) {
        std::fill(rows.begin(), rows.end(), 0.0f);
        for (int out = index * kPanel; out < std::min(num_out, (index + 1) * kPanel); ++out)
            kernels().to_f32(static_cast<const std::byte*>(weights) + out * stride * ptrdiff_t(item_size(from)), from,
                             &rows[size_t(out % kPanel) * num_in], num_in);
        pack_panel(index, rows.data());
    }
}

DenseWeight::~DenseWeight() { munmap(data_, num_panels() * panel_bytes_); }

/// rows: [kPanel][num_in].
void DenseWeight::pack_panel(int index, const float* rows) {
    std::byte* to = data_ + index * panel_bytes_;
    const size_t step = dtype_ == DType::bf16 ? 2 : 1;
    for (int out = 0; out < kPanel; ++out) {
        const float* row = rows + size_t(out) * num_in_;
        float factor = 1.0f;
        if (dtype_ == DType::i8) {
            float largest = 0.0f;
            for (int k = 0; k < num_in_; ++k) largest = std::max(largest, std::abs(row[k]));
            scales_[size_t(index) * kPanel + out] = largest / 127;
            factor = largest > 0 ? 127 / largest : 0.0f;
        }
        for (size_t k = 0; k < size_t(num_in_); ++k) {
            std::byte* at = to + ((k / step * kPanel + out) * step + k % step) * item_size(dtype_);
            if (dtype_ == DType::i8) *reinterpret_cast<int8_t*>(at) = int8_t(std::lrint(row[k] * factor));
            else if (dtype_ == DType::bf16) *reinterpret_cast<uint16_t*>(at) = f32_to_bf16(row[k]);
            else if (dtype_ == DType::f16) *reinterpret_cast<uint16_t*>(at) = f32_to_f16(row[k]);
            else std::memcpy(at, row + k, sizeof(float));
        }
    }
}

namespace {

/// The rows of a call as the panels' loop wants them.
struct Inputs {
    void (*panel)(const PanelArgs&);
    const void* x;
    ptrdiff_t stride;
    std::vector<float>& widened = buffer();

    /// Kept from call to call.
    static std::vector<float>& buffer() {
        thread_local std::vector<float> own;
        return own;
    }

    explicit Inputs(const DenseArgs& a)
        : panel(kernels().dense->of[int(a.weight->dtype())]), x(a.x), stride(a.x_stride) {
        if (a.dtype == DType::f32) return;
        const int num_in = a.weight->num_in();
        const bool are_pairs =
            num_in % 2 == 0 && (a.num_rows == 1 || stride % 2 == 0) && reinterpret_cast<uintptr_t>(x) % 4 == 0;
        if (a.dtype == DType::bf16 && a.weight->dtype() == DType::bf16 && are_pairs && kernels().dense_bf16_rows) {
            panel = kernels().dense_bf16_rows;
            return;
        }
        widened.resize(size_t(a.num_rows) * num_in);
        for (int row = 0; row < a.num_rows; ++row)
            kernels().to_f32(static_cast<const std::byte*>(a.x) + row * stride * 2, a.dtype,
                             &widened[size_t(row) * num_in], num_in);
        x = widened.data();
        stride = num_in;
    }
};

/// Sums of a panel become products: times the scales, plus the bias.
void finish_sums(const DenseWeight& weight, const float* bias, int index, int num_rows, float* sums) {
    const int first = index * kPanel, count = std::min(kPanel, weight.num_out() - first);
    const float* scales = weight.scales(index);
    for (int row = 0; row < num_rows; ++row, sums += kPanel) {
        if (scales)
            for (int i = 0; i < kPanel; ++i) sums[i] *= scales[i];
        if (bias)
            for (int i = 0; i < count; ++i) sums[i] += bias[first + i];
    }
}

/// One panel of the product, from its sums in `scratch` to y.
void run_panel(const DenseArgs& a, const Inputs& inputs, int index, float* scratch) {
    const auto sums_of = [&](const DenseWeight& weight, const float* bias, float* sums) {
        inputs.panel({weight.panel(index), weight.num_in(), a.num_rows, inputs.x, inputs.stride, sums});
        finish_sums(weight, bias, index, a.num_rows, sums);
    };
    sums_of(*a.weight, a.bias, scratch);
    if (a.gate) {
        float* gate = scratch + size_t(a.num_rows) * kPanel;
        sums_of(*a.gate, a.gate_bias, gate);
        kernels().dense->gate(gate, scratch, size_t(a.num_rows) * kPanel);
    }
    const int first = index * kPanel, count = std::min(kPanel, a.weight->num_out() - first);
    for (int row = 0; row < a.num_rows; ++row) {
        auto* to = static_cast<std::byte*>(a.y) + (row * a.y_stride + first) * ptrdiff_t(item_size(a.dtype));
        kernels().from_f32(scratch + size_t(row) * kPanel, to, a.dtype, count);
    }
}

}  // namespace

void dense(ThreadTeam& team, const DenseArgs& args) {
    const DenseWeight& weight = *args.weight;
    if (args.gate && (args.gate->num_out() != weight.num_out() || args.gate->num_in() != weight.num_in() ||
                      args.gate->dtype() != weight.dtype()))
        refuse("gate must have the shape and type of the weight");
    if (args.num_rows <= 0) return;
    const Inputs inputs(args);
    const int taken = int(std::max<size_t>(1, kTakenBytes / weight.panel_bytes()));
    const size_t floats = size_t(args.num_rows) * kPanel * (args.gate ? 2 : 1);
    for (int member = 0; member < team.num_threads(); ++member) team.scratch(member, floats);  // may throw: not below
    std::atomic<int> next{0};
    team.run([&](int member) {
        float* scratch = team.scratch(member, floats);
        while (true) {
            const int first = next.fetch_add(taken, std::memory_order_relaxed);
            if (first >= weight.num_panels()) return;
            for (int index = first; index < std::min(first + taken, weight.num_panels()); ++index)
                run_panel(args, inputs, index, scratch);
        }
    });
}

}  // namespace omniserve
