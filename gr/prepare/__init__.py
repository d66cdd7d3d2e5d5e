"""Public data sets -> data folders (gr/schema.py), as `gr prepare` runs them."""
