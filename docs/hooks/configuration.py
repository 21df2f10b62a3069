"""The configuration reference, from the yaml files themselves: every group, every option, every argument."""

from __future__ import annotations

import html
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from griffe import Docstring, DocstringSectionKind
from hydra.utils import get_object

from vsrplug import conf
from vsrplug.backbones import NETWORKS

ROOT = Path(conf.__file__).parent
PACKAGE_LINE = re.compile(r"# @package .*")
AS_IN = re.compile(r"as in `(\w+)`\.?")
# What a choice of each group is; a group without a line here is listed all the same.
MEANING = {
    "backbone": "The network.",
    "callbacks": "What watches a run: checkpoints, progress, pictures, averages, guards.",
    "data": "Where training clips come from.",
    "degradation": "How low-resolution clips are made of them.",
    "experiment": "Differences from the defaults that belong together, such as a row of a paper's table.",
    "hydra": "Where runs are written. Chosen by the commands themselves.",
    "hydra/launcher": "Where the jobs of a sweep run, besides Hydra's own `joblib`; see [sweeps](../guide/sweeps.md).",
    "logger": "Where losses and figures are logged.",
    "losses": "The pixel loss, and the weight of every loss by its name.",
    "masks": "Where the object masks come from that SEEM reads.",
    "optim": "Optimizer and schedule.",
    "paths": "Where data, weights, masks and runs lie: each is an environment variable, too.",
    "plugins": "What is attached: one, several as `plugins=[seem,memory_bank]`, or `none`.",
    "protocol": "How a figure is measured; see [protocols](../protocols.md).",
    "search": "What `vsrplug train -m` tries, and how it chooses; see [sweeps](../guide/sweeps.md).",
    "source": "What `vsrplug masks` makes masks with; see [masks](../masks.md).",
    "trainer": "Lightning's trainer: steps, devices, precision.",
    "tuning": "What learns, when, and at what rate; see [tuning](../tuning.md).",
}


def commands() -> dict[str, dict[str, Any]]:
    """Command -> the default option of each group it knows; `_text` is what its yaml says of it."""
    found = {}
    for file in sorted(ROOT.glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        groups: dict[str, Any] = {}
        for entry in yaml.safe_load(text)["defaults"]:
            if isinstance(entry, dict):
                groups |= {str(group).removeprefix("override ").lstrip("/"): option for group, option in entry.items()}
            elif entry != "_self_":
                groups["_from"] = entry
        found[file.stem] = groups | {"_text": comment(text)}
    for groups in found.values():
        if "_from" in groups:
            groups |= {group: option for group, option in found[groups["_from"]].items() if group not in groups}
    return found


def folders() -> list[str]:
    """The folders with yaml files; Hydra's own groups are folders in a folder."""
    nested = [f"hydra/{folder.name}" for folder in (ROOT / "hydra").iterdir() if folder.is_dir()]
    return sorted([f.name for f in ROOT.iterdir() if f.is_dir() and any(f.rglob("*.yaml"))] + nested)


def options(group: str) -> dict[str, Path]:
    """Option -> file, of one group and the folders in it that are no groups of their own."""
    folder = ROOT / group
    files = folder.glob("*.yaml") if group == "hydra" else folder.rglob("*.yaml")
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(files)}


