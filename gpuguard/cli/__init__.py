"""The command line. One file a command: ``cli/<name>.py`` holds ``command``, loaded when it is asked for."""

from __future__ import annotations

import difflib
import functools
import importlib
import io
import os
import pkgutil
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gpuguard.cli import commands

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
EXIT_INTERRUPTED = 130
#: More characters than any sentence has.
WHOLE = 10_000


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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by the first sentence of each, in whole."""
        named = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(WHOLE)) for name, one in named if one])

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
        """Read the arguments, or show the help."""
        return _ends_in_words(functools.partial(super().make_context, *args, **extra))

    def invoke(self, ctx: click.Context) -> object:
        """Run the command, to the last byte of its output."""
        run = super().invoke

        def to_the_last() -> object:
            try:
                return run(ctx)
            finally:
                if sys.stdout is not None:  # closed by who started us: nobody asked for output
                    sys.stdout.flush()

        return _ends_in_words(to_the_last)


def _ends_in_words(call: Callable[[], T]) -> T:
    """Call, where output that nobody takes is exit status 3 and Ctrl-C 130: 1 would say that something was found."""
    from gpuguard.cli.output import EXIT_UNREADABLE, complain

    try:
        return call()
    except BrokenPipeError:
        _discard_output()
    except KeyboardInterrupt:
        # As a shell counts it.
        raise SystemExit(EXIT_INTERRUPTED) from None
    except SystemExit as end:
        # Rich ends the program itself where nobody reads, with 1.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
    except OSError as error:
        _discard_output()
        complain(f"gpuguard: {error}")
    raise SystemExit(EXIT_UNREADABLE)


def _discard_output() -> None:
    """What is still buffered must not fail once more when the interpreter ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _take_up_streams() -> None:
    """Make standard streams fit to write to, whatever our caller made of them."""
    # One that he closed: else the next file that is opened has its number, and what is written there goes into it.
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(spare, True)
    os.close(spare)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    # Files and pipes are UTF-8, as JSON (RFC 8259, 8.1) and our pages say of themselves; a terminal shows what it can.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="backslashreplace")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gpuguard")
def main() -> None:
    """Tell, with evidence, what mines on a GPU and what tunnels out of this host; act on it by policy."""
    _take_up_streams()
    # NumPy's BLAS starts a thread for each core, which take memory and caches; nothing here multiplies matrices.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # gRPC would write lines of its own between ours; what fails there is said in our words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
