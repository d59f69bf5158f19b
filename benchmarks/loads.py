"""The loads: the tasks that clients request, and when. Does not know the contenders."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from stable_diffusion.core.types import Kind, Task

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
SHAPES = ("circle", "square", "triangle", "star")
KINDS: tuple[Kind, ...] = ("txt2img", "img2img", "inpaint")
SEED = 4


@dataclass(frozen=True)
class Load:
    """Tasks and their times: at `arrivals_s`, or from `clients` that each send the next request when they have the last image."""

    name: str
    tasks: tuple[Task, ...]
    clients: int = 0
    arrivals_s: tuple[float, ...] = ()
    counted: frozenset[int] | None = None  # positions of the tasks whose latency counts; None: all


def task(number: int, side: int, steps: int, guidance_scale: float = 7.5, kind: Kind = "txt2img") -> Task:
    """The task number `number`, with its own prompt and seed."""
    made = Task(
        kind=kind,
        prompt=f"a {COLOURS[number % 6]} {SHAPES[number % 4]} on a {COLOURS[(number + 1) % 6]} background",
        negative_prompt="",
        width=side,
        height=side,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=number,
        scheduler="DDIMScheduler",
        safety_check=False,
    )
    if kind != "txt2img":
        made = replace(made, image=_image(side), strength=0.8)
    if kind == "inpaint":
        made = replace(made, mask=_right_half(side))
    return made


def _image(side: int) -> Image.Image:
    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    return Image.fromarray(np.stack([np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), np.full((side, side), 90, np.uint8)], -1))


def _right_half(side: int) -> Image.Image:
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).rectangle((side // 2, 0, side, side), fill=255)
    return mask


def same_steps(side: int, steps: int, clients: int, requests_per_client: int) -> Load:
    tasks = tuple(task(number, side, steps) for number in range(clients * requests_per_client))
    return Load(f"{steps} steps, {clients} clients", tasks, clients=clients)


def _shortest(most_steps: int) -> int:
    return max(2, most_steps * 4 // 50)


def mixed_tasks(side: int, most_steps: int, requests: int) -> tuple[Task, ...]:
    """4 to 50 steps (where `most_steps` is 50), two thirds with guidance, all three kinds, two sizes."""
    chance = random.Random(SEED)
    shortest = _shortest(most_steps)
    return tuple(
        task(
            number,
            chance.choice((side, side, side * 3 // 2)),
            chance.choice((shortest, most_steps // 4, most_steps // 2, most_steps)),
            chance.choice((7.5, 7.5, 1.0)),
            chance.choice(KINDS),
        )
        for number in range(requests)
    )


def mixed(side: int, most_steps: int, clients: int, requests: int) -> Load:
    return Load(f"mixed, {clients} clients", mixed_tasks(side, most_steps, requests), clients=clients)


def mixed_arrivals(side: int, most_steps: int, requests: int, per_s: float, share: float) -> Load:
    """A Poisson process, the same one for every contender. `share`: `per_s` as a share of plain diffusers' capacity.

    With so few requests the rate would be off by up to a third, so the pauses are scaled until it is exact.
    """
    chance = random.Random(SEED)
    arrivals = list(itertools.accumulate(chance.expovariate(1.0) for _ in range(requests)))
    arrivals_s = tuple(arrival * requests / (per_s * arrivals[-1]) for arrival in arrivals)
    return Load(f"mixed, Poisson, {round(100 * share)} % of plain", mixed_tasks(side, most_steps, requests), arrivals_s=arrivals_s)


def short_among_long(side: int, most_steps: int, long: int, short: int, every_s: float) -> Load:
    """`long` requests at once, more than fit into a batch, and `short` ones that arrive meanwhile. Only the short ones are counted."""
    shortest = _shortest(most_steps)
    tasks = tuple(task(number, side, most_steps if number < long else shortest) for number in range(long + short))
    arrivals_s = (0.0,) * long + tuple((number + 1) * every_s for number in range(short))
    return Load(f"{shortest} steps among {most_steps}", tasks, arrivals_s=arrivals_s, counted=frozenset(range(long, long + short)))


def warm_up(side: int, requests: int) -> Load:
    """Not counted. Generates every kind and size once, and gives BentoML's adaptive batching requests to learn from."""
    return Load("warm-up", tuple(replace(one, num_inference_steps=3) for one in mixed_tasks(side, 50, requests)), clients=4)
