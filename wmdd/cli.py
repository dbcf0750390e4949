"""The command line ``wmdd``.  Each command imports heavy packages only when it runs."""

from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from wmdd.cli_options import ConfigArgument, RefreshOption, RunArgument, SetOption, answer, parse_blocks
from wmdd.runtime.signals import STOPS, stop_on


class _Commands(TyperGroup):
    """The core's commands, and those of bench, slurm and sweeps (entry-point group ``wmdd.commands``)."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(_plugins())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name)
        if found is None and cmd_name in _plugins():
            return typer.main.get_command(_plugins()[cmd_name].load())
        return found


def _plugins() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group="wmdd.commands")}


app = typer.Typer(
    cls=_Commands,
    help="Distill image datasets by Wasserstein barycenters, and measure the accuracy of students trained on them.\n\n"
    "Start with:  wmdd run digits",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


config_app = typer.Typer(help="Show configs and list the presets.", no_args_is_help=True, rich_markup_mode=None)


data_app = typer.Typer(help="Download, check, pack and generate datasets.", no_args_is_help=True, rich_markup_mode=None)


cache_app = typer.Typer(
    help="List and prune the cache of teachers, statistics and dataset listings.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(cache_app, name="cache")


def _version(wanted: bool) -> None:
    if wanted:
        import wmdd

        typer.echo(f"wmdd {wmdd.__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version of wmdd and exit.")
    ] = False,
) -> None:
    """Declare the options of ``wmdd`` itself; their callbacks do the work."""


@app.command(
    epilog="Examples:  wmdd run digits   |   wmdd run digits+paper --set ipc=1 --out runs/paper-1   |   "
    "torchrun --nproc-per-node 4 -m wmdd run imagenet-1k"
)
@stop_on(*STOPS)  # before torch is imported, which takes seconds
def run(
    config: ConfigArgument,
    override: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder to write to. Default: runs/NAME, with the name of the config.")
    ] = None,
    only_blocks: Annotated[
        str | None, typer.Option(metavar="7|0-15|1,3", help="Distill only these blocks, and train no students.")
    ] = None,
    refresh: RefreshOption = False,
) -> None:
    """Distill a dataset, train students on it, and write the report.  The same command resumes a stopped run."""
    blocks = None if only_blocks is None else parse_blocks(only_blocks)
    from wmdd import pipeline

    share = pipeline.Share() if blocks is None else pipeline.Share(("teacher", "distill"), tuple(blocks))
    pipeline.run(config, out, override or [], share, refresh)


@app.command(epilog="Example:  wmdd export runs/digits --format imagefolder --out digits-10ipc")
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="New folder for the exported images.")],
    format: Annotated[str, typer.Option(help="File format: imagefolder (lossless PNG) or parquet.")] = "imagefolder",
) -> None:
    """Export a distilled set without loss, as PNG files or Parquet, for other tools."""
    from wmdd.runs import distilled_set
    from wmdd.runtime.progress_bars import progress

    found = distilled_set.DistilledSet.load(run)
    with progress(f"export to {out}", len(found), "images") as advance:
        distilled_set.export(found, format, out, advance)


@app.command(epilog="Example:  watch -n 10 wmdd status runs/imagenet-1k")
def status(run: RunArgument) -> None:
    """Show the progress of a run: finished parts, current work, speed and estimated time left."""
    from wmdd.runs.status import show
    from wmdd.runtime.log import results

    show(run, results())


@app.command()
def verify(run: RunArgument) -> None:
    """Check every block of a run against its SHA-256.  Exit 1 if a file is damaged or missing, and name it."""
    from wmdd.runs.distilled_set import DistilledSet

    found = DistilledSet.load(run)
    typer.echo(f"{run}: {len(found)} images of {len(found.classes)} classes are intact, SHA-256 {found.sha256}")


@app.command(epilog="Example:  wmdd report runs/digits runs/digits+paper results.jsonl --html both.html")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of runs, sweeps, protocols or record files, or single record files (.jsonl).",
        ),
    ],
    html: Annotated[Path | None, typer.Option(help="HTML file to write: one self-contained page.")] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file to write: the accuracies, else the speeds.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Markdown file to write: the tables.")] = None,
    latex: Annotated[Path | None, typer.Option(help="LaTeX file to write: the tables (booktabs, longtable).")] = None,
    mllog: Annotated[Path | None, typer.Option(help="MLPerf event lines to write: a run for each student.")] = None,
) -> None:
    """Report the results of runs: a verdict and a table on the terminal, everything as HTML, CSV, Markdown or LaTeX."""
    from wmdd.report import mllog as events
    from wmdd.report import text
    from wmdd.report.collect import collect
    from wmdd.report.html import write_html
    from wmdd.runtime.log import results
    from wmdd.storage.files import write_bytes

    collected = collect(runs)
    text.terminal(collected, results())
    if html:
        write_html(collected, html)
    for path, form in ((csv, text.csv), (markdown, text.markdown), (latex, text.latex), (mllog, events.mllog)):
        if path:
            write_bytes(path, form(collected).encode())


@app.command()
def methods() -> None:
    """List the distillation methods, including those of plug-ins."""
    from wmdd.config.schema import Config
    from wmdd.distill.methods import registry

    for name in registry.names():
        summary = (registry.create(Config(), name).__doc__ or "").strip().splitlines()[0]
        typer.echo(f"{name:20} {summary}")


@app.command()
def doctor() -> None:
    """Check packages, GPUs, SLURM and the cache folder of this machine.  Exit 1 if something wmdd needs is broken."""
    from wmdd.doctor import examine, table
    from wmdd.runtime.log import results

    findings = examine()
    results().print(table(findings))
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


@app.command(epilog="Example:  wmdd selftest --json selftest.json")
def selftest(
    device: Annotated[str, typer.Option(help="Device to test: auto, cpu, cuda (all GPUs) or cuda:N.")] = "auto",
    json: Annotated[
        Path | None, typer.Option(help="JSON file to write, with the system description; attach it to a bug report.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out compiled steps, --jobs and the report.")] = False,
) -> None:
    """Check that this machine computes what it should: precisions, ranks, resume, speed.  Exit 1 if a row fails."""
    import time

    from wmdd.runtime.log import results
    from wmdd.selftest import rows, table
    from wmdd.storage.files import write_json

    machine, begun = rows.machine_of(device), time.monotonic()
    with rows.workplace(machine, quick) as place:
        found = rows.run_rows(table.rows(), place)
    seconds = time.monotonic() - begun
    results().print(table.table(found))
    typer.echo(table.summary(found, seconds))
    if json:
        write_json(json, table.as_json(found, machine, quick, seconds))
    if not table.passed(found):
        raise typer.Exit(1)


@config_app.command("show", epilog="Example:  wmdd config show tiny-imagenet+paper --set ipc=1")
def config_show(config: ConfigArgument, override: SetOption = None) -> None:
    """Print the resolved config as TOML, with a comment on every key.  Redirect it to a file to start your own."""
    from wmdd.config.loading import load_config, to_toml

    typer.echo(to_toml(load_config(config, override or [])), nl=False)


@config_app.command("list")
def config_list() -> None:
    """List the presets, and the variants that combine with every preset."""
    from wmdd.config.loading import preset_names

    presets, variants = preset_names()
    typer.echo(f"presets:   {'  '.join(presets)}\nvariants:  {'  '.join(variants)}   (as in digits+{variants[0]})")


@data_app.command("fetch", epilog="Example:  wmdd data fetch cifar10 --root /scratch/cifar10")
def data_fetch(
    name: Annotated[str, typer.Argument(help="Dataset: cifar10, imagenette, tiny-imagenet or imagenet-1k.")],
    root: Annotated[Path | None, typer.Option(help="Folder for the dataset. Default: data/NAME.")] = None,
) -> None:
    """Download a dataset, or unpack the ImageNet archives that you have put into its folder."""
    from wmdd.data.download import fetch

    typer.echo(f"{name} is at {fetch(name, root)}")


@data_app.command(
    "pack",
    epilog="Examples:  wmdd data pack imagenet-1k --out /scratch/packed   |   "
    "wmdd run imagenet-1k --set data.packed=/scratch/packed",
)
def data_pack(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option(help="Folder for the packed images. The same command resumes stopped work.")],
    override: SetOption = None,
) -> None:
    """Decode and resize every image of a config once, so that runs read pixels instead of image files."""
    from wmdd.config.loading import load_config
    from wmdd.data.pack import pack

    settings = load_config(config, override or [])
    images, size = pack(settings.data, out, settings.compute.workers)
    typer.echo(f"{out}: {images:,} images, {size / 1e6:,.1f} MB; add --set data.packed={out} to use them")


@data_app.command("check", epilog="Example:  wmdd data check tiny-imagenet --set data.root=/scratch/tiny-imagenet-200")
def data_check(config: ConfigArgument, override: SetOption = None, refresh: RefreshOption = False) -> None:
    """Decode every image of a config, and check that a run can use the dataset.  List all unreadable images.

    Exit 1 if an image cannot be read, unless data.on_error=skip leaves it out.
    """
    from wmdd import pipeline
    from wmdd.config.loading import load_config
    from wmdd.data.dataset import check_files, load_dataset

    settings = load_config(config, override or [])
    bad = check_files(settings.data, settings.compute.workers, refresh)
    for name, reason in bad:
        typer.echo(f"{name}: {reason}")
    if bad and settings.data.on_error == "fail":
        raise typer.Exit(1)
    dataset = load_dataset(settings.data, settings.compute.workers)
    pipeline.check(settings, dataset)
    images = sum(len(part) for part in (dataset.train, dataset.holdout, dataset.test) if part is not None)
    left_out = f"; {len(bad)} unreadable images are left out" if bad else ""
    typer.echo(f"{images:,} images of {len(dataset.classes)} classes can be read{left_out}")


@data_app.command(
    "synthesize", epilog="Example:  wmdd data synthesize --classes 100 --images 300 --out /scratch/synthetic"
)
def data_synthesize(
    out: Annotated[Path, typer.Option(help="New folder; it gets subfolders train/CLASS and val/CLASS.")],
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 1000,
    images: Annotated[int, typer.Option(help="Number of training images of each class.")] = 1300,
    pixels: Annotated[int, typer.Option(help="Length of each image's shorter side, in pixels.")] = 375,
    val: Annotated[int, typer.Option(help="Number of validation images of each class.")] = 50,
    seed: Annotated[int, typer.Option(help="Random seed of the generated images.", min=0)] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Number of processes. Default: the number of usable CPUs.", min=1)
    ] = None,
) -> None:
    """Generate JPEG files in ImageNet's shape for speed tests.  The same command resumes stopped work."""
    from wmdd.data.synthetic import generate
    from wmdd.runtime.progress_bars import progress

    with progress(f"images in {out}", classes * (images + val), "images") as advance:
        generate(out, classes, images, pixels, val, seed, workers, advance)
    typer.echo(f"add --set data.source=folder --set data.root={out} to use the images")


