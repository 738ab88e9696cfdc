"""Images as a model's input: what is done to them (`options`), doing it (`pipeline`), and folders of them (`folder`)."""

from .folder import folder_source, has_images
from .options import ImageOptions
from .pipeline import Pipeline, resolve, shaped

__all__ = ["ImageOptions", "Pipeline", "folder_source", "has_images", "resolve", "shaped"]
