"""Serving: a checkpoint as a package, and a package as answers. Importing it needs torch and fbgemm_gpu only."""
