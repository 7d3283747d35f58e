"""Bars at any angle, by parts that are not diffax's own (see examples/my_lab.py).

Cost: a minute on 2 CPU cores.
Command: python -m diffax.main --config=examples/my_config.py --workdir=runs/bars
"""

from diffax.config import each, new, spec

VARIANTS = {}


def get_config(variant: str = ""):
    config = new("bars")
    stage = config.base
    stage.shape = (8, 8, 1)
    stage.data = spec("data", "examples.my_lab:bars")
    stage.net = spec("network", "examples.my_lab:Mixer", width=64)
    stage.loss = spec("loss", "examples.my_lab:min_snr", gamma=5.0)
    stage.conditions = each("condition", angle="examples.my_lab:Angle")
    stage.guidance = each("guidance", "clip_denoised", contrast="examples.my_lab:contrast")
    stage.sampler = spec("sampler", "examples.my_lab:churned")
    stage.schedule = spec("schedule", "cosine", num_timesteps=100)
    stage.steps = "20"
    stage.train.update(num_train_steps=1000, batch_size=64, learning_rate=2e-3, warmup_steps=50)
    stage.train.update(anneal="cosine", ema=(0.99,), log_every=50, save_every=250, sample_every=500)
    config.sample.update(num=16, batch_size=16, columns=8)
    config.eval.update(num=32, batch_size=32, bpd_num=0)
    return config
