"""The convolutional networks and the MLP of a study of memory in training, in plain torch.

Layers and widths are those of the papers: AlexNet (Krizhevsky et al., 2012), VGG-16 (Simonyan and
Zisserman, 2015), ResNet-50 (He et al., 2016), DenseNet-121 (Huang et al., 2017) and GoogLeNet with
batch normalisation and without auxiliary heads (Szegedy et al., 2015). Each takes images of 224
pixels (ImageNet, 1,000 classes) or of 32 (CIFAR-10); for the latter, as is usual, the first
convolution keeps the resolution and no pooling follows it. The study does not state its MLP: here
it has 10 inputs, 100 hidden features and 10 classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

PIXELS = {"cifar": 32, "imagenet": 224}
CLASSES = {"cifar": 10, "imagenet": 1000}
MLP_INPUTS = 10


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution, batch normalisation and a ReLU in place."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def head(features: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)]


def mlp(data: str) -> nn.Module:
    del data
    return nn.Sequential(nn.Linear(MLP_INPUTS, 100), nn.ReLU(), nn.Linear(100, 10))


def alexnet(data: str) -> nn.Module:
    large = data == "imagenet"

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2) if large else nn.MaxPool2d(2)

    first = nn.Conv2d(3, 64, 11, 4, 2) if large else nn.Conv2d(3, 64, 3, 1, 1)
    side = 6 if large else 4
    return nn.Sequential(
        first, nn.ReLU(inplace=True), pool(),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), pool(),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True), pool(),
        nn.Flatten(), nn.Dropout(), nn.Linear(256 * side * side, 4096), nn.ReLU(inplace=True),
        nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
        nn.Linear(4096, CLASSES[data]),
    )  # fmt: skip


def vgg16(data: str) -> nn.Module:
    layers: list[nn.Module] = []
    width = 3
    for wide, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(width, wide, 3, padding=1), nn.ReLU(inplace=True)]
            width = wide
        layers.append(nn.MaxPool2d(2))
    side = PIXELS[data] // 32
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(512 * side * side, 4096), nn.ReLU(inplace=True),
        nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Linear(4096, CLASSES[data]),
    )  # fmt: skip


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv(inputs, width, 1), *conv(width, width, 3, stride), *conv(width, 4 * width, 1)[:2]
        )
        same = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Identity() if same else nn.Sequential(
            *conv(inputs, 4 * width, 1, stride)[:2]
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50(data: str) -> nn.Module:
    large = data == "imagenet"
    layers = conv(3, 64, 7, 2) if large else conv(3, 64, 3)
    if large:
        layers.append(nn.MaxPool2d(3, 2, 1))
    width = 64
    for number, (wide, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(count):
            layers.append(Bottleneck(width, wide, 2 if number and not block else 1))
            width = 4 * wide
    return nn.Sequential(*layers, *head(width, CLASSES[data]))


class DenseLayer(nn.Module):
    """Features that are put behind those that came in."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), *conv(inputs, 4 * growth, 1),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet121(data: str) -> nn.Module:
    large, growth, width = data == "imagenet", 32, 64
    layers = conv(3, 64, 7, 2) if large else conv(3, 64, 3)
    if large:
        layers.append(nn.MaxPool2d(3, 2, 1))
    for number, count in enumerate((6, 12, 24, 16)):
        if number:
            layers += [
                nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2),
            ]  # fmt: skip
            width //= 2
        for _ in range(count):
            layers.append(DenseLayer(width, growth))
            width += growth
    layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *head(width, CLASSES[data]))


class Inception(nn.Module):
    """Four branches side by side."""

    def __init__(self, inputs: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, three_in, three, five_in, five, pool = widths
        self.branches = nn.ModuleList(
            nn.Sequential(*layers)
            for layers in (
                conv(inputs, one, 1),
                conv(inputs, three_in, 1) + conv(three_in, three, 3),
                conv(inputs, five_in, 1) + conv(five_in, five, 5),
                [nn.MaxPool2d(3, 1, 1), *conv(inputs, pool, 1)],
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


INCEPTIONS = (
    (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), None,
    (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128), None,
    (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
)  # fmt: skip


def googlenet(data: str) -> nn.Module:
    large = data == "imagenet"
    layers = conv(3, 64, 7, 2) if large else conv(3, 64, 3)
    pool = [nn.MaxPool2d(3, 2, 1)] if large else []
    layers += [*pool, *conv(64, 64, 1), *conv(64, 192, 3), *pool]
    width = 192
    for widths in INCEPTIONS:
        if widths is None:
            layers.append(nn.MaxPool2d(3, 2, 1))
            continue
        layers.append(Inception(width, widths))
        width = widths[0] + widths[2] + widths[4] + widths[5]
    return nn.Sequential(*layers, *head(width, CLASSES[data]))


MODELS: dict[str, Callable[[str], nn.Module]] = {
    "MLP": mlp, "AlexNet": alexnet, "VGG-16": vgg16, "ResNet-50": resnet50,
    "DenseNet-121": densenet121, "GoogLeNet": googlenet,
}  # fmt: skip


def batch_of(model: str, data: str, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Return a batch of inputs, f32, and classes, i64."""
    shape = (batch, MLP_INPUTS) if model == "MLP" else (batch, 3, PIXELS[data], PIXELS[data])
    classes = 10 if model == "MLP" else CLASSES[data]
    return torch.randn(shape, device=device), torch.randint(classes, (batch,), device=device)
