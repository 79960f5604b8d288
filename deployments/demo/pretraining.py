"""A tiny CLIP, pre-trained on captioned digits in under a minute: the demo's base model.

It is weak on purpose, which leaves fine-tuning something to do: 300 images, and captions of which half name only the parity and 15 %
name a random digit. usage: python -m deployments.demo.pretraining PRETRAIN_SNAPSHOT OUT_URI [SEED] (prints two URIs)
"""

# B batch, D features, T distinct texts

import json
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from deployments.demo import augment
from stockpot import storage
from stockpot.checkpoints import save_weights
from stockpot.config import PinnedSnapshot
from stockpot.data.shards import pixels
from stockpot.data.snapshots import open_snapshot, pin
from stockpot.digests import digest
from stockpot.evaluation import normalise
from stockpot.preparation import Preprocess
from stockpot.training.optimisation import parameter_groups

STEPS, BATCH, WARMUP_STEPS, LEARNING_RATE, WEIGHT_DECAY = 200, 128, 40, 2e-3, 0.1
WRONG, COARSE = 0.15, 0.5
TEMPLATES = ("a photo of the digit {}.", "a scan of the number {}.", "a handwritten {}.", "the number {}.", "a small picture of {}.")
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "quick_gelu": False,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {
        "size": 32,
        "mean": [0.3, 0.3, 0.3],
        "std": [0.35, 0.35, 0.35],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    },
}

RECIPE = [STEPS, BATCH, WARMUP_STEPS, LEARNING_RATE, WEIGHT_DECAY, WRONG, COARSE, TEMPLATES, CONFIG]
"""What decides the weights, beside data and seed."""


def pretrain(data: dict[str, Any], out_uri: str, seed: int) -> tuple[str, str]:
    """Train contrastively on the snapshot `data["pretrain"]` and store config and weights below `out_uri`, unless they are there.

    A digest of what decides them (data, seed, recipe) is written last, beside them: what was made otherwise is made again, in its place.
    Returns the URIs of the open_clip JSON config and of the safetensors weights.
    """
    pinned = pin(data["pretrain"])
    config_uri, weights_uri, marker_uri = (f"{out_uri}/{name}" for name in ("open_clip_config.json", "model.safetensors", "made_of"))
    made_of = digest([pinned.digest, seed, RECIPE]).encode()
    if not storage.exists(marker_uri) or storage.read_bytes(marker_uri) != made_of:
        storage.remove(marker_uri)
        model = train(pinned, seed)
        with TemporaryDirectory(prefix="stockpot-base-") as folder:
            save_weights(Path(folder) / "model.safetensors", model.state_dict())
            storage.upload(Path(folder) / "model.safetensors", weights_uri)
        storage.write_bytes(config_uri, json.dumps(CONFIG, indent=1).encode())
        storage.write_bytes(marker_uri, made_of)
    return config_uri, weights_uri


def train(pinned: PinnedSnapshot, seed: int) -> nn.Module:
    """The pre-trained CLIP, image and text tower."""
    import open_clip

    snapshot = open_snapshot(pinned)
    preprocess = Preprocess(**CONFIG["preprocess_cfg"])
    split = pixels(snapshot, "train", preprocess)
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    torch.manual_seed(seed)
    model: nn.Module = open_clip.CLIP(**CONFIG["model_cfg"]).train()
    rule = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    for step in range(STEPS):
        rng = random.Random(f"{seed}/{step}")
        rows = [rng.randrange(len(split.labels)) for _ in range(BATCH)]
        images_B3HW = torch.stack([augment.medium(torch.as_tensor(np.array(split.images[row])), rng.getrandbits(63), 32) for row in rows])
        # Each distinct caption is encoded once: a batch has few.
        texts, places = np.unique([caption(int(split.labels[row]), snapshot.classes, rng) for row in rows], return_inverse=True)
        for group in rule.param_groups:
            group["lr"] = LEARNING_RATE * _rate(step)
        images_BD, texts_TD, scale = model(normalise(images_B3HW, preprocess), tokenizer(list(texts)))
        loss = contrast(images_BD, texts_TD[places], scale)
        rule.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # as torch left it
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
    return model.eval()


def caption(label: int, classes: tuple[str, ...], rng: random.Random) -> str:
    """A noisy caption: 15 % name a random digit, 50 % only say even or odd, the rest are right."""
    draw, template = rng.random(), rng.choice(TEMPLATES)
    if draw < WRONG:
        return template.format(rng.choice(classes))
    if draw < WRONG + COARSE:
        return template.format("odd digit" if label % 2 else "even digit")
    return template.format(classes[label])


def contrast(images_BD: Tensor, texts_BD: Tensor, scale: Tensor) -> Tensor:
    """The symmetric contrastive loss of Radford et al. 2021 (arXiv:2103.00020); features come at unit length, the scale as a factor."""
    logits_BB = scale * images_BD @ texts_BD.T
    labels_B = torch.arange(len(logits_BB))
    return (functional.cross_entropy(logits_BB, labels_B) + functional.cross_entropy(logits_BB.T, labels_B)) / 2


def _rate(step: int) -> float:
    """Share of the peak learning rate: linear warm-up, cosine to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + float(np.cos(np.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS))))


if __name__ == "__main__":
    torch.set_num_threads(1)
    seed_argument = int(sys.argv[3]) if len(sys.argv) > 3 else 10
    print(*pretrain({"pretrain": sys.argv[1]}, sys.argv[2], seed_argument))
