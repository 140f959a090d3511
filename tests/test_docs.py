"""What the documentation says exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from samlet.cli import app
from samlet.config import RunConfig
from samlet.schema import load_config

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_it_names_exist(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"`((?:src|tests|configs|benchmarks|scripts|docs)/[\w./-]+)`", text))
    assert [name for name in sorted(named) if not (REPOSITORY / name).exists()] == []


def test_commands_it_names_exist() -> None:
    commands = set(getattr(get_command(app), "commands"))  # noqa: B009
    named = {word for page in PAGES for word in re.findall(r"^samlet ([a-z-]+)", page.read_text(), re.MULTILINE)}
    assert named
    assert named <= commands


def test_the_readme_distillation_block_validates_in_a_yaml_file(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert block is not None
    path = tmp_path / "run.yaml"
    path.write_text("dataset: {root: my_images}\n" + block.group(1))
    config = load_config(RunConfig, path, check_files=False)
    assert [name for name, _ in config.distillation.terms()] == [
        "encoder_patch",
        "prompt_embed",
        "decoder_mask_token",
        "dense_mask_logits",
    ]
    assert [teacher.weight for teacher in config.teachers] == [0.7, 0.3]
