"""Who shares the next step: `stable_diffusion/engine/batching.py`, without any tensor."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from stable_diffusion.engine.batching import Batching


@dataclass(frozen=True)
class Numbered:
    number: int
    batch_key: str = "512x512"


def test_jobs_of_one_key_share_a_step_up_to_the_cap_oldest_first() -> None:
    batching: Batching[Numbered] = Batching(3)
    for number in range(5):
        batching.add(Numbered(number))
    assert [job.number for job in batching.next_batch()] == [0, 1, 2]


def test_a_job_that_leaves_makes_room_for_the_next_one() -> None:
    batching: Batching[Numbered] = Batching(2)
    jobs = [Numbered(number) for number in range(3)]
    for job in jobs:
        batching.add(job)
    batching.remove(jobs[0])
    assert batching.next_batch() == [jobs[1], jobs[2]]
    assert len(batching) == 2


def test_keys_take_turns_so_that_none_starves() -> None:
    batching: Batching[Numbered] = Batching(10)
    for number in range(8):
        batching.add(Numbered(number, "512x512"))
    batching.add(Numbered(8, "768x768"))
    batching.add(Numbered(9, "64x64"))
    turns = [batching.next_batch()[0].batch_key for _ in range(6)]
    assert turns == ["512x512", "768x768", "64x64"] * 2


def test_newcomers_of_a_busy_key_do_not_keep_another_key_from_its_turn() -> None:
    batching: Batching[Numbered] = Batching(2)
    batching.add(Numbered(0, "a"))
    batching.add(Numbered(1, "b"))
    turns = []
    for number in range(2, 10):
        batching.add(Numbered(number, "a"))
        turns.append(batching.next_batch()[0].batch_key)
    assert turns == ["a", "b"] * 4


def test_a_key_may_have_a_cap_of_its_own_which_running_out_of_memory_still_lowers() -> None:
    batching: Batching[Numbered] = Batching(10, cap_for=lambda key: 4 if key == "512x512" else 50)
    assert (batching.cap("512x512"), batching.cap("64x64")) == (4, 10)
    batching.lower_cap("512x512", 2)
    assert batching.cap("512x512") == 2


def test_nothing_to_do_gives_an_empty_batch() -> None:
    batching: Batching[Numbered] = Batching(2)
    job = Numbered(0)
    batching.add(job)
    batching.remove(job)
    batching.remove(job)
    assert batching.next_batch() == []
    assert len(batching) == 0


def test_a_lowered_cap_holds_for_its_key_only_and_is_never_raised() -> None:
    batching: Batching[Numbered] = Batching(4)
    for number in range(4):
        batching.add(Numbered(number, "large"))
        batching.add(Numbered(number, "small"))
    batching.lower_cap("large", 2)
    batching.lower_cap("large", 3)
    assert [len(batching.next_batch()) for _ in range(4)] == [2, 4, 2, 4]
    batching.lower_cap("large", 0)
    assert batching.cap("large") == 1


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Batching(0)
