"""What each policy does that the others do not, in small states with a budget of tokens."""

from __future__ import annotations

import pytest

from omniserve.config import EngineConfig
from omniserve.errors import ConfigError
from omniserve.policy.baselines import RULES, make_policy
from omniserve.policy.baselines.paper import PaperPolicy
from omniserve.policy.budget import FixedBudget
from omniserve.policy.plan import Displace, Drop, Plan, Reserve
from omniserve.policy.scheduler import schedule
from omniserve.policy.slo import SloPolicy
from omniserve.types import SLO
from policy.exact import ExactModel, Scene, make_terms, roomy
from policy.scripted import World, make_limits


def plan_of(name: str, scene: Scene, tokens: int = 32) -> Plan:
    policy = make_policy(name, FixedBudget(tokens, 8), None, None)
    return schedule(scene.state, 0.0, policy)


def device_only(**limits: object) -> Scene:
    return Scene(roomy(host_offload="never", num_host_pages=0, **limits))


def paper(model: ExactModel | None = None, **terms: float) -> PaperPolicy:
    return PaperPolicy(model or ExactModel(), make_terms(**terms))


# ---------------------------------------------------------------- which policy is made


def test_targets_need_a_calibrated_model() -> None:
    fixed, model, terms = FixedBudget(32, 8), ExactModel(), make_terms()
    assert isinstance(make_policy("omniserve", fixed, model, terms), SloPolicy)
    assert isinstance(make_policy("paper", fixed, model, terms), PaperPolicy)
    for uncalibrated in (
        make_policy("omniserve", fixed, None, terms),
        make_policy("sarathi", fixed, model, terms),
    ):
        assert not uncalibrated.promises_slo


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_policy_serves_all_that_it_takes(name: str) -> None:
    rules = RULES[name]
    mode = "auto" if rules.uses_host else "never"
    limits = make_limits(host_offload=mode, num_host_pages=16 if rules.uses_host else 0, watermark_pages=2)
    world = World(limits, policy=make_policy(name, FixedBudget(6, 3), None, None))
    wanted = {}
    for i in range(6):
        best_effort = rules.takes_best_effort and i % 2 == 0
        wanted[world.add(5 + i, 6, best_effort)] = 6
        world.step()
    world.run()
    assert world.produced == wanted


def test_neo_is_refused_by_name_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"'neo' is not run by this engine: .*waits for the host"):
        EngineConfig(policy="neo")


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="omniserve, paper, ls_only, sarathi, vllm_priority, llumnix"):
        EngineConfig(policy="fcfs")


@pytest.mark.parametrize("name", ["ls_only", "sarathi", "vllm_priority", "llumnix"])
def test_device_only_policies_start_no_host(name: str) -> None:
    with pytest.raises(ConfigError, match="host_offload='never'"):
        EngineConfig(policy=name)
    assert EngineConfig(policy=name, host_offload="never").policy == name


# ---------------------------------------------------------------- ls_only, sarathi


def test_ls_only_gives_batch_nothing() -> None:
    scene = device_only()
    chat = scene.waiting(10)
    scene.waiting(10, best_effort=True)
    scene.decoding(10, best_effort=True)
    plan = plan_of("ls_only", scene)
    assert [c.request_id for c in plan.chunks] == [chat.id]
    assert plan.decodes == ()


def test_sarathi_serves_batch_decodes_before_batch_prompts_and_chat_before_both() -> None:
    scene = device_only()
    scene.waiting(40, best_effort=True)
    batch = scene.decoding(10, best_effort=True)
    chat = scene.waiting(20)
    plan = plan_of("sarathi", scene)
    assert plan.decodes == (batch.id,)
    assert [(c.request_id, c.num_tokens) for c in plan.chunks] == [(chat.id, 20), (0, 11)]


# ---------------------------------------------------------------- vllm_priority, llumnix


