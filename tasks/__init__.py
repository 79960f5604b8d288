"""Policies: a task adds retries, a name, a place to run or a Prefect page to one library call. A task that adds none is deleted."""
