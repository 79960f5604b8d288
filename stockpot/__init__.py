"""Stockpot, the library: snapshots and exact reading, the trial, the soup, the gate. Never imports Prefect.

Rings, each importing only itself and what lies further in (`make check` enforces it):

ring 0  errors, digests, config, sweeps, devices             pydantic only
ring 1  soups, trainer, optimisation, augmentation, evaluation, statistics      torch, torchvision, timm
ring 2  doors, one module per vendor: storage (s3fs), shards (webdataset), models (open_clip, timm),
        tracking and registry (mlflow); snapshots and checkpoints go through storage
ring 3  composition: inits (the shared start), trials (run one trial), souping (cook one sweep), releasing (register, gate)
"""
