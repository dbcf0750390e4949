"""Augmentation is what torchvision does, as one linear map per axis."""

import torch
from torchvision.transforms.v2 import functional as transforms

from wmdd.data import augment


def draws(count: int, size: int = 24, seed: int = 0, **changes: object) -> augment.Draws:
    settings = {"scale": (0.08, 1.0), "flip": True, "jitter": 5} | changes
    return augment.draw((count, 1), size, generator=torch.Generator().manual_seed(seed), **settings)


def test_warp_equals_torchvisions_crop_resize_flip_and_roll() -> None:
    table, images = draws(60), torch.randn(2, 3, 24, 24)
    for one in (table[index] for index in range(60)):
        expected = transforms.resized_crop(images, *one.boxes[0].tolist(), [24, 24], antialias=True)
        if one.flips[0]:
            expected = expected.flip(-1)
        expected = torch.roll(expected, one.shifts[0].tolist(), (-2, -1))
        torch.testing.assert_close(augment.warp(images, one), expected, atol=2e-6, rtol=0)


def test_each_image_can_have_its_own_draw() -> None:
    table, images = draws(3), torch.randn(3, 1, 24, 24)
    together = augment.warp(images, augment.Draws(*(value[:, 0] for value in vars(table).values())))
    apart = torch.cat([augment.warp(images[index : index + 1], table[index]) for index in range(3)])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)


def test_draws_replay_and_stay_inside() -> None:
    table = draws(500)
    assert all(torch.equal(a, b) for a, b in zip(vars(table).values(), vars(draws(500)).values(), strict=True))
    assert not torch.equal(table.boxes, draws(500, seed=1).boxes)
    top, left, height, width = table.boxes.unbind(-1)
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= 24).all() and (left + width <= 24).all()
    area = (height * width).float() / 24**2
    assert area.min() >= 0.05 and 0.4 < area.mean() < 0.6
    assert table.shifts.abs().max() == 5 and 150 < table.flips.sum() < 350


def test_whole_image_without_flip_or_roll_is_the_identity() -> None:
    # Exactly: a selection of real images must come back byte for byte.
    images = torch.randn(2, 3, 24, 24)
    box = torch.tensor([[0, 0, 24, 24]])
    still = augment.Draws(box, torch.tensor([False]), torch.zeros(1, 2, dtype=torch.long))
    assert torch.equal(augment.warp(images, still), images)


def test_cutmix_box_has_the_drawn_area_where_it_is_not_cut() -> None:
    boxes = augment.mix_boxes(100, torch.full((400,), 0.75), torch.Generator().manual_seed(0))
    height, width = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    assert height.max() == 50 and width.max() == 50 and (boxes >= 0).all() and (boxes <= 100).all()
    for box, area in zip(boxes[:5], height * width, strict=False):
        assert augment.inside(box, 100).sum() == area
