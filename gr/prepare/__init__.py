"""Public data sets, and anyone's log, -> data folders (gr/schema.py), as `gr prepare` runs them."""
