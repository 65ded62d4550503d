// Products of a few rows, against plain sums in double, and the row operations beside them.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "dense.h"
#include "row_ops.h"
#include "simd.h"

using namespace omniserve;
using omniserve::testing::fail;

namespace {

const std::vector<const char*>& paths() {
    static const std::vector<const char*> available = [] {
        std::vector<const char*> names;
        for (const char* name : {"scalar", "avx2", "avx512", "avx512_bf16", "neon"}) {
            try {
                set_simd(name);
                names.push_back(name);
            } catch (const std::invalid_argument&) {
            }
        }
        set_simd("auto");
        return names;
    }();
    return available;
}

std::vector<float> random_numbers(size_t count, unsigned seed, DType dtype) {
    std::mt19937 random(seed);
    std::vector<float> numbers(count);
    for (float& x : numbers) {
        x = float(int(random() % 257) - 128) / 64;
        if (dtype == DType::bf16) x = bf16_to_f32(f32_to_bf16(x));
    }
    return numbers;
}

/// Exactly as many bytes as the numbers take: a read past the end is seen.
std::vector<std::byte> stored(const std::vector<float>& numbers, DType dtype) {
    std::vector<std::byte> bytes(numbers.size() * item_size(dtype));
    kernels().from_f32(numbers.data(), bytes.data(), dtype, numbers.size());
    return bytes;
}

std::vector<float> loaded(const std::vector<std::byte>& bytes, DType dtype) {
    std::vector<float> numbers(bytes.size() / item_size(dtype));
    kernels().to_f32(bytes.data(), dtype, numbers.data(), numbers.size());
    return numbers;
}

/// What is left of a weight once it is kept.
double kept(float weight, float largest, DType dtype) {
    switch (dtype) {
        case DType::bf16: return bf16_to_f32(f32_to_bf16(weight));
        case DType::f16: return f16_to_f32(f32_to_f16(weight));
        case DType::i8: return std::lrint(weight * (127 / largest)) * double(largest / 127);
        default: return weight;
    }
}

struct Product {
    Product(int num_out, int num_in, DType kept_as, DType rows_as, unsigned seed = 1)
        : num_out(num_out), num_in(num_in), kept_as(kept_as), rows_as(rows_as),
          weights(random_numbers(size_t(num_out) * num_in, seed, DType::f32)),
          bias(random_numbers(num_out, 2, DType::f32)),
          packed(weights.data(), DType::f32, num_in, num_out, num_in, kept_as) {}

    /// y of `n` rows on `threads` threads.
    std::vector<float> run(const std::vector<float>& x, int n, int threads) const {
        ThreadTeam team(threads);
        const std::vector<std::byte> rows = stored(x, rows_as);
        std::vector<std::byte> y(size_t(n) * num_out * item_size(rows_as));
        dense(team, {&packed, n, rows.data(), num_in, y.data(), num_out, rows_as, bias.data()});
        return loaded(y, rows_as);
    }

    double expected(const float* x, int out) const {
        const float* row = &weights[size_t(out) * num_in];
        float largest = 0;
        for (int k = 0; k < num_in; ++k) largest = std::max(largest, std::abs(row[k]));
        double sum = bias[out];
        for (int k = 0; k < num_in; ++k) sum += double(x[k]) * kept(row[k], largest, kept_as);
        return sum;
    }

    int num_out, num_in;
    DType kept_as, rows_as;
    std::vector<float> weights, bias;
    DenseWeight packed;
};

}  // namespace

TEST(dense_products_equal_plain_sums_for_every_type_and_path) {
    for (const char* path : paths()) {
        set_simd(path);
        for (DType kept_as : {DType::f32, DType::bf16, DType::f16, DType::i8})
            for (DType rows_as : {DType::f32, DType::bf16})
                for (const auto& [num_out, num_in] : {std::pair{33, 71}, {64, 520}, {1, 1}}) {
                    const Product product(num_out, num_in, kept_as, rows_as);
                    for (int n : {1, 5, 13}) {
                        const std::vector<float> x = random_numbers(size_t(n) * num_in, 3, rows_as);
                        const std::vector<float> y = product.run(x, n, 2);
                        for (int i = 0; i < n * num_out; ++i) {
                            const double sum = product.expected(&x[size_t(i / num_out) * num_in], i % num_out);
                            const double relative = rows_as == DType::bf16 ? 0x1p-8 : 0x1p-20;
                            CHECK_NEAR(y[i], sum, 2e-3 * (rows_as == DType::bf16) + 1e-4 + relative * std::abs(sum));
                        }
                    }
                }
    }
    set_simd("auto");
}

