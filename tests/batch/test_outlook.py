"""Whether open batches will end in time, at a pace that is given."""

from __future__ import annotations

from omniserve.batch.jobs import Job, lines_until_through, outlook
from omniserve.batch.records import BatchRecord

NOW = 1000.0


def job(seq: int, expires_at: int, num_lines: int, completed: int = 0, owner: str = "anna") -> Job:
    return Job(
        BatchRecord(
            seq=seq,
            id=f"batch_{seq}",
            owner=owner,
            endpoint="/v1/chat/completions",
            input_file_id="file-1",
            completion_window="24h",
            expires_at=expires_at,
            output_life_s=None,
            metadata=None,
            output_file_id="file-2",
            error_file_id="file-3",
            created_at=0,
            total=num_lines,
            completed=completed,
        )
    )


def test_a_batch_waits_for_the_lines_of_those_before_it() -> None:
    first, second = job(2, 1100, 50), job(1, 1120, 100, completed=25)
    assert outlook([second, first], NOW, 1.0) == (1, 125.0), "50 s, then 75 s more: 5 s late"
    assert outlook([second, first], NOW, 2.0) == (0, 62.5)


def test_beside_a_batch_other_owners_run_as_many_lines_as_its_own() -> None:
    mine, behind, theirs = job(1, 1100, 10), job(2, 1200, 10), job(3, 1050, 15, owner="ben")
    assert lines_until_through([mine, behind, theirs]) == {1: 20, 2: 35, 3: 30}
    assert outlook([mine, behind, theirs], NOW, 0.25) == (1, 140.0), "theirs takes 120 s of 50"


def test_without_a_pace_only_what_is_past_its_window_is_surely_late() -> None:
    assert outlook([job(1, 999, 5), job(2, 1001, 10_000)], NOW, None) == (1, None)


def test_no_batches_are_not_late() -> None:
    assert outlook([], NOW, 2.0) == (0, 0.0)
    assert outlook([], NOW, None) == (0, None)
