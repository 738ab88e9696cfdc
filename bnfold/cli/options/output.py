"""The options of output: where a report and a verdict go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..check import Check
from ..job import Job
from .common import OUTPUT, option


@dataclass(frozen=True)
class Reporting:
    """Where the report goes."""

    as_json: Annotated[bool, option("--json", panel=OUTPUT, help="The report as JSON on standard output, and nothing else there.")] = False
    report: Annotated[Path | None, option("--report", panel=OUTPUT, metavar="FILE.json", help="Write the report to a file too.")] = None
    force: Annotated[bool, option("--force", panel=OUTPUT, help="Overwrite files that exist.")] = False
    quiet: Annotated[bool, option("-q", "--quiet", panel=OUTPUT, help="No progress and no remarks.")] = False
    debug: Annotated[bool, option("--debug", panel=OUTPUT, help="Show the traceback of an error.")] = False

    def job(self, check: Check | None = None) -> Job:
        return Job(as_json=self.as_json, report=self.report, force=self.force, quiet=self.quiet, check=check)


@dataclass(frozen=True)
class Checking:
    """Where a verdict goes besides."""

    junit: Annotated[Path | None, option("--junit", panel=OUTPUT, metavar="FILE.xml", help="Write the verdict as JUnit XML.")] = None
    markdown: Annotated[Path | None, option("--markdown", panel=OUTPUT, metavar="FILE.md", help="Write the verdict as Markdown.")] = None

    def check(self, command: str, *files: Path, force: bool, strict: bool = False, baseline: Path | None = None) -> Check:
        return Check(command, files, junit=self.junit, markdown=self.markdown, force=force, strict=strict, baseline=baseline)
