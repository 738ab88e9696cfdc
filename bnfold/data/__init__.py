"""What the user's data can be, as batches: files, folders, functions, arrays and loaders.

Every form (`forms`) becomes a `Source` of chunks (`source`); `Data` fits the chunks to the model's inputs (`inputs`) and cuts them into
batches (`batches`).
"""

from .batches import BATCH_SIZE, Data
from .forms import Flat, as_batches, from_object, from_stream, open_data
from .inputs import WHOLE
from .samples import few
from .source import LABELS, Chunk, Counted, Source
from .spec import Array, Batch, InputSpec

__all__ = [
    "BATCH_SIZE",
    "LABELS",
    "WHOLE",
    "Array",
    "Batch",
    "Chunk",
    "Counted",
    "Data",
    "Flat",
    "InputSpec",
    "Source",
    "as_batches",
    "few",
    "from_object",
    "from_stream",
    "open_data",
]
