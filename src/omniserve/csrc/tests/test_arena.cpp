// The arena's memory as the kernel sees it.
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>

#include "rig.h"

using namespace omniserve;
using namespace omniserve::testing;

namespace {

LaneGeometry arena_geometry(int num_pages, int num_partitions = 1) {
    LaneGeometry g = small_geometry();
    g.host_page_size = 17;  // pages that begin and end anywhere
    g.num_host_pages = num_pages;
    g.num_partitions = num_partitions;
    return g;
}

void touch(const HostArena& arena) {
    for (int64_t page = 0; page < arena.kv().num_pages; ++page)
        std::memset(arena.kv().page(page), 1, arena.kv().geometry.page_bytes());
}

bool says(const HostArena& arena, const std::string& what, const std::string& way_out) {
    for (const std::string& warning : arena.warnings())
        if (warning.find(what) != std::string::npos && warning.find(way_out) != std::string::npos) return true;
    return false;
}

}  // namespace

TEST(nothing_is_resident_before_it_is_touched_and_never_more_than_the_cap) {
    const HostArena arena(arena_geometry(150), {});
    CHECK(arena.bytes() > size_t{7} << 20 && arena.usage().resident == 0);
    std::memset(arena.kv().page(0), 1, 1);
    CHECK(arena.usage().resident > 0 && arena.usage().resident <= size_t{2} << 20);
    touch(arena);
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), cap = (arena.bytes() + page - 1) / page * page;
    CHECK(arena.usage().resident == cap);
    std::vector<unsigned char> is_resident(cap / page);
    CHECK(mincore(arena.kv().base, cap, is_resident.data()) == 0);
    for (unsigned char bits : is_resident) CHECK(bits & 1);
}

TEST(huge_pages_come_where_the_kernel_grants_them) {
    const HostArena arena(arena_geometry(150), {});
    CHECK(reinterpret_cast<uintptr_t>(arena.kv().base) % (2 << 20) == 0);
    touch(arena);
    const ArenaUsage usage = arena.usage();
    CHECK(usage.huge % (2 << 20) == 0 && usage.huge <= usage.resident);
    // A grant is the kernel's to give; a refusal must have been said.
    if (!huge_page_obstacle().empty()) CHECK(usage.huge == 0 && says(arena, "huge pages", "transparent_hugepage"));
}

TEST(a_process_without_huge_pages_is_warned_and_works) {
    if (prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0) {
        std::puts("skipped: this kernel, or an emulator, cannot be told to refuse huge pages");
        return;
    }
    const HostArena arena(arena_geometry(150), {});
    touch(arena);
    const ArenaUsage usage = arena.usage();
    CHECK(prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0) == 0);
    CHECK(usage.huge == 0 && usage.resident >= arena.bytes());
    CHECK(says(arena, "huge pages refused", "transparent_hugepage"));
}

TEST(a_machine_without_huge_pages_is_recognised) {
    char path[] = "/tmp/omniserve-enabled-XXXXXX";
    close(mkstemp(path));
    std::ofstream(path) << "always madvise [never]\n";
    CHECK(!huge_page_obstacle(path).empty());
    std::ofstream(path) << "always [madvise] never\n";
    CHECK(huge_page_obstacle(path).empty());
    std::remove(path);
    CHECK(huge_page_obstacle(path).empty());
}

TEST(a_node_that_does_not_exist_is_warned_of_once_and_the_pages_work) {
    const HostArena arena(arena_geometry(400, 3), {.nodes = {1021, 1022, 1023}});
    touch(arena);
    CHECK(arena.usage().resident >= arena.bytes());
    CHECK(arena.warnings().size() == (huge_page_obstacle().empty() ? 1u : 2u));
    CHECK(says(arena, "NUMA node 1021 refused", "mbind"));
}

TEST(partitions_on_one_node_are_placed_without_a_warning_where_the_kernel_knows_nodes) {
    const HostArena arena(arena_geometry(400, 3), {.nodes = {0, 0, 0}});
    touch(arena);
    CHECK(arena.usage().resident >= arena.bytes());
    const bool has_nodes = access("/sys/devices/system/node/node0", F_OK) == 0;
    CHECK(!has_nodes || !says(arena, "NUMA", "") || says(arena, "Operation not permitted", "") ||
          says(arena, "Function not implemented", ""));
}

TEST(nodes_must_name_one_for_each_partition) {
    bool is_refused = false;
    try {
        const HostArena arena(arena_geometry(400, 3), {.nodes = {0, 0}});
    } catch (const std::invalid_argument&) {
        is_refused = true;
    }
    CHECK(is_refused);
}

TEST(two_arenas_side_by_side_are_counted_apart) {
    const HostArena first(arena_geometry(150), {}), second(arena_geometry(150), {});
    touch(first);
    CHECK(first.usage().resident >= first.bytes() && second.usage().resident == 0);
}

TEST(locking_touches_nothing) {
    const HostArena arena(arena_geometry(150), {.lock = true});
    CHECK(arena.usage().resident == 0);
    touch(arena);
    const ArenaUsage usage = arena.usage();
    CHECK(usage.locked == usage.resident || (usage.locked == 0 && says(arena, "locking", "ulimit -l")));
}
