"""The model registry, on MLflow: a soup becomes a LoggedModel (`packaging`), then one version, then an alias may point at it.

MLflow's registry has neither idempotency nor compare-and-set. Here a version is known by the tag `stockpot.soup_sha256`, two writers at
once agree on the lowest version number, and every alias is read back. Its search returns no aliases (3.17.2): they are asked for by name.
"""

import json
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow.pyfunc
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.exceptions import MlflowException, RestException
from pydantic import ValidationError

from stockpot.digests import file_digest
from stockpot.errors import RegistryError
from stockpot.ledger import packaging
from stockpot.ledger.connection import address, asking, client, experiment, is_gone, quoted, search_models, search_versions
from stockpot.ledger.records import Kind
from stockpot.outcomes import GateDecision, ModelVersion, Scores, VersionSummary, soup_id

ALIASES = ("champion", "challenger", "previous")
NO_SUCH = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's ways to say that there is no such version or alias; the second one is for names that could be none."""


def log_soup_model(model: str, mlflow_run_id: str, soup_sha256: str, folder: Path, *, torch_export: bool = False) -> str:
    """Store a soup (`folder` holds `model.safetensors` and `model.json`) as a LoggedModel of its run, once. Returns its id.

    torch_export: with a second flavour, for `mlflow.pytorch.load_model`.
    """
    with asking():
        if found := find_soup(model, soup_sha256):
            return str(found.model_id)
        tags = {"stockpot.soup_sha256": soup_sha256}
        made = client().create_logged_model(experiment(model), soup_id(soup_sha256), mlflow_run_id, tags=tags, model_type="stockpot.soup")
        with TemporaryDirectory(prefix="stockpot-package-") as scratch:
            package = packaging.package(Path(scratch), folder, made.model_id, mlflow_run_id, torch_export)
            files = {str(path.relative_to(package)): file_digest(path) for path in sorted(package.rglob("*")) if path.is_file()}
            client().log_model_artifacts(made.model_id, str(package))
        client().finalize_logged_model(made.model_id, "READY")
        client().log_outputs(mlflow_run_id, [LoggedModelOutput(made.model_id, 0)])
        client().set_logged_model_tags(made.model_id, {"stockpot.files": json.dumps(files), "stockpot.stored_soup": soup_sha256})
        return str(made.model_id)


def find_soup(model: str, soup_sha256: str) -> LoggedModel | None:
    """A stored soup by its weights, registered or not; None where it is not (any more)."""
    with asking():
        return next(iter(search_models(model, f"tags.`stockpot.stored_soup` = '{soup_sha256}'")), None)


def fetch_soup(model: str, soup_sha256: str, folder: Path) -> Path:
    """Download a stored soup, registered or not, and return the folder of its weights. Raises `RegistryError` when it is not there, or any
    file is not the one that was stored."""
    gone = RegistryError(f"The ledger has no {soup_id(soup_sha256)} of {model} any more; it may have been pruned.")
    found = find_soup(model, soup_sha256)
    if found is None:
        raise gone
    with asking():
        try:
            download_artifacts(artifact_uri=f"models:/{found.model_id}", dst_path=str(folder), tracking_uri=address())
        except MlflowException as error:
            if not is_gone(error):
                raise
            raise gone from error
    return _whole(folder, f"The {soup_id(soup_sha256)} of {model}", soup_sha256, found.tags.get("stockpot.files", "{}"))


def register_once(model: str, model_id: str, soup_sha256: str, mlflow_run_id: str, tags: dict[str, str], description: str) -> ModelVersion:
    """The version with these weights, created when there is none. Two writers at once both get the lowest one; the other is deleted."""
    if found := find_version(model, soup_sha256):
        return found
    with asking():
        _create_model(model)
        files = client().get_logged_model(model_id).tags.get("stockpot.files", "{}")
        tags = {**tags, "stockpot.soup_sha256": soup_sha256, "stockpot.files": files}
        made = client().create_model_version(
            model, f"models:/{model_id}", mlflow_run_id, tags=tags, description=description, model_id=model_id
        )
        lowest = min(_versions(model, soup_sha256))
        if int(made.version) != lowest:
            client().delete_model_version(model, made.version)
    return ModelVersion(model=model, version=lowest, soup_sha256=soup_sha256)


