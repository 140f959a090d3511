"""Kill a training run at random moments and resume it, again and again; run as a script, prints JSON.

    python crash_harness.py SCENES OUT KILLS BUG CONFIG_BLOCKS

A parent that has imported everything forks a child for each start, so that a kill costs milliseconds. BUG plants a
mistake that the comparison must notice: `naive_save` (files written in place, vouched for as they come),
`forgotten_sampler` (every start begins the epoch again), `kept_rows` (metrics.jsonl is not cut back); `none`: none.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)  # threads do not survive a fork

from samlet.artefacts import MANIFEST, sha256_of  # noqa: E402
from samlet.config import RunConfig  # noqa: E402
from samlet.data.sampler import StepSampler  # noqa: E402
from samlet.engine import checkpoint, run_dir  # noqa: E402
from samlet.recipes import train as recipe  # noqa: E402
from tests.tiny import tiny_config  # noqa: E402


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

    class Forgetful(StepSampler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "start_step": 0})

    vars(recipe).update(StepSampler=Forgetful)


def plant_kept_rows() -> None:
    """Leave the rows of steps that are done again."""
    run_dir.RunDir.continues_at = lambda self, metrics_bytes: None  # type: ignore[method-assign]


BUGS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "naive_save": plant_naive_save,
    "forgotten_sampler": plant_forgotten_sampler,
    "kept_rows": plant_kept_rows,
}


def start(config: RunConfig, bug: str = "none") -> int:
    """Train in a forked child; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        BUGS[bug]()
        code = recipe.train(config)
    finally:
        os._exit(code)


def finish(child: int) -> int:
    """Wait for a child; its exit code, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def await_a_save(child: int, folder: Path) -> None:
    """Until a checkpoint comes or goes, or the child has ended."""
    before = sorted(folder.glob("step-*"))
    while sorted(folder.glob("step-*")) == before:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)


def under_fire(config: RunConfig, kills: int, bug: str, longest: float, moments: random.Random) -> tuple[int, int]:
    """Start until the run ends, killing up to `kills` starts at random moments; how many kills hit, the last exit code.

    A start that fails by itself is the end too: nobody asks a broken run again.
    """
    hits = 0
    while True:
        child = start(config, bug)
        if hits < kills:
            if hits % 2 == 0:  # every other one gets somewhere, however slow the machine is
                await_a_save(child, config.output_dir / "checkpoints")
                time.sleep(moments.uniform(0, longest / 8))
            else:
                time.sleep(moments.uniform(0.02, longest))
            os.kill(child, signal.SIGKILL)
        code = finish(child)
        if code != -signal.SIGKILL:
            return hits, code
        hits += 1


def digests(out: Path) -> dict[str, str]:
    """sha256 of everything that a run leaves and that must not depend on being killed."""
    newest = checkpoint.checkpoints_in(out / "checkpoints")
    files = [out / "metrics.jsonl", out / "student.safetensors"]
    if newest:
        files += [newest[0] / name for name in ("student.safetensors", "optimizer.safetensors", "trainer.json")]
    return {
        f"{file.parent.name if file.parent != out else ''}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.exists()
    }


def main() -> None:
    """Run once in peace and once under fire; print what both left."""
    scenes, out, kills, bug, blocks = sys.argv[1:]
    peaceful = tiny_config(Path(scenes), Path(out) / "peaceful", **json.loads(blocks))
    began = time.monotonic()
    assert finish(start(peaceful)) == 0, "the uninterrupted run failed"
    longest = (time.monotonic() - began) * 0.4
    expected = digests(peaceful.output_dir)
    moments, hits, differing = random.Random(0), 0, list[str]()
    for number in range(20):
        stormy = tiny_config(Path(scenes), Path(out) / f"stormy{number}", **json.loads(blocks))
        hit, code = under_fire(stormy, int(kills) - hits, bug, longest, moments)
        hits += hit
        found = digests(stormy.output_dir)
        differing += [f"exit code {code}"] if code else []
        differing += sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        if hits >= int(kills) or differing:
            break
    sys.stdout.write(json.dumps({"hits": hits, "files": len(expected), "differing": differing}) + "\n")


if __name__ == "__main__":
    main()
