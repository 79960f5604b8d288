"""The door to MLflow: trials and sweeps logged, ingredients found, versions registered."""
