// The plain streaming read that host attention is measured against.
#pragma once

#include <cstddef>
#include <cstdint>

#include "thread_team.h"

namespace omniserve {

/// Reads `bytes` bytes once, dealt out to the team in blocks, and returns the sum of its 64-bit words (modulo 2^64;
/// up to 7 bytes at the end are left out).
uint64_t stream_read(ThreadTeam& team, const std::byte* from, size_t bytes);

}  // namespace omniserve
