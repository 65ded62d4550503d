// A test harness of one page: TEST registers a function, CHECK throws what failed and where.
#pragma once

#include <cmath>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace omniserve::testing {

struct Test {
    const char* name;
    void (*run)();
    bool has_threads;
};

/// Under the thread sanitizer a test that starts no thread has nothing to find.
inline bool is_worth_running([[maybe_unused]] const Test& test) {
#ifdef __SANITIZE_THREAD__
    return test.has_threads;
#else
    return true;
#endif
}

inline std::vector<Test>& all_tests() {
    static std::vector<Test> tests;
    return tests;
}

struct Registration {
    Registration(const char* name, void (*run)(), bool has_threads) { all_tests().push_back({name, run, has_threads}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
    std::ostringstream message;
    message << file << ":" << line << ": " << what;
    throw std::runtime_error(message.str());
}

}  // namespace omniserve::testing

#define REGISTERED_TEST(name, has_threads)                                                        \
    static void name();                                                                           \
    static const omniserve::testing::Registration register_##name{#name, &name, has_threads};     \
    static void name()

#define TEST(name) REGISTERED_TEST(name, true)

/// Long arithmetic that starts no thread: left out, and said to be, under the thread sanitizer.
#define TEST_OF_ONE_THREAD(name) REGISTERED_TEST(name, false)

#define CHECK(condition)                                                             \
    do {                                                                             \
        if (!(condition)) omniserve::testing::fail(__FILE__, __LINE__, #condition);  \
    } while (false)

#define CHECK_NEAR(a, b, tolerance)                                                                       \
    do {                                                                                                  \
        const double left_ = (a), right_ = (b);                                                           \
        if (!(std::abs(left_ - right_) <= (tolerance)))                                                   \
            omniserve::testing::fail(__FILE__, __LINE__,                                                  \
                                     #a " = " + std::to_string(left_) + ", " #b " = " + std::to_string(right_)); \
    } while (false)
