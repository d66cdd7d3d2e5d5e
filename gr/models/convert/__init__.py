"""Weights of other projects to gr's models and back."""
