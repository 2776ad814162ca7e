"""``gpuguard run``: broker and guard, until a signal says stop."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from gpuguard.cli.output import EXIT_UNREADABLE, EXIT_USAGE, complain


@click.command()
@click.option("--config", "config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Settings in this file, in place of /etc/gpuguard; the environment overrides.")
@click.option("--mode", type=click.Choice(["observe", "enforce"]), help="Overrides guard.mode.")
@click.option("--record", "directory", metavar="NAME", help="Record every block, below the guard's state folder.")
def command(config_file: Path | None, mode: str | None, directory: str | None) -> None:
    """Watch this host, and act by policy where the mode is enforce.

    Starts the broker (with the caller's privileges) and the guard (without any). Root sees everything; anybody else
    sees what `gpuguard doctor` says.

    \b
    Examples:
      gpuguard run
      gpuguard run --mode enforce --record night-shift
    """
    from gpuguard import logs
    from gpuguard.broker import running
    from gpuguard.broker.audit import AuditFailed
    from gpuguard.broker.journal import JournalFailed, JournalLocked
    from gpuguard.broker.protected import limits_of
    from gpuguard.config_sources import ConfigError, load_config
    from gpuguard.daemon import Start
    from gpuguard.policies import PolicyError, load_policy

    logs.configure()
    flags: dict[str, str] = {}
    if mode:
        flags["guard.mode"] = mode
    if directory == "":
        raise click.BadParameter("a folder needs a name", param_hint="--record")
    if directory:
        flags["recording.directory"] = directory
    try:
        loaded = load_config(files=[config_file] if config_file else None, flags=flags)
        start = Start(config=loaded.config, policy=load_policy())
        status = running.start(loaded.config, handover=msgspec.json.encode(start),
                              limits=limits_of(loaded.config.actions))
    except (ConfigError, PolicyError) as error:
        complain(f"gpuguard: {error}")
        raise SystemExit(EXIT_USAGE) from error
    except JournalLocked as error:
        complain(f"gpuguard cannot run here: a guard, or a command that acts, is at work already: {error}")
        raise SystemExit(EXIT_UNREADABLE) from error
    except (JournalFailed, AuditFailed, OSError) as error:
        complain(f"gpuguard cannot run here: {error}")
        raise SystemExit(EXIT_UNREADABLE) from error
    raise SystemExit(status)
