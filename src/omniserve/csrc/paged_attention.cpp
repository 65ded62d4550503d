#include "paged_attention.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "errors.h"

namespace omniserve {
namespace {

constexpr int64_t kMinPieceBytes = 64 * 1024;  // of KV: below this the merge costs more than it brings
constexpr int kPiecesPerThread = 4;           // enough to even out pieces of different length

/// One sequence cut into token ranges: pieces [first_piece, first_piece + num_pieces) of equal length.
struct Share {
    int64_t piece_tokens;
    int32_t first_piece, num_pieces;
};

class Run {
public:
    Run(ThreadTeam& team, const PagedAttentionArgs& args)
        : team_(team), args_(args),
          shape_{args.kv->geometry.num_kv_heads, args.num_heads / args.kv->geometry.num_kv_heads,
                 args.kv->geometry.head_dim} {
        divide();
        if (num_pieces_ > int64_t(shares_.size()))
            states_ = std::make_unique_for_overwrite<float[]>(num_pieces_ * shape_.floats());
        left_ = std::make_unique<std::atomic<int32_t>[]>(shares_.size());
        for (size_t i = 0; i < shares_.size(); ++i) left_[i].store(shares_[i].num_pieces, std::memory_order_relaxed);
    }

    void work(int member) {
        float* scratch = team_.scratch(
            member, shape_.floats() + scratch_floats(shape_.num_heads, shape_.group, shape_.head_dim));
        while (true) {
            const int64_t piece = next_.fetch_add(1, std::memory_order_relaxed);
            if (piece >= num_pieces_) return;
            const auto after = std::upper_bound(shares_.begin(), shares_.end(), piece,
                                                [](int64_t p, const Share& s) { return p < s.first_piece; });
            do_piece(size_t(after - shares_.begin()) - 1, piece, scratch);
        }
    }

private:
    void divide() {
        const KvGeometry& g = args_.kv->geometry;
        const int threads = team_.num_threads();
        const int64_t token_bytes = int64_t(g.token_bytes());
        int64_t tokens = 0;
        for (int i = 0; i < args_.num_sequences; ++i) tokens += args_.context_lens[i] - first_token(i);
        const int64_t target = threads == 1 ? INT64_MAX
                                            : std::max({kMinPieceBytes / token_bytes, int64_t{1},
                                                        tokens / (threads * kPiecesPerThread)});
        shares_.reserve(args_.num_sequences);
        for (int i = 0; i < args_.num_sequences; ++i) {
            const int64_t length = args_.context_lens[i] - first_token(i);
            const int64_t pieces = std::max<int64_t>(1, length / target + (length % target > target / 2));
            shares_.push_back(
                {(length + pieces - 1) / pieces, static_cast<int32_t>(num_pieces_), static_cast<int32_t>(pieces)});
            num_pieces_ += pieces;
        }
    }

    int64_t first_token(size_t sequence) const {
        const int64_t length = args_.context_lens[sequence];
        return args_.window > 0 && length > args_.window ? length - args_.window : 0;
    }

    float* piece_states(int64_t piece) { return states_.get() + piece * shape_.floats(); }

    void do_piece(size_t sequence, int64_t piece, float* scratch) {
        const Share& share = shares_[sequence];
        const int64_t length = args_.context_lens[sequence];
        const int64_t first =
            std::min(length, first_token(sequence) + (piece - share.first_piece) * share.piece_tokens);
        const size_t row = sequence * args_.num_heads * shape_.head_dim;
        float* states = share.num_pieces == 1 ? scratch : piece_states(piece);
        attend({.kv = args_.kv,
                .page_table = args_.page_tables + ptrdiff_t(sequence) * args_.table_stride,
                .layer = args_.layer,
                .first_head = 0,
                .num_heads = shape_.num_heads,
                .first = first,
                .last = std::min(length, first + share.piece_tokens),
                .q = args_.q + row,
                .group = shape_.group,
                .scale = args_.scale,
                .state = states,
                .scratch = scratch + shape_.floats()});
        if (share.num_pieces > 1) {
            if (left_[sequence].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
            states = piece_states(share.first_piece);
            for (int i = 1; i < share.num_pieces; ++i)
                merge_states(states, piece_states(share.first_piece + i), shape_);
        }
        finish_states(states, shape_, args_.out + row);
    }

    ThreadTeam& team_;
    const PagedAttentionArgs& args_;
    const StateShape shape_;
    std::vector<Share> shares_;  // by sequence
    int64_t num_pieces_ = 0;
    std::unique_ptr<float[]> states_;               // only when some share has several pieces
    std::unique_ptr<std::atomic<int32_t>[]> left_;  // pieces of a share not yet done
    std::atomic<int64_t> next_{0};
};

}  // namespace

void check(const PagedAttentionArgs& args) {
    const KvGeometry& g = args.kv->geometry;
    require_index("layer", args.layer, g.num_layers);
    if (args.num_sequences < 0) refuse("n must not be negative");
    require_range("window", args.window, 0, INT32_MAX);
    require_groups(g, args.num_heads);
    for (int i = 0; i < args.num_sequences; ++i)
        require_pages(*args.kv, "context_lens", i, args.context_lens[i], args.page_tables + i * args.table_stride,
                      args.table_stride);
}

void paged_attention(ThreadTeam& team, const PagedAttentionArgs& args) {
    if (args.num_sequences == 0) return;
    Run run(team, args);
    team.run([&run](int member) { run.work(member); });
}

}  // namespace omniserve