def find_version(model: str, soup_sha256: str) -> ModelVersion | None:
    """The version made of these weights, with its alias; None when it was never registered."""
    with asking():
        found = _versions(model, soup_sha256)
    return read_version(model, min(found)) if found else None


def read_version(model: str, number: int) -> ModelVersion:
    """One version with the alias it has now, champion first. Raises `RegistryError` when there is none."""
    with asking():
        try:
            found = client().get_model_version(model, str(number))
        except RestException as error:
            if error.error_code not in NO_SUCH:
                raise
            raise RegistryError(f"The registry has no version {number} of {model}; `stockpot status` shows what was registered.") from error
    alias = next((name for name in ALIASES if alias_version(model, name) == number), None)
    return ModelVersion(model=model, version=number, alias=alias, soup_sha256=found.tags.get("stockpot.soup_sha256", ""))


def list_versions(model: str | None = None) -> list[VersionSummary]:
    """Every version that Stockpot registered, of all models or of one, newest first."""
    with asking():
        condition = f"name = {quoted(model)} and " if model else ""
        found = search_versions(f"{condition}tags.`stockpot.soup_sha256` LIKE '%'")
    named = {name: aliases(name) for name in {str(one.name) for one in found}}
    return [
        VersionSummary(
            model=one.name,
            version=int(one.version),
            aliases=tuple(sorted(alias for alias, number in named[one.name].items() if number == int(one.version))),
            sweep_id=one.tags.get("stockpot.sweep", ""),
            recipe=one.tags.get("stockpot.recipe", ""),
            ingredients=tuple(filter(None, one.tags.get("stockpot.ingredients", "").split(","))),
            scores=_read_or_none(Scores, one.tags.get("stockpot.scores")),
            registered=datetime.fromtimestamp(one.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        )
        for one in sorted(found, key=lambda one: (str(one.name), -int(one.version)))
    ]


def resolve(name: str) -> ModelVersion:
    """The version a person means by `digits` (its champion), `digits@previous` or `digits/3`. Raises `RegistryError`."""
    model, _, number = name.partition("/")
    if number:
        if not number.isdigit():
            raise RegistryError(f"`{name}` names no version; write the model, model@alias, or model/number, such as {model}/3.")
        return read_version(model, int(number))
    model, _, alias = name.partition("@")
    found = alias_version(model, alias or "champion")
    if found is None:
        raise no_version(model, alias or "champion")
    return read_version(model, found)


def no_version(model: str, alias: str) -> RegistryError:
    """The sentence for an alias that points nowhere."""
    with asking():
        numbers = sorted(int(found.version) for found in search_versions(f"name = {quoted(model)}"))
    if not numbers:
        return RegistryError(
            f"The registry at {address()} has no version of {model}; `stockpot status` lists the sweeps, "
            "`stockpot soup SWEEP` registers a soup."
        )
    named = aliases(model)
    borne = {number: ", ".join(sorted(name for name, at in named.items() if at == number)) for number in numbers[-10:]}
    told = ", ".join(f"{number} ({names})" if names else str(number) for number, names in borne.items())
    others = [number for number in numbers if number != named.get("champion")]
    if near := get_close_matches(alias, named, 1):
        then = f"write {model}@{near[0]}, if that is meant"
    elif others:
        then = f"name one, such as {model}/{others[-1]}, or make it champion with `stockpot promote {model} --version {others[-1]}`"
    else:
        then = "there is no other to take; a retraining on new data, or with another sweep, registers the next"
    return RegistryError(f"{model} has no {alias}, but versions {told}; {then}.")


def _read_or_none(kind: type[Kind], text: str | None) -> Kind | None:
    try:
        return kind.model_validate_json(text) if text else None
    except ValidationError:
        return None


def _no_files(model: str, number: int) -> RegistryError:
    """The sentence for a version whose bytes were deleted under it, as a bare `mlflow gc` does."""
    return RegistryError(
        f"Version {number} of {model} has no files left; if it is champion, make one that has champion with "
        f"`stockpot promote {model} --version N` (`stockpot models {model}` lists them)."
    )


def models_behind_versions() -> set[str]:
    """The LoggedModels that hold the bytes of any version of any registered model. A copied version (`models:/digits/1` as its source)
    shares the bytes of its original even after that was deleted, so its storage is asked for."""
    with asking():
        return {_model_behind(found) for found in search_versions("")}


def fetch_version(version: ModelVersion, folder: Path) -> Path:
    """Download a version's model and return the folder of its weights. Raises `RegistryError` when any file is not the registered one."""
    with asking():
        client()
        source = f"models:/{version.model}/{version.version}"
        try:
            download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=address(), registry_uri=address())
        except MlflowException as error:
            if not is_gone(error):
                raise
            raise _no_files(version.model, version.version) from error
    if not any(folder.glob("artifacts/*/model.safetensors")):
        raise _no_files(version.model, version.version)
    return _whole(
        folder, f"Version {version.version} of {version.model}", version.soup_sha256, read_tags(version).get("stockpot.files", "{}")
    )


