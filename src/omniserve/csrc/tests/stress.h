// A device thread that submits, takes, cancels and copies at random against running workers. Every result is compared
// with a shadow: a second segment that gets the same rows and is served by hand, one by one, with the same kernels.
// What is wrong in a kernel wherever it is called is wrong in both: test_kernel.cpp is for that.
#pragma once

#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "rig.h"

namespace omniserve::testing {

/// One run of the stress test. Everything in it follows from the seed, so that a seed says how to do it again; only
/// the timing of threads is the machine's.
struct StressConfig {
    static constexpr int kLongLanes = 2;  // the first ones

    unsigned seed = 1;
    int num_steps = 250;       // walks and passes of the device
    int num_threads = 3;       // of the host
    const char* simd = "auto";
    int long_context = 700;    // tokens that the first two lanes start from; with 2 x 64 float32 a split task
    int num_prefixes = 0;      // contexts that several of the other lanes begin with
    int prefix_tokens = 0;     // of each; lay_out makes them whole pages
    int landing = 100;         // the last of them, which land while others are served; at most long_context
    int cancel_one_in = 8;     // steps per cancelled lane; 0: none
    int num_trips = 1;         // pages that travel to the host and back all the time
    LaneGeometry geometry = {};  // lay_out fills in what follows from the rest

    /// The shape that `make test` runs.
    static StressConfig standard(unsigned seed);
    /// Any shape, drawn from the seed.
    static StressConfig draw(unsigned seed);
    /// One line: every field.
    std::string text() const;

    void lay_out();
    LaneGeometry shadow_geometry() const;  // the same lanes without partitions
    int prefix_of(int slot) const;         // -1: none
    int context_of(int slot) const;        // tokens that the lane starts from; always the same
    // Host pages: those of the lanes, of the prefixes, of the copies.
    int pages_of_lanes() const { return geometry.max_lanes * geometry.max_pages_per_lane; }
    int pages_per_prefix() const { return prefix_tokens / geometry.host_page_size; }
    int first_page_of_copies() const { return pages_of_lanes() + num_prefixes * pages_per_prefix(); }
};

/// What happened in one run or in several.
struct StressCounts {
    uint64_t rows = 0;                // served, compared and taken
    uint64_t cancelled_rows = 0;      // in flight
    uint64_t cancelled_sharers = 0;   // those of lanes with a prefix
    uint64_t pieces = 0;              // without prefixes only split rows have any
    uint64_t shared_rows = 0;         // served with others of their prefix
    uint64_t copies = 0;
    uint64_t landed_beside_rows = 0;  // copies into a context while rows waited

    void add(const StressCounts& more);
};

class StressRun {
public:
    explicit StressRun(const StressConfig& config);
    ~StressRun();
    StressRun(const StressRun&) = delete;
    StressRun& operator=(const StressRun&) = delete;

    /// All steps, then serves out what is in flight. Throws what CHECK throws at the first wrong result.
    void run();

    /// So far.
    StressCounts counts() const;

private:
    struct Lane {
        enum State { free, landing, idle, waiting, draining } state = free;
        int layer = 0;
        int position = 0;
        int end = 0;       // the position that is not decoded any more
        int sent = 0;      // tokens of the context
        int arriving = 0;  // copies
    };
    struct Expected {
        std::vector<float> attn, x;
    };
    /// A page on its way to the host and back, or to int8, from which there is none.
    struct Trip {
        std::vector<int32_t> host_pages;
        int host_offset = 0;
        std::vector<std::byte> sent, page;
        bool is_under_way = false, is_wanted = false;
    };

    void fill_pages();
    void begin(int slot);
    void open(int slot);
    std::vector<int32_t> table_of(int slot);
    void land_context(int slot);
    void land_in_shadow(const PageCopy& copy, const std::vector<std::byte>& page);
    std::vector<std::byte> random_device_page(int num_tokens);
    void exit(int layer);
    void take(int layer, int cap, bool same_iteration);
    void check_row(int slot, const float* attn, const float* x);
    void advance(int slot);
    void walk();
    void pass();
    void sleep();
    void cancel(int slot);
    void free_drained();
    void copies();
    void end_of(uint64_t id);
    void start(Trip& trip, uint64_t id);
    PageCopy copy(const Trip& trip, uint64_t id) const;
    void check_landed(const Trip& trip);
    bool settle();
    LaneStats stats() const { return live_.port.stats(); }
    bool one_in(int count) { return count > 0 && random_() % count == 0; }

    StressConfig config_;
    std::mt19937 random_;
    int eventfd_;
    Rig live_, shadow_;
    std::vector<Lane> lanes_;
    std::map<int, Expected> expected_;  // by slot
    std::vector<Trip> trips_;
    uint64_t next_trip_ = 0;
    StressCounts counts_;  // what the device sees of them
};

/// Runs drawn configurations, seeds from `seed` on, for `seconds` (one at least), and stops at the first wrong result.
/// Prints what it ran; returns the exit status.
int soak(double seconds, unsigned seed);

}  // namespace omniserve::testing