TEST(a_row_is_the_same_beside_others_and_on_more_threads) {
    for (const char* path : paths()) {
        set_simd(path);
        const Product product(100, 1031, DType::f32, DType::f32);
        const int n = 14;
        const std::vector<float> x = random_numbers(size_t(n) * product.num_in, 4, DType::f32);
        const std::vector<float> together = product.run(x, n, 3);
        for (int row = 0; row < n; ++row) {
            const std::vector<float> one(x.begin() + row * product.num_in, x.begin() + (row + 1) * product.num_in);
            const std::vector<float> alone = product.run(one, 1, 1);
            CHECK(std::equal(alone.begin(), alone.end(), together.begin() + row * product.num_out));
        }
    }
    set_simd("auto");
}

TEST(a_gated_product_of_strided_rows_is_silu_of_one_times_the_other) {
    for (const char* path : paths()) {
        set_simd(path);
        for (DType rows_as : {DType::f32, DType::bf16, DType::f16}) {
            const Product gate(37, 40, DType::f32, rows_as, 7), up(37, 40, DType::f32, rows_as, 8);
            const int n = 3, stride = 43;
            const std::vector<float> x = random_numbers(size_t(n) * stride, 6, DType::bf16);
            const std::vector<std::byte> rows = stored(x, rows_as);
            std::vector<std::byte> y(size_t(n) * gate.num_out * item_size(rows_as));
            ThreadTeam team(2);
            dense(team, {&up.packed, n, rows.data(), stride, y.data(), gate.num_out, rows_as, up.bias.data(),
                         &gate.packed, gate.bias.data()});
            const std::vector<float> found = loaded(y, rows_as);
            for (int i = 0; i < n * gate.num_out; ++i) {
                const float* row = &x[size_t(i / gate.num_out) * stride];
                const double g = gate.expected(row, i % gate.num_out), u = up.expected(row, i % gate.num_out);
                const double expected = g / (1 + std::exp(-g)) * u;
                CHECK_NEAR(found[i], expected, 1e-4 + (rows_as == DType::f32 ? 1e-5 : 0x1p-7) * std::abs(expected));
            }
        }
    }
    set_simd("auto");
}

TEST(weights_of_zero_are_zero_in_int8) {
    const std::vector<float> zeros(40, 0.0f), x(40, 1.0f);
    const DenseWeight packed(zeros.data(), DType::f32, 40, 1, 40, DType::i8);
    float y = 1.0f;
    ThreadTeam team(1);
    dense(team, {&packed, 1, x.data(), 40, &y, 1, DType::f32});
    CHECK(y == 0.0f);
}

TEST(norms_and_rotation_stay_inside_their_rows) {
    const int heads = 3, head_dim = 6, stride = 25, n = 4;
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        std::vector<std::byte> x = stored(random_numbers(size_t(n) * stride, 5, DType::bf16), dtype);
        const std::vector<float> before = loaded(x, dtype);
        const std::vector<std::byte> ones = stored(std::vector<float>(heads * head_dim, 1.0f), dtype);
        const std::vector<std::byte> zeros = stored(std::vector<float>(2 * head_dim, 0.0f), dtype);
        const std::vector<std::byte> turn = stored({-1, -1, -1, 1, 1, 1, -1, -1, -1, 1, 1, 1}, dtype);
        const std::vector<int64_t> positions = {0, 1, 1, 0};
        rotate_heads(n, heads, head_dim, {x.data(), stride, dtype}, zeros.data(), turn.data(), positions.data());
        std::vector<float> after = loaded(x, dtype);
        for (int row = 0; row < n; ++row)
            for (int i = 0; i < stride; ++i) {
                const int d = i % head_dim, from = i - d + (d + head_dim / 2) % head_dim;
                const float sign = d < head_dim / 2 ? -1.0f : 1.0f;
                const bool is_turned = i < heads * head_dim;
                const float expected = is_turned ? sign * before[row * stride + from] : before[row * stride + i];
                CHECK(after[row * stride + i] == expected);
            }
        rms_norm(n, heads, head_dim, {x.data(), stride, dtype}, ones.data(), 1e-6f, {x.data(), stride, dtype});
        after = loaded(x, dtype);
        for (int row = 0; row < n; ++row) {
            for (int head = 0; head < heads; ++head) {
                double squares = 0;
                for (int d = 0; d < head_dim; ++d) squares += std::pow(after[row * stride + head * head_dim + d], 2);
                CHECK_NEAR(squares / head_dim, 1.0, dtype == DType::f32 ? 1e-5 : 2e-2);
            }
            for (int i = heads * head_dim; i < stride; ++i) CHECK(after[row * stride + i] == before[row * stride + i]);
        }
    }
}
