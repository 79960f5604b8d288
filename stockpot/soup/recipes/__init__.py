"""The recipes, one a file with its paper, and the averaging under them: tensors and files, no storage, no ledger."""
