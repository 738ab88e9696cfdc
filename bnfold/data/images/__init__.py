"""Images as a model's input: what is done to them (`options`), and doing it, to folders of them too (`pipeline`)."""

from .options import ImageOptions
from .pipeline import Pipeline, resolve
