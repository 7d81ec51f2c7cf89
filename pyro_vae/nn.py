"""Networks, declared without sizes and bound once the shapes are known."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from .config import Configured, plain

__all__ = ["MLP", "ConvolutionalDecoder", "ConvolutionalEncoder", "Declared", "Heads", "bind", "positive"]

Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh"]


class Declared(Configured, nn.Module):
    """A module that is written down without sizes: `bind` returns a copy that has them.

    A subclass keeps its settings in the constructor and makes its parameters in `build`. A bound one that is handed
    over again is shared.
    """

    _sizes: tuple[Any, ...] | None = None

    def build(self, *shapes: Any) -> None:
        """Make the parameters for these shapes."""

    def bind(self, *shapes: Any) -> Self:
        """A copy of this declaration with parameters for these shapes; itself where it has them already.

        Raises:
            ValueError: it has parameters for other shapes.
        """
        sizes = tuple(tuple(shape) if isinstance(shape, Sequence) else shape for shape in shapes)
        if self._sizes is None:
            bound = copy.deepcopy(self)
            bound._sizes = sizes
            bound.build(*shapes)
            return bound
        if self._sizes != sizes:
            raise ValueError(
                f"expected {type(self).__name__} bound to {sizes}, got one bound to {self._sizes}: declare another"
            )
        return self


def bind(component: nn.Module, *shapes: Any) -> Any:
    """`component` with the sizes it lacks; a module of the user's own is taken as it is."""
    return component.bind(*shapes) if isinstance(component, Declared) else component


