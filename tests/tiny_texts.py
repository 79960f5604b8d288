"""Made-up texts as token ids: 40 words, three classes that prefer a part of them each, and encoders of a few thousand random weights."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stockpot.config import BaseSpec, PinnedSnapshot
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.splits import SplitSpec

TOPICS = ("sport", "food", "music")
VOCABULARY, LENGTH = 40, 12
BERT = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
T5 = {"model_type": "t5", "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def ids(seed: int, label: int) -> list[int]:
    """4 to 15 tokens between a start (2) and an end (3), most of them of the class."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(4, 16))
    words = np.where(rng.random(count) < 0.6, rng.integers(4 + 12 * label, 16 + 12 * label, count), rng.integers(4, VOCABULARY, count))
    return [2, *words.tolist(), 3]


def npy(tokens: object, dtype: str = "int32") -> bytes:
    """An array as it lies in a sample."""
    file = io.BytesIO()
    np.save(file, np.array(tokens, dtype))
    return file.getvalue()


def texts(count: int) -> Iterator[Sample]:
    """Samples of the three topics in turn."""
    for number in range(count):
        yield Sample(f"text-{number:04d}", npy(ids(number, number % 3)), number % 3, "npy")


def publish_texts(root: str, count: int = 150) -> PinnedSnapshot:
    """A snapshot of texts in small shards."""
    splits = SplitSpec(held_out=40, gate=20, salt="texts")
    return publish(root, "texts", TOPICS, GivenSamples(texts(count)), splits=splits, shard_bytes=60_000)


def encoder(folder: Path, config: dict[str, object], **base: object) -> BaseSpec:
    """A base model of that config, with random weights unless `base` names some."""
    path = folder / f"{config['model_type']}.json"
    path.write_text(json.dumps(config))
    return BaseSpec.model_validate({"arch": f"transformers:{path}", "max_tokens": LENGTH, **base})
