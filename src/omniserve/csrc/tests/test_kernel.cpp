// The kernel against double precision, in stores of exactly the bytes it may touch.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "attention.h"
#include "check.h"
#include "paged_attention.h"
#include "stream_read.h"
#include "tolerance.h"

using namespace omniserve;

namespace {

struct Store {
    Store(KvGeometry g, int group, int num_tokens)
        : group(group), num_tokens(num_tokens), num_pages((num_tokens + g.page_size - 1) / g.page_size),
          memory(num_pages * g.page_bytes()), kv{g, memory.data(), num_pages} {
        std::mt19937 random(g.head_dim * 1000 + g.page_size);
        std::normal_distribution<float> normal;
        const size_t width = size_t(g.num_kv_heads) * g.head_dim;
        for (auto* values : {&keys, &this->values}) {
            values->resize(num_tokens * width);
            // Multiples of 1/8 below 16 are exact in every storage type.
            for (float& value : *values) value = std::round(normal(random) * 8) / 8;
        }
        q.resize(group * width);
        for (float& value : q) {
            value = normal(random);
            if (g.dtype == DType::bf16) value = bf16_to_f32(f32_to_bf16(value));  // as those of such a model
        }
        for (int i = 0; i < num_pages; ++i) table.push_back((i + 1) % num_pages);
        std::vector<int32_t> pages, offsets;
        for (int t = 0; t < num_tokens; ++t) {
            pages.push_back(table[t / g.page_size]);
            offsets.push_back(t % g.page_size);
        }
        for (int layer = 0; layer < g.num_layers; ++layer)
            write_rows(kv, layer, num_tokens, {keys.data(), ptrdiff_t(width), values.data(), ptrdiff_t(width)},
                       pages.data(), offsets.data());
        if (g.has_scales()) read_back();
    }

    /// keys and values become what int8 kept of them.
    void read_back() {
        const KvGeometry& g = kv.geometry;
        for (int t = 0; t < num_tokens; ++t)
            for (int head = 0; head < g.num_kv_heads; ++head)
                for (int d = 0; d < g.head_dim; ++d) {
                    const int page = table[t / g.page_size], offset = t % g.page_size, layer = g.num_layers - 1;
                    const size_t at = (size_t(t) * g.num_kv_heads + head) * g.head_dim + d;
                    keys[at] = kv.k_scales(page, layer, head)[offset] *
                               kv.k_block<int8_t>(page, layer, head)[d * g.page_size + offset];
                    values[at] = kv.v_scales(page, layer, head)[offset] *
                                 kv.v_block<int8_t>(page, layer, head)[offset * g.head_dim + d];
                }
    }

    double expected(int head, int dim, int first, int last) const {
        const int head_dim = kv.geometry.head_dim, width = kv.geometry.num_kv_heads * head_dim;
        const int column = head / group * head_dim;
        std::vector<double> scores;
        double top = -std::numeric_limits<double>::infinity(), sum = 0, out = 0;
        for (int t = first; t < last; ++t) {
            double score = 0;
            for (int d = 0; d < head_dim; ++d) score += double(q[head * head_dim + d]) * keys[t * width + column + d];
            scores.push_back(score / std::sqrt(head_dim));
            top = std::max(top, scores.back());
        }
        for (int t = first; t < last; ++t) {
            const double weight = std::exp(scores[t - first] - top);
            sum += weight;
            out += weight * values[t * width + column + dim];
        }
        return out / sum;
    }

    /// Attention of one KV head over [first, last) in pieces of `step` tokens.
    std::vector<float> attend_head(int kv_head, int first, int last, int step) const {
        const StateShape shape{1, group, kv.geometry.head_dim};
        std::vector<float> merged(shape.floats()), piece(merged.size());
        std::vector<float> scratch(scratch_floats(1, group, shape.head_dim)), out(size_t(group) * shape.head_dim);
        clear_states(merged.data(), shape);
        for (int t = first; t < last; t += step) {
            attend({&kv, table.data(), kv.geometry.num_layers - 1, kv_head, 1, t, std::min(last, t + step),
                    q.data() + size_t(kv_head) * group * shape.head_dim, group, 1 / std::sqrt(float(shape.head_dim)),
                    piece.data(), scratch.data()});
            merge_states(merged.data(), piece.data(), shape);
        }
        finish_states(merged.data(), shape, out.data());
        return out;
    }

