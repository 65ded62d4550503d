#include "host_arena.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <new>

#include "errors.h"

namespace omniserve {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kMaxNodes = 1024;

size_t small_page() { return size_t(sysconf(_SC_PAGESIZE)); }
uintptr_t round_down(uintptr_t value, size_t to) { return value / to * to; }
uintptr_t round_up(uintptr_t value, size_t to) { return round_down(value + to - 1, to); }

size_t num_bytes(const LaneGeometry& g) { return g.host_kv().page_bytes() * size_t(g.num_host_pages); }

long prefer_node(void* begin, size_t bytes, int node) {
    constexpr int kBits = 8 * sizeof(unsigned long);
    unsigned long mask[kMaxNodes / kBits] = {};
    mask[node / kBits] = 1ul << (node % kBits);
    return syscall(SYS_mbind, begin, bytes, MPOL_PREFERRED, mask, kMaxNodes + 1, 0);
}

std::string lock_limit() {
    rlimit limit;
    if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return "unlimited";
    return std::to_string(limit.rlim_cur / 1024) + " KiB";
}

}  // namespace

HostArena::HostArena(const LaneGeometry& geometry, const ArenaOptions& options)
    : kv_{geometry.host_kv(), nullptr, geometry.num_host_pages}, bytes_(num_bytes(geometry)),
      mapped_(round_up(bytes_, small_page())), reserved_bytes_(mapped_ + 2 * kHugePage) {
    const size_t num_nodes = options.nodes.size();
    if (num_nodes != 0 && num_nodes != size_t(geometry.num_partitions))
        refuse("nodes: must name one for each of " + std::to_string(geometry.num_partitions) + " partitions, not " +
               std::to_string(num_nodes));
    for (int node : options.nodes) require_index("nodes: node", node, kMaxNodes);
    reserved_ = mmap(nullptr, reserved_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved_ == MAP_FAILED) throw std::bad_alloc();
    // What is left before and behind stays unreadable: no neighbour is ever merged with the arena, or overrun by it.
    kv_.base = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<uintptr_t>(reserved_) + 1, kHugePage));
    if (mprotect(kv_.base, mapped_, PROT_READ | PROT_WRITE) != 0) {
        munmap(reserved_, reserved_bytes_);
        throw std::bad_alloc();
    }
    ask_for_huge_pages();
    if (num_nodes > 1) bind(geometry, options.nodes);
    if (options.lock) lock();
}

HostArena::~HostArena() { munmap(reserved_, reserved_bytes_); }

void HostArena::warn(const std::string& what, const std::string& why, const std::string& way_out) {
    warnings_.push_back("host memory: " + what + " refused (" + why + "); going on without. " + way_out);
}

void HostArena::ask_for_huge_pages() {
    // The tail beyond the last whole huge page gets small ones: the cap holds to a small page.
    std::string why;
    if (madvise(kv_.base, mapped_, MADV_HUGEPAGE) != 0) why = std::strerror(errno);
    else why = huge_page_obstacle();
    if (!why.empty())
        warn("huge pages", why,
             "To have them, write 'madvise' to /sys/kernel/mm/transparent_hugepage/enabled and start the process "
             "without PR_SET_THP_DISABLE.");
}

void HostArena::bind(const LaneGeometry& geometry, const std::vector<int>& nodes) {
    const auto boundary = [&](int partition) {  // a huge page that two partitions share goes to the second
        return round_down(reinterpret_cast<uintptr_t>(kv_.page(geometry.first_page(partition))), kHugePage);
    };
    const uintptr_t end = reinterpret_cast<uintptr_t>(kv_.base) + mapped_;
    for (int partition = 0; partition < geometry.num_partitions; ++partition) {
        const uintptr_t first = boundary(partition);
        const uintptr_t last = partition + 1 < geometry.num_partitions ? boundary(partition + 1) : end;
        if (first == last || prefer_node(reinterpret_cast<void*>(first), last - first, nodes[partition]) == 0) continue;
        warn("placing pages on NUMA node " + std::to_string(nodes[partition]), std::strerror(errno),
             "They lie where their first writer runs. In a container, allow mbind (CAP_SYS_NICE or the seccomp "
             "profile).");
        return;  // the others would be refused alike
    }
}

void HostArena::lock() {
    // On fault: locking must not touch pages before the worker that will read them does.
    if (syscall(SYS_mlock2, kv_.base, mapped_, MLOCK_ONFAULT) == 0) return;
    warn("locking " + std::to_string(mapped_ / 1024) + " KiB", std::strerror(errno),
         "The limit is " + lock_limit() +
             ": raise it (`ulimit -l`, LimitMEMLOCK of the service, the container's memlock) or leave host_mlock off.");
}

ArenaUsage HostArena::usage() const {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(kv_.base), end = begin + mapped_;
    std::ifstream smaps("/proc/self/smaps");
    ArenaUsage usage;
    bool is_ours = false;
    for (std::string line; std::getline(smaps, line);) {
        unsigned long long first, last;
        char name[32];
        size_t kib;
        if (std::sscanf(line.c_str(), "%llx-%llx ", &first, &last) == 2) is_ours = first >= begin && last <= end;
        else if (!is_ours || std::sscanf(line.c_str(), "%31[A-Za-z_]: %zu kB", name, &kib) != 2) continue;
        else if (std::strcmp(name, "Rss") == 0) usage.resident += kib * 1024;
        else if (std::strcmp(name, "AnonHugePages") == 0) usage.huge += kib * 1024;
        else if (std::strcmp(name, "Locked") == 0) usage.locked += kib * 1024;
    }
    return usage;
}

std::string huge_page_obstacle(const char* enabled_path) {
    if (prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) > 0) return "switched off for this process";
    std::ifstream file(enabled_path);
    std::string text;
    std::getline(file, text);
    return text.find("[never]") == std::string::npos ? "" : "switched off for this machine";
}

}  // namespace omniserve
