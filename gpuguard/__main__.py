"""``python -m gpuguard``."""

from gpuguard.cli import main

main(prog_name="gpuguard")
