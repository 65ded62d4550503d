#include "host_task.h"

#include <unistd.h>

#include <algorithm>

#include "park.h"
#include "slot_rows.h"

namespace omniserve {
namespace {

// A row below this many KV bytes takes some 20 microseconds on one core: less than waking a parked helper.
constexpr int64_t kSplitBytes = 512 * 1024;

void add(std::atomic<uint64_t>& counter, uint64_t amount) {
    // One writer per counter: no read-modify-write needed.
    counter.store(counter.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed);
}

float* scratch_of(WorkerContext& worker, size_t floats) {
    if (worker.scratch.size() < floats) worker.scratch.resize(floats);
    return worker.scratch.data();
}

}  // namespace

TaskRunner::TaskRunner(const Segment& segment, const PagedKv& arena, HostQueue& queue, int eventfd)
    : segment_(segment), arena_(arena), queue_(queue), eventfd_(eventfd) {}

void TaskRunner::set_num_workers(int num_workers) {
    num_workers_ = num_workers;
    num_jobs_ = 2 * num_workers;  // one may still be left by its last helper
    jobs_ = std::make_unique<Job[]>(num_jobs_);
}

void TaskRunner::serve(const Task& task, WorkerContext& worker) {
    const uint64_t began_ns = now_ns();
    Job* job = claim_job();
    worker.tasks.assign(1, task);
    if (job) queue_.claim_sharers(task, kMaxJobRows - 1, worker.tasks);
    worker.rows.clear();
    for (const Task& each : worker.tasks) begin(each, worker);  // before any piece may be read
    if (job && is_worth_a_job(worker.rows)) {
        job->began_ns = began_ns;
        return open(*job, worker);
    }
    if (job) job->gate.leave();
    for (const Row& row : worker.rows) serve_alone(row, began_ns, worker);
}

void TaskRunner::begin(const Task& task, WorkerContext& worker) {
    const SlotOrder& order = segment_.order(task.slot);
    if (ticket_epoch(task.ticket) != order.epoch.load(std::memory_order_acquire)) {
        add(worker.stats->stale_tasks, 1);
        return publish(task);
    }
    if (queue_.note_served(task)) add(worker.stats->out_of_order, 1);
    const int position = order.position.load(std::memory_order_relaxed);
    append(task, position);
    worker.rows.push_back({task, position + 1, segment_.geometry().first_token(task.layer, position + 1)});
}

void TaskRunner::append(const Task& task, int position) {
    const int32_t page = segment_.page_table(task.slot)[position / arena_.geometry.page_size];
    const int32_t offset = position % arena_.geometry.page_size;
    prefetch_token(arena_, task.layer, page, offset);
    write_rows(arena_, task.layer, 1,
               {segment_.k(task.slot), 0, segment_.v(task.slot), 0, segment_.geometry().act_dtype}, &page, &offset);
}

Job* TaskRunner::claim_job() {
    Job* end = jobs_.get() + num_jobs_;
    Job* job = std::find_if(jobs_.get(), end, [](Job& each) { return each.gate.is_free() && each.gate.try_claim(); });
    return job == end ? nullptr : job;
}

bool TaskRunner::is_worth_a_job(const std::vector<Row>& rows) const {
    if (rows.size() != 1) return !rows.empty();
    return num_workers_ > 1 && rows[0].attended() * int64_t(arena_.geometry.token_bytes()) >= kSplitBytes;
}

void TaskRunner::open(Job& job, WorkerContext& worker) {
    job.fill(segment_, worker.rows, num_workers_);
    if (job.num_sharers() > 0) add(worker.stats->shared_rows, job.num_sharers());
    const int partition = job.rows()[0].task.partition;
    num_open_.fetch_add(1, std::memory_order_relaxed);
    const int helpers = std::min(job.num_pieces(), num_workers_) - 1;
    job.gate.open();
    if (helpers > 0) segment_.notify_workers(partition, helpers);
    work_on(job, worker);
}

void TaskRunner::serve_alone(const Row& row, uint64_t began_ns, WorkerContext& worker) {
    const LaneGeometry& g = segment_.geometry();
    const StateShape shape{g.num_kv_heads, g.group(), g.head_dim};
    const size_t states = shape.floats();
    float* scratch = scratch_of(
        worker, states + g.q_elements() + scratch_floats(shape.num_heads, shape.group, shape.head_dim));
    float* row_f32 = scratch + states;
    attend({.kv = &arena_,
            .page_table = segment_.page_table(row.task.slot),
            .layer = row.task.layer,
            .first_head = 0,
            .num_heads = g.num_kv_heads,
            .first = row.first,
            .last = row.tokens,
            .q = queries_of_slot(segment_, row.task.slot, row_f32),
            .group = shape.group,
            .scale = g.score_scale(),
            .state = scratch,
            .scratch = row_f32 + g.q_elements()});
    store_result(segment_, row.task.slot, scratch, row_f32);
    add(worker.stats->kv_bytes_read, uint64_t(row.attended() * int64_t(arena_.geometry.token_bytes())));
    queue_.observe_service(now_ns() - began_ns, row.attended());
    add(worker.stats->tasks, 1);
    publish(row.task);
}

bool TaskRunner::help(WorkerContext& worker) {
    if (!has_open_job()) return false;
    for (int i = 0; i < num_jobs_; ++i) {
        if (!jobs_[i].gate.try_enter()) continue;
        work_on(jobs_[i], worker);
        return true;
    }
    return false;
}

void TaskRunner::work_on(Job& job, WorkerContext& worker) {
    float* scratch = scratch_of(worker, job.scratch_floats(segment_.geometry()));
    while (true) {
        const int piece = job.next.fetch_add(1, std::memory_order_relaxed);
        if (piece >= job.num_pieces()) break;
        if (piece == job.num_pieces() - 1) {  // the last one is handed out once: nobody need come in any more
            job.gate.close();
            num_open_.fetch_sub(1, std::memory_order_relaxed);
        }
        add(worker.stats->kv_bytes_read, uint64_t(job.attend_piece(segment_, arena_, piece, scratch)));
        add(worker.stats->pieces, 1);
        if (job.left.fetch_sub(1, std::memory_order_acq_rel) == 1) finish(job, worker, scratch);
    }
    job.gate.leave();
}

void TaskRunner::finish(Job& job, WorkerContext& worker, float* scratch) {
    job.finish(segment_, scratch);
    queue_.observe_service(now_ns() - job.began_ns, job.distinct_tokens());
    add(worker.stats->tasks, job.rows().size());
    for (const Row& row : job.rows()) publish(row.task);
}

void TaskRunner::publish(const Task& task) {
    // seq_cst against wake_engine's load; as a store-release it orders the result before the word.
    segment_.answer(task.slot).done.store(task.ticket, std::memory_order_seq_cst);
    wake_engine();
}

void TaskRunner::copy(int frame, WorkerContext& worker) {
    FrameCommand& command = segment_.command(frame);
    const KvGeometry device = segment_.geometry().device_kv();
    const KvGeometry& host = arena_.geometry;
    int host_offset = command.host_offset;
    const int32_t* host_page = command.host_pages();
    for (int moved = 0; moved < command.num_tokens; ++host_page, host_offset = 0) {
        const int count = std::min(command.num_tokens - moved, host.page_size - host_offset);
        const int token = command.token_offset + moved;
        if (command.kind == CopyKind::land)
            repack(device, segment_.frame(frame), token, host, arena_.page(*host_page), host_offset, count);
        else
            repack(host, arena_.page(*host_page), host_offset, device, segment_.frame(frame), token, count);
        moved += count;
    }
    add(worker.stats->copies, 1);
    add(worker.stats->copied_bytes, uint64_t(command.num_tokens) * host.token_bytes() * host.num_layers);
    command.state.store(uint32_t(FrameState::done), std::memory_order_seq_cst);
    wake_engine();
}

void TaskRunner::wake_engine() {
    std::atomic<uint32_t>& waiting = segment_.header().engine_waiting;
    if (waiting.load(std::memory_order_seq_cst) == 0 || waiting.exchange(0, std::memory_order_seq_cst) == 0) return;
    const uint64_t one = 1;
    if (eventfd_ >= 0 && write(eventfd_, &one, sizeof(one)) < 0) return;  // full counter: the engine is awake anyway
}

}  // namespace omniserve
