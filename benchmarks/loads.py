"""What the clients ask for, and how many of them there are. Knows nothing of who answers."""

from __future__ import annotations

from dataclasses import dataclass

from stable_diffusion.engine.job import Task

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
SHAPES = ("circle", "square", "triangle", "star")


@dataclass(frozen=True)
class Load:
    """A closed loop: each of `clients` asks for its next picture when it has got one, `requests` pictures in all."""

    name: str
    clients: int
    requests: int
    steps: tuple[int, ...]  # in turn
    guidance_scales: tuple[float, ...] = (7.5,)  # in turn

    def tasks(self, side: int) -> list[Task]:
        return [
            Task(
                kind="txt2img",
                prompt=f"a {COLOURS[number % 6]} {SHAPES[number % 4]} on a {COLOURS[(number + 1) % 6]} background",
                negative_prompt="",
                width=side,
                height=side,
                num_inference_steps=self.steps[number % len(self.steps)],
                guidance_scale=self.guidance_scales[number % len(self.guidance_scales)],
                seed=number,
                scheduler="DDIMScheduler",
                safety_check=False,
            )
            for number in range(self.requests)
        ]


def closed_loops(steps: int, requests_per_client: int) -> list[Load]:
    """The same steps for all at 1, 4, 8 and 16 clients, and mixed steps and guidance at 8."""
    same = [Load(f"same steps, {clients} clients", clients, clients * requests_per_client, (steps,)) for clients in (1, 4, 8, 16)]
    mixed_steps = tuple(max(1, steps * share // 50) for share in (4, 50, 12, 30, 20))
    return [*same, Load("mixed, 8 clients", 8, 8 * requests_per_client, mixed_steps, (7.5, 1.0, 7.5))]
