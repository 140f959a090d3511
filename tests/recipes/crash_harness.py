"""Kill a training run at random moments and resume it, again and again; run as a script, prints JSON.

    python crash_harness.py SCENES OUT KILLS BUGS WORLD CONFIG_BLOCKS

A parent that has imported everything forks a child for each start and rank, so that a kill costs milliseconds. Every
step draws from torch's generator, as a student with dropout would. With several ranks every other kill that follows
a save hits one rank alone; the others must then end by themselves.

BUGS names mistakes, each planted in a storm of its own, that the comparison must notice: `naive_save` (files written
in place, vouched for as they come), `forgotten_sampler` (every start begins the epoch again), `forgotten_random`
(torch's generators begin anew), `kept_rows` (metrics.jsonl is not cut back), `deaf` (a rank that has lost another
stays); `none`: none.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# What a run imports on its way takes longer than all the steps of a start: here it is imported once for all starts.
import scipy.ndimage  # noqa: F401
import torch
import torch._dynamo
from PIL import Image
from torch.nn import functional as F

import samlet.data.splits
import samlet.losses.task  # noqa: F401
from samlet.artefacts import MANIFEST, sha256_of
from samlet.config import RunConfig
from samlet.data.sampler import StepSampler
from samlet.engine import checkpoint, run_dir
from samlet.engine.step import TrainStep
from samlet.models import build
from samlet.recipes import train as recipe
from tests.tiny import tiny_config


def plant_naive_save() -> None:
    """Write checkpoints where they belong, file by file and slowly, vouching for whatever is there so far."""

    def vouch(folder: Path, **facts: Any) -> None:
        names = [place for place in folder.iterdir() if place.name != MANIFEST]
        files = {place.name: {"sha256": sha256_of(place), "bytes": place.stat().st_size} for place in names}
        (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}))

    def slowly(write: Callable[[Any, Path], object]) -> Callable[[Any, Path], None]:
        def written(content: Any, place: Path) -> None:
            vouch(place.parent)
            time.sleep(0.05)
            write(content, place)

        return written

    def write_in_place(path: Path, fill: Callable[[Path], object], **facts: Any) -> None:
        path.mkdir(parents=True, exist_ok=True)
        fill(path)
        vouch(path, **facts)

    names = ("save_file", "save_sam_safetensors")
    slow = {name: slowly(vars(checkpoint)[name]) for name in names}
    vars(checkpoint).update(slow, write_directory=write_in_place)


def plant_forgotten_sampler() -> None:
    """Start every epoch again after a resume."""
    init = StepSampler.__init__

    def forgetful(self: StepSampler, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "start_step": 0})

    StepSampler.__init__ = forgetful  # type: ignore[method-assign]


def plant_forgotten_random() -> None:
    """Leave torch's generators as a new start seeds them."""
    torch.set_rng_state = lambda new_state: None


def plant_kept_rows() -> None:
    """Leave the rows of steps that are done again."""
    run_dir.RunDir.continues_at = lambda self, metrics_bytes: None  # type: ignore[method-assign]


def plant_deaf() -> None:
    """Stay when the other rank is gone."""
    real = recipe.train

    def deaf(config: RunConfig) -> int:
        try:
            return real(config)
        except RuntimeError:
            time.sleep(3600)
            raise

    vars(recipe).update(train=deaf)


BUGS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "naive_save": plant_naive_save,
    "forgotten_sampler": plant_forgotten_sampler,
    "forgotten_random": plant_forgotten_random,
    "kept_rows": plant_kept_rows,
    "deaf": plant_deaf,
}


class Weather(NamedTuple):
    """What a run is started into."""

    bug: str
    world: int
    longest: float  # seconds to the latest kill
    bound: float  # seconds after the end of one rank at which the others count as hanging


def draw_in_every_step() -> None:
    """Drop pixels at random, so that the weights depend on torch's generator."""
    forward = TrainStep.forward

    def dropping(self: TrainStep, batch: Any, *others: Any) -> Any:
        pixels = F.dropout(batch.pixels, 0.1, training=self.student.training)
        return forward(self, batch._replace(pixels=pixels), *others)

    TrainStep.forward = dropping  # type: ignore[method-assign, assignment]


def start(config: RunConfig, bug: str = "none", world: int = 1) -> list[int]:
    """Train in forked children, one a rank; their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} if world > 1 else {} for rank in range(world)]
    return [start_rank(config, bug, {name: str(value) for name, value in rank.items()}) for rank in ranks]


def start_rank(config: RunConfig, bug: str, environment: dict[str, str]) -> int:
    """Train in one forked child; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.environ.update(environment, ACCELERATE_USE_CPU="true")
        draw_in_every_step()
        BUGS[bug]()
        code = recipe.train(config)
    finally:
        os._exit(code)


