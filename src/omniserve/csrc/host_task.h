// Serving one task: append its key and value, attend, write the result, publish.
//
// A long context is split into pieces (KV head x token range) that other workers help with; whoever finishes the last
// piece merges and publishes. Nobody waits for anybody.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention.h"
#include "gate.h"
#include "host_queue.h"
#include "segment.h"

namespace omniserve {

/// What one worker brings along.
struct WorkerContext {
    WorkerStats* stats = nullptr;
    std::vector<float> scratch;
    Seat seat = {};
};

class TaskRunner {
public:
    /// eventfd: written when something completes while the engine waits; -1 for none.
    TaskRunner(const Segment& segment, const PagedKv& arena, HostQueue& queue, int eventfd);

    /// Splits tasks from now on so that `num_workers` can share them. Not while tasks run.
    void set_num_workers(int num_workers);

    /// Serves the task, or opens it for others and serves a part. A task of an old epoch is acknowledged only.
    void serve(const Task& task, WorkerContext& worker);
    /// Takes pieces of a task some other worker opened. False when there is none.
    bool help(WorkerContext& worker);
    bool has_open_job() const { return num_open_.load(std::memory_order_relaxed) > 0; }

    /// Carries out a frame's command: repacks tokens between the frame and host pages.
    void copy(int frame, WorkerContext& worker);

private:
    struct SplitJob {
        Gate gate;
        Task task;
        uint64_t began_ns = 0;
        int64_t tokens = 0;
        int64_t piece_tokens = 0;
        int32_t num_pieces = 0;
        std::vector<float> states;  // [num_pieces][num_kv_heads] states
        std::atomic<int32_t> next{0};
        std::atomic<int32_t> left{0};
    };

    bool try_split(const Task& task, int64_t tokens, uint64_t began_ns, WorkerContext& worker);
    void work_on(SplitJob& job, WorkerContext& worker);
    void do_piece(SplitJob& job, int piece, WorkerContext& worker);
    void finish_split(SplitJob& job, WorkerContext& worker);
    void attend_range(const Task& task, int64_t first, int64_t last, float* state, WorkerContext& worker);
    void append(const Task& task, int position);
    void complete(const Task& task, int64_t tokens, uint64_t began_ns, WorkerContext& worker);
    void publish(const Task& task);
    void wake_engine();

    Segment segment_;
    PagedKv arena_;
    HostQueue& queue_;
    int eventfd_;
    int num_workers_ = 0;
    std::unique_ptr<SplitJob[]> jobs_;
    int num_jobs_ = 0;
    std::atomic<int32_t> num_open_{0};
};

}  // namespace omniserve
