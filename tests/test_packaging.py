"""The package list, the package data and the version, held against the tree."""

from __future__ import annotations

import configparser
import tomllib
from pathlib import Path

import vsrplug

ROOT = Path(__file__).resolve().parents[1]
MAPPED = {"vsrplug": "vsrplug", "plugins": "vsrplug.plugins", "backbones": "vsrplug.backbones", "conf": "vsrplug.conf"}
setup = configparser.ConfigParser()
setup.read(ROOT / "setup.cfg", encoding="utf-8")


def lines(value: str) -> list[str]:
    return [line.strip() for line in value.splitlines() if line.strip()]


def test_packages_are_the_folders_with_an_init() -> None:
    found = set()
    for top, package in MAPPED.items():
        for init in (ROOT / top).rglob("__init__.py"):
            found.add(".".join((package, *init.parent.relative_to(ROOT / top).parts)))
    listed = lines(setup["options"]["packages"])
    assert len(set(listed)) == len(listed)
    assert set(listed) == found
    folders = dict(line.replace(" ", "").split("=") for line in lines(setup["options"]["package_dir"]))
    assert folders == {package: top for top, package in MAPPED.items()}


def test_no_module_lies_outside_a_package() -> None:
    for top in MAPPED:
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path} would not be installed"


def test_every_data_file_is_installed() -> None:
    data = {
        key: [p.strip() for p in value.replace("\n", ",").split(",")]
        for key, value in setup["options.package_data"].items()
    }
    for top, package in MAPPED.items():
        installed = {path for pattern in data.get(package, []) if pattern for path in (ROOT / top).glob(pattern)}
        files = {
            path for path in (ROOT / top).rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".pyi")
        }
        assert files <= installed, f"not installed: {sorted(map(str, files - installed))}"


def test_one_version() -> None:
    assert setup["metadata"]["version"] == vsrplug.__version__


def test_python_versions_agree() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    lowest = setup["options"]["python_requires"].removeprefix(">=")
    assert tools["mypy"]["python_version"] == lowest
    assert tools["ruff"]["target-version"] == "py" + lowest.replace(".", "")
    assert f"Programming Language :: Python :: {lowest}" in setup["metadata"]["classifiers"]
