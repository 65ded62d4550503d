// The host's private KV memory.
#pragma once

#include <string>
#include <vector>

#include "segment.h"

namespace omniserve {

struct ArenaOptions {
    std::vector<int> nodes = {};  // NUMA node of each partition; empty: pages lie where their first writer runs
    bool lock = false;            // keep what was touched from being swapped out
};

/// Bytes of the arena, as the kernel counts them.
struct ArenaUsage {
    size_t resident = 0;
    size_t huge = 0;    // of those, in huge pages
    size_t locked = 0;  // of those, locked
};

/// Anonymous memory for all host pages: mapped once, touched page by page by whoever writes first, never grown.
///
/// Huge pages, NUMA placement and locking are wishes. One that is refused leaves a warning that says what, why and the
/// way out; the arena works without it.
class HostArena {
public:
    /// Throws std::bad_alloc when the address range cannot be had, std::invalid_argument for nodes that are not one per
    /// partition.
    HostArena(const LaneGeometry& geometry, const ArenaOptions& options);
    ~HostArena();
    HostArena(const HostArena&) = delete;
    HostArena& operator=(const HostArena&) = delete;

    const PagedKv& kv() const { return kv_; }
    /// The cap: more than this, rounded up to a small page, is never resident.
    size_t bytes() const { return bytes_; }
    const std::vector<std::string>& warnings() const { return warnings_; }
    /// Reads /proc/self/smaps: milliseconds and more for a large arena. All zero when that cannot be read.
    ArenaUsage usage() const;

private:
    void ask_for_huge_pages();
    void bind(const LaneGeometry& geometry, const std::vector<int>& nodes);
    void lock();
    void warn(const std::string& what, const std::string& why, const std::string& way_out);

    PagedKv kv_;
    size_t bytes_;
    size_t mapped_;  // bytes_ in whole small pages
    void* reserved_ = nullptr;
    size_t reserved_bytes_;
    std::vector<std::string> warnings_;
};

/// Why no huge page will be granted although asking for them succeeds; empty when some may. `enabled_path`: the
/// kernel's file of that name. An absent file says nothing.
std::string huge_page_obstacle(const char* enabled_path = "/sys/kernel/mm/transparent_hugepage/enabled");

}  // namespace omniserve
