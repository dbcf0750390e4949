"""Draw the picture of README.md: ``python docs/picture.py runs/digits docs/assets/digits.png``."""

import base64
import io
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from PIL import Image

from wmdd.report import gallery
from wmdd.report.runs import read


def draw(run: Path, out: Path) -> None:
    """Draw the first distilled image of each class above the real image nearest to it, as the report's page does."""
    problems: list[str] = []
    (grid, *_), _ = gallery.grids(read([run], problems)[0], problems)
    own = [[strip for strip in strips if strip.name in (gallery.OWN, "nearest real")] for _, strips in grid.classes]
    figure, axes = plt.subplots(2, len(own), figsize=(10, 1.86), squeeze=False)
    for column, strips in enumerate(own):
        for row, strip in enumerate(strips):
            content = base64.b64decode(strip.images[0][0].partition(",")[2])
            axes[row][column].imshow(Image.open(io.BytesIO(content)), cmap="gray", vmin=0, vmax=255)
            axes[row][column].set_axis_off()
    for row, words in enumerate(("distilled", "nearest real")):
        figure.text(0.104, 0.75 - 0.5 * row, words, ha="right", va="center", fontsize=11, color="#808080")
    figure.subplots_adjust(0.112, 0.01, 0.998, 0.99, 0.05, 0.05)
    figure.savefig(out, dpi=110, transparent=True)


if __name__ == "__main__":
    matplotlib.use("Agg")
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
