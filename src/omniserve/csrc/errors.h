// Refusals that name the field and its limit. The texts are built only when something is wrong.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace omniserve {

[[noreturn, gnu::cold]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

/// `value` must be one of 0 .. count - 1.
inline void require_index(const char* what, int64_t value, int64_t count) {
    if (value < 0 || value >= count) [[unlikely]]
        refuse(std::string(what) + " " + std::to_string(value) + " is outside 0 .. " + std::to_string(count - 1));
}

/// `value` must be one of low .. high.
inline void require_range(const char* field, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) [[unlikely]]
        refuse(std::string(field) + " must be from " + std::to_string(low) + " to " + std::to_string(high) + ", not " +
               std::to_string(value));
}

}  // namespace omniserve
