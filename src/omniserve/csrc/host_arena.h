// The host's private KV memory.
#pragma once

#include "kv.h"

namespace omniserve {

/// Anonymous memory for `num_pages` pages, huge pages where the kernel grants them; touched first by the workers that
/// write it. Throws std::bad_alloc.
class HostArena {
public:
    HostArena(const KvGeometry& geometry, int64_t num_pages);
    ~HostArena();
    HostArena(const HostArena&) = delete;
    HostArena& operator=(const HostArena&) = delete;

    const PagedKv& kv() const { return kv_; }
    size_t bytes() const { return bytes_; }

private:
    PagedKv kv_;
    size_t bytes_;
};

}  // namespace omniserve
