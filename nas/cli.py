"""Provide the command line `nas search | report | export`.

Exit codes: 0 done, 2 bad input (do not retry), 130 interrupted, 1 anything else.
"""

import argparse
import contextlib
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import nas
from gpipe_jax import known_code, progress
from gpipe_jax.config import loader, trusted_code
from gpipe_jax.config.base import section
from gpipe_jax.errors import ConfigError, SectionError
from gpipe_jax.utils import atomic_files, console, paths
from gpipe_jax.utils.messages import BAD_INPUT, answer, answering, fail, printable, write
from gpipe_jax.utils.text import figures_table
from nas.config import SearchConfig
from nas.errors import ExportOptionError
from nas.evolution.length import Length, length
from nas.export import scaled_config
from nas.reports.tables import finite, metric_labels
from nas.storage.reader import FILE
from nas.storage.run_folder import run_folder
from nas.workers import threads

CONFIG = "config.yaml"  # the config of a run, in its folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with answering(console.wants_json(arguments)):
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    options = console.parse(_parser(), arguments)
    try:
        return options.command(options)
    except (ConfigError, OSError) as error:
        return _fail(error, BAD_INPUT)
    except SystemExit as error:  # no command exits so: the user's own code does
        return _fail(f"code of the search ended the program (sys.exit({error.code!r}))", 1)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to resume", 130)


def program() -> NoReturn:
    """Run `main` and exit the process with its code, even while candidates still train."""
    try:
        code = main()
    except Exception:  # a bug, here or in a search space of the user's
        print(printable(traceback.format_exc()), file=sys.stderr)
        code = 1
    threads.leave(code)


def _fail(error: object, code: int) -> int:
    return fail(error, code, "nas")


# --- options --------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = console.new_parser("nas", "Search for architectures by regularized evolution.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "run the search of a config; the same folder resumes a search"
    search = console.add_command(commands, "search", _search, text)
    console.add_config(
        search, "a YAML file; if it names a function (evaluate.function), its module is run"
    )

    text = "report on a run, finished or not, and write its page"
    report = console.add_command(commands, "report", _report, text)
    _add_run(report)
    report.add_argument(
        "--out",
        type=console.path,
        metavar="FILE",
        help="HTML page to write (report.html in the run)",
    )

    text = "write the best architecture of a run to a file, alone or in a config for gpipe train"
    export = console.add_command(commands, "export", _export, text)
    _add_run(export)
    _add_export_options(export)
    return parser


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="folder of a run, or its name in runs/")


def _add_export_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        *("--out", "-o"), type=console.path, metavar="FILE", required=True,
        help="genotype.json, or best.yaml for gpipe train and gpipe plan",
    )  # fmt: skip
    command.add_argument(
        "--trust",
        action="store_true",
        help=f"{trusted_code.TRUST}; needed for --top and .yaml files of another user's run",
    )
    command.add_argument("--cells", action=_RenamedCells, help=argparse.SUPPRESS)
    for name, default, text in (
        ("top", 1, "train this many of the best again, for longer, and write the best of them (1)"),
        ("epochs", None, "epochs of that training (three times those of the search)"),
        (
            "cells-per-stack",
            scaled_config.CELLS_PER_STACK,
            "normal cells in each of the three stacks of the config's network (%(default)s)",
        ),
        ("filters", scaled_config.FILTERS, "filters of its first stack (%(default)s)"),
        ("stages", scaled_config.STAGES, "devices in its pipeline (%(default)s)"),
    ):
        command.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)


class _RenamedCells(argparse.Action):
    """Reject `--cells`, which older versions had, and name the option that replaces it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Print the error and exit with code 2."""
        parser.error(
            "--cells was renamed to --cells-per-stack, which counts the normal cells in each of "
            "the three stacks: use a third of the number, for example --cells-per-stack 6 instead "
            "of --cells 18"
        )


OPTION_OF: dict[tuple[str, str | None], str] = {
    ("model", "filters"): "filters",
    ("mesh", "stages"): "stages",
}
"""Options of `nas export` by the settings of the config that they become."""


# --- commands -------------------------------------------------------------------------------------


def _search(options: argparse.Namespace) -> int:
    config = loader.load_as(SearchConfig, options.config, options.overrides)
    from nas import from_config

    workdir = Path("runs") / Path(options.config).stem
    if config.run.workdir:
        with loader.locating(options.config, options.overrides, SearchConfig), section("run"):
            workdir = paths.local("workdir", config.run.workdir)
    if workdir.name in ("", ".."):
        workdir = workdir.resolve()
    started = time.perf_counter()
    try:
        run_folder(workdir.parent, workdir.name)  # for its errors, before anything is written
        with loader.locating(options.config, options.overrides, SearchConfig):
            arguments = from_config.arguments(config)
        if not (workdir / FILE).exists():  # an existing search is checked first
            _check_replaceable(workdir / CONFIG, options.config)
            _keep(config, workdir)
        with _progress(length(config.run.cycles, config.run.evaluations)) as callback:
            result = nas.search(
                name=workdir.name, folder=workdir.parent, callback=callback, **arguments
            )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([str(error)], options.config) from error
    except sqlite3.Error as error:
        problem = f"the search in {workdir} cannot be read or written ({error})"
        raise ConfigError([f"{problem}; use another run.workdir"], options.config) from error
    except (RuntimeError, TypeError) as error:
        return _fail(error, 1)
    _keep(config, workdir)
    if not result.counts.results:
        return _fail(f"{workdir} has no result yet; run the same command again to resume", 1)
    return _summary(result, time.perf_counter() - started)


