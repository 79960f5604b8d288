"""The door to architectures and weights: open_clip, timm, transformers, or a backbone of the user's own, all as one `Classifier`."""
