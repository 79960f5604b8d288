"""Stockpot, the library: snapshots and exact reading, the trial, the soup, the gate. Never imports Prefect.

Rooms, each importing only what stands below it (`make check` enforces it):

release     register, gate, promote, roll back, explain, prune
soup        which ingredients may be averaged, the recipes, the comparison, the page
training    the shared init and one trial, from its first step to its ingredient
data        snapshots: published, verified, cached, read exactly

doors       storage, s3 and s3_bodies (bytes by address), models (architectures), checkpoints (safetensors), evaluation, ledger (MLflow)
nouns       config (the request), settings (a trial), preparation, spaces, fields, sweeps, outcomes, devices, digests, errors: pydantic only
"""
