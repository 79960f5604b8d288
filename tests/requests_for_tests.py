"""The smallest valid request, and pinned data and an init to go with it."""

from stockpot.config import Init, PinnedData, PinnedSnapshot

REQUEST = {
    "model": "digits",
    "store": "s3://stockpot/store",
    "data": {"snapshot": "s3://stockpot/digits/main"},
    "base": {"arch": "ViT-B-32"},
}
DATA = PinnedData(snapshot=PinnedSnapshot(uri="s3://stockpot/digits/snapshots/a.json", digest="a" * 64))
INIT = Init(uri="s3://stockpot/store/inits/b", digest="b" * 64)
