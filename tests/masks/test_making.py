"""A clip's file is whole or not there, and the same whatever happened while it was made."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vsrplug.masks import making
from vsrplug.masks.cache_file import CacheFile
from vsrplug.masks.journal import Journal, partial_path
from vsrplug.masks.making import clear_partial, make_clip
from vsrplug.masks.words import frame_hash

from .making import SETTINGS, levels_as_masks

FRAMES = torch.randint(256, (7, 3, 20, 90), generator=torch.Generator().manual_seed(0)) / 255


class Source:
    """Remembers what it was asked for; dies as `die` says."""

    def __init__(self, die: Callable[[int], None] = lambda start: None) -> None:
        self.asked: list[tuple[int, int]] = []
        self.die = die

    def __call__(self, start: int, frames: Tensor) -> Tensor:
        self.die(start)
        self.asked.append((start, len(frames)))
        return levels_as_masks(frames)


def make(path: Path, source: Source | None = None, frames: Tensor = FRAMES, batch: int = 1, **changed: object) -> bool:
    return make_clip(path, frames, source or Source(), SETTINGS | changed, 64, batch=batch)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_a_child(run: Callable[[], object]) -> int:
    """Run in another process; its exit status, the negative signal where it was killed."""
    child = os.fork()
    if not child:
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def undisturbed(tmp_path: Path) -> bytes:
    path = tmp_path / "undisturbed" / "a.masks"
    assert make(path)
    assert names(path.parent) == ["a.masks"]
    return path.read_bytes()


def test_what_was_asked_for_is_written(tmp_path: Path) -> None:
    path, source = tmp_path / "new" / "a.masks", Source()
    seen = []
    make_clip(path, FRAMES, source, SETTINGS, 64, batch=3, made=lambda words: seen.append(words.shape))
    assert source.asked == [(0, 3), (3, 3), (6, 1)]
    assert seen == [(20, 90)] * 7
    header = CacheFile(path).header
    assert (header.settings, header.count, header.size) == (SETTINGS, 64, (20, 90))
    assert list(header.hashes) == [frame_hash(frame) for frame in FRAMES]


@pytest.mark.parametrize(("batch", "again"), [(1, [(4, 1), (5, 1), (6, 1)]), (3, [(3, 3), (6, 1)])])
def test_a_killed_run_goes_on_at_the_first_missing_frame(
    tmp_path: Path, undisturbed: bytes, batch: int, again: list[tuple[int, int]]
) -> None:
    path = tmp_path / "a.masks"

    def die(start: int) -> None:
        if start >= 4:
            os.kill(os.getpid(), signal.SIGKILL)

    assert (
        in_a_child(lambda: make(path, Source(die if batch == 1 else lambda start: die(start + 1)), batch=batch)) == -9
    )
    assert names(tmp_path) == [".a.masks.partial", "undisturbed"]
    source = Source()
    assert make(path, source, batch=batch)
    assert source.asked == again
    assert path.read_bytes() == undisturbed
    assert names(tmp_path) == ["a.masks", "undisturbed"]


@pytest.mark.parametrize("torn", [0, 1, 39, 40, 41, 200, -1])
@pytest.mark.parametrize("record", [0, 1, 4])  # the first line, then frames
def test_a_record_torn_by_a_kill_is_made_again(
    tmp_path: Path, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch, torn: int, record: int
) -> None:
    path, written, append = tmp_path / "a.masks", 0, Journal._append

    def tear(journal: Journal, content: bytes) -> None:
        nonlocal written
        if written == record:
            journal.file.write(content[:torn])
            os.kill(os.getpid(), signal.SIGKILL)
        written += 1
        append(journal, content)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_append", tear)
        assert in_a_child(lambda: make(path)) == -9
    source = Source()
    assert make(path, source)
    assert source.asked == [(number, 1) for number in range(max(record - 1, 0), 7)]
    assert path.read_bytes() == undisturbed
    assert names(tmp_path) == ["a.masks", "undisturbed"]


@pytest.mark.parametrize("before", [True, False])
def test_a_kill_while_the_file_is_put_in_place(
    tmp_path: Path, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    path, replace = tmp_path / "a.masks", os.replace

    def die(source: Path, target: Path) -> None:
        if not before:
            replace(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        assert in_a_child(lambda: make(path)) == -9
    assert path.exists() is not before
    source = Source()
    if before:
        assert make(path, source)
        assert not source.asked
    else:
        clear_partial(path)
    assert path.read_bytes() == undisturbed
    assert names(tmp_path) == ["a.masks", "undisturbed"]


def test_another_start_is_not_gone_on_from(tmp_path: Path, undisturbed: bytes) -> None:
    path = tmp_path / "a.masks"
    stop = Source(lambda start: (_ for _ in ()).throw(InterruptedError) if start == 5 else None)
    changed = FRAMES.clone()
    changed[2] = 1 - changed[2]
    for other in (lambda: make(path, stop, compactness=3), lambda: make(path, stop, frames=changed)):
        with pytest.raises(InterruptedError):
            other()
    source = Source()
    assert make(path, source)
    assert source.asked == [(number, 1) for number in range(2, 7)]  # the first two frames are the same
    assert path.read_bytes() == undisturbed


def test_a_clip_in_other_hands_is_left_to_them(tmp_path: Path, undisturbed: bytes) -> None:
    path = tmp_path / "a.masks"
    inside = []

    def other_worker(start: int) -> None:
        if start == 3:
            inside.append(in_a_child(lambda: os._exit(10 + make(path))))

    assert make(path, Source(other_worker))
    assert inside == [10]  # False
    assert path.read_bytes() == undisturbed
    assert names(tmp_path) == ["a.masks", "undisturbed"]


def test_a_clip_finished_by_another_worker_before_the_claim_is_not_made_again(
    tmp_path: Path, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, claim, source = tmp_path / "a.masks", making._claim, Source()

    def late(partial: Path) -> object:
        monkeypatch.setattr(making, "_claim", claim)
        assert make(path)
        return claim(partial)

    monkeypatch.setattr(making, "_claim", late)
    assert not make(path, source)
    assert not source.asked
    assert path.read_bytes() == undisturbed
    assert names(tmp_path) == ["a.masks", "undisturbed"]


@pytest.mark.parametrize("room", [100, 3000, 4096])
def test_a_full_disk_keeps_what_was_made(tmp_path: Path, undisturbed: bytes, room: int) -> None:
    path, soft_and_hard = tmp_path / "a.masks", resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, soft_and_hard[1]))
    try:
        with pytest.raises(
            OSError, match=r"a\.masks could not be written \(.*large.*\); the masks made so far are kept"
        ):
            make(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_and_hard)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == [".a.masks.partial", "undisturbed"]
    assert make(path)
    assert path.read_bytes() == undisturbed
    assert names(tmp_path) == ["a.masks", "undisturbed"]


def test_a_full_disk_at_the_end(tmp_path: Path, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.masks"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"No space left on device\); the masks made so far are kept, and the same"):
            make(path)
    assert names(tmp_path) == [".a.masks.partial", "undisturbed"]
    source = Source()
    assert make(path, source)
    assert not source.asked
    assert path.read_bytes() == undisturbed


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.masks"
    with pytest.raises(ValueError, match="holds up to 64 masks, the source makes count=65; take count=64"):
        make_clip(path, FRAMES, Source(), SETTINGS, 65)
    with pytest.raises(ValueError, match=r"returned \(1, 64, 20, 90\), expected \(t, count, h, w\) = \(1, 8, 20, 90\)"):
        make_clip(path, FRAMES, Source(), SETTINGS, 8)
    with pytest.raises(ValueError, match="a clip without frames has no masks"):
        make_clip(tmp_path / "b.masks", [], Source(), SETTINGS, 64)
    assert not path.exists()
    assert partial_path(path).name == ".a.masks.partial"
