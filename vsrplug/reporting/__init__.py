"""From the folders that runs leave to one table, charts and a page. `vsrplug report` is the command."""

from .intervals import Resampling
from .jobs import Job, read_jobs
from .page import page
from .rows import Row, Section
from .sections import sections
from .tables import csv_table, latex, markdown, rich_table

__all__ = [
    "Job",
    "Resampling",
    "Row",
    "Section",
    "csv_table",
    "latex",
    "markdown",
    "page",
    "read_jobs",
    "rich_table",
    "sections",
]
