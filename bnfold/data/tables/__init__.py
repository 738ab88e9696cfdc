"""Tar shards, Parquet files and data sets that were saved to disk, read by the `datasets` library, without a network.

`files` finds them; `library`, `table` and `tars` read them; `columns` says which columns are inputs and which one holds the labels; and
`chunks` makes samples of rows.
"""

from .files import files_in_table
from .source import table_source

__all__ = ["files_in_table", "table_source"]
