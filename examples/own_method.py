"""A distillation method of your own: ``python examples/own_method.py [KEY=VALUE ...]``.

The guide "Your own method" explains each part, and how a package brings methods to ``wmdd`` for good.
"""

import sys

import wmdd
from wmdd.distill.methods.registry import REGISTRY
from wmdd.methods import ClassData, ClassPlan, Method, Objective


class Surest(Method):
    """The K images that the teacher is surest of, drawn to the mean feature of their class."""

    def objective(self) -> Objective:
        """Match features and BatchNorm moments, with a little cross-entropy."""
        return Objective(feature=1.0, bn=self.synthesis().bn_weight, ce=0.1)

    def prepare(self, data: ClassData) -> ClassPlan:
        """Start from the images with the largest confidence; every image gets the mean feature as its target."""
        images = data.decode(list(range(data.count)))
        confidence = data.observe(images).logits.softmax(1)[:, data.index]
        best = confidence.argsort(descending=True, stable=True)[: self.config.ipc]
        mean = data.statistics.features.mean(0)
        return ClassPlan(images[best], atoms=mean.expand(len(best), -1))


def main() -> None:
    """Distill digits with the method above; the report compares it with WMDD and with random real images."""
    REGISTRY["surest"] = f"{Surest.__module__}:Surest"  # for this process; a package uses an entry point instead
    overrides = ["method=surest", "ipc=1", "student.seeds=1", "student.baselines=['wmdd', 'random']", *sys.argv[1:]]
    folder = wmdd.run("digits", out="runs/surest", overrides=overrides)
    print(f"open {folder}/report.html")


if __name__ == "__main__":
    main()
