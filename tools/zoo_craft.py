"""The CRAFT text detector (VGG-16 with BatchNorm, U-shaped decoder), named as in its published weights."""

# mypy: disable-error-code="import-not-found,misc,no-any-return,unused-ignore"

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_CHANNELS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0 is a max pool
_STAGES = ((0, 12), (12, 19), (19, 29), (29, 39))


class Backbone(nn.Module):
    """VGG-16-BN up to conv5, then a dilated pair of Conv; gives five maps, the deepest first."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[Any] = []  # a stage ends before its ReLU: only in place do the skips get the rectified maps
        last = 3
        for channels in _CHANNELS:
            if channels == 0:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(last, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            last = channels
        for number, (start, stop) in enumerate(_STAGES, 1):
            stage = nn.Sequential()
            for position in range(start, stop):
                stage.add_module(str(position), layers[position])
            self.add_module(f"slice{number}", stage)
        self.slice5 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.Conv2d(1024, 1024, 1)
        )

    def forward(self, x: Any) -> list[Any]:
        """Maps of the five stages, the deepest first."""
        maps = []
        for stage in (self.slice1, self.slice2, self.slice3, self.slice4, self.slice5):
            x = stage(x)
            maps.append(x)
        return maps[::-1]


class Up(nn.Module):
    """1×1 then 3×3 Conv, each with BatchNorm and ReLU."""

    def __init__(self, given: int, middle: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(given, middle, 1), nn.BatchNorm2d(middle), nn.ReLU(),
            nn.Conv2d(middle, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Any) -> Any:
        """The decoded map."""
        return self.conv(x)


class Craft(nn.Module):
    """Image (n×3×h×w) to the scores of regions and of links (n×h/2×w/2×2)."""

    def __init__(self) -> None:
        super().__init__()
        self.basenet = Backbone()
        self.upconv1, self.upconv2 = Up(1536, 512, 256), Up(768, 256, 128)
        self.upconv3, self.upconv4 = Up(384, 128, 64), Up(192, 64, 32)
        head: list[Any] = []
        for given, out in ((32, 32), (32, 32), (32, 16)):
            head += [nn.Conv2d(given, out, 3, padding=1), nn.ReLU()]
        self.conv_cls = nn.Sequential(*head, nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1))

    def forward(self, x: Any) -> Any:
        """Scores, channels last."""
        deepest, *skips = self.basenet(x)
        y = self.upconv1(torch.cat([deepest, skips[0]], 1))
        for up, skip in zip((self.upconv2, self.upconv3, self.upconv4), skips[1:], strict=True):
            y = nn.functional.interpolate(y, size=skip.shape[2:], mode="bilinear", align_corners=False)
            y = up(torch.cat([y, skip], 1))
        return self.conv_cls(y).permute(0, 2, 3, 1)
