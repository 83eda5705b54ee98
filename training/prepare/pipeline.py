"""The steps of `prepare` in their order; each is a call, and reads from top to bottom."""
