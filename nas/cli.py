"""The command line: `nas search | report | export`.

Exit codes: 0 done, 2 bad input (do not retry), 130 interrupted, 1 anything else.
"""

import argparse
import contextlib
import json
import sqlite3
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpipe_jax.config import loader
from gpipe_jax.errors import ConfigError
from gpipe_jax.utils import console, progress
from gpipe_jax.utils.console import BAD_INPUT
from nas.config import SearchConfig
from nas.export import scaled_config
from nas.reports.tables import finite
from nas.storage.reader import FILE
from nas.workers import threads


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = console.parse(_parser(), arguments)
    try:
        return options.command(options)
    except (ConfigError, OSError) as error:
        return _fail(error, BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on", 130)


def program() -> NoReturn:
    """`main` as a process of its own, which ends with that code also while candidates train."""
    try:
        code = main()
    except Exception:  # a fault of ours, or of a space of the user's
        traceback.print_exc()
        code = 1
    threads.leave(code)


def _fail(error: object, code: int) -> int:
    return console.fail(error, code, "nas")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nas", description="Search for architectures by regularized evolution."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "search as a config says; the same folder continues a search"
    one = console.add_command(commands, "search", _search, text)
    console.add_config(one)
    text = "say what a run has found, also while it goes on"
    one = console.add_command(commands, "report", _report, text)
    one.add_argument("run", metavar="RUN", help="a folder, or a name in runs/")
    one.add_argument(
        "--out", type=Path, metavar="FILE", help="the HTML page; default: report.html in the run"
    )
    text = "write the best architecture of a run to a file, or a config by which gpipe trains it"
    one = console.add_command(commands, "export", _export, text)
    one.add_argument("run", metavar="RUN", help="a folder, or a name in runs/")
    one.add_argument(
        *("--out", "-o"), type=Path, metavar="FILE", required=True,
        help="genotype.json, or best.yaml for gpipe train and gpipe plan",
    )  # fmt: skip
    for name, default, text in (
        ("top", 1, "train so many of the best again, longer, and take the best of these"),
        ("epochs", None, "of that training; default: three times the search's"),
        (
            "cells",
            scaled_config.CELLS,
            "normal cells of the config's network, in three equal stacks (3 N)",
        ),
        ("filters", scaled_config.FILTERS, "of its first stack (F)"),
        ("stages", scaled_config.STAGES, "devices in its pipeline"),
    ):
        said = "" if default is None else f" ({default})"
        one.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text + said)
    return parser


def _search(options: argparse.Namespace) -> int:
    config = loader.load_as(SearchConfig, options.config, options.overrides)
    import nas
    from nas import from_config

    workdir = Path(config.run.workdir or Path("runs") / Path(options.config).stem)
    started = time.perf_counter()
    try:
        arguments = from_config.arguments(config)
        if not (workdir / FILE).exists():  # of a search that is there it is to be checked first
            _keep(config, workdir)
        with _progress(config.run.cycles) as callback:
            result = nas.search(
                name=workdir.name, folder=workdir.parent, callback=callback, **arguments
            )
    except from_config.SectionError as error:
        found = (error.section, str(error), SearchConfig)
        place = loader.place(options.config, options.overrides, *found)
        raise ConfigError([f"{place}: {error}"], options.config) from error
    except ValueError as error:
        raise ConfigError([str(error)], options.config) from error
    except sqlite3.Error as error:
        problem = f"the search in {workdir} cannot be read or written ({error})"
        raise ConfigError([f"{problem}; use another run.workdir"], options.config) from error
    except (RuntimeError, TypeError) as error:
        return _fail(error, 1)
    _keep(config, workdir)
    if not result.counts.results:
        return _fail(f"{workdir} has no result yet; the same command goes on", 1)
    return _summary(result, time.perf_counter() - started, options.json)


def _keep(config: SearchConfig, workdir: Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.yaml").write_text(loader.dump(config), encoding="utf-8")


def _summary(result: Any, wall_s: float, as_json: bool) -> int:
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
    print(progress.table({**best.metrics, **figures}))
    print(best.row.architecture)
    if as_json:
        print(
            json.dumps(
                {
                    **figures,
                    "best_metrics": finite(best.metrics),
                    "genotype": export.architecture(best.row.architecture),
                },
                allow_nan=False,
            )
        )
    return 0


def _report(options: argparse.Namespace) -> int:
    from nas.reports import html, report
    from nas.storage.queries import Snapshot

    reader = Snapshot(_load(options.run).path)
    found = report.report(reader)
    print(found)
    out = options.out or reader.path.parent / "report.html"
    try:
        html.write(reader, out)
    except ImportError as error:
        raise ConfigError([str(error)], "--out") from error
    print(f"\npage: {out}")
    if options.json:
        print(json.dumps({**found.to_dict(), "page": str(out)}, allow_nan=False))
    return 0


def _export(options: argparse.Namespace) -> int:
    from gpipe_jax.errors import SectionError
    from nas.export import export

    result = _load(options.run)
    wanted = export.Wanted(**{name: getattr(options, name) for name in export.Wanted._fields})
    try:
        ranking = export.export(result, wanted, _show_finalist)
    except ConfigError as error:
        raise ConfigError(error.problems, f"the config of {options.out}") from error
    except (SectionError, ValueError, OSError, ImportError) as error:
        raise ConfigError([str(error)], options.run) from error
    best = ranking[0].row
    figures = {"candidate": best.id, "fitness": best.fitness, "out": str(options.out)}
    print(progress.table(figures))
    if options.json:
        ranks = [
            {"candidate": one.row.id, "fitness": one.row.fitness, "again": one.fitness}
            for one in ranking
        ]
        genotype = export.architecture(best.architecture)
        print(json.dumps({**figures, "ranking": ranks, "genotype": genotype}))
    return 0


def _show_finalist(finalist: Any) -> None:
    again = "failed" if finalist.fitness is None else f"{finalist.fitness:.6g}"
    print(
        f"#{finalist.row.id}: fitness {finalist.row.fitness:.6g}, trained again {again}", flush=True
    )


def _load(run: str) -> Any:
    """The run of that name, or in that folder; ConfigError if it cannot be read."""
    import nas

    try:
        return nas.load(run)
    except (ValueError, sqlite3.Error, StopIteration) as error:
        raise ConfigError([f"it holds no search that can be read ({error})"], run) from error


@contextlib.contextmanager
def _progress(cycles: int) -> Iterator[Callable]:
    """A callback that shows a bar on a terminal, and ten lines elsewhere."""
    with progress.counting(cycles, "results") as show:

        def callback(search: Any) -> None:
            best = search.best_fitness
            show(search.evolution.results, "no fitness" if best is None else f"best {best:.6g}")

        yield callback


if __name__ == "__main__":
    program()
