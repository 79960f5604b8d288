"""How a sample becomes a model's input: an image's pixels, or a text's tokens. The one noun that tells the two apart."""

from typing import Literal

from pydantic import Field

from stockpot.fields import Closed


class Preprocess(Closed):
    """How an image becomes a model's input. Evaluation: decode to RGB, resize on uint8 with antialiasing, centre crop; then
    (x / 255 - mean) / std on the device. Its digest stands beside every accuracy."""

    size: int = Field(ge=1, le=4096, description="Side of the square input, in pixels.")
    mean: tuple[float, float, float] = Field(description="Subtracted from red, green and blue, which are between 0 and 1.")
    std: tuple[float, float, float] = Field(description="What the difference is divided by, for red, green and blue.")
    interpolation: Literal["bilinear", "bicubic"] = Field("bicubic", description="How pixels are blended on resizing; most models' own.")
    resize_mode: Literal["shortest", "squash"] = Field(
        "shortest", description="Shorter side, or both sides, to `size / crop_fraction`; then the centre `size` by `size` is kept."
    )
    crop_fraction: float = Field(1.0, gt=0, le=1, description="Side of the centre crop as a share of the resized side.")

    @property
    def resized(self) -> int:
        """The side, in pixels, that images are resized to before the crop."""
        return round(self.size / self.crop_fraction)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input, before its batch."""
        return (3, self.size, self.size)

    @property
    def dtype(self) -> str:
        """Of the input as it is stored and travels; the device makes floats of it."""
        return "uint8"


class Tokens(Closed):
    """How a text becomes a model's input: the ids a tokeniser made of it, cut at their end or filled up to one length."""

    length: int = Field(ge=1, description="Tokens of every input.")
    vocabulary: int = Field(ge=1, description="How many tokens there are; a sample with an id from here on is unreadable.")
    padding: int = Field(ge=0, description="The id that fills up, and that no model attends to.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input, before its batch."""
        return (self.length,)

    @property
    def dtype(self) -> str:
        """Of the input as it is stored and travels."""
        return "int32"


Preparation = Preprocess | Tokens
"""How a sample becomes a model's input: what tells images from texts, everywhere."""
