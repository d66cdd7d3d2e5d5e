"""Models: embeddings, tower and task put together on a single device; and the baselines to beat."""