def comment(text: str) -> str:
    """The comment at the top of a yaml, in one line; its example commands are left to the yaml."""
    lines = []
    for line in text.splitlines():
        if PACKAGE_LINE.fullmatch(line) and not lines:
            continue
        if not line.startswith("#") or line.startswith("#  "):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def calls(value: Any) -> Iterator[dict[str, Any]]:
    """Every constructor call in a yaml, however deep."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for inner in value.values():
            yield from calls(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from calls(inner)


def constructor(call: dict[str, Any]) -> Any:
    """What a call makes: for `load_backbone` the network of that name."""
    if call["_target_"] == "vsrplug.load_backbone":
        return NETWORKS[call["name"]]
    return get_object(call["_target_"])


def arguments(made: Any) -> dict[str, str]:
    """Argument -> meaning, as the docstring of a class or function of ours has it, or the one that it refers to."""
    meaning = {}
    for section in Docstring(inspect.getdoc(made) or "", parser="google", lineno=1).parse(warnings=False):
        if section.kind is DocstringSectionKind.parameters:
            for item in section.value:
                meaning |= dict.fromkeys(re.split(r",\s*", item.name), " ".join(item.description.split()))
    for name, text in meaning.items():
        other = AS_IN.fullmatch(text)
        if other and hasattr(sys.modules[made.__module__], other[1]):  # else it is another library's
            meaning[name] = arguments(getattr(sys.modules[made.__module__], other[1])).get(name, text)
    return meaning


def tables(files: dict[str, Path]) -> Iterator[str]:
    """For every constructor of ours in a group, what its arguments mean."""
    seen = set()
    for file in files.values():
        for call in calls(yaml.safe_load(file.read_text(encoding="utf-8"))):
            made = constructor(call)
            if made in seen or not made.__module__.startswith("vsrplug"):
                continue
            seen.add(made)
            known = arguments(made)
            rows = [(key, known[key]) for key in call if key in known]
            if rows:
                yield f'\n??? info "Arguments of `{made.__name__}`"\n\n    | argument | meaning |\n    |---|---|\n'
                yield "".join(f"    | `{key}` | {_cell(meaning)} |\n" for key, meaning in rows)


def reference() -> str:
    """The markdown of the whole reference: commands, then groups with their options."""
    known = commands()
    parts = ["## Commands\n"]
    for command, groups in known.items():
        chosen = [f"`{group}={_option(option)}`" for group, option in groups.items() if not group.startswith("_")]
        what = groups["_text"].removeprefix(f"vsrplug {command}: ")
        parts.append(f"\n### vsrplug {command}\n\n{what[:1].upper()}{what[1:]}\n\nDefaults: {', '.join(chosen)}\n")
        parts.append(_source(f"{command}.yaml", ROOT / f"{command}.yaml"))
    for group in folders():
        files = options(group)
        parts.append(f"\n## {group}\n\n{MEANING.get(group, '')}\n\n")
        parts.append("| option | makes | |\n|---|---|---|\n")
        for option, file in files.items():
            text = file.read_text(encoding="utf-8")
            made = list(dict.fromkeys(_made(yaml.safe_load(text))))
            names = ", ".join(f"`{one.__name__}`" for one in made)
            parts.append(f"| `{group}={option}` | {names} | {_cell(comment(text) or _summary(made))} |\n")
        parts.extend(tables(files))
        parts.extend(_source(f"{group}/{option}.yaml", file) for option, file in files.items())
    return "".join(parts)


def _made(parsed: Any) -> Iterator[Any]:
    """What the constructor calls of a yaml make, without those inside of calls."""
    if isinstance(parsed, dict) and "_target_" in parsed:
        yield constructor(parsed)
    elif isinstance(parsed, dict):
        for inner in parsed.values():
            yield from _made(inner)


def _summary(made: list[Any]) -> str:
    """The first sentence about what an option makes, where that is one thing of ours."""
    if len(made) != 1 or not made[0].__module__.startswith("vsrplug"):
        return ""
    return (inspect.getdoc(made[0]) or "").split("\n\n")[0].replace("\n", " ")


def _option(option: Any) -> str:
    return f"[{','.join(option)}]" if isinstance(option, list) else str(option).replace("None", "null")


def _source(name: str, file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return f'\n??? abstract "{name}"\n\n    ```yaml\n' + "".join(f"    {line}\n" for line in lines) + "    ```\n"


def _cell(text: str) -> str:
    """Fit for a cell of a table: bars do not end it, and outside of code brackets and stars are text."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(
        part if i % 2 else html.escape(part, quote=False).replace("*", "\\*") for i, part in enumerate(parts)
    )
