// Races: random stress runs (stress.h), workers that come and go, and the two primitives below them.
#include <atomic>
#include <map>
#include <random>
#include <thread>
#include <vector>

#include "gate.h"
#include "stress.h"
#include "thread_team.h"

using namespace omniserve;
using namespace omniserve::testing;

TEST(results_are_right_while_pages_land_prefixes_are_shared_rows_cancelled_and_workers_help_other_partitions) {
    std::map<DType, StressCounts> with_prefixes, without;
    for (unsigned seed = 1; seed <= 12; ++seed) {
        const StressConfig config = StressConfig::standard(seed);
        StressRun run(config);
        run.run();
        (config.num_prefixes > 0 ? with_prefixes : without)[config.geometry.host_kv_dtype].add(run.counts());
    }
    for (DType kept : {DType::f32, DType::i8, DType::bf16}) {  // the test tested something
        const StressCounts &sharing = with_prefixes.at(kept), &alone = without.at(kept);
        CHECK(sharing.shared_rows > 50 && sharing.cancelled_sharers > 0);
        CHECK(alone.pieces > 20 && alone.shared_rows == 0);
        CHECK(sharing.rows + alone.rows > 500 && sharing.cancelled_rows + alone.cancelled_rows > 10);
        CHECK(sharing.copies + alone.copies > 100 && sharing.landed_beside_rows + alone.landed_beside_rows > 10);
    }
}

TEST(a_seed_draws_the_same_valid_configuration_every_time) {
    for (unsigned seed = 0; seed < 500; ++seed) {
        const StressConfig config = StressConfig::draw(seed);
        config.geometry.check();
        CHECK(config.text() == StressConfig::draw(seed).text());
    }
}

TEST(workers_stop_and_start_again_with_work_queued) {
    Rig rig(StressConfig::standard(1).geometry);  // 2 partitions
    std::mt19937 random;
    for (int round = 0; round < 10; ++round) {
        for (int slot = 0; slot < 6; ++slot) rig.open_lane(slot);
        rig.exit(round % 3, {0, 1, 2, 3, 4, 5}, random_rows(rig.geometry, 6, random));
        rig.host.start(1 + round % 3);
        CHECK(rig.port.wait_all(round % 3, 60.0));
        CHECK(rig.take(round % 3, 6).slots.size() == 6);
        rig.host.stop();
    }
}

TEST(a_team_runs_every_piece_once) {
    ThreadTeam team(4);
    for (int round = 0; round < 2000; ++round) {
        const int num_pieces = round % 37;
        std::atomic<int> next{0}, done{0};
        int plain[4] = {};  // one per member: a race here is a second thread in one member's place
        team.run([&](int member) {
            while (next.fetch_add(1) < num_pieces) {
                ++plain[member];
                done.fetch_add(1);
            }
        });
        CHECK(done == num_pieces);
        CHECK(plain[0] + plain[1] + plain[2] + plain[3] == num_pieces);
    }
}

TEST(a_gate_is_reused_only_when_everybody_left) {
    Gate gate;
    int job = 0;  // plain on purpose: written by the owner, read by visitors
    std::atomic<bool> stop{false};
    std::atomic<int> visits{0};
    std::vector<std::thread> visitors;
    for (int i = 0; i < 3; ++i)
        visitors.emplace_back([&] {
            while (!stop) {
                if (!gate.try_enter()) continue;
                visits += job > 0;
                gate.close();
                gate.leave();
            }
        });
    for (int round = 1; round <= 3000; ++round) {
        while (!gate.try_claim()) std::this_thread::yield();
        job = round;
        const int visits_before = visits;
        gate.open();
        while (round % 8 == 0 && visits == visits_before) std::this_thread::yield();
        gate.close();
        gate.leave();
    }
    stop = true;
    for (std::thread& visitor : visitors) visitor.join();
    CHECK(gate.is_free() && visits >= 3000 / 8);
}
