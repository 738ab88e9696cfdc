"""Tables of samples: tar shards, Parquet files and the folders that Hugging Face's `datasets` writes with save_to_disk.

`table` and `tars` read them, without that library and without a network; and `source` makes samples of rows.
"""
