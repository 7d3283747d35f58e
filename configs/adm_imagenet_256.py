"""ADM on ImageNet, 256x256, class-conditional (Dhariwal & Nichol 2021, arXiv:2105.05233).

Tables 4, 5, 11 and 14. The paper's scores, 50,000 samples:

| steps    | guidance | FID   | sFID  | Inception | precision | recall |
|----------|----------|-------|-------|-----------|-----------|--------|
| 250      | none     | 10.94 | 6.02  | 100.98    | 0.69      | 0.63   |
| 250      | 1.0      | 4.59  | 5.25  | 186.70    | 0.82      | 0.52   |
| 250      | 10.0     | 9.11  | 10.93 | 283.92    | 0.88      | 0.32   |
| 25, DDIM | 2.5      | 5.44  | 5.32  |           | 0.81      | 0.49   |

On the way, at guidance 1.0: FID 12.21 after 250,000 steps, 7.95 after 500,000 and 5.74 after a million.
553.8M parameters. Guided by the classifier of configs/adm_classifier_256.py.

Data: a folder of images, one folder per class, data/imagenet_256 below the current one, or
      --config.base.data.path=FOLDER and --config.classifier.data.path=FOLDER.
Cost: 1,980,000 steps of 256 pictures; the paper reports 916 days of a V100, and 46 more for the classifier.
Command: python -m diffax.main --config=configs/adm_imagenet_256.py --workdir=runs/adm_imagenet_256 --stage=base
     and the same with --stage=classifier, at the same time or before; --mode=sample needs both.
Sooner:  --config.base.sampler=ddim --config.base.steps=ddim25 --config.base.guidance.classifier.scale=2.5
"""

from diffax.config import add_section, each, load, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 embedded digits, minutes on a CPU"}


def get_config(variant: str = ""):
    config = new("adm_imagenet_256")
    stage = config.base
    stage.shape = (256, 256, 3)
    stage.conditions.label = spec("condition", "label", num_classes=1000)
    stage.data = spec("data", "folder", path="data/imagenet_256")
    stage.loader.flip = True
    stage.net.update(channels=256, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, dropout=0.0)
    stage.net.update(attention=(8, 16, 32), head_channels=64)  # at 32, 16 and 8 pixels
    stage.net.update(scale_shift=True, resample="biggan", remat="blocks")
    stage.schedule = spec("schedule", "linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    stage.variance = "learned_range"
    stage.loss = spec("loss", "hybrid", weight=1.0)  # T / 1000
    stage.steps = "250"
    stage.train.update(num_train_steps=1_980_000, batch_size=256, learning_rate=1e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    stage.guidance = each("guidance", "clip_denoised", "classifier")
    stage.guidance.classifier.scale = 1.0
    config.stages = ("classifier", "base")
    classifier = add_section(config, "classifier", load("adm_classifier_256").classifier)
    config.sample.update(num=16, batch_size=16, columns=4)
    config.eval.update(num=0, batch_size=16)  # small evaluation classifiers are for small data
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config)
        classifier.train.update(num_train_steps=600, batch_size=64)
        stage.net.update(channel_mult=(1, 2, 4), attention=(4,))
        stage.train.update(num_train_steps=800, batch_size=64, anneal="cosine", ema=(0.995,))
        config.eval.update(num=500, batch_size=100, guidance=(0.0, 1.0, 2.0, 4.0, 8.0))
    return config
