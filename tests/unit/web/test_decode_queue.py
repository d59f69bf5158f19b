"""Few uploads are decoded at a time, callers take turns, the queue is limited, and a cancelled caller takes no turn."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable

import pytest

from stable_diffusion.core.errors import QueueFull
from stable_diffusion.web import decode_queue
from stable_diffusion.web.decode_queue import Decoding


class Decoder:
    """Work that ends when `go_on` is called, and the order in which it began."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.at_once = 0
        self.most_at_once = 0
        self._may_end = threading.Semaphore(0)
        self._lock = threading.Lock()

    def of(self, name: str) -> Callable[[], str]:
        def work() -> str:
            with self._lock:
                self.begun.append(name)
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
            assert self._may_end.acquire(timeout=10)
            with self._lock:
                self.at_once -= 1
            return name

        return work

    def go_on(self, count: int) -> None:
        self._may_end.release(count)


async def until_all_have_begun_or_wait() -> None:
    await asyncio.sleep(0.05)


async def assert_both_places_are_free(queue: Decoding) -> None:
    """Of three, two begin at once, and the third begins when one of them has ended."""
    decoder = Decoder()
    asked = [asyncio.ensure_future(queue.run("next", decoder.of(f"next {number}"))) for number in range(3)]
    await until_all_have_begun_or_wait()
    assert len(decoder.begun) == 2
    decoder.go_on(3)
    assert await asyncio.gather(*asked) == ["next 0", "next 1", "next 2"]


def test_two_uploads_are_decoded_at_a_time_and_callers_take_turns() -> None:
    async def decode() -> list[str]:
        queue, decoder = Decoding(), Decoder()
        asked = [asyncio.ensure_future(queue.run("many", decoder.of(f"many {number}"))) for number in range(6)]
        await until_all_have_begun_or_wait()
        asked += [asyncio.ensure_future(queue.run("one", decoder.of("one")))]
        await until_all_have_begun_or_wait()
        for finished in range(1, 8):  # one at a time, so that thread scheduling cannot change the order
            decoder.go_on(1)
            while len(decoder.begun) < min(7, finished + 2):
                await asyncio.sleep(0.001)
        assert await asyncio.gather(*asked) == [*(f"many {number}" for number in range(6)), "one"]
        assert decoder.most_at_once == 2
        return decoder.begun

    begun = asyncio.run(decode())
    assert begun.index("one") <= 4, "after one of the others' at each of the two places"


def test_a_caller_cancelled_while_waiting_takes_no_turn() -> None:
    async def decode() -> list[str]:
        queue, decoder = Decoding(), Decoder()
        running = [asyncio.ensure_future(queue.run("a", decoder.of("first"))) for _ in range(2)]
        left = [asyncio.ensure_future(queue.run("a", decoder.of("left"))) for _ in range(3)]
        await until_all_have_begun_or_wait()
        for one in left:
            one.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        last = [asyncio.ensure_future(queue.run("a", decoder.of("last"))) for _ in range(2)]
        decoder.go_on(4)
        await asyncio.gather(*running, *last)
        await assert_both_places_are_free(queue)
        return decoder.begun

    assert asyncio.run(decode()) == ["first", "first", "last", "last"]


def test_a_caller_cancelled_when_its_turn_comes_passes_it_on() -> None:
    async def decode() -> None:
        queue, decoder = Decoding(), Decoder()
        busy = [asyncio.ensure_future(queue.run("a", decoder.of("first"))) for _ in range(2)]
        await until_all_have_begun_or_wait()
        leaving, staying = (asyncio.ensure_future(queue.run("a", decoder.of(name))) for name in ("leaves", "stays"))
        await until_all_have_begun_or_wait()
        queue._pass_on()  # as if one had ended: the turn is given but not yet taken
        leaving.cancel()
        await until_all_have_begun_or_wait()
        assert decoder.begun == ["first", "first", "stays"]
        decoder.go_on(3)
        assert await asyncio.gather(*busy, staying) == ["first", "first", "stays"]

    asyncio.run(decode())


def test_running_work_of_a_cancelled_caller_occupies_its_place_until_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    async def decode() -> None:
        queue, decoder = Decoding(), Decoder()

        def broken() -> str:
            decoder.of("broken")()
            raise ValueError("no picture")

        left = [asyncio.ensure_future(queue.run("a", work)) for work in (decoder.of("left"), broken)]
        await until_all_have_begun_or_wait()
        for one in left:
            one.cancel()
        staying = [asyncio.ensure_future(queue.run("a", decoder.of("stays"))) for _ in range(2)]
        await until_all_have_begun_or_wait()
        assert sorted(decoder.begun) == ["broken", "left"]
        decoder.go_on(4)
        assert await asyncio.gather(*staying) == ["stays"] * 2
        assert decoder.most_at_once == 2
        await assert_both_places_are_free(queue)

    asyncio.run(decode())
    gc.collect()
    assert caplog.text == ""


def test_the_queue_is_limited_per_caller_and_in_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_queue, "MAX_WAITING", 4)
    monkeypatch.setattr(decode_queue, "MAX_WAITING_OF_CALLER", 3)

    async def decode() -> None:
        queue, decoder = Decoding(), Decoder()
        asked = [asyncio.ensure_future(queue.run("a", decoder.of("a"))) for _ in range(5)]
        await until_all_have_begun_or_wait()
        with pytest.raises(QueueFull, match="^3 images of this caller are already waiting to be decoded, try again in 5 s") as refused:
            await queue.run("a", decoder.of("refused"))
        assert refused.value.retry_after_s == 5
        asked.append(asyncio.ensure_future(queue.run("b", decoder.of("b"))))
        await until_all_have_begun_or_wait()
        with pytest.raises(QueueFull, match="^4 images are already waiting"):
            await queue.run("b", decoder.of("refused"))
        decoder.go_on(6)
        assert await asyncio.gather(*asked) == ["a"] * 5 + ["b"]
        assert "refused" not in decoder.begun

    asyncio.run(decode())


def test_an_error_frees_its_place() -> None:
    async def decode() -> None:
        queue = Decoding()
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                await queue.run("a", lambda: 1 // 0)
        assert await queue.run("a", lambda: 1) == 1

    asyncio.run(decode())
