#include "host_task.h"

#include <unistd.h>

#include <algorithm>

#include "park.h"

namespace omniserve {
namespace {

// A task below this many KV bytes takes some 20 microseconds on one core: less than waking a parked helper.
constexpr int64_t kSplitBytes = 512 * 1024;
constexpr int64_t kMinPieceBytes = 128 * 1024;
constexpr int kPiecesPerWorker = 4;  // enough to even out workers that join late

void add(std::atomic<uint64_t>& counter, uint64_t amount) {
    // One writer per counter: no read-modify-write needed.
    counter.store(counter.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed);
}

int64_t bytes_per_token(const KvGeometry& g) {
    return 2 * int64_t(g.num_kv_heads) * g.head_dim * int64_t(item_size(g.dtype));
}

}  // namespace

TaskRunner::TaskRunner(const Segment& segment, const PagedKv& arena, HostQueue& queue, int eventfd)
    : segment_(segment), arena_(arena), queue_(queue), eventfd_(eventfd) {}

void TaskRunner::set_num_workers(int num_workers) {
    num_workers_ = num_workers;
    num_jobs_ = num_workers > 1 ? 2 * num_workers : 0;  // one may still be left by its last helper
    jobs_ = std::make_unique<SplitJob[]>(num_jobs_);
}

void TaskRunner::serve(const Task& task, WorkerContext& worker) {
    const uint64_t began_ns = now_ns();
    const SlotOrder& order = segment_.order(task.slot);
    if (ticket_epoch(task.ticket) != order.epoch.load(std::memory_order_acquire)) {
        add(worker.stats->stale_tasks, 1);
        return publish(task);
    }
    if (queue_.note_served(task)) add(worker.stats->out_of_order, 1);
    const int position = order.position.load(std::memory_order_relaxed);
    const int64_t tokens = position + 1;
    append(task, position);  // before any piece may be read
    if (try_split(task, tokens, began_ns, worker)) return;

    const LaneGeometry& g = segment_.geometry();
    const StateShape shape{g.num_kv_heads, g.group(), g.head_dim};
    worker.scratch.resize(shape.floats() + scratch_floats(shape.num_heads, shape.group, shape.head_dim));
    attend_range(task, 0, tokens, worker.scratch.data(), worker);
    finish_states(worker.scratch.data(), shape, segment_.result(task.slot));
    complete(task, tokens, began_ns, worker);
}

void TaskRunner::append(const Task& task, int position) {
    const int32_t page = segment_.page_table(task.slot)[position / arena_.geometry.page_size];
    const int32_t offset = position % arena_.geometry.page_size;
    write_rows(arena_, task.layer, 1,
               {segment_.k(task.slot), 0, segment_.v(task.slot), 0, segment_.geometry().act_dtype}, &page, &offset);
}

void TaskRunner::attend_range(const Task& task, int64_t first, int64_t last, float* state,
                              WorkerContext& worker) {
    const LaneGeometry& g = segment_.geometry();
    attend({.kv = &arena_,
            .page_table = segment_.page_table(task.slot),
            .layer = task.layer,
            .first_head = 0,
            .num_heads = g.num_kv_heads,
            .first = first,
            .last = last,
            .q = segment_.q(task.slot),
            .group = g.group(),
            .scale = g.score_scale(),
            .state = state,
            .scratch = worker.scratch.data() + g.num_kv_heads * state_floats(g.group(), g.head_dim)});
    add(worker.stats->kv_bytes_read, uint64_t(last - first) * bytes_per_token(arena_.geometry));
}

bool TaskRunner::try_split(const Task& task, int64_t tokens, uint64_t began_ns, WorkerContext& worker) {
    const LaneGeometry& g = segment_.geometry();
    const int64_t bytes = tokens * bytes_per_token(arena_.geometry);
    if (num_workers_ < 2 || bytes < kSplitBytes) return false;
    SplitJob* job = std::find_if(jobs_.get(), jobs_.get() + num_jobs_, [](SplitJob& j) { return j.gate.try_claim(); });
    if (job == jobs_.get() + num_jobs_) return false;

    const int64_t piece_bytes = std::max(kMinPieceBytes, bytes / (num_workers_ * kPiecesPerWorker));
    const int64_t pieces = std::max<int64_t>(1, bytes / piece_bytes);
    job->task = task;
    job->began_ns = began_ns;
    job->tokens = tokens;
    job->piece_tokens = (tokens + pieces - 1) / pieces;
    job->num_pieces = static_cast<int32_t>((tokens + job->piece_tokens - 1) / job->piece_tokens);
    job->states.resize(job->num_pieces * g.num_kv_heads * state_floats(g.group(), g.head_dim));
    job->next.store(0, std::memory_order_relaxed);
    job->left.store(job->num_pieces, std::memory_order_relaxed);
    num_open_.fetch_add(1, std::memory_order_relaxed);
    job->gate.open();
    segment_.notify_workers(task.partition, std::min(job->num_pieces, num_workers_) - 1);
    work_on(*job, worker);
    return true;
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

void TaskRunner::work_on(SplitJob& job, WorkerContext& worker) {
    while (true) {
        const int piece = job.next.fetch_add(1, std::memory_order_relaxed);
        if (piece >= job.num_pieces) break;
        if (piece == job.num_pieces - 1) {  // the last one is handed out once: nobody need come in any more
            job.gate.close();
            num_open_.fetch_sub(1, std::memory_order_relaxed);
        }
        do_piece(job, piece, worker);
        if (job.left.fetch_sub(1, std::memory_order_acq_rel) == 1) finish_split(job, worker);
    }
    job.gate.leave();
}

void TaskRunner::do_piece(SplitJob& job, int piece, WorkerContext& worker) {
    const LaneGeometry& g = segment_.geometry();
    const StateShape shape{g.num_kv_heads, g.group(), g.head_dim};
    worker.scratch.resize(shape.floats() + scratch_floats(shape.num_heads, shape.group, shape.head_dim));
    const int64_t first = piece * job.piece_tokens;
    attend_range(job.task, first, std::min(job.tokens, first + job.piece_tokens),
                 job.states.data() + piece * shape.floats(), worker);
    add(worker.stats->pieces, 1);
}

void TaskRunner::finish_split(SplitJob& job, WorkerContext& worker) {
    const LaneGeometry& g = segment_.geometry();
    const StateShape shape{g.num_kv_heads, g.group(), g.head_dim};
    float* merged = job.states.data();
    for (int i = 1; i < job.num_pieces; ++i) merge_states(merged, merged + i * shape.floats(), shape);
    finish_states(merged, shape, segment_.result(job.task.slot));
    complete(job.task, job.tokens, job.began_ns, worker);
}

void TaskRunner::complete(const Task& task, int64_t tokens, uint64_t began_ns, WorkerContext& worker) {
    queue_.observe_service(now_ns() - began_ns, tokens);
    add(worker.stats->tasks, 1);
    publish(task);
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
    add(worker.stats->copied_bytes, uint64_t(command.num_tokens) * bytes_per_token(host) * host.num_layers);
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
