"""Guards: the one file that serves gives the soup's own answers, decodes as training does, refuses nonsense, and needs nothing of
Stockpot."""

import ast
import base64
import io
import sys
import warnings
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from stockpot.data.images import decode, eval_transform
from stockpot.digests import canonical
from stockpot.evaluation import logits
from stockpot.ledger import packaging, served_model
from stockpot.models.classifier import ModelConfig, build
from stockpot.models.folders import write_model
from tests.tiny_sweep import ARCH, CLASSES, PREPROCESS, png


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig(kind="open_clip", arch=ARCH, preprocess=PREPROCESS, classes=CLASSES)


@pytest.fixture(scope="module")
def served(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[served_model.Soup, Any]:
    torch.manual_seed(3)
    model = build(config)
    folder = tmp_path_factory.mktemp("soup")
    write_model(folder, model)
    soup = served_model.Soup()
    soup.load_context(SimpleNamespace(artifacts={"soup": str(folder)}))
    return soup, model


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def pictures() -> list[bytes]:
    rng = np.random.default_rng(5)
    colour = Image.fromarray(rng.integers(0, 256, (31, 23, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    colour.save(turned, "jpeg", exif=exif)
    sixteen = Image.fromarray(rng.integers(0, 65536, (20, 20)).astype(np.uint16))
    return [
        encoded(colour, "png"), encoded(colour, "jpeg"), encoded(colour.convert("L"), "jpeg"), encoded(colour.convert("CMYK"), "jpeg"),
        encoded(colour.convert("P"), "png"), encoded(colour.convert("RGBA"), "png"), encoded(colour, "webp"), encoded(sixteen, "png"),
        turned.getvalue(), encoded(colour.resize((16, 16)), "png"),
    ]  # fmt: skip


def test_every_kind_of_picture_is_decoded_and_prepared_as_in_training(served: tuple[served_model.Soup, Any]) -> None:
    for data in pictures():
        assert torch.equal(served_model.image(data, 0), decode(data))
        assert torch.equal(served[0]._transformed(decode(data)), eval_transform(decode(data), PREPROCESS))


def test_answers_are_the_soups_own(served: tuple[served_model.Soup, Any]) -> None:
    soup, model = served
    images = [png(seed, seed % 3) for seed in range(6)]
    pixels = torch.stack([eval_transform(decode(data), PREPROCESS) for data in images])
    wanted = logits(model, pixels, PREPROCESS).softmax(1)
    answers = soup.predict(None, pd.DataFrame({"image": images}))
    assert [answer["label"] for answer in answers] == [CLASSES[place] for place in wanted.argmax(1).tolist()]
    assert [answer["probability"] for answer in answers] == wanted.amax(1).tolist()
    assert soup.predict(None, [{"image": base64.b64encode(data).decode()} for data in images]) == answers


def test_the_likeliest_classes_come_best_first(served: tuple[served_model.Soup, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    soup, model = served
    images = [png(seed, seed % 3) for seed in range(5)]
    pixels = torch.stack([eval_transform(decode(data), PREPROCESS) for data in images])
    wanted = logits(model, pixels, PREPROCESS).softmax(1)
    monkeypatch.setattr(served_model, "BATCH", 2)
    for top_k in (1, 2, 3, 9):
        answers = soup.predict(None, [{"image": data} for data in images], {"top_k": top_k})
        for answer, row in zip(answers, wanted.tolist(), strict=True):
            order = sorted(range(3), key=lambda place: -row[place])[:top_k]
            assert [one["label"] for one in answer["top"]] == [CLASSES[place] for place in order]
            assert [one["probability"] for one in answer["top"]] == pytest.approx([row[place] for place in order], abs=1e-6)
            assert {"label": answer["label"], "probability": answer["probability"]} == answer["top"][0]
    with pytest.raises(ValueError, match="found top_k 0; needed: 1 or more"):
        soup.predict(None, [{"image": images[0]}], {"top_k": 0})


def test_a_row_of_a_later_batch_is_named_by_its_place(served: tuple[served_model.Soup, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_model, "BATCH", 2)
    with pytest.raises(ValueError, match="row 3: found int"):
        served[0].predict(None, [*[{"image": png(0, 0)}] * 3, {"image": 1}])


def test_a_kept_text_tower_answers_about_other_labels(tmp_path: Path) -> None:
    torch.manual_seed(4)
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    arch = {**ARCH, "text_cfg": text}
    model = build(ModelConfig(kind="open_clip", arch=arch, preprocess=PREPROCESS, classes=CLASSES, keep_text=True))
    with torch.no_grad():
        model.text.logit_scale.fill_(3.0)
    write_model(tmp_path / "soup", model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packaging.package(tmp_path, tmp_path / "soup", "m-0", "0" * 32, torch_export=False)
        loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    images, labels, templates = [png(seed, seed % 3) for seed in range(6)], ["lion", "bear"], ["a photo of a {}.", "a {}"]
    answers = loaded.predict([{"image": data} for data in images], params={"labels": labels, "templates": templates})
    pixels = torch.stack([eval_transform(decode(data), PREPROCESS) for data in images])
    wanted = logits(model.for_classes(labels, templates), pixels, PREPROCESS).softmax(1).amax(1)
    assert [answer["probability"] for answer in answers] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert {answer["label"] for answer in loaded.predict([{"image": data} for data in images])} <= set(CLASSES)
    for template in ("a photo", "a {} of {x}", "a {} {", "a {{}}"):
        with pytest.raises(ValueError, match="every template needs one `"):
            loaded.unwrap_python_model().predict(None, [{"image": images[0]}], {"labels": labels, "templates": [template]})


def test_without_a_text_tower_other_labels_are_refused(served: tuple[served_model.Soup, Any]) -> None:
    with pytest.raises(ValueError, match="has no text tower, so it knows its own classes only"):
        served[0].predict(None, [{"image": png(0, 0)}], {"labels": ["lion"], "templates": ["a {}"]})


def test_a_registered_file_with_another_activation_is_not_served(config: ModelConfig, tmp_path: Path) -> None:
    model = build(config)
    torch.nn.init.zeros_(model.head.bias)
    write_model(tmp_path, model)
    (tmp_path / "model.json").write_bytes(canonical(config.model_copy(update={"arch": {**ARCH, "quick_gelu": True}})))
    with pytest.raises(ValueError, match="not the registered one: its logits differ"):
        served_model.Soup().load_context(SimpleNamespace(artifacts={"soup": str(tmp_path)}))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "at least one row"),
        ([[1, 2]], "one column `image`"),
        ([{"image": b"x", "other": 1}], "one column `image`"),
        ([{"image": 3}], "row 0: found int"),
        ([{"image": None}], "row 0: found NoneType"),
        ([{"image": "nonsense!"}], "row 0: the text is not base64"),
        ([{"image": base64.b64encode(b"still no image").decode()}], "row 0: not a readable image"),
        ([{"image": b""}], "row 0: found 0 bytes"),
        ([{"image": png(0, 0)}, {"image": png(0, 0)[:60]}], "row 1: not a readable image"),
    ],
)
def test_nonsense_is_refused_by_row(served: tuple[served_model.Soup, Any], rows: list[Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        served[0].predict(None, rows)


def test_a_picture_too_large_is_refused_before_it_is_decoded(
    served: tuple[served_model.Soup, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_model, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="pixels, at most 100"):
        served[0].predict(None, [{"image": png(0, 0)}])
    monkeypatch.setattr(served_model, "MAX_BYTES", 99)
    with pytest.raises(ValueError, match="needed: an image file of 1 to 99 bytes"):
        served[0].predict(None, [{"image": png(0, 0)}])
    with pytest.raises(ValueError, match="characters of base64; needed: an image file of 1 to 99 bytes"):
        served[0].predict(None, [{"image": base64.b64encode(png(0, 0)).decode()}])


def test_a_picture_of_exactly_the_size_that_is_taken_is_taken(
    served: tuple[served_model.Soup, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = png(0, 0)  # 18 wide and 20 high
    forms = [{"image": picture}, {"image": base64.b64encode(picture).decode()}]
    for name, most in (("MAX_BYTES", len(picture)), ("MAX_PIXELS", 18 * 20)):
        monkeypatch.setattr(served_model, name, most)
        assert len(served[0].predict(None, forms)) == 2
    for name, most in (("MAX_PIXELS", 18 * 20 - 1), ("MAX_BYTES", len(picture) - 1)):
        monkeypatch.setattr(served_model, name, most)
        for form in forms:
            with pytest.raises(ValueError, match=f"{most:,}"):
                served[0].predict(None, [form])
    monkeypatch.undo()
    monkeypatch.setattr(served_model, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="18 x 20 pixels, at most 100"):
        served[0].predict(None, [{"image": picture[:60]}])  # only its header is there


def test_what_is_taken_at_most_is_no_more_than_a_server_can_hold() -> None:
    pixels = 3 * served_model.MAX_PIXELS
    assert 3 * 8000 * 8000 <= pixels <= 2**28, "a camera's largest picture, in a quarter of a gigabyte"
    assert 2**24 <= served_model.MAX_BYTES <= 2**26


def test_the_file_imports_nothing_of_this_repository_and_only_what_is_pinned() -> None:
    tree = ast.parse(Path(served_model.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    roots = {str(module).split(".")[0] for module in modules}
    assert not {"stockpot", "flows", "tasks", "deployments", "pickle"} & roots
    known = packages_distributions()
    pinned = {pin.partition("==")[0] for pin in packaging.requirements({})}
    assert all(pinned & set(known[root]) for root in roots - sys.stdlib_module_names)


def test_the_exported_program_gives_the_same_answers_for_any_batch(
    served: tuple[served_model.Soup, Any], config: ModelConfig, tmp_path: Path
) -> None:
    _, model = served
    write_model(tmp_path, model)
    served_model.export(tmp_path, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 2, 5):
        pixels = torch.stack([eval_transform(decode(png(seed, seed % 3)), PREPROCESS) for seed in range(count)])
        with torch.inference_mode():
            assert torch.allclose(program(pixels / 255), logits(model, pixels, PREPROCESS), atol=1e-5)
