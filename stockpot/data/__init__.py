"""The data plane: snapshots published, verified, cached and read exactly."""
