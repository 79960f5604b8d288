"""The shared initialisation of a sweep: one body and one head, built once, hashed and stored. Only models with one init may be averaged.

An init is found by its key, the digest of (base, what lies behind its addresses, init spec, snapshot); its identity is that of its
weights and config. `{store}/inits/{key}/init.json` is the commit marker: it is
created once, last, and names the folder that holds the weights under their own digest. Two builders at once therefore agree.
"""

# C classes, D features

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import ValidationError
from torch import Tensor

from stockpot import storage
from stockpot.config import TEXT_PREFIX, BaseSpec, Init, InitSpec, PinnedSnapshot
from stockpot.data.snapshots import Snapshot, open_snapshot
from stockpot.digests import canonical, digest, file_digest
from stockpot.errors import ModelError, ObjectExists, ObjectMissing
from stockpot.models.bases import Base, load_base
from stockpot.models.bodies import body_digest
from stockpot.models.classifier import Classifier, ModelConfig, build
from stockpot.models.folders import FILES, read_model, write_model
from stockpot.models.loading import load_state
from stockpot.models.naming import is_uri
from stockpot.training.probing import probed

Probe = Callable[[Classifier, Snapshot, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(model, snapshot, weight (C, D), bias (C)) to the weight and bias of a linear probe that starts there."""
Examine = Callable[[ModelConfig], None]
"""Raises `StockpotError` for a config that nothing should be built for."""


def prepare(
    base: BaseSpec, spec: InitSpec, snapshot: PinnedSnapshot, store: str, probe: Probe = probed, examine: Examine = lambda _config: None
) -> Init:
    """Build the init, or find the one already built from the same base, spec and snapshot.

    probe: asked for a `linear_probe` head, which may take a GPU. examine: refuses a config before that. Raises `ModelError` for a base that
    cannot be built, a zero-shot head without a text tower, a probe that does not converge, and an init that was changed since it was built.
    """
    root = f"{store.rstrip('/')}/inits/{digest([base, spec, snapshot.digest, _contents(base)])[:12]}"
    if storage.exists(f"{root}/init.json"):
        init = _committed(root)
        examine(load(init).config)
        return init
    classifier = _build(base, spec, open_snapshot(snapshot), probe, examine)
    with TemporaryDirectory(prefix="stockpot-init-") as name:
        folder = Path(name)
        identity = digest([write_model(folder, classifier), classifier.config])
        body = body_digest(classifier) if spec.freeze_head else ""
        init = Init(uri=f"{root}/{identity[:12]}", digest=identity, body=body)
        for file in FILES:
            storage.upload(folder / file, f"{init.uri}/{file}")
    try:
        storage.write_bytes(f"{root}/init.json", canonical(init), create=True)
    except ObjectExists:
        return _committed(root)  # another builder was faster; its init is the init
    return init


def fetch(init: Init) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and weights of an init, examined as `load` does."""
    model = load(init)
    return model.config, model.state_dict()


def load(init: Init) -> Classifier:
    """The model of an init, on the CPU.

    Raises `ModelError` when weights or config are not those the init was made of, or it no longer computes the logits stored with them.
    """
    with TemporaryDirectory(prefix="stockpot-init-") as name:
        folder = Path(name)
        for file in FILES:
            storage.download(f"{init.uri}/{file}", folder / file)
        found = _identity(folder)
        if found != init.digest:
            raise ModelError(
                f"The init at {init.uri} has digest {found[:12]}, it was built with {init.digest[:12]}: its weights or its config "
                f"(activation included) were changed. Restore the objects, or remove {init.uri.rpartition('/')[0]} to have it built anew."
            )
        return read_model(folder)


def _identity(folder: Path) -> str:
    """The digest of the model in a folder; "none" where its config cannot be read."""
    try:
        config = ModelConfig.model_validate_json((folder / "model.json").read_bytes())
    except ValidationError:
        return "none"
    return digest([file_digest(folder / "model.safetensors"), config])


def _contents(base: BaseSpec) -> list[str]:
    """What lies behind the base's addresses now, by size and etag: new weights at an old address are another base."""
    found = []
    for uri in filter(None, (base.arch.removeprefix(TEXT_PREFIX), base.weights)):
        if is_uri(uri):
            stored = [one for one in storage.list_prefix(uri) if one.uri == uri]
            if not stored:
                raise ObjectMissing(f"The base model needs {uri}, and nothing is stored there; check the address, or put the file there.")
            found.append(f"{stored[0].size} {stored[0].etag}")
    return found


def _committed(root: str) -> Init:
    return Init.model_validate(json.loads(storage.read_bytes(f"{root}/init.json")))


def _build(base: BaseSpec, spec: InitSpec, snapshot: Snapshot, probe: Probe, examine: Examine) -> Classifier:
    loaded = load_base(base, seed=spec.seed)
    if base.text_tower == "keep" and loaded.text is None:
        raise ModelError(f"`{base.arch}` has no text tower to keep; leave `text_tower` at drop.")
    config = loaded.config(snapshot.classes, keep_text=base.text_tower == "keep", frozen_head=spec.freeze_head)
    examine(config)
    classifier = build(config)
    weight_CD, bias_C = _start(loaded, base, spec, classifier)
    load_state(classifier, {**loaded.state(config), "head.weight": weight_CD, "head.bias": bias_C})
    if spec.head == "linear_probe":
        weight_CD, bias_C = probe(classifier, snapshot, weight_CD, bias_C)
        classifier.head.load_state_dict({"weight": weight_CD, "bias": bias_C})
    return classifier


def _start(loaded: Base, base: BaseSpec, spec: InitSpec, classifier: Classifier) -> tuple[Tensor, Tensor]:
    """The head before any fitting: random from the seed, zero-shot where there is a text tower, else zero, for a probe to start from."""
    classes = classifier.config.classes
    shape = (len(classes), classifier.head.in_features)
    if spec.head == "random":
        generator = torch.Generator().manual_seed(spec.seed)
        return torch.randn(shape, generator=generator) * shape[1] ** -0.5, torch.zeros(shape[0])
    if loaded.text is not None:
        return loaded.text.zero_shot_head(classes, spec.templates), torch.zeros(shape[0])
    if spec.head == "zero_shot":
        raise ModelError(f"`{base.arch}` has no text tower, a zero_shot head needs one; ask for the head `linear_probe` or `random`.")
    return torch.zeros(shape), torch.zeros(shape[0])
