"""SRe2L and its descendants as published: cross-entropy and running BatchNorm statistics."""

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
            "bn_class_share": 0.0,
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


class SRe2LPlus(SRe2L):
    """SRe2L++ (Cui et al. 2025): SRe2L from real crops instead of noise.

    Its students learn from batch-specific labels: set ``labels.teacher_mode=batch`` for all methods of a comparison.
    The crops are those that ``rded`` would choose.
    """

    def _constants(self) -> dict[str, Any]:
        return super()._constants() | {"start": "patch"}


class FADRM(SRe2LPlus):
    """FADRM (Cui et al. 2025): SRe2L++ that injects its start images into the images between equal parts of the work.

    One teacher and one resolution; the published change of resolution between the parts at 224 px is left out.
    """

    def _constants(self) -> dict[str, Any]:
        own = self.config.sre2l
        return super()._constants() | {"injections": own.injections, "injection_keep": own.injection_keep}


class EDC(SRe2LPlus):
    """EDC with one teacher (Shao et al. 2024): real crops, BatchNorm targets blended from global and class moments.

    Left out are its several teachers, the moving average of the statistics, and the flatness term. Its smoothed cosine,
    small batches, squared error and averaged weights belong to the students: see ``student`` and ``labels``.
    """

    uses_statistics = True

    def _constants(self) -> dict[str, Any]:
        return super()._constants() | {"bn_class_share": self.config.sre2l.class_share}