    int group, num_tokens, num_pages;
    std::vector<std::byte> memory;
    PagedKv kv;
    std::vector<float> q, keys, values;  // q [heads][head_dim]; rows [num_tokens][num_kv_heads * head_dim]
    std::vector<int32_t> table;
};

double tolerance(const Store& store) { return testing::attention_tolerance(store.kv.geometry, store.group); }

void check_all_heads(const Store& store, int first, int last, int step) {
    const int head_dim = store.kv.geometry.head_dim;
    const double allowed = tolerance(store);
    for (int kv_head = 0; kv_head < store.kv.geometry.num_kv_heads; ++kv_head) {
        const std::vector<float> out = store.attend_head(kv_head, first, last, step);
        for (int g = 0; g < store.group; ++g)
            for (int d = 0; d < head_dim; d += 7)
                CHECK_NEAR(out[g * head_dim + d], store.expected(kv_head * store.group + g, d, first, last), allowed);
    }
}

/// The paths this CPU has; says once which others there are.
const std::vector<const char*>& paths() {
    static const std::vector<const char*> available = [] {
        std::vector<const char*> names;
        for (const char* name : {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon"}) {
            try {
                set_simd(name);
                names.push_back(name);
            } catch (const std::invalid_argument&) {
                std::printf("skipped: this CPU has no %s\n", name);
            }
        }
        set_simd("auto");
        return names;
    }();
    return available;
}

template <class Function>
void on_every_path(Function&& function) {
    for (const char* name : paths()) {
        set_simd(name);
        function();
    }
    set_simd("auto");
}

/// Attention of `num_heads` heads of the store's first KV head over [first, last), in double precision.
std::vector<double> reference(const Store& store, int num_heads, int first, int last) {
    const int head_dim = store.kv.geometry.head_dim;
    std::vector<double> out(size_t(num_heads) * head_dim), scores(last - first);
    for (int head = 0; head < num_heads; ++head) {
        double* row = out.data() + size_t(head) * head_dim;
        double sum = 0, top = -std::numeric_limits<double>::infinity();
        for (int t = first; t < last; ++t) {
            double& score = scores[t - first] = 0;
            for (int d = 0; d < head_dim; ++d)
                score += double(store.q[head * head_dim + d]) * store.keys[t * head_dim + d];
            score /= std::sqrt(head_dim);
            top = std::max(top, score);
        }
        for (int t = first; t < last; ++t) {
            const double weight = std::exp(scores[t - first] - top);
            sum += weight;
            for (int d = 0; d < head_dim; ++d) row[d] += weight * store.values[t * head_dim + d];
        }
        for (int d = 0; d < head_dim; ++d) row[d] /= sum;
    }
    return out;
}

/// A copy of bytes that ends where reading on is a segmentation fault, for builds without an address sanitizer.
class GuardedCopy {
public:
    explicit GuardedCopy(const std::vector<std::byte>& bytes) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), usable = (bytes.size() + page - 1) / page * page;
        size_ = usable + page;
        map_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(map_ != MAP_FAILED);
        CHECK(mprotect(static_cast<std::byte*>(map_) + usable, page, PROT_NONE) == 0);
        data_ = static_cast<std::byte*>(map_) + usable - bytes.size();
        std::memcpy(data_, bytes.data(), bytes.size());
    }
    ~GuardedCopy() { munmap(map_, size_); }
    GuardedCopy(const GuardedCopy&) = delete;

    std::byte* data() const { return data_; }

private:
    void* map_;
    size_t size_;
    std::byte* data_;
};

/// Every group from 1 to 9 and several token ranges, in one store.
void check_groups_and_lengths(Store& store) {
    const int head_dim = store.kv.geometry.head_dim;
    for (const auto& [first, last] : {std::pair{0, 1}, {2, 17}, {1, 64}, {3, 134}}) {
        const std::vector<double> expected = reference(store, 9, first, last);
        for (store.group = 1; store.group <= 9; ++store.group) {
            const std::vector<float> out = store.attend_head(0, first, last, last - first);
            for (int i = 0; i < store.group * head_dim; ++i) CHECK_NEAR(out[i], expected[i], tolerance(store));
        }
    }
}

}  // namespace

TEST_OF_ONE_THREAD(attention_is_the_reference_for_every_type_page_and_head_size) {
    on_every_path([] {
        for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::i8})
            for (int page_size : {1, 3, 16, 40})
                for (int head_dim : {64, 72, 112, 256})
                    check_all_heads(Store({1, 2, head_dim, page_size, dtype}, 3, 83), 0, 83, 83);
    });
}

