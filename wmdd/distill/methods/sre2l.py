"""SRe2L and CDA as published: cross-entropy and running BatchNorm statistics, from noise."""

from typing import Any, ClassVar

from wmdd.config.schema import SynthesisConfig
from wmdd.distill.methods.matching import Wmdd


class SRe2L(Wmdd):
    """SRe2L (Yin et al. 2023): cross-entropy and the teacher's running BatchNorm statistics, from noise.

    The constants of the paper and of the published scripts are the section ``sre2l`` of the config. Taken from
    ``synthesis``: iterations and learning rate (published: 4000 and 0.25 on ImageNet-1K, 4000 and 0.1 on
    Tiny-ImageNet), and mirroring. A group is spread over the classes, as in the published batches of one image of each
    of 100 classes. The published roll is 32 px of 224 to one side; here it is to either side.
    """

    uses_statistics = False
    bn_weights: ClassVar[dict[str, float]] = {"tiny-imagenet": 1.0}
    """Published weight of the BatchNorm term by dataset, where it is not 0.01"""

    def synthesis(self) -> SynthesisConfig:
        """Return the settings of the section ``sre2l``, with the iterations, learning rate and mirroring of the run."""
        return self.config.synthesis.replace(self._constants())

    def _constants(self) -> dict[str, Any]:
        own = self.config.sre2l
        published = self.bn_weights.get(self.config.data.source, 0.01)
        return {
            "betas": own.betas,
            "start": "noise",
            "norm": own.norm,
            "feature_weight": 0.0,
            "bn_weight": published if own.bn_weight is None else own.bn_weight,
            "bn_first_weight": own.bn_first_weight,
            "bn_target": "global",
            "bn_weighted": False,
            "ce_weight": own.ce_weight,
            "augment": own.augment,
            "crop_scale": own.crop_scale,
            "crop_curriculum": 0.0,
            "jitter": self.config.data.resolution // 7 if own.jitter is None else own.jitter,
            "clamp": True,
        }


class CDA(SRe2L):
    """CDA (Yin & Shen 2023): SRe2L with crops that shrink from the whole image to 8 % of it.

    The settings are those of ``SRe2L``, except for the crop curriculum (cosine, to the last iteration) and the weight
    of the BatchNorm term on Tiny-ImageNet, 0.05. Published learning rates: 0.25 on ImageNet-1K, 0.4 on Tiny-ImageNet.
    """

    bn_weights: ClassVar[dict[str, float]] = {"tiny-imagenet": 0.05}

    def _constants(self) -> dict[str, Any]:
        return super()._constants() | {"crop_curriculum": self.config.sre2l.crop_curriculum}
