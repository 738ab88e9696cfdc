"""Tables of samples: tar shards, Parquet files and the folders that Hugging Face's `datasets` writes with save_to_disk.

`files` finds them; `arrow` and `tars` read them, without that library and without a network; `columns` says which columns are inputs and
which one holds the labels; and `source` makes samples of rows.
"""
