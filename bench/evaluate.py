"""What a distilled set from elsewhere is worth: its images as a method of a run, beside real ones."""

from collections.abc import Sequence
from pathlib import Path

from wmdd.config.loading import load_config
from wmdd.config.schema import Config
from wmdd.distill.methods import external_folder, registry


def config_of(
    folder: Path,
    source: str,
    overrides: Sequence[str] = (),
    layout: str = "auto",
    ipc: int | None = None,
    name: str | None = None,
    baselines: Sequence[str] = ("random", "medoids"),
) -> Config:
    """Return the config of a run that measures the images of a folder; nothing but the folder's files is read.

    Args:
        folder: a distilled set, one sub-folder a class.
        source: preset or file: data set, teacher, labels and students.
        overrides: ``key=value`` strings applied to it.
        layout: as in ``external.layout``.
        ipc: images of each class; None reads it off the folder.
        name: of the run; None takes the folder's.
        baselines: methods measured beside it, at the same IPC by the same students.

    Raises:
        InputError: the folder holds no images, or the config, the layout or a baseline is wrong.
    """
    found = external_folder.images_per_class(folder) if ipc is None else ipc
    given = ["method=external", f"ipc={found}", f"external.layout={layout}"]
    config = load_config(source, [*overrides, *given])
    config = config.replace(
        {
            "name": name or folder.resolve().name,
            "external.folder": str(folder),
            "external.sha256": external_folder.fingerprint(folder),
            "student.baselines": tuple(baselines),
        }
    )
    for method in baselines:
        registry.create(config, method)
    return config
