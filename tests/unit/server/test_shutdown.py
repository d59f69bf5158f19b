"""An API worker stops after SIGTERM when its work is finished, and polling clients do not delay it."""

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


async def discard(_: Any) -> None:
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


def test_running_requests_finish_and_new_ones_are_refused() -> None:
    async def stop() -> None:
        unfinished = Unfinished(grace_s=60)
        middleware = Draining(slow, unfinished, refused)
        begun = asyncio.ensure_future(middleware(scope("/txt2img"), no_messages, discard))
        await asyncio.sleep(0)
        assert 0.05 < await stopped_after_s(unfinished) < 1
        with pytest.raises(PermissionError):
            await middleware(scope("/txt2img"), no_messages, discard)
        await begun

    asyncio.run(stop())


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/jobs/a1", "/jobs/a1/picture"])
def test_polling_clients_are_served_and_do_not_delay_the_shutdown(path: str) -> None:
    async def stop() -> None:
        unfinished = Unfinished(grace_s=60)
        middleware = Draining(slow, unfinished, refused)

        async def poll_for_ever() -> None:
            while True:
                await middleware(scope(path), no_messages, discard)

        polling = []
        for _ in range(4):
            polling.append(asyncio.ensure_future(poll_for_ever()))
            await asyncio.sleep(0.025)
        assert await stopped_after_s(unfinished) < 1
        assert not any(one.done() for one in polling)
        for one in polling:
            one.cancel()

    asyncio.run(stop())


def test_the_shutdown_does_not_wait_long_after_the_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "_NOTICE_TIME_S", 0.2)

    async def stop() -> None:
        unfinished = Unfinished(grace_s=0.2)
        with unfinished.piece_of_work():
            assert 0.35 < await stopped_after_s(unfinished) < 2
            assert unfinished.grace_is_over.is_set()

    asyncio.run(stop())


def test_the_stop_function_is_called_once() -> None:
    async def stop() -> int:
        calls = []
        unfinished = Unfinished(grace_s=60)
        unfinished.stop_when_done(lambda: calls.append(1))
        for _ in range(3):
            with unfinished.piece_of_work():
                pass
        return len(calls)

    assert asyncio.run(stop()) == 1
