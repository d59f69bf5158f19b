"""A mixed load on a server that fails on purpose (`faulty/service.py`), and a ledger of every request against its answer.

A request is answered as its kind allows, or, while the server is being disturbed, with an error that says so; nothing else is even.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests import faults
from tests.http.servers import PLAIN_HTTP

PROMPT = "a red circle on a blue background"
SEEDS = range(3)
LEVELS = 2  # of 255 that a picture may differ from itself when it was drawn alone
ANSWERED_WITHIN_S = 120
HURRIED_SIDES = range(64, 136, 8)

# What a server may say while one of its processes is away, or while it stops.
DISTURBED = {"model_unavailable", "model_loading", "shutting_down", "jobs_unavailable", "broken connection", "refused connection"}

SOUND: dict[str, dict[str, Any]] = {
    "txt2img": {"num_inference_steps": 4},
    "unguided": {"num_inference_steps": 6, "guidance_scale": 1.0, "scheduler": "Euler a"},
    "img2img": {"num_inference_steps": 6, "strength": 0.7},
    "inpaint": {"num_inference_steps": 5, "strength": 0.9, "scheduler": "DPM++ 2M"},
}


@dataclass(frozen=True)
class Entry:
    asked: str
    answered: str  # "picture", "left", "cancelled", or the type of an error
    began_s: float  # by time.monotonic
    seconds: float


class Uneven(AssertionError):
    """A request was answered otherwise than it may be."""


@dataclass
class Load:
    """Clients that send requests until they are told to stop. Each picture is held against the same one drawn alone."""

    url: str
    seed: int
    allowed_besides: set[str] = field(default_factory=set)
    entries: list[Entry] = field(default_factory=list)
    alone: dict[tuple[str, int], np.ndarray[Any, Any]] = field(default_factory=dict)

    def draw_alone(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60, **PLAIN_HTTP) as client:
            for kind in SOUND:
                for seed in SEEDS:
                    path, arguments = _request(kind, seed)
                    self.alone[kind, seed] = _pixels(client.post(path, **arguments).raise_for_status().content)

    def draw_every_size(self) -> None:
        """torch keeps what it has compiled for a size: some 140 MB for all of these, once."""
        with httpx.Client(base_url=self.url, timeout=60, **PLAIN_HTTP) as client:
            for width in HURRIED_SIDES:
                for height in HURRIED_SIDES:
                    body = {"prompt": PROMPT, "num_inference_steps": 2, "width": width, "height": height}
                    client.post("/txt2img", json=body).raise_for_status()

    async def run(self, clients: int, go_on: Callable[[], bool], kinds: tuple[str, ...] = ()) -> None:
        """Returns when all that was sent is answered. Raises Uneven for the first that is not as it may be."""
        await asyncio.gather(*(self._client(number, go_on, kinds or tuple(_KINDS)) for number in range(clients)))

    async def _client(self, number: int, go_on: Callable[[], bool], kinds: tuple[str, ...]) -> None:
        chance = random.Random(f"{self.seed} {number}")
        while go_on():
            kind = chance.choice(kinds)
            began = time.monotonic()
            try:
                # A connection of its own each time: any API worker may get it.
                async with httpx.AsyncClient(base_url=self.url, timeout=ANSWERED_WITHIN_S, **PLAIN_HTTP) as client:
                    answered = await _KINDS[kind](self, client, chance)
            except httpx.ConnectError:
                answered = "refused connection"
            except httpx.TransportError as error:
                answered = "never answered" if isinstance(error, httpx.TimeoutException) else "broken connection"
            self.entries.append(Entry(kind, answered, began, time.monotonic() - began))
            if answered not in _ALLOWED[kind] | self.allowed_besides:
                raise Uneven(f"{kind} was answered with {answered!r} after {self.entries[-1].seconds:.1f} s")
            if answered in DISTURBED:
                await asyncio.sleep(0.2)

    def summary(self) -> str:
        counts = Counter(f"{entry.asked}: {entry.answered}" for entry in self.entries)
        return f"{len(self.entries)} requests; " + ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))

    def require_same(self, kind: str, seed: int, content: bytes) -> str:
        difference = np.abs(_pixels(content) - self.alone[kind, seed]).max()
        return "picture" if difference <= LEVELS else f"another picture ({difference} levels)"


def _pixels(content: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def _request(kind: str, seed: int, **changes: Any) -> tuple[str, dict[str, Any]]:
    fields = {"prompt": PROMPT, "seed": seed, "output_format": "png", **SOUND[kind], **changes}
    if "strength" not in fields:
        return "/txt2img", {"json": fields}
    files = {"img": _INPUT} if kind == "img2img" else {"img": _INPUT, "mask": _MASK}
    return f"/{kind}", {"files": files, "data": {"data": json.dumps(fields)}}


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


_INPUT = _png(Image.linear_gradient("L").resize((64, 64)).convert("RGB"))
_MASK = _png(Image.linear_gradient("L").resize((64, 64)).point(lambda level: 255 if level > 127 else 0))


def _error_of(response: httpx.Response) -> str:
    error = response.json().get("error")
    return str(error if isinstance(error, str) else error.get("code") or error["type"])


async def _plain(load: Load, client: httpx.AsyncClient, chance: random.Random) -> str:
    kind, seed = chance.choice(tuple(SOUND)), chance.choice(SEEDS)
    path, arguments = _request(kind, seed)
    response = await client.post(path, **arguments)
    return load.require_same(kind, seed, response.content) if response.status_code == 200 else _error_of(response)


async def _events(load: Load, client: httpx.AsyncClient, chance: random.Random) -> str:
    seed = chance.choice(SEEDS)
    path, arguments = _request("txt2img", seed, preview_every_steps=1)
    async with client.stream("POST", path, headers={"Accept": "text/event-stream"}, **arguments) as response:
        if response.status_code != 200:
            await response.aread()
            return _error_of(response)
        last = ""
        async for line in response.aiter_lines():
            last = line if line.startswith("data: ") else last
    data = json.loads(last.removeprefix("data: ") or "{}")
    if "error" in data:
        return str(data["error"]["type"])
    return load.require_same("txt2img", seed, base64.b64decode(data["image"])) if "image" in data else "broken connection"


async def _openai(load: Load, client: httpx.AsyncClient, chance: random.Random) -> str:
    response = await client.post("/v1/images/generations", json={"prompt": PROMPT, "n": 2, "seed": 0, "num_inference_steps": 4})
    if response.status_code != 200:
        return _error_of(response)
    answers = {load.require_same("txt2img", one["seed"], base64.b64decode(one["b64_json"])) for one in response.json()["data"]}
    return answers.pop() if len(answers) == 1 else "unequal"


async def _a1111(load: Load, client: httpx.AsyncClient, chance: random.Random) -> str:
    seed = chance.choice(SEEDS)
    body = {"prompt": PROMPT, "seed": seed, "steps": 4, "cfg_scale": 7.5, "sampler_name": "PNDM"}
    response = await client.post("/sdapi/v1/txt2img", json=body)
    if response.status_code != 200:
        return _error_type_of_a1111(response)
    return load.require_same("txt2img", seed, base64.b64decode(response.json()["images"][0]))


def _error_type_of_a1111(response: httpx.Response) -> str:
    """Its errors have the names of ours as classes."""
    name = str(response.json()["error"])
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


async def _asynchronous(load: Load, client: httpx.AsyncClient, chance: random.Random) -> str:
    seed = chance.choice(SEEDS)
    path, arguments = _request("txt2img", seed)
    taken = await client.post(path, headers={"Prefer": "respond-async"}, **arguments)
    if taken.status_code != 202:
        return _error_of(taken)
    return await _end_of(load, client, taken.headers["location"], seed)


async def _end_of(load: Load, client: httpx.AsyncClient, location: str, seed: int) -> str:
    """What was accepted must have an end, whatever happens to the processes: broken connections are asked again."""
    deadline = time.monotonic() + ANSWERED_WITHIN_S
    while time.monotonic() < deadline:
        try:
            response = await client.get(location)
            if response.status_code == 503:
                await asyncio.sleep(0.2)
                continue
            job = response.json()
            if job["state"] == "completed":
                return load.require_same("txt2img", seed, (await client.get(job["picture"])).raise_for_status().content)
            if job["state"] in ("failed", "cancelled"):
                return str(job["error"]["type"])
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.1)
    return "accepted and never ended"


async def _cancelled(load: Load, client: httpx.AsyncClient, chance: random.Random) -> str:
    path, arguments = _request("txt2img", 0, num_inference_steps=100)
    taken = await client.post(path, headers={"Prefer": "respond-async"}, **arguments)
    if taken.status_code != 202:
        return _error_of(taken)
    await asyncio.sleep(chance.random() * 0.3)
    await client.delete(taken.headers["location"])
    return await _end_of(load, client, taken.headers["location"], 0)


async def _leaving(load: Load, client: httpx.AsyncClient, chance: random.Random) -> str:
    path, arguments = _request(chance.choice(tuple(SOUND)), 0, num_inference_steps=100)
    accept = chance.choice(("image/png", "text/event-stream"))
    try:
        response = await asyncio.wait_for(client.post(path, headers={"Accept": accept}, **arguments), 0.05 + chance.random() * 0.4)
    except asyncio.TimeoutError:
        return "left"
    return "picture" if response.status_code == 200 else _error_of(response)


async def _failing(load: Load, client: httpx.AsyncClient, chance: random.Random) -> str:
    fault = chance.choice(faults.FAILING)
    # A size of its own for what lowers the cap, so that the others go on in company.
    width = 72 if fault == faults.FITS_NEVER else 64
    path, arguments = _request("txt2img", chance.randrange(100), prompt=f"{PROMPT} {fault}", width=width)
    response = await client.post(path, **arguments)
    return "a picture in spite of its fault" if response.status_code == 200 else _error_of(response)


async def _contained(load: Load, client: httpx.AsyncClient, chance: random.Random) -> str:
    """The fault stands in the negative prompt, which makes no difference to a picture without guidance."""
    fault, seed = chance.choice(faults.CONTAINED), chance.choice(SEEDS)
    lowers_the_cap = fault == faults.FITS_ALONE_ONLY
    path, arguments = _request("unguided", seed, negative_prompt=fault, width=72 if lowers_the_cap else 64)
    response = await client.post(path, **arguments)
    if response.status_code != 200:
        return _error_of(response)
    if (response.headers.get("decoded_again") == "float32") != (fault in faults.DECODED_AGAIN):
        return "not said"
    return "picture" if lowers_the_cap else load.require_same("unguided", seed, response.content)


async def _wrong(load: Load, client: httpx.AsyncClient, chance: random.Random) -> str:
    wrong: dict[str, Any] = chance.choice(({"height": 100}, {"strength": 2}, {"seed": -1}, {"prompt": ""}, {"num_inference_steps": 10**9}))
    return _error_of(await client.post("/txt2img", json={"prompt": PROMPT, **wrong}))


async def _hurried(load: Load, client: httpx.AsyncClient, chance: random.Random) -> str:
    """Of a size that was drawn before it is refused at once, of most others dropped later."""
    sides = {side: chance.choice(HURRIED_SIDES) for side in ("width", "height")}
    path, arguments = _request("txt2img", 0, num_inference_steps=150, **sides)
    response = await client.post(path, headers={"Request-Timeout": f"{0.05 + chance.random():.3f}"}, **arguments)
    if response.status_code == 200:
        return "picture"
    return "dropped" if "was not finished" in response.text else _error_of(response)


_KINDS: dict[str, Callable[[Load, httpx.AsyncClient, random.Random], Awaitable[str]]] = {
    "plain": _plain,
    "events": _events,
    "openai": _openai,
    "a1111": _a1111,
    "asynchronous": _asynchronous,
    "cancelled": _cancelled,
    "leaving": _leaving,
    "failing": _failing,
    "contained": _contained,
    "wrong": _wrong,
    "hurried": _hurried,
}
_PICTURE = {"picture"}
_ALLOWED: dict[str, set[str]] = {
    "plain": _PICTURE,
    "events": _PICTURE,
    "openai": _PICTURE,
    "a1111": _PICTURE,
    "asynchronous": _PICTURE,
    "cancelled": {"cancelled", "too_many_jobs"},
    "leaving": {"left"},
    "failing": {"generation_failed"},
    "contained": _PICTURE,
    "wrong": {"invalid_request"},
    "hurried": {"deadline_exceeded", "dropped"},
}
SOUND_KINDS = ("plain", "events", "openai", "a1111", "asynchronous")