class MLP(Declared):
    """Dense layers with an activation after each hidden one; all event dimensions are flattened.

    Shapes: ``(*batch, *input_shape) -> (*batch, *output_shape)``. Without an output shape the last hidden
    layer is the output, as an encoder wants it. ``hidden=()`` is a linear map, or with no output shape the identity.
    The activation ``"glu"`` makes gated layers ``(W h + b) * sigmoid(V h + c)`` (arXiv 1612.08083).

    Example:
        >>> MLP(hidden=(32,), activation="tanh").bind((1, 8, 8), (10,))(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, hidden: Sequence[int] = (256, 256), activation: Literal["glu", Activation] = "relu") -> None:
        super().__init__()
        self.hidden = _sizes("hidden", hidden)
        self.activation = activation

    def build(self, input_shape: Sequence[int], output_shape: Sequence[int] | None = None) -> None:
        self.input_shape = torch.Size(input_shape)
        widths = [math.prod(input_shape), *self.hidden]
        self.output_shape = torch.Size(output_shape or widths[-1:])
        parts = 2 if self.activation == "glu" else 1
        self.layers = nn.ModuleList(nn.Linear(a, parts * b) for a, b in zip(widths, widths[1:], strict=False))
        self.output = nn.Linear(widths[-1], math.prod(output_shape)) if output_shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        activation = getattr(nn.functional, self.activation)
        h = x.flatten(start_dim=-len(self.input_shape)) if self.input_shape else x[..., None]
        for layer in self.layers:
            h = activation(layer(h))
        return self.output(h).unflatten(-1, self.output_shape)


class Heads(nn.Module):
    """Tensors of several shapes, linear in features h; of no features, parameters.

    Shapes: ``(*batch, features) -> (*batch, *shape)`` for each shape.

    Example:
        >>> [tensor.shape for tensor in Heads(10, (3,), (2, 4))(torch.zeros(5, 10))]
        [torch.Size([5, 3]), torch.Size([5, 2, 4])]
    """

    def __init__(self, features: int, *shapes: Sequence[int]) -> None:
        super().__init__()
        self.shapes = [torch.Size(shape) for shape in shapes]
        self.sizes = [math.prod(shape) for shape in shapes]
        if features:
            self.linear = nn.Linear(features, sum(self.sizes))
        else:
            self.value = nn.Parameter(0.1 * torch.randn(sum(self.sizes)))

    @torch.no_grad()
    def start(self, index: int, value: float) -> None:
        """Add a constant to the tensor of this index, before training."""
        constant = self.linear.bias if hasattr(self, "linear") else self.value
        constant.split(self.sizes)[index].add_(value)

    def forward(self, h: Tensor) -> list[Tensor]:
        value = self.linear(h) if hasattr(self, "linear") else self.value
        parts = value.split(self.sizes, dim=-1)
        return [
            part.unflatten(-1, shape) if shape else part.squeeze(-1)
            for part, shape in zip(parts, self.shapes, strict=True)
        ]


class ConvolutionalEncoder(Declared):
    """Strided 3 x 3 convolutions, each halving the picture, and a dense layer of features.

    Shapes: ``(*batch, C, H, W) -> (*batch, features)`` for pictures of any size.

    Example:
        >>> ConvolutionalEncoder(features=20).bind((1, 28, 28))(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 20])
    """

    def __init__(
        self, channels: Sequence[int] = (32, 64), features: int = 256, activation: Activation = "relu"
    ) -> None:
        super().__init__()
        self.channels = _sizes("channels", channels)
        self.features = _sizes("features", [features])[0]
        self.activation = activation

    def build(self, input_shape: Sequence[int], output_shape: Sequence[int] | None = None) -> None:
        _check_picture(input_shape, "ConvolutionalEncoder")
        self.input_shape = torch.Size(input_shape)
        self.output_shape = torch.Size(output_shape or (self.features,))
        widths = [input_shape[0], *self.channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, kernel_size=3, stride=2, padding=1) for a, b in zip(widths, widths[1:], strict=False)
        )
        height, width = _halvings(input_shape, len(self.channels))[-1]
        self.dense = nn.Linear(widths[-1] * height * width, self.features)
        self.output = nn.Linear(self.features, math.prod(output_shape)) if output_shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        activation = getattr(nn.functional, self.activation)
        batch_shape = x.shape[:-3]
        h = x.reshape(-1, *self.input_shape)
        for convolution in self.convolutions:
            h = activation(convolution(h))
        h = self.output(activation(self.dense(h.flatten(start_dim=1))))
        return h.reshape(*batch_shape, *self.output_shape)


class ConvolutionalDecoder(Declared):
    """The mirror of `ConvolutionalEncoder`: a dense layer, then nearest-neighbour doublings and convolutions.

    Shapes: ``(*batch, *input_shape) -> (*batch, *output_shape)``, where the last three dimensions of the output are
    ``(C, H, W)`` of any size.

    Example:
        >>> ConvolutionalDecoder().bind((16,), (1, 1, 28, 28))(torch.zeros(5, 16)).shape
        torch.Size([5, 1, 1, 28, 28])
    """

    def __init__(
        self, channels: Sequence[int] = (64, 32), features: int = 256, activation: Activation = "relu"
    ) -> None:
        super().__init__()
        self.channels = _sizes("channels", channels)
        self.features = _sizes("features", [features])[0]
        self.activation = activation

    def build(self, input_shape: Sequence[int], output_shape: Sequence[int]) -> None:
        _check_picture(output_shape[-3:], "ConvolutionalDecoder")
        self.input_shape, self.output_shape = torch.Size(input_shape), torch.Size(output_shape)
        self.sizes = _halvings(output_shape[-3:], len(self.channels))[::-1]
        height, width = self.sizes[0]
        self.dense = nn.Linear(math.prod(input_shape), self.features)
        self.picture = nn.Linear(self.features, self.channels[0] * height * width)
        widths = [*self.channels, math.prod(output_shape[:-2])]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, kernel_size=3, padding=1) for a, b in zip(widths, widths[1:], strict=False)
        )

    def forward(self, z: Tensor) -> Tensor:
        activation = getattr(nn.functional, self.activation)
        batch_shape = z.shape[: z.dim() - len(self.input_shape)]
        h = activation(self.dense(z.reshape(-1, self.dense.in_features)))
        h = activation(self.picture(h)).reshape(-1, self.channels[0], *self.sizes[0])
        for i, (convolution, size) in enumerate(zip(self.convolutions, self.sizes[1:], strict=True)):
            h = convolution(nn.functional.interpolate(h, size=size, mode="nearest"))
            h = activation(h) if i + 1 < len(self.convolutions) else h
        return h.reshape(*batch_shape, *self.output_shape)


def positive(name: str, value: int) -> int:
    """`value`, or a ValueError where it is no positive whole number."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected {name} to be a positive whole number, got {value!r}: give 1 or more")
    return value


def _sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(positive(name, size) for size in sizes)


def _check_picture(shape: Sequence[int], name: str) -> None:
    if len(shape) != 3:
        raise ValueError(
            f"expected pictures of shape (C, H, W) for {name}, got data of shape {tuple(shape)}: use MLP for tables"
        )


def _halvings(shape: Sequence[int], times: int) -> list[tuple[int, int]]:
    """Heights and widths of a (C, H, W) picture after 0, 1, ..., `times` halvings, rounded up."""
    return [(-(-shape[-2] // 2**i), -(-shape[-1] // 2**i)) for i in range(times + 1)]
