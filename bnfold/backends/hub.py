"""Models that are named by where they come from, not by a file: hf://OWNER/REPOSITORY/FILE, and timm:NAME."""

from __future__ import annotations

import re
from pathlib import Path

from bnfold.errors import ModelError, UnsupportedError, UsageError
from bnfold.text import first_line

HUGGING_FACE = re.compile(r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")  # a path has one slash of two
ADDRESS = re.compile(r"[a-z]+:/{1,2}.*", re.IGNORECASE)
BESIDE = "preprocessor_config.json"


def is_timm(path: str | Path) -> bool:
    return str(path).startswith("timm:")


def local(name: str | Path) -> Path:
    """The file that is meant, which for hf:// is fetched, with what its weights are in and how images are prepared for it.

    UsageError for a name that can't be one; UnsupportedError without huggingface_hub; ModelError where it isn't there, or no network is.
    """
    text = re.sub("^hf:/{1,2}", "hf://", str(name))
    if (found := HUGGING_FACE.fullmatch(text)) is None:
        if text.startswith("hf:"):
            raise UsageError(f"{text}: write it as hf://OWNER/REPOSITORY/FILE, or hf://OWNER/REPOSITORY@REVISION/FILE")
        if len(text.partition(":")[0]) > 1 and ADDRESS.fullmatch(text):
            raise UsageError(f"{text}: an address, not a file; download it, or name it as hf://OWNER/REPOSITORY/FILE where it lies there")
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UnsupportedError(f"{text}: fetching it needs huggingface_hub: pip install huggingface_hub, or download the file") from None
    file = found["file"]
    wanted = [file, f"{file}_data", f"{file}.data", BESIDE, f"{Path(file).parent}/{BESIDE}"]
    try:
        path = Path(snapshot_download(found["repo"], revision=found["revision"], allow_patterns=wanted)) / file
    except Exception as error:  # of the hub's own kinds, and of whatever carries its requests
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{text}: can't be fetched ({why}); is the name right, and is there a network?") from None
    if not path.is_file():
        raise ModelError(f"{text}: there is no file {file} in that repository")
    return path
