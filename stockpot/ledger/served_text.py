"""The registered model of texts, as MLflow runs it: `served_model`, for token ids in place of images. No pickle, nothing of Stockpot.

It takes the ids that the tokeniser of the training data makes, so the tokeniser stays with whoever asks. Cutting and filling up repeat
`stockpot.data.tokens`, the encoder repeats `stockpot.models.encoders`; a test holds them together.
"""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
import transformers
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from safetensors import safe_open
from torch import Tensor, nn

BATCH = 256

# B texts, L tokens, C classes


class Refused(MlflowException, ValueError):  # type: ignore[misc]  # mlflow is untyped
    """Something that cannot be answered. A plain ValueError would reach an HTTP client as a stack trace; this one as its sentence."""

    def __init__(self, sentence: str) -> None:
        MlflowException.__init__(self, sentence, error_code=INVALID_PARAMETER_VALUE)


class Soup(PythonModel):  # type: ignore[misc]  # mlflow is untyped
    """Token ids in; the most likely classes and their probabilities out."""

    def load_context(self, context: Any) -> None:
        """Build the classifier and load its weights, on a GPU where there is one."""
        folder = Path(context.artifacts["soup"])
        config = json.loads((folder / "model.json").read_text())
        self.classes: list[str] = config["classes"]
        self.tokens: dict[str, int] = config["preprocess"]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = Classifier(config["arch"]["config"], self.tokens["padding"], len(self.classes))
        self.model.load_state_dict(read_weights(folder / "model.safetensors"))
        require_same_logits(self.model.eval(), json.loads((folder / "fingerprint.json").read_text())["logits"], self.tokens)
        self.model.to(self.device)

    # MLflow reads the hint of `model_input` as a schema, and warns where there is none; a DataFrame's it leaves to the signature.
    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:  # noqa: ARG002
        """Per text its `label` and `probability`, and `top`: the `top_k` likeliest classes as `{"label", "probability"}`, best first.

        Column `tokens`: a list of token ids, cut at its end or filled up to the model's length. params: `top_k`, at least 1; more than
        there are classes means all of them. Raises ValueError for anything else, naming the row.
        """
        rows, top_k = column(model_input), (params or {}).get("top_k", 1)
        if top_k < 1:
            raise Refused(f"found top_k {top_k}; needed: 1 or more")
        inputs, answers = [fitted(value, row, self.tokens) for row, value in enumerate(rows)], []
        for start in range(0, len(inputs), BATCH):
            likely = self.logits(torch.stack(inputs[start : start + BATCH])).softmax(dim=1).topk(min(top_k, len(self.classes)), dim=1)
            answers += [_answer(self.classes, *row) for row in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)]
        return answers

    @torch.inference_mode()
    def logits(self, tokens_BL: Tensor) -> Tensor:
        """Token ids of the model's length to float32 logits (B, C) on the CPU."""
        logits_BC: Tensor = self.model(tokens_BL.to(self.device))
        return logits_BC.float().cpu()


class Encoder(nn.Module):
    """Token ids to features: the pooler's answer, or the mean of the states over all tokens but padding."""

    def __init__(self, config: dict[str, Any], padding: int) -> None:
        super().__init__()
        known = transformers.AutoConfig.for_model(**config)
        self.encoder = transformers.AutoModelForTextEncoding.from_config(known, dtype=torch.float32)
        self.padding = padding

    def forward(self, tokens_BL: Tensor) -> Tensor:
        mask_BL = tokens_BL != self.padding
        told = self.encoder(input_ids=tokens_BL.long(), attention_mask=mask_BL.long())
        pooled_BD: Tensor | None = getattr(told, "pooler_output", None)
        if pooled_BD is not None:
            return pooled_BD
        mean_BD: Tensor = (told.last_hidden_state * (mask_BL / mask_BL.sum(dim=1, keepdim=True)).unsqueeze(2)).sum(dim=1)
        return mean_BD


class Classifier(nn.Module):
    """Encoder and linear head."""

    def __init__(self, config: dict[str, Any], padding: int, classes: int) -> None:
        super().__init__()
        self.body = Encoder(config, padding)
        self.head = nn.Linear(self.body.encoder.config.hidden_size, classes)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        logits_BC: Tensor = self.head(self.body(tokens_BL))
        return logits_BC


@torch.inference_mode()
def require_same_logits(model: nn.Module, stored: list[list[float]], tokens: dict[str, int]) -> None:
    """Raises ValueError unless the model says about fixed noise what it said when it was stored: `stockpot.models.folders`, repeated."""
    noise_PL = np.random.default_rng(2203).integers(0, tokens["vocabulary"], (len(stored), tokens["length"]), np.int32)
    noise_PL[-1, (tokens["length"] + 1) // 2 :] = tokens["padding"]
    before, now = torch.tensor(stored), model(torch.from_numpy(noise_PL))
    apart = float((before - now).abs().max() / before.abs().max().clamp(min=1e-12))
    if not apart <= 1e-4:
        raise ValueError(
            f"the loaded model is not the registered one: its logits differ from the stored ones by {apart:.1e} of the largest, 1e-4 is "
            "allowed; install the versions in requirements.txt, and leave model.json as it was registered"
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict; names tied on saving share one tensor again."""
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        header = file.metadata() or {}
    for name, first in json.loads(header.get("stockpot", '{"tied": {}}'))["tied"].items():
        state[name] = state[first]
    return state


def column(model_input: Any) -> list[Any]:
    """The `tokens` column of a DataFrame, or of a list of dictionaries."""
    rows = model_input.to_dict("records") if hasattr(model_input, "to_dict") else model_input
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and set(row) == {"tokens"} for row in rows):
        raise Refused("needed: at least one row with one column `tokens` holding a list of token ids")
    return [row["tokens"] for row in rows]


def fitted(value: Any, row: int, tokens: dict[str, int]) -> Tensor:
    """Token ids to int32 (L,), cut or filled up. Raises ValueError naming the row and what was found."""
    ids = np.asarray(value) if isinstance(value, list | tuple | np.ndarray) else np.empty(0)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise Refused(f"row {row}: found {str(value)[:40]}; needed: a list of token ids, at least one")
    kept = ids[: tokens["length"]]
    if kept.min() < 0 or kept.max() >= tokens["vocabulary"]:
        raise Refused(f"row {row}: found tokens {kept.min()} to {kept.max()}; needed: 0 to {tokens['vocabulary'] - 1}")
    if (kept == tokens["padding"]).all():
        raise Refused(f"row {row}: found nothing but padding (token {tokens['padding']}); needed: a text")
    filled = np.full(tokens["length"], tokens["padding"], np.int32)
    filled[: len(kept)] = kept
    return torch.from_numpy(filled)


def _answer(classes: list[str], places: list[int], probabilities: list[float]) -> dict[str, Any]:
    top = [{"label": classes[place], "probability": share} for place, share in zip(places, probabilities, strict=True)]
    return {**top[0], "top": top}


mlflow.models.set_model(Soup())
