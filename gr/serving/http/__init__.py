"""The server: the Open Inference Protocol over HTTP, its connections and its metrics."""
