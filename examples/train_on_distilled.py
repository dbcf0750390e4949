"""Train a network on a distilled set with a plain torch loop: ``python examples/train_on_distilled.py RUN [EPOCHS]``.

RUN is the folder of a finished run, such as runs/digits.
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader

import wmdd
from wmdd.data.dataset import load_dataset
from wmdd.data.pixels import normalize


def network(channels: int, classes: int) -> nn.Module:
    """Return a small ConvNet for images of any size."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, classes))


def main() -> None:
    """Train on the distilled images with hard labels, then measure on the real test images."""
    run, epochs = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 100
    torch.manual_seed(0)
    distilled = wmdd.DistilledSet.load(run)
    model = network(distilled.data.channels, len(distilled.classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for images, labels in DataLoader(distilled, batch_size=50, shuffle=True):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    test = load_dataset(distilled.data).test  # the real images that the run has never used
    model.eval()
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(test.labels), 500):
            rows = range(start, min(start + 500, len(test.labels)))
            images = normalize(test.decode(rows), distilled.data)
            correct += int((model(images).argmax(1) == test.labels[rows.start : rows.stop]).sum())
    print(f"{len(distilled)} distilled images: {correct} of {len(test.labels)} test images correct")


if __name__ == "__main__":
    main()
