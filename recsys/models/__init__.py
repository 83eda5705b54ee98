"""Models: two towers for retrieval."""
