"""DD-Ranking's scores."""

import math


def label_robust_score(hard: float, soft: float, real_hard: float, random_soft: float, weight: float = 0.5) -> float:
    """Return how far images are worth something by themselves, whatever the labels: LRS, from 0 to 1.

    LRS = (e^α − e^−1) / (e − e^−1) with α = w·IOR − (1 − w)·HLR: ``improvement_over_random`` under the labels in
    question, ``hard_label_recovery`` under hard ones. Z. Li et al., "DD-Ranking: Rethinking the Evaluation of Dataset
    Distillation", arXiv:2505.13300. Their formulas take fractions, as this does; their released code exponentiates
    percentages, so that its figures do not compare.

    Args:
        hard: accuracy of the images under hard labels, a fraction like all others.
        soft: accuracy of the images under the labels in question.
        real_hard: accuracy of the whole training set under hard labels.
        random_soft: accuracy of as many random real images under the labels in question.
        weight: w, the share of IOR.

    Raises:
        ValueError: an accuracy is not a fraction.
    """
    _refuse_percentages(hard, soft, real_hard, random_soft)
    gain, loss = improvement_over_random(soft, random_soft), hard_label_recovery(real_hard, hard)
    return normalized(weight * gain - (1 - weight) * loss)


def augmentation_robust_score(
    augmented: float, random_augmented: float, plain: float, random_plain: float, weight: float = 0.5
) -> float:
    """Return how far the gain over random real images survives without augmentation: ARS, from 0 to 1.

    ARS = (e^β − e^−1) / (e − e^−1) with β = γ·(augmented − random_augmented) + (1 − γ)·(plain − random_plain); γ is
    ``weight``. DD-Ranking, as for ``label_robust_score``.

    Raises:
        ValueError: an accuracy is not a fraction.
    """
    _refuse_percentages(augmented, random_augmented, plain, random_plain)
    gains = improvement_over_random(augmented, random_augmented), improvement_over_random(plain, random_plain)
    return normalized(weight * gains[0] + (1 - weight) * gains[1])


def hard_label_recovery(real_hard: float, hard: float) -> float:
    """Return HLR = acc(real, hard) − acc(images, hard): what is lost against the whole training set; less is better."""
    return real_hard - hard


def improvement_over_random(images: float, random: float) -> float:
    """Return IOR = acc(images, any) − acc(random, any): what is gained over random real images; more is better."""
    return images - random


def normalized(score: float) -> float:
    """Return (e^x − e^−1) / (e − e^−1), which grows with x: 0 at −1, 1 at 1."""
    return (math.exp(score) - math.exp(-1)) / (math.e - math.exp(-1))


def _refuse_percentages(*accuracies: float) -> None:
    if not all(0 <= accuracy <= 1 for accuracy in accuracies):
        raise ValueError(f"scores are defined on accuracies from 0 to 1, got {accuracies}")
