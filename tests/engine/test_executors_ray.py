"""Ray Data as the executor: the store of one process, a killed actor survived, nothing computed twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from samlet.engine import executors_ray
from samlet.engine.executors import run_local, run_ray
from samlet.errors import SamletError
from tests.engine.drawn_shards import DrawnWork, computed, content, written_job

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


def test_without_ray_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    job = written_job(tmp_path)
    with pytest.raises(SamletError, match=r"needs Ray Data: pip install 'samlet\[ray\]'$"):
        run_ray(job, DrawnWork)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One for all tests: Ray takes long to start."""
    pytest.importorskip("ray.data")
    with executors_ray._cluster(4):
        yield


@pytest.fixture
def alone(cluster: None, tmp_path: Path) -> dict[str, bytes]:
    """What one process makes of twelve images."""
    assert run_local(written_job(tmp_path / "alone"), DrawnWork) == 0
    return content(tmp_path / "alone")


def ray_run(job: str) -> int:
    return run_ray(job, DrawnWork, 2, images=12)


@pytest.mark.ray
def test_two_actors_leave_the_store_of_one_process(alone: dict[str, bytes], tmp_path: Path) -> None:
    store = tmp_path / "ray"
    assert ray_run(written_job(store, shards=2)) == 0
    assert len(computed(store)) == 6
    assert ray_run(written_job(store)) == 0
    assert content(store) == alone
    assert computed(store) == computed(tmp_path / "alone")
    assert ray_run(written_job(store)) == 0  # nothing is left to do


@pytest.mark.ray
def test_an_actor_that_is_killed_is_restarted(alone: dict[str, bytes], tmp_path: Path) -> None:
    store = tmp_path / "ray"
    assert ray_run(written_job(store, die_once="2/1")) == 0
    assert content(store) == alone
    assert computed(store) == computed(tmp_path / "alone")


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_what_ends_a_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SamletError, match=r"^1/1\.jpg: cannot be read; mend or remove it$"):
        ray_run(written_job(tmp_path / "error", error="1/1"))
    with pytest.raises(SamletError, match=r"(?s)^Ray gave up \(.*what is done is kept$"):
        ray_run(written_job(tmp_path / "die", die="1/1"))
