"""A consumer: needs mlflow, torch and open_clip, and nothing of this repository, which is made impossible to import here.

usage: python -I stranger.py MODEL_URI FOLDER      images are FOLDER/*-LABEL.png; prints [[label, answer], ...] as JSON
"""

import json
import sys
from pathlib import Path

for name in ("stockpot", "tasks", "flows", "deployments"):
    sys.modules[name] = None  # type: ignore[assignment]  # how Python is told that there is no such module

import mlflow  # noqa: E402

if __name__ == "__main__":
    model = mlflow.pyfunc.load_model(sys.argv[1])
    images = sorted(Path(sys.argv[2]).glob("*.png"))
    answers = model.predict([{"image": path.read_bytes()} for path in images])
    print(json.dumps([[path.stem.split("-")[1], answer["label"]] for path, answer in zip(images, answers, strict=True)]))
