"""The words of the README and the docs: their Python blocks run, their commands compose, their links lead somewhere.

The site is built once, strictly: a page that no menu names, a link or an anchor that leads nowhere is an error.
"""

from __future__ import annotations

import html
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Template
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from hydra import compose, initialize_config_module
from PIL import Image
from torch import nn

import vsrplug.backbones
import vsrplug.data
import vsrplug.masks
import vsrplug.plugins
from vsrplug import attach, conf
from vsrplug.backbones import EDVR, IconVSR
from vsrplug.commands import COMMANDS as VERBS
from vsrplug.commands import main
from vsrplug.plugins import SEEMPlugin

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
PYTHON = [
    pytest.param(block, id=f"{page}-{i}")
    for page, text in PAGES.items()
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]


def commands(block: str) -> Iterator[str]:
    """The lines of a block, with the variables that earlier ones set."""
    variables: dict[str, str] = {}
    for line in block.replace("\\\n", " ").splitlines():
        expanded = Template(line).safe_substitute(variables)
        if assigned := re.fullmatch(r"(\w+)=(\S*)", expanded):
            variables[assigned[1]] = assigned[2]
        yield expanded


COMMANDS = [
    line
    for text in PAGES.values()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in commands(block)
]
OWN = "--config-dir my_conf"  # a folder of the reader's, whose files the pages show
REFERENCE = ("core", "plugins", "backbones", "training", "data", "evaluation")
FILES_SHOWN = re.compile(r"```yaml\n# (my_conf/\S+\.yaml)\n(.*?)```", re.DOTALL)


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


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("vsrplug") and OWN not in line])
def test_commands_compose(line: str) -> None:
    _, command, *overrides = shlex.split(line, comments=True)
    # A sweep composes once a combination; the first of each list stands for it here.
    first = [o if "[" in o else re.sub(r",.*", "", o) for o in overrides if o != "-m"]
    first = [o.replace("none,memory_bank,[seem,memory_bank]", "[seem,memory_bank]") for o in first]
    if command == "report":  # takes its folder as a word alone
        first = [o if "=" in o else f"folder='{o}'" for o in first]
    with initialize_config_module("vsrplug.conf", version_base="1.3"):
        assert compose(command, overrides=first)


@pytest.mark.parametrize("line", [line for line in COMMANDS if OWN in line])
def test_commands_with_a_folder_of_ones_own(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in PAGES.values():
        for name, content in FILES_SHOWN.findall(text):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    words = [word for word in shlex.split(line) if word != "-m"]  # Hydra shows the configuration of one job, or runs
    monkeypatch.setattr("sys.argv", [*words, "--cfg", "all"])
    main()
    runs = yaml.safe_load(capsys.readouterr().out)
    chosen = [f"my_conf/{word.replace('=', '/')}.yaml" for word in line.split() if "=" in word]
    files = [tmp_path / name for name in chosen if (tmp_path / name).exists()]
    assert files, f"no page shows a file for this command, only {sorted(tmp_path.glob('my_conf/*/*'))}"
    for file in files:
        text = file.read_text()
        _assert_holds(yaml.safe_load(text), runs if "# @package _global_" in text else runs[file.parent.name])


def _assert_holds(said: dict[str, Any], runs: dict[str, Any]) -> None:
    """What a yaml says is part of what runs; what it leaves to be given has been given."""
    for key, value in said.items():
        if isinstance(value, dict):
            _assert_holds(value, runs[key])
        elif key != "defaults":
            assert runs[key] == value or (value == "???" and runs[key] not in (None, "???")), key


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\[[^\]]+\]\(([\w./-]+\.\w+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in COMMANDS:
        if line.startswith("make"):
            assert f"\n{line.split()[1]}:" in makefile


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, built so that every warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page_and_notebook(site: Path) -> None:
    pages = [path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in ROOT.glob("docs/**/*.md")]
    notebooks = [f"notebooks/{path.stem}" for path in ROOT.glob("notebooks/*.ipynb")]
    assert len(notebooks) == 4
    for page in [*pages, *notebooks]:
        assert (site / page.removesuffix("index") / "index.html").exists(), page
    assert not (site / "hooks").exists()


def test_the_site_asks_nobody_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        for address in re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"?([^\" >]+)", page.read_text()):
            assert not re.match(r"(https?:)?//", address), f"{page}: {address}"


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    known = "".join((site / "reference" / page / "index.html").read_text() for page in REFERENCE)
    documented = {name.rpartition(".")[2] for name in re.findall(r'id="(vsrplug[\w.]+)"', known)}
    for package in (vsrplug, vsrplug.plugins, vsrplug.backbones, vsrplug.data, vsrplug.masks):
        assert set(package.__all__) - documented <= {"NETWORKS"}  # a table that load_backbone reads


def test_the_configuration_reference_has_every_option_and_says_what_arguments_mean(site: Path) -> None:
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "reference" / "configuration" / "index.html").read_text()))
    page = " ".join(page.split())
    folder = Path(conf.__file__).parent
    for file in folder.rglob("*.yaml"):
        group, _, option = file.relative_to(folder).with_suffix("").as_posix().partition("/")
        if group == "hydra" and "/" in option:  # whose own groups are nested: hydra/launcher=slurm
            group, option = f"hydra/{option.partition('/')[0]}", option.partition("/")[2]
        assert (f"{group}={option}" if option else f"vsrplug {group}") in page
        assert " ".join(file.read_text().split()) in page, file
    # of a wiring that refers to its plain module, of a network behind load_backbone, of a function
    for argument in ("entries N, columns of the memory", "blocks residual blocks of each", 'motion "fast", "medium"'):
        assert argument in page, argument


def test_commands_of_the_reference_are_those_there_are() -> None:
    assert {file.stem for file in Path(conf.__file__).parent.glob("*.yaml")} == set(VERBS)


def test_the_picture_of_the_concepts_is_drawn_from_the_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "hooks")
    import site_picture

    model = site_picture.example()
    drawn = site_picture.FILE.read_text()
    assert drawn == site_picture.picture(model), "run: python docs/hooks/site_picture.py"
    texts = [element.text for element in ElementTree.fromstring(drawn).iter() if element.tag.endswith("}text")]
    for name in model.sites:
        assert texts.count(name) == 1
    for name, plugin in model.plugins.items():
        assert texts.count(name) == len(plugin.sites)


@pytest.mark.parametrize("make", [lambda: EDVR(extract_blocks=1, reconstruct_blocks=1), lambda: IconVSR(64, 1)])
def test_other_backbones_can_be_drawn_too(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """No two sites lie on each other, and every site lies on the picture."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "hooks")
    import site_picture

    model = attach(make(), seem=SEEMPlugin)
    root = ElementTree.fromstring(site_picture.picture(model))
    *_, width, height = map(float, root.attrib["viewBox"].split())
    labels = [e for e in root.iter() if e.tag.endswith("}text") and e.text in model.sites]
    places = {(float(label.attrib["x"]), float(label.attrib["y"])) for label in labels}
    assert len(places) == len(model.sites)
    assert all(0 < x < width and 0 < y < height for x, y in places)
