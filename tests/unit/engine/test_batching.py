"""Who shares the next step: `stable_diffusion/engine/batching.py`, without any tensor."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from stable_diffusion.engine.batching import Batching, JobT


@dataclass(frozen=True)
class Numbered:
    number: int
    batch_key: str = "512x512"
    steps_left: int = 50
    owner: str = "somebody"


def next_batch(batching: Batching[JobT]) -> list[JobT]:
    """As the engine takes it when all jobs are ready."""
    jobs, batch_limit = batching.next_turn()
    for job in jobs[:batch_limit]:
        batching.note_start(job)
    return jobs[:batch_limit]


def test_jobs_of_one_key_share_a_step_up_to_the_cap_oldest_first() -> None:
    batching: Batching[Numbered] = Batching(3)
    for number in range(5):
        batching.add(Numbered(number))
    assert [job.number for job in next_batch(batching)] == [0, 1, 2]


@dataclass(eq=False)
class Counting:
    """A job whose steps are taken."""

    steps_left: int
    batch_key: str = "512x512"
    owner: str = "somebody"


def take_a_step(batching: Batching[Counting]) -> None:
    for job in next_batch(batching):
        job.steps_left -= 1
        if not job.steps_left:
            batching.remove(job)


def test_a_short_job_does_not_wait_for_the_end_of_long_ones_that_fill_the_batch() -> None:
    batching: Batching[Counting] = Batching(2)
    for _ in range(4):
        batching.add(Counting(50))
    for _ in range(20):
        take_a_step(batching)
    short = Counting(4)
    batching.add(short)
    for _ in range(4):
        take_a_step(batching)
    assert short.steps_left == 0


def test_everybody_is_told_where_he_stands_and_how_many_batches_there_are_before_his_end() -> None:
    batching: Batching[Counting] = Batching(2)
    jobs = [Counting(10) for _ in range(4)]
    for job in jobs:
        batching.add(job)
        next_batch(batching)
    told = list(batching.standings())
    assert [standing.job for standing in told] == jobs
    assert [standing.position for standing in told] == [0, 0, 1, 2]
    # Two at a time: those who wait have 20 and 30 steps before them.
    assert [standing.batches_left for standing in told] == [10, 10, 20, 25]


def test_another_size_that_takes_turns_makes_everything_twice_as_long() -> None:
    batching: Batching[Counting] = Batching(2)
    batching.add(Counting(10))
    batching.add(Counting(10, "768x768"))
    assert [standing.batches_left for standing in batching.standings()] == [20, 20]


def test_jobs_of_the_same_length_are_finished_in_the_order_in_which_they_came() -> None:
    batching: Batching[Counting] = Batching(2)
    jobs = [Counting(10) for _ in range(6)]
    ended: list[Counting] = []
    for job in jobs:
        batching.add(job)
        take_a_step(batching)
        ended += [job for job in jobs if not job.steps_left and job not in ended]
    while len(batching):
        take_a_step(batching)
        ended += [job for job in jobs if not job.steps_left and job not in ended]
    assert ended == jobs


def test_a_long_job_is_finished_however_many_short_ones_keep_coming() -> None:
    batching: Batching[Counting] = Batching(1)
    long = Counting(50)
    batching.add(long)
    steps = 0
    while long.steps_left:
        if steps % 4 == 0:
            batching.add(Counting(4))  # as many as can be done, for ever
        take_a_step(batching)
        steps += 1
    # Those of the first 2 * 50 - 2 * 4 steps may overtake it, none that comes later.
    assert steps <= 100 + 50


@pytest.mark.parametrize("batch_limit", [1, 2, 4])
def test_ten_pictures_of_one_owner_delay_another_ones_by_one_at_most(batch_limit: int) -> None:
    batching: Batching[Counting] = Batching(batch_limit)
    for _ in range(10):
        batching.add(Counting(50, owner="many"))
    for _ in range(5):
        take_a_step(batching)
    one = Counting(50, owner="one")
    batching.add(one)
    turns = 0
    while one.steps_left:
        take_a_step(batching)
        turns += 1
    assert turns <= 50 + 50


def test_ten_sizes_of_one_owner_have_no_more_turns_than_the_one_of_another() -> None:
    batching: Batching[Counting] = Batching(4)
    for side in range(10):
        batching.add(Counting(50, f"{side}", "many"))
    one = Counting(50, "64x64", "one")
    batching.add(one)
    for _ in range(101):
        take_a_step(batching)
    assert one.steps_left == 0


def test_two_owners_with_endless_queues_get_the_same_number_of_steps_though_one_of_them_sends_more_at_once() -> None:
    batching: Batching[Counting] = Batching(1)
    taken = {"many": 0, "few": 0}
    for turn in range(3000):
        if turn % 400 == 0:
            for owner, count in (("many", 40), ("few", 4)):
                for _ in range(count):
                    batching.add(Counting(50, owner=owner))
        (job,) = next_batch(batching)
        taken[job.owner] += 1
        job.steps_left -= 1
        if not job.steps_left:
            batching.remove(job)
    assert abs(taken["many"] - taken["few"]) <= 100, taken


@pytest.mark.parametrize(("batch_limit", "steps", "every"), [(1, 20, 20), (4, 20, 5), (10, 30, 3), (1, 4, 4)])
@pytest.mark.parametrize("owners", [1, 5, 20, 10**6])
def test_a_long_job_is_finished_however_many_owners_keep_coming_with_shorter_ones(
    batch_limit: int, steps: int, every: int, owners: int
) -> None:
    batching: Batching[Counting] = Batching(batch_limit)
    long = Counting(50, owner="long")
    batching.add(long)
    turns = 0
    while long.steps_left:
        if turns % every == 0:
            batching.add(Counting(steps, owner=f"{turns // every % owners}"))
        take_a_step(batching)
        turns += 1
        assert turns < 400


@pytest.mark.parametrize(
    ("batch_limit", "theirs", "mine", "most"), [(1, 10, 50, 110), (1, 50, 150, 310), (4, 20, 50, 60), (1, 4, 150, 310)]
)
def test_ten_shorter_pictures_of_one_owner_delay_a_longer_one_by_no_more_than_its_own_share(
    batch_limit: int, theirs: int, mine: int, most: int
) -> None:
    batching: Batching[Counting] = Batching(batch_limit)
    for _ in range(200 // theirs * 10):
        batching.add(Counting(theirs, owner="many"))
    take_a_step(batching)
    one = Counting(mine, owner="one")
    batching.add(one)
    turns = 0
    while one.steps_left:
        take_a_step(batching)
        turns += 1
    assert turns <= most


def test_an_owner_who_comes_back_has_no_debt_and_no_credit() -> None:
    batching: Batching[Counting] = Batching(1)
    for _ in range(3):
        batching.add(Counting(50, owner="early"))
    while len(batching):
        take_a_step(batching)
    early, late = Counting(50, owner="early"), Counting(50, owner="late")
    batching.add(early)
    batching.add(late)
    for _ in range(50):
        take_a_step(batching)
    assert (early.steps_left, late.steps_left) == (0, 50), "who came first is first"


def test_what_an_owner_cancels_is_not_its_debt() -> None:
    batching: Batching[Counting] = Batching(1)
    for _ in range(20):
        cancelled = Counting(50, owner="somebody")
        batching.add(cancelled)
        take_a_step(batching)
        batching.remove(cancelled)
    again, other = Counting(50, owner="somebody"), Counting(50, owner="other")
    batching.add(again)
    batching.add(other)
    for _ in range(50):
        take_a_step(batching)
    assert again.steps_left == 0


def test_a_short_job_goes_before_its_owners_long_ones_without_costing_another_owner_anything() -> None:
    def steps_of_the_other(*, with_a_short_one: bool) -> int:
        batching: Batching[Counting] = Batching(2)
        for _ in range(6):
            batching.add(Counting(50, owner="many"))
        other = Counting(50, owner="other")
        batching.add(other)
        for _ in range(10):
            take_a_step(batching)
        short = Counting(4, owner="many")
        if with_a_short_one:
            batching.add(short)
        for _ in range(10):
            take_a_step(batching)
        assert not with_a_short_one or short.steps_left == 0
        return 50 - other.steps_left

    assert steps_of_the_other(with_a_short_one=True) == steps_of_the_other(with_a_short_one=False) == 20


def test_a_job_that_leaves_makes_room_for_the_next_one() -> None:
    batching: Batching[Numbered] = Batching(2)
    jobs = [Numbered(number) for number in range(3)]
    for job in jobs:
        batching.add(job)
    batching.remove(jobs[0])
    assert next_batch(batching) == [jobs[1], jobs[2]]
    assert len(batching) == 2


def test_keys_take_turns_so_that_none_starves() -> None:
    batching: Batching[Numbered] = Batching(10)
    for number in range(8):
        batching.add(Numbered(number, "512x512"))
    batching.add(Numbered(8, "768x768"))
    batching.add(Numbered(9, "64x64"))
    turns = [next_batch(batching)[0].batch_key for _ in range(6)]
    assert turns == ["512x512", "768x768", "64x64"] * 2


def test_newcomers_of_a_busy_key_do_not_keep_another_key_from_its_turn() -> None:
    batching: Batching[Numbered] = Batching(2)
    batching.add(Numbered(0, "a"))
    batching.add(Numbered(1, "b"))
    turns = []
    for number in range(2, 10):
        batching.add(Numbered(number, "a"))
        turns.append(next_batch(batching)[0].batch_key)
    assert turns == ["a", "b"] * 4


def test_a_key_may_have_a_cap_of_its_own_which_running_out_of_memory_still_lowers() -> None:
    batching: Batching[Numbered] = Batching(10, batch_limit_for=lambda key: 4 if key == "512x512" else 50)
    assert (batching.batch_limit("512x512"), batching.batch_limit("64x64")) == (4, 10)
    batching.lower_batch_limit("512x512", 2)
    assert batching.batch_limit("512x512") == 2


def test_nothing_to_do_gives_an_empty_batch() -> None:
    batching: Batching[Numbered] = Batching(2)
    job = Numbered(0)
    batching.add(job)
    batching.remove(job)
    batching.remove(job)
    assert next_batch(batching) == []
    assert len(batching) == 0


def test_a_lowered_cap_holds_for_its_key_only_and_is_never_raised() -> None:
    batching: Batching[Numbered] = Batching(4)
    for number in range(4):
        batching.add(Numbered(number, "large"))
        batching.add(Numbered(number, "small"))
    batching.lower_batch_limit("large", 2)
    batching.lower_batch_limit("large", 3)
    assert [len(next_batch(batching)) for _ in range(4)] == [2, 4, 2, 4]
    batching.lower_batch_limit("large", 0)
    assert batching.batch_limit("large") == 1


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Batching(0)
