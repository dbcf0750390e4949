"""A distilled set from elsewhere, as a method."""

from wmdd.config.schema import Config
from wmdd.data.dataset import Dataset, ImageSet
from wmdd.data.pixels import normalize
from wmdd.data.sources import BrokenImage
from wmdd.distill.methods import external_folder
from wmdd.distill.methods.base import ClassData, ClassPlan, Method
from wmdd.errors import InputError


class Imported(Method):
    """Distilled images in a folder (`wmdd bench evaluate`); never optimized.

    The config section ``external`` names the folder, its layout and its SHA-256; ``external_folder`` describes the
    layouts. Weights and soft labels of the set are not read: all images have equal weights, and the run's teacher
    labels them.
    """

    uses_statistics = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._opened: ImageSet | None = None

    def check(self, dataset: Dataset) -> None:
        """Check that the folder is complete, and that it is the one of the config."""
        external_folder.check(self._images(dataset), self.config.external, self.config.ipc)

    def prepare(self, data: ClassData) -> ClassPlan:
        """Decode the images of the class, in the order of their names."""
        images = self._images(data.dataset)
        try:
            pixels = images.decode(images.of_class(data.index))
        except BrokenImage as error:
            raise InputError(f"{error.file}: {error.reason}; replace it in the distilled set") from None
        return ClassPlan(normalize(pixels, self.config.data))

    def _images(self, dataset: Dataset) -> ImageSet:
        if self._opened is None:  # a method object belongs to one run, and so to one dataset
            self._opened = external_folder.open_set(self.config.external, self.config.data, dataset)
        return self._opened
