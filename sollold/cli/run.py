"""``sollold run``: run the daemon in the foreground, as systemd does."""

from __future__ import annotations

import argparse
import sys

from sollold import log
from sollold.cli.config import loaded
from sollold.cli.exit import Exit
from sollold.settings.fault import SettingsError
from sollold.settings.load import LoadedSettings

FLAGS = {
    "port": ("http.port",),
    "peer_port": ("cluster.port",),
    "host": ("http.host", "cluster.host"),
    "name": ("node.name",),
    "memory_limit": ("node.memory_limit",),
    "log_level": ("log.level",),
}
"""The setting that each flag sets."""


def settings(options: argparse.Namespace) -> LoadedSettings:
    """The settings, overridden by this command's own flags; called again on a reload.

    Raises:
        SettingsError: as `sollold.settings.load.load`.
    """
    named = [
        f"{key}={value}"
        for field, keys in FLAGS.items()
        if (value := getattr(options, field)) is not None
        for key in keys
    ]
    if options.models:
        named.append(f"models.folders={','.join(options.models)}")
    if options.seed:
        named.append(f"cluster.seeds={','.join(options.seed)}")
    return loaded(argparse.Namespace(config=options.config, set=[*options.set, *named]))


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    found = settings(options)
    log.set_up(found.settings.log.level)
    from sollold.daemon import late_certificates

    late_certificates.install()
    from sollold.daemon.main import StartError, serve

    try:
        serve(found, reload=lambda: settings(options), demo=options.demo_model)
    except StartError as error:
        print(f"sollold: {error}", file=sys.stderr)
        return Exit.FAILED
    except SettingsError as error:
        print(f"sollold: {error}", file=sys.stderr)
        return Exit.USAGE
    return Exit.DONE
