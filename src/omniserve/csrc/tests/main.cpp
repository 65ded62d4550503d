// omniserve_native_tests [substring of names]: runs the tests, prints one line each, fails if any failed.
#include <cstdio>
#include <cstring>
#include <exception>

#include "check.h"

int main(int argc, char** argv) {
    const char* wanted = argc > 1 ? argv[1] : "";
    int run = 0, failed = 0;
    for (const omniserve::testing::Test& test : omniserve::testing::all_tests()) {
        if (!std::strstr(test.name, wanted)) continue;
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
    std::printf("%d tests, %d failed\n", run, failed);
    return run == 0 || failed > 0;
}
