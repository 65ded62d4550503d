#include "thread_team.h"

#include <pthread.h>
#include <sched.h>

#include "errors.h"
#include "park.h"

namespace omniserve {

void pin_this_thread(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (cpu < 0 || cpu >= CPU_SETSIZE) return;
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

ThreadTeam::ThreadTeam(int num_threads, std::vector<int> cpus) {
    require_range("num_threads", num_threads, 1, 1024);
    scratch_.resize(num_threads);
    for (int member = 1; member < num_threads; ++member) {
        const int cpu = cpus.empty() ? -1 : cpus[member % cpus.size()];
        threads_.emplace_back([this, member, cpu] { loop(member, cpu); });
    }
}

ThreadTeam::~ThreadTeam() {
    stop_ = true;
    generation_.fetch_add(1);
    futex_wake(generation_, num_threads(), FutexScope::process);
    for (std::thread& thread : threads_) thread.join();
}

float* ThreadTeam::scratch(int member, size_t floats) {
    std::vector<float>& own = scratch_[member];
    if (own.size() < floats) own.resize(floats);
    return own.data();
}

void ThreadTeam::run(const std::function<void(int)>& work) {
    if (threads_.empty()) return work(0);
    gate_.try_claim();  // always free here: the previous run waited for it
    work_ = &work;
    gate_.open();
    generation_.fetch_add(1);
    if (sleepers_.load() > 0) futex_wake(generation_, num_threads(), FutexScope::process);
    work(0);
    gate_.close();
    gate_.leave();
    const auto everyone_left = [this] { return gate_.is_free(); };  // those inside are at their last piece
    while (!spin_until(kSpinNs, everyone_left)) std::this_thread::yield();
}

void ThreadTeam::loop(int member, int cpu) {
    if (cpu >= 0) pin_this_thread(cpu);
    uint32_t seen = 0;
    while (true) {
        const auto changed = [&] { return generation_.load(std::memory_order_relaxed) != seen; };
        if (!spin_until(kSpinNs, changed)) {
            sleepers_.fetch_add(1);
            while (!changed()) futex_wait(generation_, seen, 1'000'000'000, FutexScope::process);
            sleepers_.fetch_sub(1);
        }
        seen = generation_.load();
        if (stop_) return;
        if (gate_.try_enter()) {
            (*work_)(member);
            gate_.close();
            gate_.leave();
        }
    }
}

}  // namespace omniserve
