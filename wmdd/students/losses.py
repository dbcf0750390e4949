"""The losses of students: hard labels, soft labels, squared error."""

from torch import Tensor
from torch.nn import functional

from wmdd.runs.distilled_set import DistilledSet, MappedSet
from wmdd.runtime.team import Team
from wmdd.students import batches


def importance_of(distilled: DistilledSet | MappedSet) -> Tensor:
    """Return the weight of each image in the loss, [N]: its barycenter weight, scaled to mean 1."""
    weights = distilled.weights.float()
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