@cache_app.command("list")
def cache_list() -> None:
    """List the cache entries; the entry that was unused for the longest time comes first."""
    import time

    from wmdd.storage import cache

    found = cache.entries()
    for entry in found:
        age = (time.time() - entry.used) / 86400
        notes = "  needed by a submitted job" if entry.pinned else ""
        notes += "" if entry.current else "  written by another version of wmdd, not used"
        typer.echo(f"{entry.kind:11} {entry.key[:16]}  {entry.size / 1e6:10,.1f} MB  unused {age:6.1f} days{notes}")
    typer.echo(f"{cache.cache_root()}: {len(found)} entries, {sum(entry.size for entry in found) / 1e6:,.1f} MB")


@cache_app.command("prune", epilog="Example:  wmdd cache prune --older-than 30")
def cache_prune(
    older_than: Annotated[float, typer.Option(help="Age of the entries to delete: days since their last use.", min=0)],
) -> None:
    """Delete old cache entries, except those that jobs of the last 30 days need.  Runs recompute deleted entries."""
    from wmdd.storage import cache

    gone = cache.prune(older_than)
    typer.echo(f"deleted {len(gone)} entries, {sum(entry.size for entry in gone) / 1e6:,.1f} MB")


def main() -> None:
    """Run the command line."""
    answer(app)
