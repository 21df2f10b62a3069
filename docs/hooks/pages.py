"""MkDocs hooks: notebooks and configuration become pages, and mkdocstrings is shown the package in one folder."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from configuration import reference
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NOTEBOOKS = ROOT / "notebooks"
SOURCES = Path(tempfile.mkdtemp(prefix="vsrplug_docs_"))
PLACE = "<!-- every group and option -->"
LINK = re.compile(r"\]\((?:\.\./)+notebooks/(\w+)\.ipynb\)")


def on_startup(command: str, dirty: bool) -> None:
    """Links to the sources, laid out as they are installed."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    for line in setup["options"]["package_dir"].strip().splitlines():
        package, folder = (part.strip() for part in line.split("="))
        target = SOURCES.joinpath(*package.split("."))
        target.mkdir(parents=True)
        for source in (ROOT / folder).iterdir():
            (target / source.name).symlink_to(source)


@event_priority(100)  # before mkdocstrings looks at its settings
def on_config(config: Any) -> Any:
    """Show mkdocstrings that folder: it reads files, and knows no `package_dir`."""
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(SOURCES)]
    return config


def on_shutdown() -> None:
    """Take the links away."""
    shutil.rmtree(SOURCES)


def on_files(files: Any, config: Any) -> Any:
    """Give every notebook a page."""
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        page = File.generated(config, f"notebooks/{notebook.stem}.md", content=markdown(notebook))
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill the configuration reference in, and turn links to a notebook into links to its page."""
    up = "../" * page.file.src_uri.count("/")
    markdown = LINK.sub(rf"]({up}notebooks/\1.md)", markdown)
    return markdown.replace(PLACE, reference()) if PLACE in markdown else markdown


def markdown(notebook: Path) -> str:
    """The cells of a notebook as a page; outputs are stripped, so there are none."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    return "\n\n".join(parts) + f"\n\n---\n\nThis page is `notebooks/{notebook.name}`, which the tests run.\n"
