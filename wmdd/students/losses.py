"""The losses of students: hard labels, soft labels, squared error, cosine."""

from torch import Tensor
from torch.nn import functional

from wmdd.runs.distilled_set import DistilledSet, MappedSet
from wmdd.runtime.team import Team
from wmdd.students import batches


def importance_of(distilled: DistilledSet | MappedSet, power: float = 1.0) -> Tensor:
    """Return the weight of each image in the loss, [N]: its barycenter weight to a power, scaled to mean 1.

    A power other than 1 keeps the total weight of each class (``barycenter.weight_power``).
    """
    weights = distilled.weights.float()
    if power != 1:
        powered = weights.pow(power)
        before, after = (
            weights.new_zeros(len(distilled.classes)).index_add(0, distilled.labels, each)
            for each in (weights, powered)
        )
        weights = powered * (before / after)[distilled.labels]
    return weights * (len(weights) / weights.sum())


def mixed(importance: Tensor, batch: batches.Batch) -> Tensor:
    """Return the weight in the loss of each mixed image of a batch, [b]."""
    own = importance[batch.images]
    return batch.share * own + (1 - batch.share) * own[batch.partners]


def hard_loss(
    logits: Tensor, classes: Tensor, batch: batches.Batch, team: Team, importance: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy with the classes of both images of a mix, summed over this rank's images."""

    def part(images: Tensor) -> Tensor:
        wanted = team.shard(classes[images])
        if importance is None:
            return functional.cross_entropy(logits, wanted, reduction="sum")
        return functional.cross_entropy(logits, wanted, reduction="none") @ team.shard(importance[images])

    loss = batch.share * part(batch.images)
    if batch.share < 1:
        loss = loss + (1 - batch.share) * part(batch.images[batch.partners])
    return loss


def soft_loss(logits: Tensor, wanted: Tensor, temperature: float, importance: Tensor | None = None) -> Tensor:
    """Return the KL divergence at a temperature, summed over images.

    The factor T² keeps the size of the gradients (Hinton 2015).
    """
    student = functional.log_softmax(logits / temperature, dim=1)
    teacher = functional.softmax(wanted / temperature, dim=1)
    if importance is None:
        return functional.kl_div(student, teacher, reduction="sum") * temperature**2
    return functional.kl_div(student, teacher, reduction="none").sum(1) @ importance * temperature**2


def squared_error(logits: Tensor, wanted: Tensor, importance: Tensor | None = None) -> Tensor:
    """Return the squared error between logits, mean over classes, summed over images (Shao et al. 2024, EDC)."""
    errors = functional.mse_loss(logits, wanted, reduction="none").mean(1)
    return errors.sum() if importance is None else errors @ importance


GIFT_SHARE = 0.1
"""Length of the smoothed classes in GIFT's target; the teacher's logits have length 1"""
GIFT_SMOOTHING = 0.1
"""Label smoothing of these classes"""


def gift_loss(
    logits: Tensor, wanted: Tensor, classes: Tensor, batch: batches.Batch, team: Team, importance: Tensor | None = None
) -> Tensor:
    """Return one minus the cosine to GIFT's target, summed over images (Shang et al. 2024).

    The target is the sum of the teacher's logits at length 1 and the smoothed classes of the mix at length 0.1.

    Args:
        logits: student's logits of this rank's images, [b, C].
        wanted: teacher's logits, [b, C].
        classes: class of every image of the set, [N] int64.
        batch: the mixed batch.
        team: ranks that share the batch.
        importance: weight of each mixed image, [b]; None for equal weights.
    """

    def smoothed(images: Tensor) -> Tensor:
        hot = functional.one_hot(team.shard(classes[images]), wanted.shape[1]).to(wanted)
        return (1 - GIFT_SMOOTHING) * hot + GIFT_SMOOTHING / wanted.shape[1]

    mix = batch.share * smoothed(batch.images)
    if batch.share < 1:
        mix = mix + (1 - batch.share) * smoothed(batch.images[batch.partners])
    target = functional.normalize(wanted, dim=1) + GIFT_SHARE * functional.normalize(mix, dim=1)
    distance = 1 - functional.cosine_similarity(logits, target, dim=1)
    return distance.sum() if importance is None else distance @ importance