TEST(every_group_size_reads_its_own_queries) {
    on_every_path([] {
        for (int group : {1, 2, 4, 5, 6, 7, 8, 9, 16})
            check_all_heads(Store({2, 1, 80, 16, DType::bf16}, group, 70), 0, 70, 70);
    });
}

TEST_OF_ONE_THREAD(the_best_path_is_the_reference_for_every_combination_of_sizes) {
    std::printf("best path: %s\n", kernels().name);
    for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::i8})
        for (int page_size : {1, 5, 16, 64, 80})
            for (int head_dim : {64, 72, 80, 96, 128, 256}) {
                Store store({1, 1, head_dim, page_size, dtype}, 9, 134);
                check_groups_and_lengths(store);
            }
}

TEST_OF_ONE_THREAD(no_path_reads_past_the_end_of_a_store) {
    on_every_path([] {
        for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::i8})
            for (int page_size : {1, 3, 16, 64})
                for (int head_dim : {64, 72, 112, 128})
                    for (int group : {1, 2, 3, 6}) {
                        Store store({1, 1, head_dim, page_size, dtype}, group, 131);
                        const GuardedCopy copy(store.memory);
                        store.kv.base = copy.data();
                        check_all_heads(store, 0, 131, 131);
                    }
    });
}

TEST(pieces_merge_to_the_whole) {
    on_every_path([] {
        for (int step : {1, 7, 64, 65}) check_all_heads(Store({1, 1, 64, 5, DType::f16}, 2, 131), 2, 131, step);
    });
}

TEST(an_empty_state_is_neutral) {
    const StateShape shape{2, 1, 64};
    std::vector<float> states(shape.floats()), empty(shape.floats()), out(128, 1.0f), lse(2);
    clear_states(empty.data(), shape);
    clear_states(states.data(), shape);
    merge_states(states.data(), empty.data(), shape);
    finish_states(states.data(), shape, out.data(), lse.data());
    for (int head : {0, 1}) CHECK(out[head * 64] == 0 && lse[head] == -std::numeric_limits<float>::infinity());
}

TEST(half_precision_conversions_round_trip) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const uint16_t half = static_cast<uint16_t>(bits);
        const float as_f16 = f16_to_f32(half), as_bf16 = bf16_to_f32(half);
        if (!std::isnan(as_f16)) CHECK(f32_to_f16(as_f16) == half);
        else CHECK(std::isnan(f16_to_f32(f32_to_f16(as_f16))));
        if (!std::isnan(as_bf16)) CHECK(f32_to_bf16(as_bf16) == half);
        else CHECK(std::isnan(bf16_to_f32(f32_to_bf16(as_bf16))));
    }
}

TEST(every_path_widens_alike) {
    std::vector<uint16_t> narrow(0x10000);
    for (size_t i = 0; i < narrow.size(); ++i) narrow[i] = static_cast<uint16_t>(i);
    on_every_path([&] {
        for (DType dtype : {DType::bf16, DType::f16})
            for (size_t count : {narrow.size(), narrow.size() - 1, size_t{13}, size_t{1}}) {
                std::vector<float> wide(count);  // the last ones, whose tail differs with the count
                const uint16_t* from = narrow.data() + narrow.size() - count;
                kernels().to_f32(from, dtype, wide.data(), count);
                for (size_t i = 0; i < count; ++i) {
                    const float expected = dtype == DType::f16 ? f16_to_f32(from[i]) : bf16_to_f32(from[i]);
                    CHECK(std::isnan(expected) ? std::isnan(wide[i]) : wide[i] == expected);
                }
            }
    });
}

TEST(exp_keeps_its_stated_bound_on_every_path) {
    std::vector<float> x = {0.0f, -0.0f, -87.0f}, y;
    for (float value = -1e-8f; value > -87.0f; value *= 1.001f) x.push_back(value);
    for (float value : {-87.01f, -1e4f, -std::numeric_limits<float>::infinity()}) x.push_back(value);
    on_every_path([&] {
        y.assign(x.size(), NAN);
        kernels().exp_nonpositive(x.data(), y.data(), x.size());
        for (size_t i = 0; i < x.size() - 3; ++i) CHECK_NEAR(y[i] / std::exp(double(x[i])), 1.0, 1e-7);
        for (size_t i = x.size() - 3; i < x.size(); ++i) CHECK(y[i] == 0.0f);
    });
}

