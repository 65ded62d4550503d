// Attention of prompts against that of each of their tokens alone, in stores of exactly the bytes it may touch.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "prompt_attention.h"
#include "tolerance.h"

using namespace omniserve;

namespace {

constexpr int kGroup = 3, kTokens = 150;

struct Prompt {
    Prompt(DType dtype, int head_dim, int page_size)
        : geometry{1, 2, head_dim, page_size, dtype}, num_pages((kTokens + page_size - 1) / page_size),
          memory(num_pages * geometry.page_bytes(), std::byte{0xff}), kv{geometry, memory.data(), num_pages} {
        std::mt19937 random(head_dim + page_size);
        std::normal_distribution<float> normal;
        std::vector<float> k(size_t(kTokens) * 2 * head_dim), v(k.size());
        for (auto* values : {&k, &v})
            for (float& value : *values) value = normal(random);
        q.resize(size_t(kTokens) * width());
        for (float& value : q) value = bf16_to_f32(f32_to_bf16(normal(random)));
        std::vector<int32_t> pages, offsets;
        for (int i = 0; i < num_pages; ++i) table.push_back((i + 1) % num_pages);
        for (int t = 0; t < kTokens; ++t) {
            pages.push_back(table[t / page_size]);
            offsets.push_back(t % page_size);
        }
        write_rows(kv, 0, kTokens, {k.data(), 2 * head_dim, v.data(), 2 * head_dim}, pages.data(), offsets.data());
    }

    int width() const { return 2 * kGroup * geometry.head_dim; }

    /// Attention of one token's queries over tokens [first, position], as decoding does it.
    std::vector<float> alone(int position, int first) const {
        const StateShape shape{2, kGroup, geometry.head_dim};
        std::vector<float> states(shape.floats()), scratch(scratch_floats(2, kGroup, shape.head_dim)), out(width());
        attend({.kv = &kv,
                .page_table = table.data(),
                .num_heads = 2,
                .first = first,
                .last = position + 1,
                .q = q.data() + size_t(position) * width(),
                .group = kGroup,
                .scale = 1 / std::sqrt(float(shape.head_dim)),
                .state = states.data(),
                .scratch = scratch.data()});
        finish_states(states.data(), shape, out.data());
        return out;
    }

    /// Tokens [start, start + count) as one chunk, each beside what it gives alone.
    void check_chunk(ThreadTeam& team, int start, int count, int window) const {
        std::vector<float> out(size_t(count) * width(), NAN);
        const PromptChunk chunk{0, count, start};
        const PromptAttentionArgs args{.kv = &kv,
                                       .num_chunks = 1,
                                       .num_heads = 2 * kGroup,
                                       .chunks = &chunk,
                                       .page_tables = table.data(),
                                       .table_stride = ptrdiff_t(table.size()),
                                       .q = q.data() + size_t(start) * width(),
                                       .q_stride = width(),
                                       .out = out.data(),
                                       .out_stride = width(),
                                       .scale = 1 / std::sqrt(float(geometry.head_dim)),
                                       .window = window};
        check(args);
        prompt_attention(team, args);
        for (int i = 0; i < count; ++i) {
            const int position = start + i, first = window ? std::max(0, position + 1 - window) : 0;
            const std::vector<float> expected = alone(position, first);
            for (int d = 0; d < width(); ++d)
                CHECK_NEAR(out[size_t(i) * width() + d], expected[d], 2 * testing::attention_tolerance(geometry, 9));
        }
    }

    KvGeometry geometry;
    int num_pages;
    std::vector<std::byte> memory;
    PagedKv kv;
    std::vector<float> q;  // [kTokens][width]
    std::vector<int32_t> table;
};

}  // namespace

TEST(a_prompt_is_its_tokens_on_every_path) {
    ThreadTeam three(3);
    for (const char* path : {"scalar", "avx2", "avx512", "avx512_bf16", "neon"}) {
        try {
            set_simd(path);
        } catch (const std::invalid_argument&) {
            continue;  // this CPU has it not; test_kernel.cpp says so
        }
        for (DType dtype : {DType::f32, DType::bf16, DType::f16})
            for (const auto& [head_dim, page_size] : {std::pair{64, 16}, {72, 5}, {128, 64}}) {
                const Prompt prompt(dtype, head_dim, page_size);
                prompt.check_chunk(three, 0, kTokens, 0);
                prompt.check_chunk(three, 61, 70, 0);
                prompt.check_chunk(three, 30, 100, 40);
                prompt.check_chunk(three, 149, 1, 1);
            }
    }
    set_simd("auto");
}

TEST(threads_share_a_prompt_without_meeting) {
    ThreadTeam four(4);
    const Prompt prompt(DType::f32, 64, 16);
    for (int i = 0; i < 20; ++i) prompt.check_chunk(four, 0, kTokens, i % 2 ? 50 : 0);
}
