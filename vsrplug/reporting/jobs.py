"""The jobs of a folder: those done, pruned, failed, not finished, and, of a sweep, those never started."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import yaml

from vsrplug.json_files import read_json

from .figures import Figures, read_figures
from .plan import planned

State = Literal["done", "pruned", "failed", "not finished", "not started"]
STATES: tuple[State, ...] = ("done", "pruned", "failed", "not finished", "not started")
COLUMNS = ("backbone", "plugins", "tuning", "protocol")  # groups with a column of their own
ELSEWHERE = ("seed", "paths", "logger", "hydra")  # keys that make no other combination of a job


@dataclass(frozen=True)
class Job:
    """One run of a network: what it was asked for, and what came of it.

    Args:
        name: its folder, seen from the folder that was read; its overrides where it has none yet.
        state: done, pruned (stopped by a search), failed, not finished (killed, or running), not started.
        backbone, plugins, tuning, protocol: the words they were chosen with; a protocol's own name.
        seed: None where it is not known.
        overrides: what it was given on the command line, as `key=value`.
        words: group -> option of the groups that have no column of their own, such as masks and experiment.
        settings: the whole configuration, `"a.b.c"` -> value, without seed, paths and logger, which make no other
            combination.
        known: whether `settings` are whole. They are not for a job that was never started.
        folder: None for a job that was never started.
        figures: of a job that is done.
        error, traceback: of a job that failed; `error` also says where a pruned one was stopped.
        when: when it came to its end, seconds since the epoch.
    """

    name: str
    state: State
    backbone: str
    plugins: str
    tuning: str
    protocol: str
    seed: int | None
    overrides: tuple[str, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    known: bool = True
    folder: Path | None = None
    figures: Figures | None = None
    error: str = ""
    traceback: str = ""
    when: float = 0.0

    @property
    def label(self) -> tuple[str, str, str, str]:
        """What a row is called."""
        return self.protocol, self.backbone, self.plugins, self.tuning


def read_jobs(folder: Path) -> list[Job]:
    """Every job under a folder, in the order of their paths; then those that a sweep's command names and nobody began.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no run has left anything in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; expected that of a sweep, or of several runs")
    found = chain(
        (path.parent for name in ("metrics.json", "failed.json") for path in folder.rglob(name)),
        (path.parent.parent for path in folder.rglob(".hydra/overrides.yaml")),
    )
    jobs = [_read_job(path, folder) for path in sorted(set(found))]
    for sweep in sorted(folder.rglob("multirun.yaml")):
        begun = [job for job in jobs if job.folder and sweep.parent in job.folder.parents]
        jobs += _not_started(sweep, begun)
    if not jobs:
        raise ValueError(
            f"no run has left anything in {folder}: expected folders with metrics.json, such as "
            "`vsrplug train -m plugins=none,seem tuning=full` leaves in runs/sweeps"
        )
    return jobs


def _read_job(folder: Path, top: Path) -> Job:
    given = _load(folder / ".hydra" / "overrides.yaml")
    overrides = tuple(map(str, given)) if isinstance(given, list) else ()
    config = _mapping(_load(folder / ".hydra" / "config.yaml"))
    hydra = _mapping(_load(folder / ".hydra" / "hydra.yaml"))
    choices = _mapping(hydra, "hydra", "runtime", "choices")
    if _others_choices(_mapping(read_json(folder / "metrics.json"), "choices"), choices, config):
        overrides, config, choices = (), {}, {}  # of a start that left no figures: those there are of an earlier one
    state: State = "not finished"
    figures, error, traceback, end = None, "", "", folder
    if (folder / "metrics.json").exists() and not _newer(folder / "failed.json", folder / "metrics.json"):
        end = folder / "metrics.json"
        written = read_json(end)
        choices = choices or _mapping(written, "choices")
        if "pruned" in written and "psnr" in written:
            state, error = "pruned", f"at step {written['pruned']}, with {written['psnr']:.3f} dB"
        else:
            try:
                figures = read_figures(end)
                state = "done"
            except ValueError as reason:
                state, error = "failed", str(reason)
    elif (folder / "failed.json").exists():
        end, state = folder / "failed.json", "failed"
        failure = read_json(end)
        choices = choices or _mapping(failure, "choices")
        error, traceback = str(failure.get("error", "failed.json cannot be read")), str(failure.get("traceback", ""))
    chosen = {group: str(option) for group, option in choices.items()}
    words = chosen | _assigned(overrides)
    grouped = [group for group in chosen if group.isidentifier() and group not in (*COLUMNS, *ELSEWHERE)]
    attached = (figures and figures.plugins) or ",".join(config.get("plugins") or ())
    settings = dict(_flat(config)) or {group: word for group, word in words.items() if group.isidentifier()}
    seed = config.get("seed", words.get("seed", read_json(end).get("seed") if figures else None))
    return Job(
        name=folder.relative_to(top).as_posix(),
        state=state,
        backbone=words.get("backbone", "-"),
        plugins=_joined(words.get("plugins", "")) or _joined(attached) or "none",
        tuning=words.get("tuning", "-"),
        protocol=figures.protocol if figures else settings.get("protocol.name", words.get("protocol", "-")),
        seed=_number(seed),
        overrides=overrides,
        words={group: words[group] for group in grouped if words[group] not in ("None", "null")},
        settings=_kept(settings),
        folder=folder,
        figures=figures,
        error=error,
        traceback=traceback,
        when=end.stat().st_mtime,
    )


