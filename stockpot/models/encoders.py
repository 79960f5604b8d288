"""The door to transformers: a text encoder by the address of its `config.json`, or by its name on the hub; an extra, `stockpot[text]`.

The encoder takes token ids and gives one row of features a text: its pooler's answer where it has a pooler (BERT, RoBERTa, ALBERT), else
the mean of its states over all tokens but padding (T5, DistilBERT). Its head is our own linear one, so only encoders come in here.
Ignores code that a config names (`auto_map`): none of it is ever run. transformers is imported on first use, because it is slow to import.
"""

# B batch, L tokens, D features

import json
import re
from typing import Any

import torch
from torch import Tensor, nn

from stockpot import storage
from stockpot.config import TEXT_PREFIX, BaseSpec
from stockpot.errors import ModelError
from stockpot.models.loading import fetch_state, load_state
from stockpot.models.naming import is_uri, nearest
from stockpot.preparation import Tokens

RENAMED = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}
"""Names in weights that were once TensorFlow's, as they are called now."""
LEFT_BEHIND = (r"(^|\.)position_ids$", r"^lm_head\.", r"^(cls|classifier|qa_outputs)\.")
"""What published weights carry beside the encoder: its old buffers, and the heads it was trained with."""


class Encoder(nn.Module):
    """Token ids int32 (B, L) to features (B, D). Random weights; dropout as the config says."""

    def __init__(self, arch: dict[str, Any]) -> None:
        super().__init__()
        config = _library().AutoConfig.for_model(**arch["config"])
        self.encoder: nn.Module = _library().AutoModelForTextEncoding.from_config(config, dtype=torch.float32)
        self.padding = _padding(config)
        self.width: int = config.hidden_size

    def forward(self, tokens_BL: Tensor) -> Tensor:
        mask_BL = tokens_BL != self.padding
        told = self.encoder(input_ids=tokens_BL.long(), attention_mask=mask_BL.long())
        pooled_BD: Tensor | None = getattr(told, "pooler_output", None)
        if pooled_BD is not None:
            return pooled_BD
        share_BL1 = (mask_BL / mask_BL.sum(dim=1, keepdim=True)).unsqueeze(2)
        mean_BD: Tensor = (told.last_hidden_state * share_BL1).sum(dim=1)
        return mean_BD


def tower(arch: dict[str, Any]) -> tuple[nn.Module, int]:
    """The encoder of that config with random weights, and its number of features."""
    body = Encoder(arch)
    return body, body.width


def describe(base: BaseSpec) -> tuple[dict[str, Any], Tokens]:
    """The encoder's whole config, and how its texts are prepared. Raises `ModelError`, with the nearest names."""
    config = _config(base)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and base.max_tokens > longest:
        raise ModelError(f"`{base.arch}` reads at most {longest} tokens, `max_tokens` is {base.max_tokens}; write `max_tokens: {longest}`.")
    plain = {name: value for name, value in config.to_dict().items() if name not in ("transformers_version", "_name_or_path", "dtype")}
    return {"config": plain}, Tokens(length=base.max_tokens, vocabulary=config.vocab_size, padding=_padding(config))


def load(base: BaseSpec, arch: dict[str, Any]) -> tuple[dict[str, Tensor], None]:
    """The encoder's weights: published ones, those at an address, or random ones. There is no text tower beside it."""
    body = Encoder(arch)
    if base.weights is not None and is_uri(base.weights):
        load_state(body.encoder, _of_encoder(fetch_state(base.weights), body.encoder))
    elif base.weights is not None:
        body.encoder = _from_hub(base, "AutoModelForTextEncoding", use_safetensors=True, dtype=torch.float32)
    _require_length(body, base)
    return body.state_dict(), None


def _config(base: BaseSpec) -> Any:
    name = base.arch.removeprefix(TEXT_PREFIX)
    if not is_uri(name):
        return _from_hub(base, "AutoConfig")
    try:
        plain = json.loads(storage.read_bytes(name))
        kind = plain["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"`{name}` is no config of transformers ({error}); it needs a `model_type`, such as `bert`.") from error
    known = _library().models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    if kind not in known:
        raise ModelError(f"`{name}` describes a `{kind}`, which is no text encoder of transformers; {nearest(kind, list(known))}")
    try:
        return _library().AutoConfig.for_model(kind, **{name: value for name, value in plain.items() if name != "model_type"})
    except Exception as error:  # each config of transformers refuses what it is given in its own way
        told = " ".join(str(error).split())
        raise ModelError(f"`{name}` does not describe a `{kind}` ({told}); write it as transformers does.") from error


def _from_hub(base: BaseSpec, what: str, **options: Any) -> Any:
    """A config or an encoder by its name on the hub; `weights` names the revision."""
    name = base.arch.removeprefix(TEXT_PREFIX)
    revision = base.weights if base.weights and not is_uri(base.weights) else "main"
    try:
        return getattr(_library(), what).from_pretrained(name, revision=revision, **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`{name}`, revision `{revision}`, cannot be fetched from the hub ({str(error).splitlines()[0]}); open the way to it, or write "
            f"`{TEXT_PREFIX}` and the address of its config.json, and the address of its weights as `weights`."
        ) from error


def _of_encoder(state: dict[str, Tensor], encoder: Any) -> dict[str, Tensor]:
    """The encoder's part of a whole model's weights: a tied tensor under all its names, and where there is no pooler, a random one."""
    for pattern, name in RENAMED.items():
        state = {re.sub(pattern, name, key): tensor for key, tensor in state.items()}
    prefix = f"{encoder.base_model_prefix}."
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    unwanted = (*LEFT_BEHIND, *(encoder._keys_to_ignore_on_load_unexpected or ()))
    found = {key: tensor for key, tensor in state.items() if not any(re.search(str(pattern), key) for pattern in unwanted)}
    own = encoder.state_dict()
    given = {own[key].data_ptr(): tensor for key, tensor in found.items() if key in own}
    for key, tensor in own.items():
        if key not in found and (tensor.data_ptr() in given or key.startswith("pooler.")):
            found[key] = given.get(tensor.data_ptr(), tensor)
    return found


@torch.inference_mode()
def _require_length(body: Encoder, base: BaseSpec) -> None:
    """Raises `ModelError` for a text of `max_tokens` that has no positions: some count theirs from behind the padding's id (RoBERTa)."""
    try:
        body.eval()(torch.full((1, base.max_tokens), body.padding + 1))
    except (IndexError, RuntimeError) as error:
        raise ModelError(
            f"`{base.arch}` cannot read {base.max_tokens} tokens ({str(error).splitlines()[0]}); write a smaller `max_tokens`."
        ) from error


def _padding(config: Any) -> int:
    return int(config.pad_token_id or 0)


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "Text encoders need transformers, which is not installed here; install `stockpot[text]` where inits are prepared, trials run "
            "and soups are cooked."
        ) from error
    return transformers
