"""Files are whole or absent, and what they vouch for is checked (P3, P4)."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from samlet.artefacts import MANIFEST, read_manifest, write_directory, write_file, write_json
from samlet.errors import CheckpointError, SamletError


def fill(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "inner").mkdir()
    (folder / "inner" / "state.json").write_text('{"step": 3}')


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    place = tmp_path / "step-3"
    write_directory(place, fill, step=3)
    return place


def test_a_directory_comes_with_a_manifest_of_its_files(artefact: Path) -> None:
    manifest = read_manifest(artefact)
    assert manifest["step"] == 3
    assert sorted(manifest["files"]) == ["inner/state.json", "weights.bin"]
    assert [path.name for path in artefact.parent.iterdir()] == ["step-3"]


@pytest.mark.parametrize("seed", range(3))
def test_every_flipped_byte_and_every_cut_is_found(artefact: Path, seed: int) -> None:
    chance = random.Random(seed)
    for name in ("weights.bin", "inner/state.json", MANIFEST):
        victim = artefact / name
        content = victim.read_bytes()
        for _ in range(25):
            place = chance.randrange(len(content))
            for damaged in (content[:place], content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]):
                victim.write_bytes(damaged)
                try:
                    manifest = read_manifest(artefact)
                except CheckpointError as error:
                    assert str(artefact) in str(error)
                else:  # a byte of the manifest's own facts or white space: the files are still what it vouches for
                    assert name == MANIFEST
                    assert sorted(manifest["files"]) == ["inner/state.json", "weights.bin"]
        victim.write_bytes(content)
    read_manifest(artefact)


def test_a_manifest_cannot_point_outside(artefact: Path) -> None:
    manifest = json.loads((artefact / MANIFEST).read_text())
    manifest["files"]["../secret"] = {"sha256": "0", "bytes": 1}
    (artefact / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside"):
        read_manifest(artefact)


def test_replacing_a_directory_leaves_the_new_one_alone(artefact: Path) -> None:
    write_directory(artefact, lambda folder: (folder / "only.txt").write_text("x"), step=4)
    assert sorted(read_manifest(artefact)["files"]) == ["only.txt"]
    assert [path.name for path in artefact.parent.iterdir()] == ["step-3"]


def test_a_failed_fill_leaves_what_was_there(artefact: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(SamletError, match=r"No space left on device.*is untouched"):
        write_directory(artefact, half)
    assert read_manifest(artefact)["step"] == 3
    assert [path.name for path in artefact.parent.iterdir()] == ["step-3"]


def test_json_without_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "x.txt"
    write_file(place, lambda path: path.write_text("one"))
    write_file(place, lambda path: path.write_text("two"))
    assert place.read_text() == "two"
    assert [path.name for path in place.parent.iterdir()] == ["x.txt"]


def test_a_really_full_disk(tmp_path: Path) -> None:
    """On a file system of one MiB, where the machine lets us mount one."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        place = mount / "step-1"
        write_directory(place, lambda folder: (folder / "a").write_bytes(b"x" * 300_000), step=1)
        with pytest.raises(SamletError, match="No space left on device"):
            write_directory(place, lambda folder: (folder / "a").write_bytes(b"y" * 2_000_000), step=2)
        assert read_manifest(place)["step"] == 1
        assert [path.name for path in mount.iterdir()] == ["step-1"]
    finally:
        subprocess.run(["umount", str(mount)], check=False)


def test_a_place_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SamletError, match=r"file/m\.json: could not be written"):
        write_json(tmp_path / "file" / "m.json", {})


def test_a_file_is_no_checkpoint_folder(tmp_path: Path) -> None:
    (tmp_path / "student.pt").write_text("x")
    with pytest.raises(CheckpointError, match=r"student\.pt: is a file; a checkpoint is a folder"):
        read_manifest(tmp_path / "student.pt")
    (tmp_path / "step" / MANIFEST).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read \(Is a directory\)"):
        read_manifest(tmp_path / "step")


def test_importing_samlet_opens_no_socket_and_starts_nothing() -> None:
    code = (
        "import sys\n"
        "def audit(event, args):\n"
        "    if event.startswith(('socket.connect', 'subprocess.Popen', 'os.exec', 'os.posix_spawn')):\n"
        "        raise SystemExit(f'{event} {args}')\n"
        "sys.addaudithook(audit)\n"
        "import samlet.cli, samlet.config, samlet.recipes.train, samlet.recipes.check_data, samlet.models\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
