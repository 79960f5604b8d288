"""The recipes, one a file with its paper, and the averaging under them. Ring 1: tensors and files, no storage, no ledger."""
