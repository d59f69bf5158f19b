"""Fewer threads while steps are held up, all again when they are not: on made-up times."""

from __future__ import annotations

import pytest

from stable_diffusion.core.settings import operators_threads
from stable_diffusion.engine.threads import ThreadCount, of_process


class Machine:
    """Steps of one kind: how long they take by the number of threads, alone and beside another program."""

    def __init__(self, threads: int, alone_s: dict[int, float], beside_s: dict[int, float]) -> None:
        self.alone_s, self.beside_s = alone_s, beside_s
        self.is_busy = False
        self.now_s = 0.0
        self.set_to: list[int] = []
        self.said: list[str] = []
        self.count = ThreadCount(threads, self.set_to.append, self.said.append)

    def step(self, kind: str = "2 rows", times: float = 1.0) -> int:
        """The threads with which it was computed."""
        threads = self.count.threads
        seconds = times * (self.beside_s if self.is_busy else self.alone_s)[threads]
        self.now_s += seconds
        self.count.note_step(kind, seconds, self.now_s)
        return threads

    def run_for(self, seconds: float) -> list[int]:
        end_s = self.now_s + seconds
        found = []
        while self.now_s < end_s:
            found.append(self.step())
        return found


@pytest.fixture
def machine() -> Machine:
    """Two cores, the measured times of the demo model."""
    return Machine(2, alone_s={1: 0.052, 2: 0.032}, beside_s={1: 0.045, 2: 0.225})


def test_alone_all_threads_compute_all_the_time(machine: Machine) -> None:
    assert set(machine.run_for(60)) == {2}
    assert machine.set_to == []
    assert machine.said == []


def test_beside_another_program_fewer_threads_compute_from_the_second_slow_step_on(machine: Machine) -> None:
    machine.run_for(2)
    machine.is_busy = True
    found = machine.run_for(4)
    assert found[:2] == [2, 2]
    assert set(found[2:]) == {1}
    assert len(machine.said) == 1


def test_a_step_that_takes_seconds_is_enough(machine: Machine) -> None:
    machine.run_for(2)
    machine.is_busy = True
    machine.beside_s[2] = 4.3
    assert [machine.step() for _ in range(3)] == [2, 1, 1]


def test_while_the_other_program_runs_more_threads_are_tried_ever_more_seldom(machine: Machine) -> None:
    machine.run_for(2)
    machine.is_busy = True
    machine.run_for(5)
    found = machine.run_for(200)
    assert 3 <= found.count(2) <= 7
    assert sum(threads == 1 for threads in found) > 0.99 * len(found)


def test_when_the_other_program_has_ended_all_threads_compute_again(machine: Machine) -> None:
    machine.run_for(2)
    machine.is_busy = True
    machine.run_for(20)
    machine.is_busy = False
    machine.run_for(61)
    assert set(machine.run_for(5)) == {2}
    assert len(machine.said) == 2


def test_a_single_slow_step_changes_nothing(machine: Machine) -> None:
    machine.run_for(2)
    assert [machine.step(times=5.0), machine.step(), machine.step(times=5.0), machine.step()] == [2, 2, 2, 2]


def test_the_first_steps_of_a_kind_may_take_long(machine: Machine) -> None:
    machine.run_for(2)
    assert [machine.step("20 rows", times=times) for times in (60.0, 30.0, 10.0)] == [2, 2, 2]


def test_many_threads_are_halved_until_steps_are_no_longer_held_up() -> None:
    by_threads = {16: 0.1, 8: 0.12, 4: 0.2, 2: 0.4, 1: 0.8}
    machine = Machine(16, alone_s=by_threads, beside_s={**by_threads, 16: 5.0, 8: 3.0})
    machine.run_for(2)
    machine.is_busy = True
    machine.run_for(12)
    assert machine.set_to[:2] == [8, 4]
    assert machine.count.threads == 4


def test_a_trial_that_meets_other_steps_ends_when_these_are_held_up(machine: Machine) -> None:
    for _ in range(5):
        machine.step()
        machine.step("8 rows", times=2.0)
    machine.is_busy = True
    machine.step(), machine.step()
    assert machine.count.threads == 1
    machine.run_for(6)
    while machine.count.threads == 1:
        machine.step()
    assert machine.step("8 rows", times=2.0) == 2, "the trial"
    assert machine.count.threads == 1


def test_a_trial_that_fails_returns_to_the_number_before_it() -> None:
    by_threads = {3: 0.1, 2: 0.14, 1: 0.3}
    machine = Machine(3, alone_s=by_threads, beside_s={3: 5.0, 2: 5.0, 1: 0.3})
    machine.run_for(2)
    machine.is_busy = True
    machine.run_for(6)
    assert machine.count.threads == 1
    machine.beside_s[2] = 0.14
    machine.run_for(40)
    assert machine.count.threads == 2, "3 were tried and failed"


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS"])
def test_what_the_operator_sets_about_threads_wins(name: str) -> None:
    set_to: list[int] = []
    assert of_process({name: "x"}, 8, set_to.append, print) is None
    assert set_to == []
    assert of_process({"PATH": "/bin", "SD_MODEL": "demo"}, 8, set_to.append, print) is not None
    assert of_process({"PATH": "/bin"}, 1, set_to.append, print) is None, "nothing to decide"


def test_the_operators_number_of_threads_is_used() -> None:
    set_to: list[int] = []
    assert of_process({"OMP_NUM_THREADS": "3"}, 8, set_to.append, print) is None
    assert set_to == [3]


def test_what_the_first_process_has_kept_counts_more_than_what_bentoml_has_set() -> None:
    bentomls = {"OMP_NUM_THREADS": "8", "MKL_NUM_THREADS": "8"}
    assert operators_threads({**bentomls, "SD_OPERATORS_THREADS": ""}) == ""
    assert operators_threads({**bentomls, "SD_OPERATORS_THREADS": "2"}) == "2"
    assert operators_threads(bentomls) == "8"
