"""Data: the Parquet folders that `gr prepare` writes, the training order, and batches made from them."""
