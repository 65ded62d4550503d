#include "prompt_attention.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "errors.h"

namespace omniserve {
namespace {

constexpr int kBlockQueries = 96;    // of one KV head: their sums and scores stay in the second-level cache
constexpr int kMinBlockQueries = 8;  // below that a block reads keys and values for too little work
constexpr int kPiecesPerThread = 4;  // enough to even out pieces of different length

/// Rows [first, first + count) of a chunk.
struct Block {
    int32_t chunk, first, count;
    int64_t last_token;  // one behind the last that it sees
};

class Run {
public:
    Run(ThreadTeam& team, const PromptAttentionArgs& args)
        : team_(team), args_(args), kv_heads_(args.kv->geometry.num_kv_heads), group_(args.num_heads / kv_heads_),
          head_dim_(args.kv->geometry.head_dim) {
        divide();
        for (int member = 0; member < team.num_threads(); ++member) scratch(member);  // may throw: not later
    }

    void work(int member) {
        float* q = scratch(member);
        while (true) {
            const int64_t piece = next_.fetch_add(1, std::memory_order_relaxed);
            if (piece >= int64_t(blocks_.size()) * kv_heads_) return;
            do_piece(blocks_[piece / kv_heads_], int(piece % kv_heads_), q, q + query_floats(block_rows_));
        }
    }

private:
    size_t query_floats(int rows) const { return size_t(rows) * group_ * head_dim_; }

    /// Queries of a block, their states and what `attend` needs.
    float* scratch(int member) const {
        const int queries = block_rows_ * group_;
        return team_.scratch(member, query_floats(block_rows_) + state_floats(queries, head_dim_) +
                                         scratch_floats(1, queries, head_dim_));
    }

    void divide() {
        int64_t rows = 0;
        for (int i = 0; i < args_.num_chunks; ++i) rows += args_.chunks[i].num_rows;
        const int64_t enough = int64_t(team_.num_threads()) * kPiecesPerThread;
        const int64_t even = team_.num_threads() == 1 ? rows : rows * kv_heads_ / enough;
        const int fewest = std::max(1, kMinBlockQueries / group_), most = std::max(fewest, kBlockQueries / group_);
        block_rows_ = int(std::clamp<int64_t>(even, fewest, most));
        for (int32_t i = 0; i < args_.num_chunks; ++i)
            for (int32_t first = 0; first < args_.chunks[i].num_rows; first += block_rows_) {
                const int32_t count = std::min(block_rows_, args_.chunks[i].num_rows - first);
                blocks_.push_back({i, first, count, args_.chunks[i].start + first + count});
            }
        std::sort(blocks_.begin(), blocks_.end(),  // those with most to read first: the others even out
                  [](const Block& a, const Block& b) { return a.last_token > b.last_token; });
    }

    /// Bytes from the beginning of rows to the queries (or results) of one of them and a KV head.
    ptrdiff_t offset_of(ptrdiff_t stride, int row, int kv_head) const {
        return (row * stride + ptrdiff_t(kv_head) * group_ * head_dim_) * ptrdiff_t(item_size(args_.dtype));
    }

    void do_piece(const Block& block, int head, float* q, float* states) {
        const PromptChunk& chunk = args_.chunks[block.chunk];
        const int row = chunk.first_row + block.first, queries = block.count * group_;
        const size_t row_floats = query_floats(1);
        for (int i = 0; i < block.count; ++i)
            kernels().to_f32(static_cast<const std::byte*>(args_.q) + offset_of(args_.q_stride, row + i, head),
                             args_.dtype, q + i * row_floats, row_floats);
        const int64_t first_position = chunk.start + block.first;
        attend({.kv = args_.kv,
                .page_table = args_.page_tables + ptrdiff_t(block.chunk) * args_.table_stride,
                .layer = args_.layer,
                .first_head = head,
                .num_heads = 1,
                .first = args_.window > 0 ? std::max<int64_t>(0, first_position + 1 - args_.window) : 0,
                .last = block.last_token,
                .q = q,
                .group = queries,
                .scale = args_.scale,
                .state = states,
                .scratch = states + state_floats(queries, head_dim_),
                .queries_per_token = group_,
                .first_position = first_position,
                .window = args_.window});
        finish_states(states, {1, queries, head_dim_}, q);
        for (int i = 0; i < block.count; ++i)
            kernels().from_f32(q + i * row_floats,
                               static_cast<std::byte*>(args_.out) + offset_of(args_.out_stride, row + i, head),
                               args_.dtype, row_floats);
    }

    ThreadTeam& team_;
    const PromptAttentionArgs& args_;
    const int kv_heads_, group_, head_dim_;
    int32_t block_rows_ = 1;
    std::vector<Block> blocks_;
    std::atomic<int64_t> next_{0};
};

}  // namespace

void check(const PromptAttentionArgs& args) {
    const KvGeometry& g = args.kv->geometry;
    require_index("layer", args.layer, g.num_layers);
    require_range("window", args.window, 0, INT32_MAX);
    require_groups(g, args.num_heads);
    for (int i = 0; i < args.num_chunks; ++i) {
        const PromptChunk& chunk = args.chunks[i];
        require_range("chunks: start", chunk.start, INT32_MIN, INT32_MAX);
        if (chunk.first_row < 0 || chunk.num_rows < 1 || chunk.start < 0)
            refuse("chunks[" + std::to_string(i) + "] needs at least one row, and must not start before 0");
        require_pages(*args.kv, "chunks", i, chunk.start + chunk.num_rows, args.page_tables + i * args.table_stride,
                      args.table_stride);
    }
}

void prompt_attention(ThreadTeam& team, const PromptAttentionArgs& args) {
    if (args.num_chunks == 0) return;
    Run run(team, args);
    team.run([&run](int member) { run.work(member); });
}

}  // namespace omniserve
