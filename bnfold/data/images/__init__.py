"""Images as a model's input: what is done to them (`options`), doing it (`pipeline`), and folders of them (`folder`)."""

from .options import ImageOptions
from .pipeline import Pipeline, resolve

__all__ = ["ImageOptions", "Pipeline", "resolve"]