def test_vllm_lets_running_batch_go_on_before_a_waiting_chat() -> None:
    scene = device_only()
    running = scene.prefilling(100, 20, best_effort=True)
    chat = scene.waiting(20)
    assert [c.request_id for c in plan_of("vllm_priority", scene).chunks] == [running.id]
    assert plan_of("sarathi", scene).chunks[0].request_id == chat.id


def test_vllm_preempts_for_a_running_request_and_not_for_a_waiting_one() -> None:
    scene = device_only(num_device_pages=8)
    scene.decoding(63, best_effort=True)
    scene.decoding(47, out=1, slo=None)
    scene.waiting(20)
    plan = plan_of("vllm_priority", scene)
    assert not any(isinstance(move, Drop) for move in plan.moves), "the chat waits for pages"
    full = device_only(num_device_pages=6)
    batch = full.decoding(64, best_effort=True)
    chat = full.decoding(32, slo=None)  # its next token needs a page that nobody has left
    plan = plan_of("vllm_priority", full)
    assert plan.decodes == (chat.id,)
    assert Drop(batch.id) in plan.moves


def test_llumnix_keeps_headroom_from_batch_and_gives_it_to_chat() -> None:
    scene = device_only(num_device_pages=20, watermark_pages=10)
    scene.decoding(100, slo=None)  # 7 pages
    batch = scene.waiting(60, best_effort=True)
    assert batch.id not in {m.request_id for m in plan_of("llumnix", scene).moves if isinstance(m, Reserve)}
    assert batch.id in {
        m.request_id for m in plan_of("vllm_priority", scene, 64).moves if isinstance(m, Reserve)
    }
    chat = scene.waiting(60)
    assert chat.id in {m.request_id for m in plan_of("llumnix", scene, 64).moves if isinstance(m, Reserve)}


# ---------------------------------------------------------------- paper


def test_the_paper_spends_the_whole_target_however_much_of_it_is_gone() -> None:
    scene = Scene()
    scene.decoding(20, last_token_s=0.0)
    prompt = scene.waiting(500)
    plan = schedule(scene.state, 0.06, paper())
    assert [(c.request_id, c.num_tokens) for c in plan.chunks] == [(prompt.id, 89)]


def test_the_paper_leaves_omega_to_lanes_while_there_are_any() -> None:
    scene = Scene()
    scene.decoding(20)
    batch = scene.waiting(500, best_effort=True)
    assert [c.num_tokens for c in schedule(scene.state, 0.0, paper()).chunks] == [89]
    scene.lane(20, in_flight=True)
    plan = schedule(scene.state, 0.0, paper())
    assert [(c.request_id, c.num_tokens) for c in plan.chunks] == [(batch.id, 79)], "a tenth of 100 ms less"


def test_in_the_paper_batch_decodes_leave_omega_though_there_are_no_lanes() -> None:
    scene = Scene()
    scene.decoding(20)
    batch = scene.decoding(40, best_effort=True)
    slow = ExactModel(row=0.042)  # both together take 94 ms, a tenth of 100 ms is for lanes
    plan = schedule(scene.state, 0.0, paper(slow))
    assert batch.id not in plan.decodes
    assert Displace(batch.id) in plan.moves
    assert batch.id in schedule(scene.state, 0.0, paper(ExactModel(row=0.039))).decodes


def test_the_paper_bounds_walks_with_chats_by_tpot_alone() -> None:
    scene = Scene()
    scene.decoding(20)
    scene.waiting(500, best_effort=True)
    assert [c.num_tokens for c in schedule(scene.state, 0.0, paper(walk_bound_s=0.05)).chunks] == [89]
    alone = Scene()
    alone.waiting(500, best_effort=True)
    assert [c.num_tokens for c in schedule(alone.state, 0.0, paper(walk_bound_s=0.05)).chunks] == [40]


def test_the_papers_chunks_keep_tpot_though_nobody_decodes_yet() -> None:
    scene = Scene()
    scene.waiting(500)
    assert [c.num_tokens for c in schedule(scene.state, 0.0, paper()).chunks] == [90]


