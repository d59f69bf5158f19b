"""When an API worker stops after SIGTERM: not before it has finished, and not later because somebody goes on asking."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from stable_diffusion.core import shutdown
from stable_diffusion.core.shutdown import Unfinished
from stable_diffusion.server.middleware import Draining


async def no_messages() -> Any:
    raise AssertionError("nothing is read")


async def unheard(_: Any) -> None:
    return


async def slow(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(0.1)


async def refused(scope: Scope, receive: Receive, send: Send) -> None:
    raise PermissionError(scope["path"])


def scope(path: str) -> Scope:
    return {"type": "http", "path": path}


async def stopped_after_s(unfinished: Unfinished, *, at_most_s: float = 5) -> float:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    began_s = loop.time()
    unfinished.stop_when_done(stopped.set)
    await asyncio.wait_for(stopped.wait(), at_most_s)
    return loop.time() - began_s


def test_what_was_begun_is_finished_first_and_what_is_new_is_refused() -> None:
    async def stop() -> None:
        unfinished = Unfinished(grace_s=60)
        door = Draining(slow, unfinished, refused)
        begun = asyncio.ensure_future(door(scope("/txt2img"), no_messages, unheard))
        await asyncio.sleep(0)
        assert 0.05 < await stopped_after_s(unfinished) < 1
        with pytest.raises(PermissionError):
            await door(scope("/txt2img"), no_messages, unheard)
        await begun

    asyncio.run(stop())


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/jobs/a1", "/jobs/a1/picture"])
def test_who_goes_on_asking_is_answered_and_keeps_nobody_from_stopping(path: str) -> None:
    async def stop() -> None:
        unfinished = Unfinished(grace_s=60)
        door = Draining(slow, unfinished, refused)

        async def ask_for_ever() -> None:
            while True:
                await door(scope(path), no_messages, unheard)

        asking = []
        for _ in range(4):
            asking.append(asyncio.ensure_future(ask_for_ever()))
            await asyncio.sleep(0.025)
        assert await stopped_after_s(unfinished) < 1
        assert not any(one.done() for one in asking)
        for one in asking:
            one.cancel()

    asyncio.run(stop())


def test_what_does_not_end_with_the_grace_period_is_not_waited_for_much_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "_TIME_TO_TELL_S", 0.2)

    async def stop() -> None:
        unfinished = Unfinished(grace_s=0.2)
        with unfinished.piece_of_work():
            assert 0.35 < await stopped_after_s(unfinished) < 2
            assert unfinished.grace_is_over.is_set()

    asyncio.run(stop())


def test_the_server_is_told_to_stop_once() -> None:
    async def stop() -> int:
        told = []
        unfinished = Unfinished(grace_s=60)
        unfinished.stop_when_done(lambda: told.append(1))
        for _ in range(3):
            with unfinished.piece_of_work():
                pass
        return len(told)

    assert asyncio.run(stop()) == 1
