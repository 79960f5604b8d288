"""The error family. Every message is one sentence that says what was found, what was needed and what to do next.

StockpotError                    a stated failure: the command line prints the message and exits with 1
├── BadRequest                   a request no machine could carry out
├── Transient                    worth another attempt later, unchanged
│   ├── ServerUnreachable        Prefect, MLflow or the object store does not answer
│   ├── DeviceBusy               every GPU of the node is held by another trial
│   ├── BudgetSpent              a trial has had its time; its state is saved for the next attempt
│   └── RankLost                 one of the processes of a trial on several GPUs vanished
├── ServerRefused                a server answers, and does not let this user in
├── StorageError                 the object store answered, but not with what was asked
│   ├── StorageRefused           credentials, bucket or permission
│   ├── Interrupted              its bytes ended early, or came no further (also Transient)
│   ├── ObjectMissing            no such object, or an empty prefix
│   └── ObjectExists             a conditional create found the object already there
├── DataError                    a dataset is not what its snapshot says
│   ├── SnapshotMissing          no snapshot at that address
│   ├── SnapshotBroken           shards or index differ from the manifest
│   └── SkipBudgetExceeded       more unreadable samples than the request allows
├── ModelError                   unknown architecture, or weights of another shape
├── TrialFailed                  one trial ended without an ingredient (the sweep counts it and goes on)
│   └── NonFinite                loss or weights stopped being numbers
├── IngredientMismatch           weights that may not be averaged
├── TooFewIngredients            fewer finished trials than the quorum
├── SweepMissing                 no such sweep in the ledger
├── RecordUnreadable             a record in the ledger that this Stockpot cannot read
├── SoupFailed                   the soup flow ended without a version
├── RegistryError                a version or alias is not what was written
└── StackError                   the local stack cannot start or is already running
    ├── PortTaken
    └── StackRunning
"""


def counted(number: int, noun: str) -> str:
    """`1 problem`, `2,000 problems`: as a message says how many."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class StockpotError(Exception):
    """Root of the family; `str(error)` is the whole message a person sees."""


class BadRequest(StockpotError):
    """A request no machine could carry out."""


class Transient(StockpotError):
    """Worth another attempt later, unchanged."""


class ServerUnreachable(Transient):
    """Prefect, MLflow or the object store does not answer."""


class ServerRefused(StockpotError):
    """A server answers, and does not let this user in."""


class DeviceBusy(Transient):
    """Every GPU of the node is held by another trial."""


class BudgetSpent(Transient):
    """A trial has had its time; its state is saved for the next attempt."""


class RankLost(Transient):
    """One of the processes of a trial on several GPUs vanished."""


class StorageError(StockpotError):
    """The object store answered, but not with what was asked."""


class StorageRefused(StorageError):
    """Credentials, bucket or permission."""


class Interrupted(StorageError, Transient):
    """An object's bytes ended before its end, by a cut or by silence."""


class ObjectMissing(StorageError):
    """No such object, or an empty prefix."""


class ObjectExists(StorageError):
    """A conditional create found the object already there."""


class DataError(StockpotError):
    """A dataset is not what its snapshot says."""


class SnapshotMissing(DataError):
    """No snapshot at that address."""


class SnapshotBroken(DataError):
    """Shards or index differ from the manifest."""


class SkipBudgetExceeded(DataError):
    """More unreadable samples than the request allows."""


class ModelError(StockpotError):
    """Unknown architecture, or weights of another shape."""


class TrialFailed(StockpotError):
    """One trial ended without an ingredient; the sweep counts it and goes on."""


class NonFinite(TrialFailed):
    """Loss or weights stopped being numbers."""


class IngredientMismatch(StockpotError):
    """Weights that may not be averaged."""


class TooFewIngredients(StockpotError):
    """Fewer finished trials than the quorum."""


class SweepMissing(StockpotError):
    """No such sweep in the ledger."""


class RecordUnreadable(StockpotError):
    """A record in the ledger that this Stockpot cannot read."""


class SoupFailed(StockpotError):
    """The soup flow ended without a version."""


class RegistryError(StockpotError):
    """A version or alias is not what was written."""


class StackError(StockpotError):
    """The local stack cannot start or is already running."""


class PortTaken(StackError):
    """Another process listens on a port that was asked for."""


class StackRunning(StackError):
    """A second stack on the same state directory."""
