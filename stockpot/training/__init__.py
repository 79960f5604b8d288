"""The trial: from a shared init to an ingredient, through losses, optimisers, interruptions and resumes."""
