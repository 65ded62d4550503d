#include "host_arena.h"

#include <sys/mman.h>

#include <new>

namespace omniserve {

HostArena::HostArena(const KvGeometry& geometry, int64_t num_pages)
    : kv_{geometry, nullptr, num_pages}, bytes_(geometry.page_bytes() * size_t(num_pages)) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    madvise(memory, bytes_, MADV_HUGEPAGE);  // a wish: small pages work as well
    kv_.base = static_cast<std::byte*>(memory);
}

HostArena::~HostArena() { munmap(kv_.base, bytes_); }

}  // namespace omniserve
