"""SRe2L and CDA as their authors publish them: cross-entropy and running BatchNorm statistics, from noise."""

from typing import Any, ClassVar

from wmdd.config.schema import SynthesisConfig
from wmdd.distill.methods.matching import Wmdd


class SRe2L(Wmdd):
    """SRe2L (Yin et al. 2023): cross-entropy and the teacher's running BatchNorm statistics, from noise.

    Taken from the paper and from the published scripts, whatever the config says: Gaussian start; cross-entropy with
    weight 1; plain (not squared) norms of the gaps to the running moments over the whole group, the first layer times
    10, all times 0.01 (ImageNet-1K and CIFAR; 1 on Tiny-ImageNet); no feature term; one crop of 8 to 100 % of the area
    and one roll a step for the whole group; Adam's betas (0.5, 0.9); pixels clamped.  The roll is 32 px of 224, and at
    other resolutions a seventh of the side (4 px of 32, as published for CIFAR), to either side where theirs is to one.

    Taken from the config: iterations, learning rate (published: 4000 and 0.25 on ImageNet-1K, 4000 and 0.1 on
    Tiny-ImageNet), mirroring, the teacher, and which images make up a group.  Their group is one image of each of 100
    classes, here it is all images of a few: nearer to what running statistics describe only where the IPC is small.
    The published weight of 0.01 is that of a ResNet-18, whose 20 layers add up; a ConvNet of three gets a lighter term.
    """

    uses_statistics = False
    bn_weights: ClassVar[dict[str, float]] = {"tiny-imagenet": 1.0}
    """Published weight of the BatchNorm term by data set, where it is not 0.01"""

    def synthesis(self) -> SynthesisConfig:
        """Return the published settings, with the config's iterations, learning rate, mirroring and groups."""
        return self.config.synthesis.replace(self._published())

    def _published(self) -> dict[str, Any]:
        return {
            "betas": (0.5, 0.9),
            "start": "noise",
            "norm": "euclidean",
            "feature_weight": 0.0,
            "bn_weight": self.bn_weights.get(self.config.data.source, 0.01),
            "bn_first_weight": 10.0,
            "bn_target": "global",
            "bn_weighted": False,
            "ce_weight": 1.0,
            "augment": "group",
            "crop_scale": (0.08, 1.0),
            "crop_curriculum": 0.0,
            "jitter": self.config.data.resolution // 7,
            "clamp": True,
        }


class CDA(SRe2L):
    """CDA (Yin & Shen 2023): SRe2L with crops that go from the whole image down to 8 % of it.

    Settings as for ``SRe2L``, but for the curriculum (cosine, to the last iteration) and the weight of the BatchNorm
    term on Tiny-ImageNet, which is 0.05.  Published learning rates: 0.25 on ImageNet-1K, 0.4 on Tiny-ImageNet.
    """

    bn_weights: ClassVar[dict[str, float]] = {"tiny-imagenet": 0.05}

    def _published(self) -> dict[str, Any]:
        return super()._published() | {"crop_curriculum": 1.0}
