#include "stream_read.h"

#include <algorithm>

#include "attention.h"

namespace omniserve {
namespace {

constexpr size_t kBlock = size_t{1} << 20;  // bytes: long enough for the hardware's prefetchers, short enough to share

}  // namespace

uint64_t stream_read(ThreadTeam& team, const std::byte* from, size_t bytes) {
    if (team.num_threads() == 1) return kernels().stream_sum(from, bytes);
    std::atomic<size_t> next{0};
    std::atomic<uint64_t> total{0};
    team.run([&](int) {
        uint64_t sum = 0;
        for (size_t at; (at = next.fetch_add(kBlock, std::memory_order_relaxed)) < bytes;)
            sum += kernels().stream_sum(from + at, std::min(kBlock, bytes - at));
        total.fetch_add(sum, std::memory_order_relaxed);
    });
    return total.load(std::memory_order_relaxed);
}

}  // namespace omniserve
