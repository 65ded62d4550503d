// What a stress run may look like, and how many of them follow each other.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <exception>
#include <initializer_list>
#include <sstream>

#include "stress.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#define OMNISERVE_SANITIZED
#endif

namespace omniserve::testing {
namespace {

constexpr size_t kArenaBytes = size_t{24} << 20;  // drawn shapes stay below: filling them is not what is tested
constexpr int kLandingFrames = 3;
constexpr double kReportS = 30.0;

unsigned current_seed = 0;
bool is_soaking = false;

void print_seed() {
    if (!is_soaking) return;
    std::printf("\nwhile running seed %u; again with: --soak 60 --seed %u\n", current_seed, current_seed);
    std::fflush(stdout);
}

}  // namespace
}  // namespace omniserve::testing

// What the undefined-behaviour sanitizer calls at each report; the others have a callback for it (see soak).
extern "C" void __ubsan_on_report() { omniserve::testing::print_seed(); }

namespace omniserve::testing {
namespace {

class Draw {
public:
    explicit Draw(unsigned seed) : random_(seed) {}
    template <class T>
    T of(std::initializer_list<T> values) {
        return values.begin()[random_() % values.size()];
    }
    int between(int low, int high) { return low + int(random_() % unsigned(high - low + 1)); }

private:
    std::mt19937 random_;
};

bool has_simd(const char* name) {
    try {
        set_simd(name);
    } catch (const std::exception&) {
        return false;
    }
    set_simd("auto");
    return true;
}

struct Totals {
    uint64_t configs = 0, int8_configs = 0;
    StressCounts counts;

