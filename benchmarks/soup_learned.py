"""Learned mixing by layer of 16 ingredients of ViT-B/32 size: the memory a step takes, in models (353 MB), beside what the process held
before; the paper's way holds every ingredient and its gradient. One step of 8 images, on the CPU, in a fresh process.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch

from benchmarks._memory import Watched
from stockpot.checkpoints import save_weights
from stockpot.soup.recipes.learned import learn
from stockpot.soup.recipes.weights import open_weights

INGREDIENTS = 16


def measure() -> dict[str, dict[str, Any]]:
    """`soup.learned_models`: peak private memory over one model; and resident."""
    grown = json.loads(
        subprocess.run(
            [sys.executable, "-m", "benchmarks.soup_learned", "--memory", str(INGREDIENTS)], check=True, capture_output=True, text=True
        ).stdout
    )
    return {
        "soup.learned_models": {
            "ratio": round(grown["models"], 3), "unit": "models of memory", "peer": "one model", "repeats": 1,
            "spread": [round(grown["models"], 3)] * 2, "resident": round(grown["resident"], 3), "ingredients": INGREDIENTS,
        }
    }  # fmt: skip


def _step(files: int) -> dict[str, float]:
    """One step over so many files: the same bytes under as many names, which costs the same memory and less disk."""
    torch.set_num_threads(1)
    config = open_clip.get_model_config("ViT-B-32")
    from open_clip.model import _build_vision_tower

    tower = _build_vision_tower(config["embed_dim"], dict(config["vision_cfg"]), False)
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as scratch:
        path = Path(scratch) / "0.safetensors"
        save_weights(path, tower.state_dict())
        size = path.stat().st_size
        del tower
        for number in range(1, files):
            (Path(scratch) / f"{number}.safetensors").hardlink_to(path)
        opened = [open_weights(Path(scratch) / f"{number}.safetensors") for number in range(files)]
        images, labels = torch.randn(8, 3, 224, 224), torch.arange(8)
        with Watched() as memory:
            tower = _build_vision_tower(config["embed_dim"], dict(config["vision_cfg"]), False)
            learn(tower, opened, [(images, labels)], by_layer=True, learning_rate=0.05)
    return {"models": memory.grown["Anonymous"] / size, "resident": memory.grown["Rss"] / size}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        print(json.dumps(_step(int(sys.argv[2]))))
    else:
        print(measure())
