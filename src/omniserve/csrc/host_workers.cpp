#include "host_workers.h"

#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "errors.h"
#include "park.h"
#include "thread_team.h"

namespace omniserve {
namespace {

constexpr uint64_t kParkNs = 1'000'000'000;  // a parked worker looks around once a second in any case

const Segment& check_limits(const Segment& segment, const HostOptions& options) {
    const LaneGeometry& g = segment.geometry();
    const size_t needed = g.host_kv().page_bytes() * size_t(g.num_host_pages);
    if (options.arena_bytes > 0 && needed > options.arena_bytes)
        refuse("arena_bytes: " + std::to_string(g.num_host_pages) + " host pages need " + std::to_string(needed) +
               " bytes, the limit is " + std::to_string(options.arena_bytes));
    require_range("nice", options.nice, 0, 19);
    for (int partition : options.partitions) require_index("partitions", partition, g.num_partitions);
    return segment;
}

}  // namespace

HostWorkers::HostWorkers(void* address, const HostOptions& options)
    : segment_(check_limits(Segment::attach(address), options)), options_(options),
      arena_(segment_.geometry(), options.arena), queue_(segment_),
      runner_(segment_, arena_.kv(), queue_, options.eventfd) {
    by_hand_.stats = &segment_.header().workers[0];
    segment_.header().arena_bytes.store(arena_.bytes(), std::memory_order_relaxed);
    segment_.header().host_pid.store(getpid(), std::memory_order_relaxed);
    segment_.header().host_ready.store(1, std::memory_order_release);
}

HostWorkers::~HostWorkers() {
    // Without threads the segment is not touched: its mapping may be gone by now.
    if (!threads_.empty()) stop();
}

void HostWorkers::publish_memory() {
    const ArenaUsage usage = arena_.usage();
    SegmentHeader& h = segment_.header();
    h.arena_resident.store(usage.resident, std::memory_order_relaxed);
    h.arena_huge.store(usage.huge, std::memory_order_relaxed);
}

void HostWorkers::start(int num_threads) {
    require_range("num_threads", num_threads, 1, kMaxWorkers);
    if (!threads_.empty()) throw std::logic_error("workers are running already");
    for (const Task& task : stashed_tasks_) runner_.serve(task, by_hand_);
    for (int frame : stashed_frames_) runner_.copy(frame, by_hand_);
    stashed_tasks_.clear();
    stashed_frames_.clear();
    stop_ = false;
    runner_.set_num_workers(num_threads);
    for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this, i] { loop(i); });
    segment_.header().num_workers.store(num_threads, std::memory_order_relaxed);
}

void HostWorkers::stop() {
    if (threads_.empty()) return;
    stop_ = true;
    segment_.notify_all_workers();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    runner_.set_num_workers(0);
}

void HostWorkers::loop(int index) {
    pthread_setname_np(pthread_self(), ("omni-host-" + std::to_string(index)).c_str());
    if (!options_.cpus.empty()) pin_this_thread(options_.cpus[index % options_.cpus.size()]);
    if (options_.nice > 0) setpriority(PRIO_PROCESS, 0, options_.nice);  // of this thread, on Linux
    WorkerContext worker{&segment_.header().workers[index], {}, {partition_of_worker(index)}};
    while (!stop_.load(std::memory_order_relaxed)) {
        const uint32_t seen = segment_.header().work_seq.load(std::memory_order_seq_cst);
        if (!serve_next(worker)) idle(worker.seat, seen);
    }
}

int HostWorkers::partition_of_worker(int index) const {
    const std::vector<int>& partitions = options_.partitions;
    return partitions.empty() ? index % geometry().num_partitions : partitions[index % partitions.size()];
}

void HostWorkers::idle(const Seat& seat, uint32_t seen) {
    queue_.begin_idle(seat.partition);
    const auto is_needed = [&] { return has_work(seat) || stop_.load(std::memory_order_relaxed); };
    if (!spin_until(kSpinNs, is_needed)) park(seat, seen);
    queue_.end_idle(seat.partition);
}

bool HostWorkers::serve_next(WorkerContext& worker) {
    const uint64_t began_ns = now_ns();
    Task task;
    int frame;
    if (runner_.help(worker)) {
    } else if (queue_.pop(worker.seat, task)) {
        runner_.serve(task, worker);
    } else if (queue_.pop_frame(worker.seat, frame)) {
        runner_.copy(frame, worker);
    } else {
        return false;
    }
    std::atomic<uint64_t>& busy = worker.stats->busy_ns;
    busy.store(busy.load(std::memory_order_relaxed) + now_ns() - began_ns, std::memory_order_relaxed);
    return true;
}

void HostWorkers::park(const Seat& seat, uint32_t seen) {
    // `seen` was read before the queues were: work that came since has moved work_seq, and the futex does not sleep.
    SegmentHeader& h = segment_.header();
    h.sleepers.fetch_add(1, std::memory_order_seq_cst);
    if (!stop_) futex_wait(h.work_seq, seen, kParkNs, FutexScope::machine, sleeper_bit(seat.partition));
    h.sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

void HostWorkers::drain_queue() {
    if (!threads_.empty()) throw std::logic_error("workers are running: tasks cannot be served by hand");
    Task task;
    while (queue_.pop(by_hand_.seat, task)) stashed_tasks_.push_back(task);
    int frame;
    while (queue_.pop_frame(by_hand_.seat, frame)) stashed_frames_.push_back(frame);
    std::sort(stashed_tasks_.begin(), stashed_tasks_.end(),
              [](const Task& a, const Task& b) { return a.number < b.number; });
    std::sort(stashed_frames_.begin(), stashed_frames_.end(),
              [this](int a, int b) { return segment_.command(a).number < segment_.command(b).number; });
}

std::vector<std::pair<int32_t, int32_t>> HostWorkers::pending() {
    drain_queue();
    std::vector<std::pair<int32_t, int32_t>> tasks;
    for (const Task& task : stashed_tasks_) tasks.emplace_back(task.layer, task.slot);
    return tasks;
}

bool HostWorkers::serve(int slot) {
    drain_queue();
    const auto found = std::find_if(stashed_tasks_.begin(), stashed_tasks_.end(),
                                    [slot](const Task& task) { return task.slot == slot; });
    if (found == stashed_tasks_.end()) return false;
    const Task task = *found;
    stashed_tasks_.erase(found);
    runner_.serve(task, by_hand_);
    return true;
}

std::vector<uint64_t> HostWorkers::pending_copies() {
    drain_queue();
    std::vector<uint64_t> ids;
    for (int frame : stashed_frames_) ids.push_back(segment_.command(frame).id);
    return ids;
}

bool HostWorkers::serve_copy(uint64_t id) {
    drain_queue();
    const auto found = std::find_if(stashed_frames_.begin(), stashed_frames_.end(),
                                    [&](int frame) { return segment_.command(frame).id == id; });
    if (found == stashed_frames_.end()) return false;
    const int frame = *found;
    stashed_frames_.erase(found);
    runner_.copy(frame, by_hand_);
    return true;
}

}  // namespace omniserve