    void print(double seconds) const {
        const auto print_count = [](const char* what, uint64_t count) {
            std::printf("%s%llu", what, static_cast<unsigned long long>(count));
        };
        std::printf("%.0f s: ", seconds);
        print_count("configurations ", configs);
        print_count(" (int8 ", int8_configs);
        print_count("), rows ", counts.rows);
        print_count(", shared rows ", counts.shared_rows);
        print_count(", pieces ", counts.pieces);
        print_count(", cancels ", counts.cancelled_rows);
        print_count(" (of sharers ", counts.cancelled_sharers);
        print_count("), pages copied ", counts.copies);
        std::printf("\n");
        std::fflush(stdout);
    }
};

}  // namespace

StressConfig StressConfig::standard(unsigned seed) {
    StressConfig config{.seed = seed, .geometry = small_geometry()};
    LaneGeometry& g = config.geometry;
    // Every four seeds another storage, so that each comes with every number of threads and of prefixes.
    g.kv_dtype = std::array{DType::f32, DType::f32, DType::bf16}[seed / 4 % 3];
    g.host_kv_dtype = seed / 4 % 3 == 1 ? DType::i8 : g.kv_dtype;
    config.long_context *= g.host_kv_dtype == DType::i8 ? 3 : g.kv_dtype == DType::bf16 ? 2 : 1;  // still split
    config.num_prefixes = int(seed % 3);
    config.prefix_tokens = 300;
    g.max_lanes = 7;
    g.host_page_size = 16;
    g.device_page_size = 10;
    config.num_steps = 80;
    config.num_threads = 1 + int(seed % 4);
    g.num_partitions = 1 + int(seed / 3 % 3);
    config.lay_out();
    return config;
}

StressConfig StressConfig::draw(unsigned seed) {
    Draw draw(seed);
    StressConfig config{.seed = seed};
    config.num_steps = draw.between(40, 250);
    config.num_threads = draw.between(1, 5);
    config.simd = draw.of({"auto", "auto", "avx512", "avx512_vnni", "avx2", "scalar"});
    config.long_context = draw.of({0, 100, 700, 1500});
    config.cancel_one_in = draw.of({0, 1, 3, 8});
    config.num_trips = draw.between(0, 4);
    config.landing = draw.of({0, 50, 100});
    LaneGeometry& g = config.geometry;
    g.num_layers = draw.of({1, 2, 3, 5, 66});  // 66: more than one word of the bitmap of layers
    g.num_kv_heads = draw.between(1, 3);
    g.num_heads = g.num_kv_heads * draw.of({1, 2, 3, 4, 8});
    g.head_dim = draw.of({64, 72, 128});
    g.hidden_size = draw.of({16, 40});
    g.act_dtype = draw.of({DType::f32, DType::bf16, DType::f16});
    g.kv_dtype = draw.of({DType::f32, DType::bf16, DType::f16});
    g.host_kv_dtype = draw.between(1, 3) == 1 ? DType::i8 : g.kv_dtype;
    config.long_context *= g.host_kv_dtype == DType::i8 ? 3 : 1;
    config.num_prefixes = draw.of({0, 1, 1, 2});
    config.prefix_tokens = draw.of({60, 300, 900});
    g.max_lanes = draw.between(1, 14);
    g.host_page_size = draw.of({4, 16, 64});
    g.device_page_size = draw.of({6, 10, 16, 64});
    g.num_partitions = draw.between(1, 3);
    g.window = draw.of({0, 0, 1, 30, 200});
    g.window_layers.fill(draw.of({0, 1}) ? ~uint64_t{0} : 0x5555555555555555);
    if (!has_simd(config.simd)) config.simd = "auto";
    config.lay_out();
    const auto is_smallest = [&] { return g.num_layers == 1 && config.long_context + config.prefix_tokens == 0; };
    while (g.host_kv().page_bytes() * g.num_host_pages > kArenaBytes && !is_smallest()) {
        if (g.num_layers == 1) {
            config.long_context /= 2;
            config.prefix_tokens /= 2;
        }
        g.num_layers = std::max(1, g.num_layers / 2);
        config.lay_out();
    }
    return config;
}

void StressConfig::lay_out() {
    LaneGeometry& g = geometry;
    prefix_tokens = num_prefixes > 0 ? (prefix_tokens + g.host_page_size - 1) / g.host_page_size * g.host_page_size : 0;
    if (prefix_tokens == 0) num_prefixes = 0;
    g.max_pages_per_lane = (std::max(long_context, prefix_tokens + g.host_page_size) + 60) / g.host_page_size + 1;
    landing = std::min(landing, long_context);
    g.num_frames = num_trips + (landing > 0 ? kLandingFrames : 0);
    g.num_host_pages = first_page_of_copies() + num_trips * g.max_pages_per_frame();
}

/// Twice as many lanes with each prefix as with none, one beside the other.
int StressConfig::prefix_of(int slot) const {
    if (slot < kLongLanes || num_prefixes == 0) return -1;
    const int place = (slot - kLongLanes) % (2 * num_prefixes + 1);
    return place < 2 * num_prefixes ? place % num_prefixes : -1;
}

int StressConfig::context_of(int slot) const {
    if (slot < kLongLanes) return long_context;
    return prefix_of(slot) < 0 ? 0 : prefix_tokens + (slot - kLongLanes) * 5 % geometry.host_page_size;
}

LaneGeometry StressConfig::shadow_geometry() const {
    LaneGeometry shadow = geometry;
    shadow.num_partitions = 1;
    return shadow;
}

std::string StressConfig::text() const {
    const LaneGeometry& g = geometry;
    std::ostringstream out;
    out << "seed " << seed << ": " << num_steps << " steps, " << num_threads << " threads, " << simd << ", "
        << g.max_lanes << " lanes, " << g.num_layers << " layers, " << g.num_heads << "/" << g.num_kv_heads
        << " heads of " << g.head_dim << ", hidden " << g.hidden_size << ", act " << dtype_name(g.act_dtype) << ", KV "
        << dtype_name(g.kv_dtype) << " (host " << dtype_name(g.host_kv_dtype) << "), context " << long_context
        << " (the last " << landing << " land), " << num_prefixes << " prefixes of " << prefix_tokens << ", "
        << g.num_partitions << " partitions, pages of " << g.host_page_size << " and " << g.device_page_size
        << " tokens, window " << g.window << (g.has_window(1) ? "" : " in every other layer") << ", " << num_trips
        << " copies in flight, "
        << (cancel_one_in ? "a cancel every " + std::to_string(cancel_one_in) + " steps" : "no cancels");
    return out.str();
}

int soak(double seconds, unsigned seed) {
#ifdef OMNISERVE_SANITIZED
    __sanitizer_set_death_callback(print_seed);
#endif
    std::printf("seeds from %u on, for %.0f s\n", seed, seconds);
    const auto now = [] { return std::chrono::steady_clock::now(); };
    const auto began = now();
    const auto elapsed = [&] { return std::chrono::duration<double>(now() - began).count(); };
    is_soaking = true;
    Totals totals;
    double next_report = kReportS;
    for (current_seed = seed; totals.configs == 0 || elapsed() < seconds; ++current_seed) {
        const StressConfig config = StressConfig::draw(current_seed);
        try {
            StressRun run(config);
            run.run();
            ++totals.configs;
            totals.int8_configs += config.geometry.host_kv_dtype == DType::i8;
            totals.counts.add(run.counts());
        } catch (const std::exception& error) {
            std::printf("FAILED  %s\n        %s\n", error.what(), config.text().c_str());
            print_seed();
            return 1;
        }
        if (elapsed() < next_report) continue;
        totals.print(elapsed());
        next_report = elapsed() + kReportS;
    }
    totals.print(elapsed());
    return 0;
}

}  // namespace omniserve::testing
