"""Load on an engine or on a server, and what a package is measured against."""
