"""What every trial starts from: the base model and the shared initialisation made of it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from stockpot.fields import Closed, Uri
from stockpot.preparation import Preprocess

TEXT_PREFIX = "transformers:"
"""How the architecture of a text encoder begins."""


class BaseSpec(Closed):
    """The base model every trial starts from."""

    arch: str = Field(
        min_length=1,
        description="An open_clip architecture (`ViT-B-32`), the URI of an open_clip JSON config (which may name a timm image tower), or "
        "`timm:NAME`, such as `timm:vit_base_patch16_224.augreg_in21k`, whose images are prepared as timm does for that name; or your own "
        "backbone, `package.module:name`, called without arguments. For texts, `transformers:` and the address of an encoder's "
        "`config.json`, or its name on the hub; the samples are then arrays of token ids (`.npy`).",
    )
    weights: str | None = Field(
        None,
        description="A pretrained tag of that architecture (of a text encoder a revision on the hub, such as `main`), or the URI of a "
        "state dict: safetensors, or torch's format, read without running any of it. None: random weights, or what your own backbone has.",
    )
    preprocess: Preprocess | None = Field(
        None, description="How images are prepared. None: as the architecture or the tag says; a backbone of your own says nothing."
    )
    max_tokens: int = Field(
        128, ge=1, le=65_536, description="Tokens that a text encoder reads of a sample; longer ones are cut at their end. The paper's 128."
    )
    text_tower: Literal["drop", "keep"] = Field(
        "drop",
        description="drop: the text tower builds the zero-shot head and stays behind. keep: it travels with every model, frozen, so that "
        "the soup can still be asked about classes it was not trained on; each stored model is larger by it.",
    )


class InitSpec(Closed):
    """The shared initialisation: body and head, built once and hashed. Only models with one init may be averaged."""

    head: Literal["zero_shot", "linear_probe", "random"] = Field(
        "linear_probe",
        description="zero_shot: from the text tower. linear_probe: fitted to convergence on the train split's features, started from the "
        "zero-shot head where there is one; a node computes features once a base model, on a GPU where it has one. random: from the seed.",
    )
    templates: tuple[str, ...] = Field(
        ("a photo of a {}.",), min_length=1, description="Prompt templates, `{}` is the class name; their embeddings are averaged."
    )
    seed: int = Field(0, ge=0, description="Seeds a random head or random base weights.")
    freeze_head: bool = Field(
        False,
        description="Leave the head as it is and train the body alone, so that models of other classes may borrow the bodies "
        "(`soup.bodies_of`); made for zero_shot heads.",
    )

    @model_validator(mode="after")
    def _templates_have_a_place(self) -> Self:
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"template {template!r} has no `{{}}` for the class name; write it like 'a photo of a {{}}.'")
            if not _holds_one_name(template):
                raise ValueError(
                    f"template {template!r} has braces other than one `{{}}` for the class name; write it like 'a photo of a {{}}.'"
                )
        return self


def _holds_one_name(template: str) -> bool:
    try:
        return template.format("ant") == template.replace("{}", "ant")  # not so where `{{}}` escapes the braces
    except (LookupError, ValueError):
        return False


class Init(Closed):
    """The shared initialisation: a folder in object storage with weights, model config and head."""

    uri: Uri = Field(description="Folder holding `model.safetensors`, `model.json` and `fingerprint.json`.")
    digest: str = Field(description="Of the weights and the model config: two trials are soupable only when this is equal.")
    body: str = Field(
        "", description="Digest of the body alone, where the head stays frozen: bodies under it may be borrowed. Empty: it is trained."
    )
