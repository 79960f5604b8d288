"""The demo: scikit-learn's handwritten digits and a tiny CLIP, through the same stack, flows and registry as production."""
