"""What the user's data can be, as batches: files, folders, functions, arrays and loaders.

Every form becomes a `Source` of chunks (`source`, and by name `files`, `open`, `random`, `images` and `tables`); `Data` fits the
chunks to the model's inputs (`spec`, `inputs`) and cuts them into batches (`batches`). `open` has the doors.
"""

from .batches import Data
from .inputs import WHOLE, Counted
from .open import as_batches, open_data
from .source import BATCH_SIZE, LABELS, Chunk, digest
from .spec import Array, Batch, InputSpec
