"""Encoder strategies: which tokens an encoder refreshes. One paper, one or two files."""
