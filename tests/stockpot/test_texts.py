"""Promise: texts go the way of images: token ids are published, read exactly, trained on, souped, judged and served, and what cannot work
is refused in a sentence. An encoder's answer is transformers' own on the bare tokens; tied weights are one tensor all the way."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors import safe_open

from deployments.predicting import predict_files
from stockpot.config import DataSpec, GateSpec, InitSpec, PinnedData, RetrainRequest, SweepSpec
from stockpot.data import tokens
from stockpot.data.examination import ProblemsFound
from stockpot.data.images import Undecodable
from stockpot.data.preparing import content_digest
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.registering import register
from stockpot.data.shards import TrainReader, pixels
from stockpot.data.snapshots import open_snapshot
from stockpot.errors import BadRequest, ModelError
from stockpot.evaluation import accuracy, logits
from stockpot.ledger import registry, served_text, tracking
from stockpot.models import encoders
from stockpot.models.bases import load_base
from stockpot.models.classifier import build
from stockpot.models.folders import read_model, write_model
from stockpot.models.loading import load_state
from stockpot.preparation import Tokens
from stockpot.release import gating, releasing
from stockpot.settings import TrialSettings
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.weights import open_weights
from stockpot.soup.souping import cook
from stockpot.sweeps import plan
from stockpot.training.course import fine_tune
from stockpot.training.inits import fetch, load, prepare
from stockpot.training.optimisation import rate_scales
from stockpot.training.rehearsal import rehearse
from stockpot.training.trials import run_trial
from tests.tiny_data import picture
from tests.tiny_texts import BERT, LENGTH, T5, TOPICS, VOCABULARY, encoder, ids, npy, publish_texts, texts

SETTINGS = TrialSettings(epochs=12, batch_size=30, learning_rate=3e-3, augmentation="none", schedule="constant")
FORM = Tokens(length=6, vocabulary=VOCABULARY, padding=0)


@pytest.mark.slow
def test_texts_become_a_champion_that_reads_tokens(ledger: str, tmp_path: Path) -> None:
    snapshot = publish_texts(f"{tmp_path}/texts")
    request = RetrainRequest(
        model=f"texts-{uuid4().hex[:8]}",
        store=f"{tmp_path}/store",
        data=DataSpec(snapshot=snapshot.uri),
        base=encoder(tmp_path, BERT),
        sweep=SweepSpec(trials=2, settings=SETTINGS),
    )
    init = prepare(request.base, request.init, snapshot, request.store)
    rehearse(request.sweep, fetch(init)[0])
    sweep = plan(request, PinnedData(snapshot=snapshot), init)
    tracking.open_sweep(sweep)
    singles = [run_trial(trial, say=lambda _line: None) for trial in sweep.trials]
    report = cook(sweep.id, say=lambda _line: None)
    assert set(report.scores) == {"best_single", "uniform", "greedy"} and not report.excluded
    assert report.scores["greedy"].held_out.correct >= max(one.held_out.correct for one in singles) > 0.6 * 40
    version = releasing.register(report)
    assert releasing.gate(report, version, GateSpec()).promoted
    folder = registry.fetch_version(version, tmp_path / "version")
    model, opened = read_model(folder), open_snapshot(snapshot)
    gate = pixels(opened, "gate", model.config.preprocess)
    told = logits(model, gate.images, model.config.preprocess)
    assert accuracy(told, gate.labels) == report.scores["greedy"].gate
    evidence = gating.gather_evidence(
        sweep, {"champion": version, "challenger": version}, dict.fromkeys(("champion", "challenger"), folder), GateSpec()
    )
    assert evidence.gate.accuracy("champion") == evidence.gate.accuracy("challenger") == report.scores["greedy"].gate
    served = registry.load(f"{request.model}@champion")
    bare = [ids(int(key.rpartition("-")[2]), label) for key, label in zip(gate.keys, gate.labels.tolist(), strict=True)]
    answers = served.predict([{"tokens": one} for one in bare], params={"top_k": 3})
    assert [answer["label"] for answer in answers] == [TOPICS[place] for place in told.argmax(1).tolist()]
    assert [answer["probability"] for answer in answers] == pytest.approx(told.softmax(1).amax(1).tolist(), abs=1e-5)
    (tmp_path / "text.npy").write_bytes(npy(bare[0], "int64"))
    (row,) = predict_files(request.model, [tmp_path / "text.npy"])
    assert (row["text"], row["label"]) == (f"{tmp_path}/text.npy", answers[0]["label"])
    (tmp_path / "text.npy").write_bytes(picture(0))
    with pytest.raises(BadRequest, match=r"text.npy is no readable array of tokens .*; the model takes token ids"):
        predict_files(request.model, [tmp_path / "text.npy"])
    assert "timm" not in (folder.parents[1] / "requirements.txt").read_text()


@pytest.mark.parametrize("config", [BERT, T5], ids=["bert: its pooler", "t5: the mean of its states"])
def test_the_answer_is_transformers_own_on_the_bare_tokens(config: dict, tmp_path: Path) -> None:
    base = load_base(encoder(tmp_path, config), seed=3)
    model = build(base.config(TOPICS)).eval()
    load_state(model.body, base.tower)
    for seed in range(5):
        bare = torch.tensor([ids(seed, 0)[:LENGTH]])
        with torch.inference_mode():
            told = model.body.encoder(input_ids=bare)
            wanted = told.pooler_output if config is BERT else told.last_hidden_state.mean(dim=1)
            filled = tokens.fit(bare[0].numpy().astype(np.int32), base.preprocess)[None]
            assert torch.allclose(model.features(filled), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "embedding", "block"),
    [
        (BERT, "embeddings.word_embeddings.weight", "encoder.layer.{}.attention.self.query.weight"),
        (T5, "shared.weight", "encoder.block.{}.layer.0.SelfAttention.q.weight"),
    ],
    ids=["bert", "t5"],
)
def test_rates_fall_from_the_head_to_the_embeddings(config: dict, embedding: str, block: str, tmp_path: Path) -> None:
    model = build(load_base(encoder(tmp_path, config)).config(TOPICS))
    scales = rate_scales(model, 0.5)
    names = ["head.weight", *(f"body.encoder.{block.format(number)}" for number in (1, 0)), f"body.encoder.{embedding}"]
    assert [scales[name] for name in names] == [1.0, 0.5, 0.25, 0.125]


def test_batches_are_the_same_from_the_cache_and_from_storage(node: Path, tmp_path: Path) -> None:
    snapshot = open_snapshot(publish_texts(f"{tmp_path}/texts"))
    form = Tokens(length=LENGTH, vocabulary=VOCABULARY, padding=0)
    cached, streamed = (
        list(TrainReader(snapshot, preprocess=form, augment=None, batch_size=40, seed=1, reading=reading).batches(0))
        for reading in ("cached", "streamed")
    )
    assert [len(batch.labels) for batch in cached] == [40, 40, 10]
    assert all(
        torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels) for one, two in zip(cached, streamed, strict=True)
    )
    row, label = cached[0].images[0], int(cached[0].labels[0])
    assert any(
        (one := ids(seed, label)[:LENGTH]) == row[: len(one)].tolist() and not row[len(one) :].any() for seed in range(label, 150, 3)
    )


def test_existing_shards_of_tokens_are_registered_and_an_image_goes_before_tokens(node: Path, tmp_path: Path) -> None:
    published = open_snapshot(publish_texts(f"{tmp_path}/texts"))
    pinned = register([f"{tmp_path}/texts/shards"], root=f"{tmp_path}/again", name="again", classes=TOPICS, splits="test")
    assert open_snapshot(pinned).counts == {"test": 150} and published.counts["train"] == 90
    both = [Sample("a", picture(1), 0, "png"), Sample("b", npy([2, 5, 3]), 1, "npy")]
    mixed = open_snapshot(publish(f"{tmp_path}/mixed", "mixed", ("x", "y"), GivenSamples(both), splits="test"))
    with pytest.raises(Exception, match=r"shard shards/\w+\.tar, sample 'a' is no readable array of tokens .* an evaluation allows none"):
        pixels(mixed, "test", FORM)


def test_the_same_tokens_in_another_type_are_the_same_text() -> None:
    assert content_digest(npy([4, 5], "int64")) == content_digest(npy([4, 5], "uint16")) != content_digest(npy([5, 4]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy([[1, 2]]), r"is an array of int32 and shape \[1, 2\], needed is one row of integers"),
        (npy([]), "shape \\[0\\], needed is one row"),
        (npy([0.5], "float32"), "is an array of float32"),
        (npy([-1, 4]), "holds the numbers -1 to 4, needed are ids from 0 on"),
        (npy([2**40], "int64"), "holds the numbers"),
        (npy([1, 2, 3])[:-4], "is no readable array of tokens"),
        (picture(0), "is no readable array of tokens .* starts with"),
        (b"", "is no readable array of tokens"),
        (npy([1, 2, 3]).replace(b"(3,)", b"(%d,)" % 10**12), "is no readable array of tokens"),
        (npy([{}], "object"), "is no readable array of tokens .*allow_pickle"),
        (npy([3, VOCABULARY]), f"holds token {VOCABULARY}, the vocabulary ends at {VOCABULARY - 1}"),
        (npy([0, 0]), r"holds nothing but padding \(token 0\)"),
    ],
)
def test_what_is_no_text_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Undecodable, match=reason):
        tokens.fit(tokens.decode(data), FORM)


def test_a_damaged_byte_makes_other_tokens_or_a_sentence() -> None:
    good = npy([1, 2, 3])
    refused = 0
    for place, byte in product(range(len(good)), b"\0 '(}x\xff"):
        try:
            tokens.decode(good[:place] + bytes([byte]) + good[place + 1 :])
        except Undecodable:
            refused += 1
    assert 0 < refused < len(good) * 7


def test_unreadable_texts_are_found_before_there_is_a_snapshot(tmp_path: Path) -> None:
    given = [*texts(9), Sample("bad", npy([[1], [2]]), 0, "npy")]
    with pytest.raises(ProblemsFound, match=r"1 x unreadable sample.*'bad': unreadable sample, is an array of int32"):
        publish(f"{tmp_path}/bad", "bad", TOPICS, GivenSamples(given), splits="test")


def test_serving_fits_tokens_as_training_does(tmp_path: Path) -> None:
    plain = FORM.model_dump()
    for value in ([3], [0, 9, 0], list(range(1, 12))):
        assert torch.equal(served_text.fitted(value, 0, plain), tokens.fit(np.array(value, np.int32), FORM))
    for value, found in (
        ("words", "found words"),
        ([], r"found \[\]"),
        ([0], "found nothing but padding"),
        ([1, 99], "found tokens 1 to 99"),
    ):
        with pytest.raises(ValueError, match=f"row 7: {found}"):
            served_text.fitted(value, 7, plain)
    with pytest.raises(ValueError, match="one column `tokens`"):
        served_text.column([{"image": b""}])
    model = build(load_base(encoder(tmp_path, T5)).config(TOPICS))
    write_model(tmp_path / "soup", model)
    served = served_text.Soup()
    served.load_context(SimpleNamespace(artifacts={"soup": str(tmp_path / "soup")}))
    rows = torch.stack([tokens.fit(np.array(ids(seed, 1), np.int32), model.config.preprocess) for seed in range(4)])
    assert torch.allclose(served.logits(rows), logits(model, rows, model.config.preprocess), atol=1e-6)


def test_a_tied_embedding_is_trained_stored_and_averaged_once(node: Path, tmp_path: Path) -> None:
    pinned = publish_texts(f"{tmp_path}/texts")
    init = prepare(encoder(tmp_path, T5), InitSpec(head="random"), pinned, f"{tmp_path}/store")
    names = ("body.encoder.encoder.embed_tokens.weight", "body.encoder.shared.weight")
    for seed in (0, 1):
        model = load(init)
        fine_tune(model, SETTINGS.model_copy(update={"seed": seed, "epochs": 1, "ema_decays": (0.5,)}), open_snapshot(pinned))
        write_model(tmp_path / str(seed), model)
    paths = [tmp_path / str(seed) / "model.safetensors" for seed in (0, 1)]
    with safe_open(paths[0], framework="pt") as file:
        assert len(set(names) & set(file.keys())) == 1
    mean = average([open_weights(path) for path in paths])
    soup, states = load(init), [read_model(path.parent).state_dict() for path in paths]
    load_state(soup, mean)
    assert mean[names[0]].data_ptr() == mean[names[1]].data_ptr()
    assert soup.state_dict()[names[0]].data_ptr() == soup.state_dict()[names[1]].data_ptr()
    assert not torch.equal(states[0][names[0]], states[1][names[0]])
    assert all(torch.allclose(soup.state_dict()[name], (states[0][name] + states[1][name]) / 2, atol=1e-7) for name in mean)


@pytest.mark.parametrize(
    ("config", "whole"),
    [(BERT, transformers.AutoModelForSequenceClassification), (T5, transformers.AutoModelForSeq2SeqLM)],
    ids=["bert with a classifier", "t5 with a decoder"],
)
def test_the_encoder_is_taken_out_of_a_whole_models_weights(config: dict, whole: type, tmp_path: Path) -> None:
    published = whole.from_config(transformers.AutoConfig.for_model(**config))
    torch.save(published.state_dict(), tmp_path / "whole.pt")
    tower = load_base(encoder(tmp_path, config, weights=f"{tmp_path}/whole.pt")).tower
    inner = published.bert if config is BERT else published
    assert len(tower) > 10
    assert all(torch.equal(tensor, inner.state_dict()[name.removeprefix("encoder.")]) for name, tensor in tower.items())
    wider = {**config, "hidden_size": 32} if config is BERT else {**config, "d_model": 32}
    with pytest.raises(ModelError, match=r"do not fit the architecture: `\S+` is \(.*16\) in the weights and \(.*32\) in the model"):
        load_base(encoder(tmp_path, wider, weights=f"{tmp_path}/whole.pt"))
    deeper = {**config, "num_hidden_layers": 1} if config is BERT else {**config, "num_layers": 1}
    with pytest.raises(ModelError, match="unknown in the model"):
        load_base(encoder(tmp_path, deeper, weights=f"{tmp_path}/whole.pt"))


def test_what_cannot_work_is_told_before_a_gpu_is_taken(node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="describes a `bertt`, which is no text encoder of transformers; did you mean `bert`"):
        load_base(encoder(tmp_path, {**BERT, "model_type": "bertt"}))
    with pytest.raises(ModelError, match="does not describe a `bert`"):
        load_base(encoder(tmp_path, {**BERT, "hidden_size": "wide"}))
    with pytest.raises(ModelError, match="reads at most 16 tokens, `max_tokens` is 17; write `max_tokens: 16`"):
        load_base(encoder(tmp_path, BERT, max_tokens=17))
    with pytest.raises(ModelError, match=r"cannot read 16 tokens \(.*out of bounds.*\); write a smaller `max_tokens`"):
        load_base(encoder(tmp_path, {**BERT, "model_type": "roberta", "pad_token_id": 1}, max_tokens=16))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ModelError, match="is no config of transformers"):
        load_base(encoder(tmp_path, BERT).model_copy(update={"arch": f"transformers:{tmp_path}/list.json"}))
    init = prepare(encoder(tmp_path, BERT), InitSpec(head="random"), publish_texts(f"{tmp_path}/texts"), f"{tmp_path}/store")
    with pytest.raises(BadRequest, match="`minimal` augments images and the model reads tokens; write `augmentation: none`"):
        rehearse(SweepSpec(trials=1), fetch(init)[0])
    with pytest.raises(BadRequest, match="mixup and CutMix blend pixels and the model reads tokens"):
        rehearse(SweepSpec(trials=1, settings=SETTINGS.model_copy(update={"mixup": 0.2})), fetch(init)[0])

    def unreachable(*_args: object, **_options: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ModelError, match=r"`some/bert`, revision `v2`, cannot be fetched from the hub \(no route to the hub\)"):
        load_base(encoder(tmp_path, BERT).model_copy(update={"arch": "transformers:some/bert", "weights": "v2"}))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ModelError, match=r"install `stockpot\[text\]`"):
        encoders.tower({"config": BERT})


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"init": {"head": "zero_shot"}}, "has no text tower for a zero_shot head"),
        ({"release": {"torch_export": True}}, "reads tokens and `release.torch_export` is about pixels"),
        (
            {"base": {"arch": "transformers:x", "preprocess": {"size": 8, "mean": (0, 0, 0), "std": (1, 1, 1)}}},
            "`base.preprocess` is about",
        ),
    ],
)
def test_a_request_that_mixes_texts_and_pixels_is_refused(part: dict, reason: str) -> None:
    plain = {"model": "m", "store": "s3://b/store", "data": {"snapshot": "s3://b/d"}, "base": {"arch": "transformers:s3://b/config.json"}}
    with pytest.raises(ValidationError, match=reason):
        RetrainRequest.model_validate({**plain, **part})
