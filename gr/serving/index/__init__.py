"""The items nearest to a query: exact and approximate."""
