"""gr: training of sparse recommender models on torch and torchrec. Importing the package imports no torch."""

__version__ = "0.1.0"
