"""The command line. One file a command: ``cli/<name>.py`` holds ``command``, loaded when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import sys
from typing import Any

import click

from gpuguard.cli import commands

EXIT_INTERRUPTED = 130


class _Commands(click.Group):
    """The folder listing is the list of commands; only the one that runs is imported."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(commands.__path__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"gpuguard.cli.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; where there is none of that name, name the one that was meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from error

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Read the arguments; Ctrl-C meanwhile is told as when a command is at work."""
        try:
            return super().make_context(*args, **extra)
        except KeyboardInterrupt:
            raise SystemExit(EXIT_INTERRUPTED) from None

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; output that nobody takes is exit status 3, for 1 would say that something was found."""
        from gpuguard.cli.output import EXIT_UNREADABLE

        try:
            try:
                return super().invoke(ctx)
            finally:
                if sys.stdout is not None:  # closed by who started us: nobody asked for output
                    sys.stdout.flush()
        except BrokenPipeError:
            _discard_output()
        except KeyboardInterrupt:
            # As a shell counts it: 1 would say that something was found.
            raise SystemExit(EXIT_INTERRUPTED) from None
        except SystemExit as end:
            # Rich ends the program itself where nobody reads, with 1.
            if not isinstance(end.__context__, BrokenPipeError):
                raise
        except OSError as error:
            _discard_output()
            click.echo(f"gpuguard: {error}", err=True)
        raise SystemExit(EXIT_UNREADABLE)


def _discard_output() -> None:
    """What is still buffered must not fail once more when the interpreter ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gpuguard")
def main() -> None:
    """Tell, with evidence, what mines on a GPU and what tunnels out of this host; act on it by policy."""
    # Standard descriptors that our caller closed: else the next file that is opened has their number, and what is
    # written to them goes into it.
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(spare, True)
    os.close(spare)
    # NumPy's BLAS starts a thread for each core, which take memory and caches; nothing here multiplies matrices.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # gRPC would write lines of its own between ours; what fails there is said in our words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
