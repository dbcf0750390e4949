"""``wmdd bench evaluate``: a distilled set from elsewhere as the method of a run, compared with real images."""

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
    """Return the config of a run that measures the images of a folder. The dataset is not read.

    Args:
        folder: folder of the distilled set, with one sub-folder per class.
        source: preset or file of the config, with dataset, teacher, labels and students.
        overrides: ``key=value`` strings for the config.
        layout: value of ``external.layout``.
        ipc: images per class; None counts those of the folder.
        name: name of the run; None uses the folder's.
        baselines: methods to compare the set with, at the same IPC and with the same students.

    Raises:
        InputError: the folder contains no images, or the config, the layout or a baseline is wrong.
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
