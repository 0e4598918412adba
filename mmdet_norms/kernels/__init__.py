"""Faster ways to compute what the layers define; torch only. A layer asks for one and falls back to its formula."""