def test_in_the_paper_batch_makes_no_prompt_late_that_one_pass_would_end_in_time() -> None:
    """A pass for the prompt takes 210 ms, 220 are left of its second."""
    scene = Scene()
    prompt = scene.waiting(200, slo=SLO(1.0, 0.5))
    batch = scene.waiting(500, best_effort=True)
    plan = schedule(scene.state, 0.7795, paper())
    assert [(c.request_id, c.num_tokens) for c in plan.chunks] == [(prompt.id, 200), (batch.id, 10)]


def test_what_is_owed_to_batch_goes_before_the_papers_budgets() -> None:
    scene = Scene()
    scene.decoding(20, slo=SLO(1.0, 0.01))
    batch = scene.decoding(40, best_effort=True)
    assert batch.id not in schedule(scene.state, 0.0, paper(best_effort_share=0.1)).decodes
    scene.state.best_effort_debt_s = 0.0011
    assert batch.id in schedule(scene.state, 0.0, paper(best_effort_share=0.1)).decodes


def test_in_the_paper_the_lowest_layers_come_first() -> None:
    scene = Scene()
    scene.decoding(20, slo=SLO(1.0, 0.013))
    for _ in range(12):
        scene.lane(20, in_flight=True)
    scene.state.lanes_waiting = (6, 6)
    plan = schedule(scene.state, 0.0, paper(max_lane_rows=3))
    assert plan.lane_cap == (3, 1), "no lane can start: the four rows that fit are for the layers"


def test_in_the_paper_starts_come_before_all_layers() -> None:
    scene = Scene()
    scene.decoding(20, slo=SLO(1.0, 0.013))
    for _ in range(10):
        scene.lane(20, in_flight=True)
    for _ in range(2):
        scene.lane(20)
    scene.state.lanes_waiting = (5, 5)
    plan = schedule(scene.state, 0.0, paper(max_lane_rows=3))
    assert len(plan.lane_starts) == 2
    assert plan.lane_cap == (2, 0)


def test_the_paper_keeps_its_budget_by_the_expected_time() -> None:
    scene = Scene()
    scene.decoding(20)
    prompt = scene.waiting(500)
    plan = schedule(scene.state, 0.0, paper(ExactModel(margin=0.25)))
    assert [(c.request_id, c.num_tokens) for c in plan.chunks] == [(prompt.id, 89)], "without a margin"


def test_in_the_paper_one_without_a_row_becomes_a_lane_at_once() -> None:
    scene = Scene()
    scene.decoding(20, slo=SLO(1.0, 0.0111), last_token_s=0.0)
    for _ in range(4):
        scene.lane(20, in_flight=True)
    batch = scene.decoding(40, best_effort=True, last_token_s=0.0)
    slow_host = ExactModel(host_row=0.1)
    assert Displace(batch.id) in schedule(scene.state, 0.0, paper(slow_host)).moves
    ours = schedule(scene.state, 0.0, SloPolicy(slow_host, make_terms())).moves
    assert Displace(batch.id) not in ours


def test_the_papers_estimate_knows_neither_waiting_nor_chunking() -> None:
    scene = Scene()
    scene.decoding(20)
    request = scene.newcomer(640)
    found = paper().admit(scene.state, request, 0.9)
    ours = SloPolicy(ExactModel(), make_terms()).admit(scene.state, request, 0.9)
    assert found.is_accepted
    assert found.predicted_ttft_s == pytest.approx(0.010 + 0.641)
    assert ours.obstacle == "ttft"


def test_the_papers_estimate_takes_everybody_for_a_decode_too() -> None:
    """g = |D| + |P| + 1, and of each what it has of its text, and one."""
    scene = Scene()
    scene.decoding(20)
    scene.prefilling(100, 40)
    request = scene.newcomer(640)
    model = ExactModel(walk=0.0, row=0.0, decode=1e-2, context=1e-5)
    found = paper(model).admit(scene.state, request, 0.0)
    assert found.predicted_ttft_s == pytest.approx(3e-2 + (21 + 41 + 1) * 1e-5)
