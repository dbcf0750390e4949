"""Weights files: find, read without pickle code, load strictly, and map outputs to the dataset's classes."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from wmdd.data.dataset import Dataset
from wmdd.errors import InputError, WmddError
from wmdd.networks.create import AUXILIARY
from wmdd.storage.files import read_tensors


def locate(source: str | None, network: str) -> Path | None:
    """Return the path of the weights file.  Weights of torchvision are downloaded to its cache and verified.

    Raises:
        InputError: the file or the published weights do not exist.
        WmddError: the download failed.
    """
    if source is None:
        return None
    if source.startswith("torchvision:"):
        return _torchvision(source.removeprefix("torchvision:"), network)
    path = Path(source)
    if not path.is_file():
        raise InputError(f"teacher.weights = {source!r}: no such file; for published weights, use torchvision:NAME")
    return path


def _torchvision(name: str, network: str) -> Path:
    import torchvision

    try:
        choices = torchvision.models.get_model_weights(network)
        chosen = choices[name]
    except (ValueError, KeyError):
        known = [entry.name for entry in choices] if "choices" in locals() else []
        valid = f"valid: {', '.join(known)}" if known else f"torchvision publishes no weights for {network!r}"
        raise InputError(f"teacher.weights = 'torchvision:{name}': {valid}") from None
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(chosen.url).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(chosen.url, str(path), hash_prefix=path.stem.rpartition("-")[2])
        except OSError as error:
            raise WmddError(f"{chosen.url}: cannot be downloaded ({error}); put the file at {path}") from None
    return path


def read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state dict, and the class names of its outputs if the file contains them (safetensors of wmdd).

    Raises:
        InputError: the file is not a state dict, or would need pickle code to load.
    """
    import safetensors

    if path.suffix == ".safetensors":
        state = read_tensors(path)
        with safetensors.safe_open(path, "pt") as file:
            names = (file.metadata() or {}).get("classes", "")
        return state, names.split("\n") if names else []
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many types for other files
        first = str(error).splitlines()[0]
        raise InputError(f"{path}: is not a state dict that loads without pickle code ({first})") from None
    for wrapper in ("state_dict", "model"):
        loaded = loaded.get(wrapper, loaded) if isinstance(loaded, dict) else {}
    state = {str(name).removeprefix("module."): value for name, value in loaded.items() if isinstance(value, Tensor)}
    return state, []


def fit(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict strictly, without auxiliary heads (``create.AUXILIARY``).

    Raises:
        InputError: keys are missing or unexpected, or shapes differ; the message names the keys.
    """
    wanted = network.state_dict()
    # Old files lack BatchNorm's counters; evaluation never reads them.
    given = {name: value for name, value in wanted.items() if name.endswith("num_batches_tracked")}
    given |= _without_auxiliary(state)
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    shapes = [
        f"{name} is {list(given[name].shape)}, not {list(value.shape)}"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    problems = [
        f"{title} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for title, keys in (("missing", missing), ("unexpected", unexpected), ("shape:", shapes))
        if keys
    ]
    if problems:
        raise InputError(f"{path}: does not fit {type(network).__name__}: {'; '.join(problems)}")
    restore(network, given)


def restore(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a network's state strictly.  Some networks need module versions, which files do not contain."""
    versioned = OrderedDict(_without_auxiliary(state))
    versioned._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    network.load_state_dict(versioned)


def _without_auxiliary(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.partition(".")[0] not in AUXILIARY}


def output_count(state: dict[str, Tensor], path: Path) -> int:
    """Return the number of outputs: the rows of the last linear layer.

    Raises:
        InputError: the state dict has no linear layer.
    """
    linear = [value for name, value in state.items() if name.endswith("weight") and value.ndim == 2]
    if not linear:
        raise InputError(f"{path}: contains no linear layer; expected the state dict of a classifier")
    return len(linear[-1])


def class_map(
    dataset: Dataset, outputs: int, names: list[str], positions: tuple[int, ...] | None, path: Path
) -> list[int] | None:
    """Return the index of the output for each class of the dataset; None if outputs and classes match one to one.

    Args:
        dataset: dataset with the classes.
        outputs: number of outputs of the weights.
        names: class names of the outputs; empty if the file does not contain them.
        positions: output of each class of the whole dataset (``teacher.outputs``), if the config sets it.
        path: path of the weights, for error messages.

    Raises:
        InputError: the outputs do not cover the classes.
    """
    known = list(dataset.all_classes)
    if names:
        places = {name: place for place, name in enumerate(names)}
    elif positions is not None:
        if len(positions) != len(known) or max(positions) >= outputs:
            raise InputError(
                f"teacher.outputs: names {len(positions)} outputs up to {max(positions)}; the dataset has {len(known)}"
                f" classes, {path} has {outputs} outputs"
            )
        places = dict(zip(known, positions, strict=True))
    elif outputs == len(known):
        places = {name: place for place, name in enumerate(known)}
    else:
        raise InputError(
            f"{path}: has {outputs} outputs without class names, the dataset has {len(known)} classes;"
            " set teacher.outputs to the output of each class"
        )
    for name in dataset.classes:
        if name not in places:
            raise InputError(f"{path}: has no output for class {name!r} of the dataset")
    chosen = [places[name] for name in dataset.classes]
    return None if chosen == list(range(outputs)) else chosen
