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
    if (queue_.note_served(task.number)) add(worker.stats->out_of_order, 1);
    const int position = order.position.load(std::memory_order_relaxed);
    const int64_t tokens = position + 1;
    append(task, position);  // before any piece may be read
    if (try_split(task, tokens, began_ns, worker)) return;

    const LaneGeometry& g = segment_.geometry();
    const size_t state = state_floats(g.group(), g.head_dim);
    worker.scratch.resize(state + scratch_floats(g.group(), g.head_dim));
    for (int head = 0; head < g.num_kv_heads; ++head) {
        attend_range(task, head, 0, tokens, worker.scratch.data(), worker);
        finish_state(worker.scratch.data(), g.group(), g.head_dim,
                     segment_.result(task.slot) + size_t(head) * g.group() * g.head_dim);
    }
    complete(task, tokens, began_ns, worker);
}

void TaskRunner::append(const Task& task, int position) {
    const int32_t page = segment_.page_table(task.slot)[position / arena_.geometry.page_size];
    const int32_t offset = position % arena_.geometry.page_size;
    write_rows(arena_, task.layer, 1,
               {segment_.k(task.slot), 0, segment_.v(task.slot), 0, segment_.geometry().act_dtype}, &page, &offset);
}

void TaskRunner::attend_range(const Task& task, int kv_head, int64_t first, int64_t last, float* state,
                              WorkerContext& worker) {
    const LaneGeometry& g = segment_.geometry();
    attend({.kv = &arena_,
            .page_table = segment_.page_table(task.slot),
            .layer = task.layer,
            .kv_head = kv_head,
            .first = first,
            .last = last,
            .q = segment_.q(task.slot) + size_t(kv_head) * g.group() * g.head_dim,
            .group = g.group(),
            .scale = g.score_scale(),
            .state = state,
            .scratch = worker.scratch.data() + state_floats(g.group(), g.head_dim)});
    add(worker.stats->kv_bytes_read, uint64_t(last - first) * arena_.geometry.token_bytes() / g.num_kv_heads);
}

bool TaskRunner::try_split(const Task& task, int64_t tokens, uint64_t began_ns, WorkerContext& worker) {
    const LaneGeometry& g = segment_.geometry();
    const int64_t bytes = tokens * int64_t(arena_.geometry.token_bytes());
    if (num_workers_ < 2 || bytes < kSplitBytes) return false;
    SplitJob* job = std::find_if(jobs_.get(), jobs_.get() + num_jobs_, [](SplitJob& j) { return j.gate.try_claim(); });
    if (job == jobs_.get() + num_jobs_) return false;

    const int64_t piece_bytes = std::max(kMinPieceBytes, bytes / (num_workers_ * kPiecesPerWorker));
    const int64_t per_head = std::max<int64_t>(1, bytes / g.num_kv_heads / piece_bytes);
    job->task = task;
    job->began_ns = began_ns;
    job->tokens = tokens;
    job->piece_tokens = (tokens + per_head - 1) / per_head;
    job->pieces_per_head = static_cast<int32_t>((tokens + job->piece_tokens - 1) / job->piece_tokens);
    job->num_pieces = job->pieces_per_head * g.num_kv_heads;
    job->states.resize(job->num_pieces * state_floats(g.group(), g.head_dim));
    job->next.store(0, std::memory_order_relaxed);
    job->left.store(job->num_pieces, std::memory_order_relaxed);
    num_open_.fetch_add(1, std::memory_order_relaxed);
    job->gate.open();
    segment_.notify_workers(std::min(job->num_pieces, num_workers_) - 1);
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
    const size_t state = state_floats(g.group(), g.head_dim);
    worker.scratch.resize(state + scratch_floats(g.group(), g.head_dim));
    const int64_t first = (piece % job.pieces_per_head) * job.piece_tokens;
    attend_range(job.task, piece / job.pieces_per_head, first, std::min(job.tokens, first + job.piece_tokens),
                 job.states.data() + piece * state, worker);
    add(worker.stats->pieces, 1);
}

void TaskRunner::finish_split(SplitJob& job, WorkerContext& worker) {
    const LaneGeometry& g = segment_.geometry();
    const size_t state = state_floats(g.group(), g.head_dim);
    for (int head = 0; head < g.num_kv_heads; ++head) {
        float* merged = job.states.data() + size_t(head) * job.pieces_per_head * state;
        for (int i = 1; i < job.pieces_per_head; ++i) merge_state(merged, merged + i * state, g.group(), g.head_dim);
        finish_state(merged, g.group(), g.head_dim,
                     segment_.result(job.task.slot) + size_t(head) * g.group() * g.head_dim);
    }
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
