"""Quickstart: handwritten digits to order, trained in minutes on a laptop's CPU.

A class-conditional DDPM with the cosine schedule of Improved DDPM (arXiv:2102.09672), on the 1,797
digits of scikit-learn, enlarged from 8 to 16 pixels. It shows every part of diffax at a size where
nothing needs an accelerator; it reproduces no published score.

Cost: about 5 minutes of training on 2 CPU cores.
Command: bash launch/quickstart.sh
     or: python -m diffax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from diffax.config import new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "a one-minute check that everything runs; the digits stay blurry"}


def get_config(variant: str = ""):
    config = new("quickstart")
    stage = config.base
    stage.shape = (16, 16, 1)
    stage.conditions.label = spec("condition", "label", num_classes=10)
    stage.data = spec("data", "digits")
    stage.net.update(channels=16, channel_mult=(1, 2, 4), num_res_blocks=1, attention=(4,))
    stage.net.update(heads=4, groups=8, scale_shift=True)
    stage.schedule = spec("schedule", "cosine", num_timesteps=1000)
    stage.steps = "100"
    stage.train.update(num_train_steps=800, batch_size=64, learning_rate=1e-3, warmup_steps=100)
    stage.train.update(anneal="cosine", ema=(0.995,), ema_warmup=True)
    stage.train.update(log_every=50, save_every=200, sample_every=200)
    config.sample.update(num=100, batch_size=100, columns=10)
    config.eval.update(num=1000, batch_size=100, bpd_num=64)
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config)
        stage.train.num_train_steps = 100
    return config
