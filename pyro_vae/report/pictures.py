"""Sections on pictures."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..prediction import reconstruct
from .charts import PICTURE_WIDTH, WALK, Plot, Section, counted
from .sections import memory
from .subject import Coded, dimension

__all__ = ["Pictures"]


class Pictures:
    """Sections whose figures are made of pictures."""

    def __init__(self, subject: Coded) -> None:
        self.subject = subject
        x = subject.dataset.train.x
        low, high = x.min().item(), x.max().item()
        self.range = (0.0, 1.0) if low >= 0 and high <= 1 or low == high else (low, high)
        width = self.tiles(x[:1]).shape[-2]
        self.columns = min(12, max(3, PICTURE_WIDTH // width))

    def tiles(self, x: Tensor) -> np.ndarray:
        """(..., C, H, W) as bytes (..., H, W, 3); channels, unless 1 or 3, stand side by side."""
        low, high = self.range
        x = ((x.float() - low) / (high - low)).clamp(0, 1)
        channels = x.shape[-3]
        if channels not in (1, 3):
            x = x.movedim(-3, -2).flatten(-2)[..., None, :, :]
        x = x.expand(*x.shape[:-3], 3, *x.shape[-2:])
        return (x.movedim(-3, -1) * 255).round().byte().numpy()

    def mosaic(self, name: str, x: Tensor, description: str, group: int = 0) -> Plot:
        """Pictures x (rows, columns, C, H, W), each pixel a square; a wide gap follows every `group` rows."""
        tiles = self.tiles(x)
        rows, columns, height, width, _ = tiles.shape
        scale, gap = max(1, PICTURE_WIDTH // (columns * width)), 8
        tiles = tiles.repeat(scale, axis=2).repeat(scale, axis=3)
        height, width = height * scale, width * scale
        tops = [r * (height + gap) + (r // group * 3 * gap if group else 0) for r in range(rows)]
        canvas = np.zeros((tops[-1] + height, columns * (width + gap) - gap, 4), np.uint8)
        for r, top in enumerate(tops):
            for c in range(columns):
                tile = canvas[top : top + height, c * (width + gap) : c * (width + gap) + width]
                tile[..., :3], tile[..., 3] = tiles[r, c], 255
        buffer = io.BytesIO()
        Image.fromarray(canvas).save(buffer, "png", optimize=True)
        return Plot(name, buffer.getvalue(), description, "picture")

    def samples(self) -> Section:
        rows = min(8, max(2, -(-96 // self.columns)))
        x = self.subject.sample(rows * self.columns, mean=True).unflatten(0, (rows, self.columns))
        count = rows * self.columns
        return Section(
            "Samples",
            f"{count} images that do not exist. Each starts as random numbers z drawn from the prior p(z), "
            "which the model turns into the average image E[x|z].",
            (self.mosaic("samples", x, f"A grid of {count} images drawn from the model"),),
        )

    def reconstructions(self) -> Section:
        test = self.subject.dataset.test.observed
        count = min(self.columns * 3, len(test))
        columns = min(self.columns, count)
        lines = count // columns
        data = test[: lines * columns].cpu()
        remade = reconstruct(self.subject.run.model, self.subject.run.guide, data)
        pairs = torch.stack([x.unflatten(0, (lines, columns)) for x in (data, remade)], dim=1).flatten(0, 1)
        return Section(
            "Reconstructions",
            "Above, test images that the model has never seen; below each, what is left of it after it has "
            f"been squeezed into {counted(self.subject.code.shape[1], 'number')} and unfolded again.",
            (self.mosaic("reconstructions", pairs, "Test images above their reconstructions", group=2),),
        )

    def traversals(self) -> Section:
        subject, D = self.subject, self.subject.code.shape[1]
        if D == 2:
            side = 16 if self.columns == 12 else self.columns
            quantile = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(side) + 0.5) / side)
            standard = torch.stack(torch.meshgrid(quantile, -quantile, indexing="xy"), dim=-1)
            title, name = "The whole latent plane", "manifold"
            text = (
                "Two numbers describe every image, so all that this model can draw fits on one map. From "
                f"left to right {subject.names[0]} grows, from bottom to top {subject.names[1]}, in steps of "
                "equal probability under a normal prior."
            )
        else:
            dims, values = subject.walked(8), torch.linspace(-2.5, 2.5, min(11, self.columns))
            standard = torch.zeros(len(dims), len(values), D)
            for row, d in enumerate(dims):
                standard[row, :, d] = values
            title, name = "What the latent numbers mean", "traversals"
            text = (
                f"Each row turns one latent number {WALK}. From top to bottom: "
                f"{', '.join(dimension(subject, d) for d in dims)}."
            )
        x = subject.walk(standard)
        if isinstance(x, str):
            return Section(title, x)
        return Section(title, text, (self.mosaic(name, x, "Images decoded from chosen latent numbers"),))

    def nearest(self) -> Section:
        subject, train = self.subject, self.subject.dataset.train
        count = min(10, self.columns)
        x = subject.sample(count, mean=True)
        nearest = torch.cdist(x.flatten(1), train.x.cpu().flatten(1)).argmin(1)
        pairs = torch.stack([x, train.x[nearest.to(train.device)].cpu()])
        return Section(
            "Does it memorise?",
            f"Above, samples; below each, the training image that is closest to it. {memory(subject)}",
            (self.mosaic("nearest", pairs, "Samples above their nearest training images"),),
        )
