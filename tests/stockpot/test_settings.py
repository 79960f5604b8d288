"""Promise: a trial whose settings say nothing is trained as the paper trains."""

from stockpot.settings import TrialSettings


def test_the_defaults_are_the_papers():
    """Wortsman et al. 2022 (arXiv:2203.05482), appendix J, and the authors' code: AdamW at 2e-5 with a decay of 0.1, a cosine over ten
    epochs after 500 steps of warm-up, batches of 512, gradients clipped at 1, crops of 90 to 100 %. All else is off."""
    paper = {
        "learning_rate": 2e-5,
        "weight_decay": 0.1,
        "epochs": 10,
        "batch_size": 512,
        "optimiser": "adamw",
        "schedule": "cosine",
        "warmup_steps": 500,
        "clip_norm": 1.0,
        "loss": "cross_entropy",
        "augmentation": "minimal",
    }
    off = {
        "max_steps": None,
        "micro_batch": None,
        "precision": "fp32",
        "compile": False,
        "sam_rho": 0,
        "label_smoothing": 0,
        "mixup": 0,
        "cutmix": 0,
        "last_epoch_augmentation": None,
        "smallest_crop": None,
        "layer_decay": 1,
        "frozen": (),
        "ema_decays": (),
        "evaluate_every_steps": None,
        "seed": 0,
    }
    assert TrialSettings().model_dump() == paper | off
