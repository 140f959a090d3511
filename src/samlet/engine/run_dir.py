"""The folder of one run, as a person finds it.

config.yaml        the resolved configuration          metrics.jsonl   one row a logged step and validation
run.json           versions, seeds, digests, outcome   tensorboard/    the same as events
curves.png         metrics over steps                  overlays/       fixed validation images, at each validation
best/              the best student so far             checkpoints/    what resume needs
embeddings/        what a frozen encoder said, where the configuration wants it kept
automatic_masks/   the teacher's pseudo-labels, where the run finds them itself
student.safetensors, mobile_sam.pt                     the best student, once the run has ended
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from ruamel.yaml import YAML

from samlet.artefacts import read_manifest, remove_leftovers, write_directory, write_file, write_json, write_text
from samlet.engine.checkpoint import checkpoints_in
from samlet.errors import SamletError
from samlet.models.checkpoints import save_sam_safetensors, save_sam_upstream

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from samlet.models.sam import Sam


class RunDir:
    """Paths and writers of a run; only one process of a run writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.facts = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"
        self.overlays = path / "overlays"
        self.best = path / "best"
        self.checkpoints = path / "checkpoints"
        self.embeddings = path / "embeddings"
        self.automatic_masks = path / "automatic_masks"
        self._lock = path / ".lock"
        self._holder = path / ".lock-holder"  # beside the lock, whose content is the locking library's
        self._began = False  # this start has written run.json
        self._events: SummaryWriter | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other trainer out of this folder; tidy up what a killed one left.

        A start that comes to nothing leaves nothing behind that was not there before it.

        Raises:
            SamletError: another one is in; or the folder cannot be made or written.
        """
        new = self._absent()
        lock = FileLock(self._lock, timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            self._holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        except Timeout as error:
            raise SamletError(
                f"{self.path}: another samlet train is writing here{self._held_by()}; wait for it or stop it"
            ) from error
        except OSError as error:
            reason = error.strerror or error
            _take_back(new)
            lock.release()
            raise SamletError(f"{self.path}: cannot be used as output_dir ({reason}); choose another") from error
        with ExitStack() as leaving:
            leaving.callback(lock.release)
            leaving.push(lambda _, error, __: None if error is None else self._came_to(error, new))
            leaving.callback(self._holder.unlink, missing_ok=True)
            for folder in (self.path, self.checkpoints, self.overlays):
                remove_leftovers(folder)
            yield

    def _held_by(self) -> str:
        try:
            return f" ({self._holder.read_text(encoding='utf-8')})"
        except OSError:
            return ""

    def _absent(self) -> list[Path]:
        """What a start makes before its first step, as far as it is not there yet; the innermost first."""
        places = (self._lock, self.config, self.facts, self.path, *self.path.parents)
        return [place for place in places if not place.exists()]

    def _came_to(self, error: BaseException, new: list[Path]) -> None:
        """After a start that failed: nothing of its own where it took no step, or else why, in run.json."""
        if self.metrics.exists() or checkpoints_in(self.checkpoints):
            new = [self._lock] if self._lock in new else []
        _take_back(new)
        if self._began and self.facts.exists():
            reason = " ".join(str(error).split()) or type(error).__name__
            with suppress(SamletError):  # a disk that is full, which is what failed
                self.update_facts(outcome=f"failed: {reason[:300]}")

    def begins_anew(self) -> None:
        """Forget the rows of a start that never reached a checkpoint."""
        self.metrics.unlink(missing_ok=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)

    def continues_at(self, metrics_bytes: int) -> None:
        """Cut metrics.jsonl back to the checkpoint's length.

        Raises:
            SamletError: it is shorter than that, so somebody else has changed it.
        """
        length = self.metrics.stat().st_size if self.metrics.exists() else 0
        if length < metrics_bytes:
            raise SamletError(f"{self.metrics}: rows are missing that the checkpoint counts; restore the file")
        if length:
            with self.metrics.open("r+b") as file:
                file.truncate(metrics_bytes)

    def log(self, row: Mapping[str, float | int | str], *, events: bool) -> None:
        """Append one row to metrics.jsonl, and to the events where wanted."""
        line = json.dumps(row, allow_nan=False) + "\n"
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise SamletError(
                f"{self.metrics}: could not be written ({error.strerror}); the last checkpoint is whole. "
                "Make room, then run the same command again"
            ) from error
        if events:
            self._log_events(row)

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl, with every row safely on disk."""
        if not self.metrics.exists():
            return 0
        with self.metrics.open("rb") as file:
            os.fsync(file.fileno())
        return self.metrics.stat().st_size

    def _log_events(self, row: Mapping[str, float | int | str]) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=int(row["step"]))
        for name, value in row.items():
            if name not in ("step", "split") and not isinstance(value, str):
                self._events.add_scalar(f"{row['split']}/{name}", value, int(row["step"]))

    def close(self) -> None:
        """Flush the events."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def save_best(self, student: Sam, facts: Mapping[str, Any]) -> None:
        """Replace `best/`: the student as safetensors and as an upstream checkpoint, and what it scored."""

        def fill(folder: Path) -> None:
            save_sam_safetensors(student, folder / "student.safetensors")
            save_sam_upstream(student, folder / upstream_name(student.kind))
            write_json(folder / "metrics.json", dict(facts))

        write_directory(self.best, fill, **facts)

    def publish_best(self) -> list[Path]:
        """Put the best student's files where a person looks first."""
        published = []
        for name in read_manifest(self.best)["files"]:
            if name != "metrics.json":
                write_file(self.path / name, partial(shutil.copyfile, self.best / name))
                published.append(self.path / name)
        return published

    def drop_old_checkpoints(self, keep: int) -> None:
        """Keep the newest `keep` checkpoints."""
        for place in checkpoints_in(self.checkpoints)[keep:]:
            shutil.rmtree(place, ignore_errors=True)

    def drop_checkpoints_after(self, place: Path) -> None:
        """Forget the steps that a resume from an older checkpoint does again."""
        for newer in checkpoints_in(self.checkpoints):
            if newer.name > place.name:
                shutil.rmtree(newer, ignore_errors=True)

    def write_config(self, plain: Mapping[str, Any]) -> None:
        """The resolved configuration, loadable as it is."""
        buffer = io.StringIO()
        yaml = YAML(typ="rt")
        yaml.default_flow_style = False
        yaml.dump(dict(plain), buffer)
        write_text(self.config, buffer.getvalue())

    def read_config(self) -> dict[str, Any] | None:
        """The configuration this folder was started with, if any."""
        if not self.config.exists():
            return None
        return dict(YAML(typ="safe").load(self.config.read_text(encoding="utf-8")))

    def read_facts(self) -> dict[str, Any]:
        """What run.json says; nothing where there is none."""
        return dict(json.loads(self.facts.read_text(encoding="utf-8"))) if self.facts.exists() else {}

    def update_facts(self, **facts: Any) -> None:
        """Merge facts into run.json."""
        self._began = True
        write_json(self.facts, {**self.read_facts(), **facts})


def _take_back(places: list[Path]) -> None:
    """Remove files, and folders that are empty."""
    for place in places:
        with suppress(OSError):
            place.rmdir() if place.is_dir() else place.unlink()


def upstream_name(kind: str) -> str:
    """File name under which other tools expect a checkpoint of this kind."""
    return "mobile_sam.pt" if kind == "vit_t" else f"sam_{kind}.pth"
