"""Guards: what another `prune` took a moment ago is nothing to count, nothing to delete, and a sentence to whoever fetches it."""

from pathlib import Path
from uuid import uuid4

import pytest

from stockpot.errors import RegistryError
from stockpot.ledger import registry
from stockpot.ledger.connection import client, experiment
from stockpot.ledger.stored import delete_stored, stored_bytes, stored_models


def test_a_model_that_vanishes_after_it_was_listed(ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sha256 = f"stored-{uuid4().hex[:8]}", uuid4().hex * 2
    tags = {"stockpot.soup_sha256": sha256, "stockpot.stored_soup": sha256}
    made = client().create_logged_model(experiment(model), "soup", tags=tags, model_type="stockpot.soup")
    client().finalize_logged_model(made.model_id, "READY")
    (one,) = stored_models(model)
    assert (one.model_id, one.kind, one.about, one.whole) == (made.model_id, "soup", sha256, True)
    found = registry.find_soup(model, sha256)
    delete_stored(one.model_id, one.kind)
    assert stored_models(model) == []
    assert stored_bytes(one.model_id) == 0
    delete_stored(one.model_id, one.kind)
    monkeypatch.setattr(registry, "find_soup", lambda *_: found)
    with pytest.raises(RegistryError, match=f"has no soup-{sha256[:12]} of {model} any more; it may have been pruned"):
        registry.fetch_soup(model, sha256, tmp_path)
