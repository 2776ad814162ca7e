"""Launches that were recorded elsewhere: read from a file, and judged as the running guard would have judged them."""