def ended(child: int) -> bool:
    """Whether a child is over; it can be waited for all the same."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def finish(children: list[int], bound: float = 180) -> list[int | str]:
    """Wait for children; their exit codes, negative where a signal ended one; a word for those that hang.

    So does a child that is there `bound` seconds after another has ended.
    """
    limit = float("inf")
    while not all(map(ended, children)) and time.monotonic() < limit:
        if limit == float("inf") and any(map(ended, children)):
            limit = time.monotonic() + bound
        time.sleep(0.005)
    hanging = [child for child in children if not ended(child)]
    for child in hanging:
        os.kill(child, signal.SIGKILL)
    codes = {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    return ["hangs" if child in hanging else codes[child] for child in children]


def await_a_save(children: list[int], folder: Path) -> None:
    """Until a checkpoint comes or goes, or a child has ended."""
    before = sorted(folder.glob("step-*"))
    while sorted(folder.glob("step-*")) == before and not any(map(ended, children)):
        time.sleep(0.002)


def fire(children: list[int], folder: Path, hit: int, longest: float, moments: random.Random) -> None:
    """Kill all children, or one of several, at a random moment that the number of hits so far chooses the kind of."""
    victims = children
    if hit % 2 == 0:  # every other one gets somewhere, however slow the machine is
        await_a_save(children, folder)
        time.sleep(moments.uniform(0, longest / 8))
        if hit % 4 == 0:
            victims = [moments.choice(children)]
    else:
        time.sleep(moments.uniform(0.02, longest))
    for victim in victims:
        os.kill(victim, signal.SIGKILL)


def under_fire(config: RunConfig, weather: Weather, kills: int, moments: random.Random) -> tuple[int, list[str]]:
    """Start until the run ends, killing up to `kills` starts at random moments; how many kills hit, what went wrong.

    A start that fails by itself is the end too: nobody asks a broken run again.
    """
    hits, folder = 0, config.output_dir / "checkpoints"
    while True:
        children = start(config, weather.bug, weather.world)
        if hits < kills:
            fire(children, folder, hits, weather.longest, moments)
        codes = finish(children, weather.bound)
        if "hangs" in codes or -signal.SIGKILL not in codes:
            return hits, [f"exit codes {codes}"] if any(codes) else []
        hits += 1
        if complaints := checkpoint.newest_valid(folder)[1]:
            return hits, complaints


def digests(out: Path) -> dict[str, str]:
    """sha256 of everything that a run leaves and that must not depend on being killed."""
    newest = checkpoint.checkpoints_in(out / "checkpoints")
    files = [out / "metrics.jsonl", out / "student.safetensors"]
    if newest:
        files += [*sorted(newest[0].glob("*.safetensors")), newest[0] / "trainer.json"]
    return {
        f"{file.parent.name if file.parent != out else ''}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.exists()
    }


def storm(blocks: dict[str, Any], scenes: Path, out: Path, weather: Weather, kills: int) -> dict[str, Any]:
    """As many runs under fire as `kills` kills take; what they left that the run in peace did not."""
    expected = digests(out / "peaceful")
    moments, hits, differing = random.Random(0), 0, list[str]()
    for number in range(20):
        stormy = tiny_config(scenes, out / f"{weather.bug}{number}", **blocks)
        hit, wrong = under_fire(stormy, weather, kills - hits, moments)
        hits += hit
        found = digests(stormy.output_dir)
        differing += wrong
        differing += sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        if hits >= kills or differing:
            break
    return {"hits": hits, "files": len(expected), "differing": differing}


def main() -> None:
    """Run once in peace and once for each bug under fire; print what they left."""
    scenes, out, blocks = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[6])
    kills, bugs, world = int(sys.argv[3]), sys.argv[4].split(","), int(sys.argv[5])
    torch.set_num_threads(1)  # threads do not survive a fork
    Image.init()
    vars(build)["_DECODER"].update(decoder_mlp_dim=64)  # half of a tiny student's weights, which every save writes
    began = time.monotonic()
    peaceful = start(tiny_config(scenes, out / "peaceful", **blocks), world=world)
    assert not any(finish(peaceful)), "the uninterrupted run failed"
    longest = (time.monotonic() - began) * 0.4
    weathers = [Weather(bug, world, longest, bound=5 if bug == "deaf" else 180) for bug in bugs]
    results = {weather.bug: storm(blocks, scenes, out, weather, kills) for weather in weathers}
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