TEST(every_path_narrows_alike) {
    std::mt19937 random(3);
    std::vector<float> wide(4099);
    for (float& value : wide) value = std::bit_cast<float>(uint32_t(random()));
    for (DType dtype : {DType::bf16, DType::f16}) {
        std::vector<uint16_t> expected(wide.size()), got(wide.size());
        for (size_t i = 0; i < wide.size(); ++i)
            expected[i] = dtype == DType::f16 ? f32_to_f16(wide[i]) : f32_to_bf16(wide[i]);
        on_every_path([&] {
            kernels().from_f32(wide.data(), got.data(), dtype, wide.size());
            for (size_t i = 0; i < wide.size(); ++i) CHECK(got[i] == expected[i] || std::isnan(wide[i]));
        });
    }
}

TEST(a_streaming_read_reads_every_word_once) {
    std::vector<uint64_t> words(3 * (size_t{1} << 17) + 5);  // several blocks and a tail
    std::mt19937_64 random(1);
    uint64_t expected = 0;
    for (uint64_t& word : words) expected += word = random();
    ThreadTeam one(1), three(3);
    on_every_path([&] {
        for (ThreadTeam* team : {&one, &three})
            CHECK(stream_read(*team, reinterpret_cast<std::byte*>(words.data()), words.size() * 8) == expected);
    });
}

TEST(a_team_agrees_with_its_caller_alone) {
    const Store store({1, 2, 64, 16, DType::f32}, 2, 1500);
    const std::vector<int32_t> lens = {1500, 3, 0, 900};
    std::vector<int32_t> tables;
    for (size_t i = 0; i < lens.size(); ++i) tables.insert(tables.end(), store.table.begin(), store.table.end());
    std::vector<float> q, alone(lens.size() * store.q.size()), shared(alone.size());
    for (size_t i = 0; i < lens.size(); ++i) q.insert(q.end(), store.q.begin(), store.q.end());
    PagedAttentionArgs args{&store.kv,        0,           int(lens.size()), 4, q.data(), tables.data(),
                            store.num_pages, lens.data(), alone.data(),     0.125f};
    check(args);
    ThreadTeam one(1), three(3);
    paged_attention(one, args);
    args.out = shared.data();
    for (int repeat = 0; repeat < 20; ++repeat) {
        std::fill(shared.begin(), shared.end(), NAN);
        paged_attention(three, args);
        for (size_t i = 0; i < alone.size(); ++i) CHECK_NEAR(shared[i], alone[i], 2e-6);
    }
}

TEST(repack_rounds_to_int8_as_writing_does_and_nothing_comes_back) {
    const Store store({2, 2, 72, 9, DType::f32}, 1, 9);
    const KvGeometry small{2, 2, 72, 4, DType::i8};
    std::vector<std::byte> landed(3 * small.page_bytes()), written(landed.size());
    for (int t = 0; t < 9; ++t)
        repack(store.kv.geometry, store.kv.page(0), t, small, landed.data() + (t + 3) / 4 * small.page_bytes(),
               (t + 3) % 4, 1);
    std::vector<int32_t> pages, offsets;
    for (int t = 0; t < 9; ++t) {
        pages.push_back((t + 3) / 4);
        offsets.push_back((t + 3) % 4);
    }
    const PagedKv kv{small, written.data(), 3};
    for (int layer = 0; layer < 2; ++layer)
        write_rows(kv, layer, 9, {store.keys.data(), 144, store.values.data(), 144}, pages.data(), offsets.data());
    CHECK(landed == written);
    for (DType dtype : {DType::f32, DType::i8}) {
        bool is_refused = false;
        try {
            std::vector<std::byte> back(KvGeometry{2, 2, 72, 4, dtype}.page_bytes());
            repack(small, landed.data(), 0, {2, 2, 72, 4, dtype}, back.data(), 0, 1);
        } catch (const std::logic_error&) {
            is_refused = true;
        }
        CHECK(is_refused);
    }
}

TEST(repack_moves_tokens_between_page_sizes_and_back) {
    const KvGeometry big{2, 2, 64, 9, DType::bf16}, small{2, 2, 64, 4, DType::bf16};
    std::vector<std::byte> from(big.page_bytes()), middle(3 * small.page_bytes()), back(big.page_bytes());
    std::mt19937 random(1);
    for (std::byte& value : from) value = std::byte(random());
    for (int t = 0; t < 9; ++t)
        repack(big, from.data(), t, small, middle.data() + (t + 3) / 4 * small.page_bytes(), (t + 3) % 4, 1);
    repack(small, middle.data(), 3, big, back.data(), 0, 1);
    repack(small, middle.data() + small.page_bytes(), 0, big, back.data(), 1, 4);
    repack(small, middle.data() + 2 * small.page_bytes(), 0, big, back.data(), 5, 4);
    CHECK(from == back);
}