def _check_replaceable(path: Path, where: str) -> None:
    """Raise ConfigError if a config exists that `nas search` has not written itself."""
    if not path.exists():
        return
    with contextlib.suppress(ConfigError):
        if loader.dump(loader.load_as(SearchConfig, path)) == path.read_text(encoding="utf-8"):
            return
    problem = (
        f"{path.parent} does not hold a search, but a {path.name}, which the search would replace; "
        f"use another folder (run.workdir=...)"
    )
    raise ConfigError([problem], where)


def _keep(config: SearchConfig, workdir: Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(workdir / CONFIG, loader.dump(config))


def _summary(result: Any, wall_s: float) -> int:
    from nas.export import export

    counts, best = result.counts, result.best
    figures = {
        "best_fitness": best.fitness,
        "results": counts.results,
        "evaluations": counts.evaluations,
        "cache_hits": counts.cache_hits,
        "rejected": counts.rejected,
        "failures": counts.failures,
        "wall_s": wall_s,
        "run": str(result.path),
    }
    labels = metric_labels(best.metrics, figures)
    metrics = {labels[name]: value for name, value in best.metrics.items()}
    write(figures_table({**metrics, **figures}))
    write(best.row.architecture)
    answer(
        {
            **figures,
            **finite({"best_fitness": best.fitness}),
            "best_metrics": finite(best.metrics),
            "genotype": export.as_json(best.row.architecture),
        }
    )
    return 0


def _report(options: argparse.Namespace) -> int:
    from nas.reports import html, report
    from nas.storage.queries import Snapshot

    reader = Snapshot(_load(options.run).path)
    summary = report.report(reader)
    write(summary)
    out = options.out or reader.path.parent / "report.html"
    try:
        page = html.page(reader)
    except ImportError as error:
        return _fail(error, BAD_INPUT)
    try:
        html.write(page, out)
    except OSError as error:
        option = "" if options.out is None else "--out "
        return _fail(f"{option}{error}", BAD_INPUT)
    write(f"\npage: {out}")
    answer({**summary.to_dict(), "page": str(out)})
    return 0


def _export(options: argparse.Namespace) -> int:
    from nas.export import export

    result = _load(options.run, trust=options.trust)
    fields = {name: getattr(options, name) for name in export.ExportOptions._fields}
    if not options.trust and (options.top > 1 or options.out.suffix in export.CONFIG_SUFFIXES):
        _check_own_code(result.reader.setup(), options.run)
    try:
        ranking = export.export(result, export.ExportOptions(**fields), _show_finalist)
    except ExportOptionError as error:
        option = error.option.replace("_", "-")
        return _fail(f"--{option} {error.value}: {error.problem}", BAD_INPUT)
    except SectionError as error:
        option = OPTION_OF.get((error.section, error.field))
        where = options.run if option is None else f"--{option} {getattr(options, option)}"
        return _fail(f"{where}: {error.problem}", BAD_INPUT)
    except ConfigError as error:
        raise ConfigError(error.problems, f"the config of {options.out}") from error
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError([str(error)], options.run) from error
    best = ranking[0].row
    figures = {"candidate": best.id, "fitness": best.fitness, "out": str(options.out)}
    write(figures_table(figures))
    ranks = [  # `again` is the fitness that `nas report --json` has under `trained_again`
        {
            "candidate": each.row.id,
            **finite({"fitness": each.row.fitness, "again": each.fitness}),
        }
        for each in ranking
    ]
    answer({**figures, "ranking": ranks, "genotype": export.as_json(best.architecture)})
    return 0


def _check_own_code(setup: bytes | None, run: str) -> None:
    """Raise ConfigError if the run's evaluator, which is code, is not of this user's searches."""
    if setup is None or known_code.is_known(setup):
        return
    problem = (
        "this command would run code from the folder (its evaluator), which no search of yours on "
        "this machine has stored; add --trust if you trust the author of the folder, or export to "
        "a .json file without --top, which runs no code"
    )
    raise ConfigError([problem], run)


def _show_finalist(finalist: Any) -> None:
    again = "failed" if finalist.fitness is None else f"{finalist.fitness:.6g}"
    write(f"#{finalist.row.id}: fitness {finalist.row.fitness:.6g}, trained again {again}")


def _load(run: str, *, trust: bool = False) -> Any:
    """Load the run in this folder, or of this name in runs/; raise ConfigError if not a run."""
    try:
        return nas.load(run, trust=trust)
    except (ValueError, sqlite3.Error, StopIteration) as error:
        raise ConfigError([f"no search can be read here ({error})"], run) from error


@contextlib.contextmanager
def _progress(length: Length) -> Iterator[Callable]:
    """Yield a callback that shows a progress bar on a terminal, and ten lines elsewhere."""
    with progress.counting(length.total, length.noun) as show:

        def callback(search: Any) -> None:
            best = search.best_fitness
            done = length.done(search.evolution.results, search.evaluated)
            show(done, "no fitness" if best is None else f"best {best:.6g}")

        yield callback


if __name__ == "__main__":
    program()
