// omniserve_native_tests [substring of names]: runs the tests, prints one line each, fails if any failed.
// omniserve_native_tests --soak SECONDS [--seed N]: random stress runs instead, until the first wrong result.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>

#include "check.h"
#include "stress.h"

namespace {

int run_tests(const char* wanted) {
    int run = 0, failed = 0, left_out = 0;
    for (const omniserve::testing::Test& test : omniserve::testing::all_tests()) {
        if (!std::strstr(test.name, wanted)) continue;
        if (!omniserve::testing::is_worth_running(test)) {
            ++left_out;
            std::printf("left out %s: it starts no thread\n", test.name);
            continue;
        }
        ++run;
        try {
            test.run();
            std::printf("ok      %s\n", test.name);
        } catch (const std::exception& error) {
            ++failed;
            std::printf("FAILED  %s\n        %s\n", test.name, error.what());
        }
        std::fflush(stdout);
    }
    std::printf("%d tests, %d failed, %d left out\n", run, failed, left_out);
    return run == 0 || failed > 0;
}

/// The whole text as a number from 0 on; false when it is none.
bool parse(const char* text, double& value) {
    char* end;
    value = std::strtod(text, &end);
    return end != text && *end == '\0' && value >= 0;
}

int run_soak(int argc, char** argv) {
    double seconds, seed = std::random_device{}() % 1'000'000;
    const bool is_valid = (argc == 3 || (argc == 5 && std::strcmp(argv[3], "--seed") == 0)) &&
                          parse(argv[2], seconds) && (argc == 3 || (parse(argv[4], seed) && seed <= 4e9));
    if (!is_valid) {
        std::fprintf(stderr, "usage: %s --soak SECONDS [--seed N], both from 0 on, N at most 4e9\n", argv[0]);
        return 2;
    }
    return omniserve::testing::soak(seconds, static_cast<unsigned>(seed));
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1 && std::strcmp(argv[1], "--soak") == 0) return run_soak(argc, argv);
    return run_tests(argc > 1 ? argv[1] : "");
}
