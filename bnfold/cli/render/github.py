"""Annotations on GitHub: workflow commands on standard error, where the runner reads them as it does on standard output."""

from __future__ import annotations

import os
import sys
from typing import Literal

MOST = 10  # annotations of one step that GitHub shows


def wanted() -> bool:
    """Whether this runs in GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def annotate(level: Literal["error", "warning"], title: str, text: str) -> None:
    """One annotation."""
    print(line(level, title, text), file=sys.stderr, flush=True)


def line(level: str, title: str, text: str) -> str:
    """The workflow command, see https://docs.github.com/actions/reference/workflow-commands-for-github-actions."""
    escaped = _data(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={escaped}::{_data(text)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
