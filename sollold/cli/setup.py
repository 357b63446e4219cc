"""``sollold setup``: find or build llama.cpp, with a progress bar."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sollold.cli.config import loaded
from sollold.cli.exit import Exit
from sollold.cli.on_screen import on_screen
from sollold.engines.install.build_step import SetupFailed
from sollold.engines.install.setup import Progress, Setup
from sollold.errors import system_reason
from sollold.settings.paths import places


def setup(options: argparse.Namespace) -> int:
    """Find or build llama.cpp, and print where it is."""
    settings = loaded(options).settings
    if (options.gpu or options.architectures) and not options.portable:
        print("sollold: --gpu and --architectures go with --portable", file=sys.stderr)
        return Exit.USAGE
    folders = places(settings.node)
    try:
        folders.make()
    except OSError as error:
        print(
            f"sollold: can't write {error.filename or folders.cache}: {system_reason(error)}; "
            "name other folders with --set node.cache_dir=… and --set node.state_dir=…",
            file=sys.stderr,
        )
        return Exit.FAILED
    with _show_progress() as tell:
        work = Setup(settings.llama, folders.cache, tell)
        try:
            wanted = (options.gpu, options.architectures)
            found = work.run_portable(*wanted) if options.portable else work.run()
        except SetupFailed as error:
            print(f"sollold: {error}", file=sys.stderr)
            return Exit.FAILED
        except (KeyboardInterrupt, SystemExit):
            work.cancel()
            raise
    if options.print_folder:
        print(found.server.parent)
    else:
        print(f"llama.cpp {found.build} is ready: {found.server.parent}")
    return Exit.DONE


@contextmanager
def _show_progress() -> Iterator[Callable[[Progress], None]]:
    """Show progress on standard error: a bar on a terminal, else a line per stage."""
    if not sys.stderr.isatty():
        printed = {"stage": "", "tenth": -1}

        def line(progress: Progress) -> None:
            tenth = int(progress.fraction * 10)
            if (progress.stage, tenth) != (printed["stage"], printed["tenth"]):
                printed.update(stage=progress.stage, tenth=tenth)
                print(f"{progress.fraction:4.0%}  {progress.message}", file=sys.stderr, flush=True)

        yield line
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.description}", markup=False),
    )
    with on_screen(rich.Progress(*columns, console=Console(stderr=True), transient=True)) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda progress: bar.update(task, completed=progress.fraction, description=progress.message)
