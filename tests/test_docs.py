"""The words of the README and the docs: their Python blocks run, their commands compose, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
PYTHON = [
    pytest.param(block, id=f"{page}-{i}")
    for page, text in PAGES.items()
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
COMMANDS = [
    line
    for text in PAGES.values()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_clips" / "a").mkdir(parents=True)
    for t in range(2):
        Image.effect_noise((32, 24), 50).convert("RGB").save(tmp_path / "my_clips" / "a" / f"{t:08d}.png")
    exec(compile(block, "page", "exec"), {"__name__": "page"})


def test_uses_in_the_readme_are_short() -> None:
    for block in re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.DOTALL):
        lines = [line for line in block.splitlines() if line and not line.startswith(("import", "from", "#"))]
        assert len(lines) <= 10


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("vsrplug")])
def test_commands_compose(line: str) -> None:
    _, command, *overrides = shlex.split(line, comments=True)
    # A sweep composes once a combination; the first of each list stands for it here.
    first = [o if "[" in o else re.sub(r",.*", "", o) for o in overrides if o != "-m"]
    first = [o.replace("none,memory_bank,[seem,memory_bank]", "[seem,memory_bank]") for o in first]
    with initialize_config_module("vsrplug.conf", version_base="1.3"):
        assert compose(command, overrides=first)


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\[[^\]]+\]\(([\w./-]+\.\w+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in COMMANDS:
        if line.startswith("make"):
            assert f"\n{line.split()[1]}:" in makefile
