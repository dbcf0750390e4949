"""Distill digits from Python: ``python examples/distill_digits.py [KEY=VALUE ...]``."""

import sys

import wmdd


def main() -> None:
    """Distill one image per digit, train students on the images, and write a report."""
    overrides = ["ipc=1", "student.seeds=1", *sys.argv[1:]]
    folder = wmdd.run("digits", out="runs/example", overrides=overrides)
    distilled = wmdd.DistilledSet.load(folder)
    image, label = distilled[0]
    print(
        f"{len(distilled)} images of {len(distilled.classes)} classes; the first: {tuple(image.shape)}, class {label}"
    )
    print(f"open {folder}/report.html")


if __name__ == "__main__":  # a run may start worker processes, which import this file
    main()