def alias_version(model: str, alias: str) -> int | None:
    """The version an alias points at; None when it points nowhere."""
    with asking():
        try:
            return int(client().get_model_version_by_alias(model, alias).version)
        except RestException as error:
            if error.error_code in NO_SUCH:
                return None
            raise


def aliases(model: str) -> dict[str, int]:
    """Every alias of a model and the version it points at, a person's own ones too; empty when there is no such model."""
    with asking():
        try:
            return {name: int(number) for name, number in client().get_registered_model(model).aliases.items()}
        except RestException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise


def set_alias(model: str, alias: str, number: int | None) -> None:
    """Point an alias at a version, or nowhere, and read it back. Raises `RegistryError` when another writer won."""
    with asking():
        if number is not None:
            client().set_registered_model_alias(model, alias, str(number))
        elif alias_version(model, alias) is not None:
            client().delete_registered_model_alias(model, alias)
    if (now := alias_version(model, alias)) != number:
        raise RegistryError(f"Alias {alias} of {model} was set to {number} and reads {now}: another writer moved it; run the gate again.")


def write_tag(version: ModelVersion, name: str, value: str) -> None:
    """Set one tag of a version; a value holds up to 100,000 characters."""
    with asking():
        client().set_model_version_tag(version.model, str(version.version), name, value)


def read_tags(version: ModelVersion) -> dict[str, str]:
    """All tags of a version."""
    with asking():
        return dict(client().get_model_version(version.model, str(version.version)).tags)


def read_decision(version: ModelVersion) -> GateDecision | None:
    """What the gate decided about a version; None when it has not been judged, or by a gate of an earlier Stockpot."""
    return _read_or_none(GateDecision, read_tags(version).get("stockpot.decision"))


def load(name: str) -> Any:
    """`digits@champion` or `digits/3`, as a consumer loads it: `.predict([{"image": bytes}, ...])` gives a label and a probability each."""
    with asking():
        version = resolve(name)
        try:
            return mlflow.pyfunc.load_model(f"models:/{version.model}/{version.version}")
        except MlflowException as error:
            if not is_gone(error):
                raise
            raise _no_files(version.model, version.version) from error


def _whole(folder: Path, what: str, soup_sha256: str, files: str) -> Path:
    """The folder of the weights in a download, after comparing every file with the digests (JSON) taken when it was stored."""
    weights = next(folder.glob("artifacts/*/model.safetensors"), None)
    if weights is None:
        raise RegistryError(f"{what} has no files left; register its soup again (`stockpot soup SWEEP`).")
    if (found := file_digest(weights)) != soup_sha256:
        raise RegistryError(
            f"{what} holds weights with sha256 {found[:12]}, not the registered {soup_sha256[:12]}; its files were changed: delete the "
            "version and register the soup again."
        )
    for name, sha256 in json.loads(files).items():
        path = folder / name
        if not path.exists() or (found if path == weights else file_digest(path)) != sha256:
            raise RegistryError(
                f"{what} holds another `{name}` than was registered; its files were changed: delete the version and register the soup "
                "again."
            )
    return weights.parent


def _create_model(model: str) -> None:
    try:
        client().create_registered_model(model, description="Soups cooked by Stockpot; load `champion`.")
    except RestException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions(model: str, soup_sha256: str) -> list[int]:
    condition = f"name = {quoted(model)} and tags.`stockpot.soup_sha256` = '{soup_sha256}'"
    return [int(found.version) for found in search_versions(condition)]


def _model_behind(version: Any) -> str:
    source = str(version.source)
    if not source.startswith("models:/m-"):
        source = client().get_model_version_download_uri(version.name, version.version).removesuffix("/artifacts")
    return source.rpartition("/")[2]
