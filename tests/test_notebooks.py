"""The notebooks run from the first cell to the last, on embedded data, and are kept without outputs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
NAMES = [notebook.stem for notebook in NOTEBOOKS]


def read(notebook: Path) -> nbformat.NotebookNode:
    return nbformat.read(notebook, as_version=4)


def test_there_is_one_for_each_use_and_one_for_a_plugin_of_ones_own() -> None:
    assert NAMES == ["01_import_a_module", "02_attach_and_tune", "03_sweep_and_report", "04_write_a_plugin"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_runs_from_the_first_cell_to_the_last(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the kernel's sockets lie here too
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # cells call `vsrplug`
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kernel = AsyncKernelManager(kernel_name="python3", transport="ipc")
    cells = read(notebook)
    NotebookClient(cells, km=kernel, timeout=500, startup_timeout=300).execute()
    shown = [output for cell in cells.cells for output in cell.get("outputs", [])]
    assert shown
    assert not [output for output in shown if output.output_type == "error"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_is_kept_without_outputs(notebook: Path) -> None:
    """What a run leaves in a notebook is noise in a diff."""
    cells = read(notebook)
    nbformat.validate(cells)
    assert set(cells.metadata) == {"kernelspec", "language_info"}
    assert cells.metadata.kernelspec.name == "python3"
    for cell in cells.cells:
        assert not cell.get("outputs"), "clear the outputs before saving"
        assert cell.get("execution_count") is None
        assert not cell.metadata


def test_a_plugin_of_ones_own_takes_sixty_lines() -> None:
    code = [cell.source for cell in read(NOTEBOOKS[3]).cells if cell.cell_type == "code"]
    lines = [line for source in code for line in source.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 60
