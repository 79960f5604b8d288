"""The bytes in the ledger, for retention: every LoggedModel of ours, how large it is, and deleting one so that an interruption leaves
nothing half there: unlisted first (no trial or soup finds it any more), then its bytes, then its record, which the next `prune` would find.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from stockpot.ledger.connection import address, asking, client, is_gone, search_models
from stockpot.outcomes import soup_id

Kind = Literal["ingredient", "soup"]

COMMITTED_BY: dict[Kind, str] = {"ingredient": "stockpot.ingredient", "soup": "stockpot.stored_soup"}
"""The tag that is written last: without it the model does not exist for `tracking` and `registry`."""


class Stored(NamedTuple):
    """A LoggedModel of ours."""

    model_id: str
    kind: Kind
    about: str
    """The trial's id, or the soup's sha256."""
    made: datetime
    """When its upload began, UTC."""
    whole: bool
    """Whether all of it was stored and none deleted."""
    init: str = ""
    """Digest of the init an ingredient started from; empty for a soup."""

    @property
    def ingredient_id(self) -> str:
        """What a soup made of it calls it."""
        return soup_id(self.about) if self.kind == "soup" else self.about


def stored_models(model: str) -> list[Stored]:
    """Every ingredient and soup whose bytes lie in the ledger, unfinished uploads too. Raises `ServerUnreachable`."""
    with asking():
        return [stored for found in search_models(model, "") if (stored := _stored(found))]


def stored_bytes(model_id: str) -> int:
    """Bytes of a LoggedModel's files; 0 where another `prune` took it meanwhile."""

    def size(path: str | None) -> int:
        infos = client().list_logged_model_artifacts(model_id, path)
        return sum(size(info.path) if info.is_dir else info.file_size or 0 for info in infos)

    with asking(), _may_be_gone():
        return size(None)
    return 0


def delete_stored(model_id: str, kind: Kind) -> None:
    """Delete a LoggedModel, its bytes and its record, or what another `prune` left of it."""
    with asking(), _may_be_gone():
        found = client().get_logged_model(model_id)
        if COMMITTED_BY[kind] in found.tags:
            client().delete_logged_model_tag(model_id, COMMITTED_BY[kind])
        get_artifact_repository(found.artifact_location, tracking_uri=address()).delete_artifacts()
        client().delete_logged_model(model_id)


@contextmanager
def _may_be_gone() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if not is_gone(error):
            raise


def _stored(found: LoggedModel) -> Stored | None:
    kind: Kind = "soup" if "stockpot.soup_sha256" in found.tags else "ingredient"
    about = found.tags.get("stockpot.soup_sha256") or found.tags.get("stockpot.trial")
    made = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    return (
        Stored(found.model_id, kind, about, made, COMMITTED_BY[kind] in found.tags, found.tags.get("stockpot.init", "")) if about else None
    )
