"""What is read: snapshots, by address and, once pinned, by content."""

from typing import Literal

from pydantic import Field

from stockpot.fields import Closed, Fraction, Uri


class DataSpec(Closed):
    """What is read: snapshots, never globs."""

    snapshot: Uri = Field(
        description="A manifest (`s3://bucket/digits/snapshots/<digest>.json`), or a dataset (`s3://bucket/digits`), whose newest "
        "snapshot is then pinned when the flow starts. Holds the splits train, held_out and gate."
    )
    test: Uri | None = Field(None, description="Snapshot read once, for the report; it never selects.")
    shifts: dict[str, Uri] = Field(default_factory=dict, description="Shift suites, name to snapshot: reported and gated, never selecting.")
    loader_workers: int = Field(
        0,
        ge=0,
        le=64,
        description="Processes that decode and augment for one trial, and decode for the linear probe. 0 decodes where the model is.",
    )
    skip_fraction: Fraction = Field(
        0.0, description="Share of train samples that may be unreadable before the trial fails. held_out, gate and test allow none."
    )
    reading: Literal["auto", "cached", "streamed"] = Field(
        "auto",
        description="cached: shards on the node's disk, fetched once for all its trials. streamed: from storage every epoch. "
        "auto: cached where the snapshot fits. The samples and their order are the same.",
    )


class PinnedSnapshot(Closed):
    """A snapshot by address and content."""

    uri: Uri = Field(description="Its manifest.")
    digest: str = Field(description="sha256 of the manifest's canonical JSON.")


class PinnedData(Closed):
    """The request's data after pinning: every later step reads exactly these bytes."""

    snapshot: PinnedSnapshot
    test: PinnedSnapshot | None = None
    shifts: dict[str, PinnedSnapshot] = Field(default_factory=dict)
