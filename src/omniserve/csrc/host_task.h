// Serving rows: append key and value, attend, write the result, publish.
//
// A long context, or rows that share one, become a job cut into pieces that other workers help with; whoever finishes
// the last piece merges and publishes. Nobody waits for anybody.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention.h"
#include "host_job.h"
#include "host_queue.h"
#include "segment.h"

namespace omniserve {

/// What one worker brings along.
struct WorkerContext {
    WorkerStats* stats = nullptr;
    std::vector<float> scratch = {};
    Seat seat = {};
    std::vector<Task> tasks = {};  // being begun
    std::vector<Row> rows = {};
};

class TaskRunner {
public:
    /// eventfd: written when something completes while the engine waits; -1 for none.
    TaskRunner(const Segment& segment, const PagedKv& arena, HostQueue& queue, int eventfd);

    /// Opens jobs from now on that `num_workers` can share. Not while tasks run.
    void set_num_workers(int num_workers);

    /// Serves the task, with those waiting at its layer that share its prefix, or opens them for others and serves a
    /// part. A task of an old epoch is acknowledged only.
    void serve(const Task& task, WorkerContext& worker);
    /// Takes pieces of a job some other worker opened. False when there is none.
    bool help(WorkerContext& worker);
    bool has_open_job() const { return num_open_.load(std::memory_order_relaxed) > 0; }

    /// Carries out a frame's command: repacks tokens between the frame and host pages.
    void copy(int frame, WorkerContext& worker);

private:
    /// Appends the token of a task and adds it to the rows; one of an old epoch is acknowledged and left out.
    void begin(const Task& task, WorkerContext& worker);
    void append(const Task& task, int position);
    Job* claim_job();
    bool is_worth_a_job(const std::vector<Row>& rows) const;
    void open(Job& job, WorkerContext& worker);
    void serve_alone(const Row& row, uint64_t began_ns, WorkerContext& worker);
    void work_on(Job& job, WorkerContext& worker);
    void finish(Job& job, WorkerContext& worker, float* scratch);
    void publish(const Task& task);
    void wake_engine();

    Segment segment_;
    PagedKv arena_;
    HostQueue& queue_;
    int eventfd_;
    int num_workers_ = 0;
    std::unique_ptr<Job[]> jobs_;
    int num_jobs_ = 0;
    std::atomic<int32_t> num_open_{0};
};

}  // namespace omniserve