def _not_started(sweep: Path, begun: list[Job]) -> list[Job]:
    """A job that lacks only the seed of another has the other's configuration; of the rest only the words are known."""
    kin = {frozenset(_unseeded(job.overrides)): job for job in reversed(begun)}
    there = {frozenset(job.overrides) for job in begun}
    config = _mapping(_load(sweep))
    hydra = _mapping(config, "hydra")
    chosen = {group: str(option) for group, option in _mapping(hydra, "runtime", "choices").items()}
    jobs = []
    for overrides in planned(hydra):
        if frozenset(overrides) in there:
            continue
        assigned = _assigned(overrides)
        words = (dict.fromkeys(COLUMNS, "-") if "experiment" in assigned else chosen) | assigned  # which it may change
        seed = words.get("seed", config.get("seed"))
        missing = Job(
            name=" ".join(overrides),
            state="not started",
            backbone=words.get("backbone", "-"),
            plugins=_joined(words.get("plugins", "")) or "none",
            tuning=words.get("tuning", "-"),
            protocol=words.get("protocol", "-"),
            seed=_number(seed),
            overrides=overrides,
            settings=_kept({key: word for key, word in assigned.items() if key not in COLUMNS}),
            known=False,
        )
        twin = kin.get(frozenset(_unseeded(overrides)))
        if twin is not None:
            names = {key: getattr(twin, key) for key in COLUMNS}
            missing = replace(missing, words=twin.words, settings=twin.settings, known=twin.known, **names)
        jobs.append(missing)
    return jobs


def _others_choices(written: Mapping[str, Any], choices: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether figures were written with other choices than those of the last start in their folder."""
    attached = ",".join(name for name, call in _mapping(config, "plugins").items() if call) or "none"
    if config and written and not config.get("plugins_file") and attached != written.get("plugins", attached):
        return True
    return any(str(choices[key]) != str(written[key]) for key in written.keys() & choices.keys() - {"plugins"})


def _unseeded(overrides: Iterable[str]) -> list[str]:
    return [override for override in overrides if not override.startswith("seed=")]


def _assigned(overrides: Iterable[str]) -> dict[str, str]:
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs}


def _kept(settings: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in settings.items() if key.split(".")[0] not in ELSEWHERE}


def _joined(plugins: str) -> str:
    """`[seem,memory_bank]` -> `seem + memory_bank`."""
    names = [name.strip(" '\"") for name in plugins.strip("[]").split(",")]
    return " + ".join(name for name in names if name not in ("", "none", "None"))


def _flat(tree: Any, path: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, str(tree)


def _newer(path: Path, other: Path) -> bool:
    return path.exists() and path.stat().st_mtime > other.stat().st_mtime


def _number(seed: Any) -> int | None:
    return int(seed) if str(seed).lstrip("-").isdigit() else None


def _mapping(tree: Any, *keys: str) -> dict[str, Any]:
    """The mapping under the keys; empty where a file that was cut short has something else there."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return dict(tree) if isinstance(tree, Mapping) else {}


def _load(path: Path) -> Any:
    """A yaml of Hydra's, interpolations as they stand; None where there is none or it was cut short."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a hundred times faster, which counts in a large sweep
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (OSError, ValueError, yaml.YAMLError):
        return None
