"""ADM on ImageNet, 128x128, class-conditional (Dhariwal & Nichol 2021, arXiv:2105.05233).

Tables 5, 11 and 14. The paper's scores, 50,000 samples:

| steps    | guidance | FID  | sFID | precision | recall |
|----------|----------|------|------|-----------|--------|
| 250      | none     | 5.91 | 5.09 | 0.70      | 0.65   |
| 250      | 0.5      | 2.97 | 5.09 | 0.78      | 0.59   |
| 25, DDIM | 1.25     | 5.98 | 7.04 | 0.78      | 0.51   |

On the way, at guidance 1.0: FID 7.97 after 250,000 steps, 5.31 after 500,000, 4.10 after a million and 3.09 at the end.
421.5M parameters; four heads at every width, where the other sizes have heads of 64 channels. Guided by the classifier
of configs/adm_classifier_128.py.

Data: a folder of images, one folder per class, data/imagenet_128 below the current one, or
      --config.base.data.path=FOLDER and --config.classifier.data.path=FOLDER.
Cost: 4,360,000 steps of 256 pictures; the paper reports 521 days of a V100, and 9 more for the classifier.
Command: python -m diffax.main --config=configs/adm_imagenet_128.py --workdir=runs/adm_imagenet_128 --stage=base
     and the same with --stage=classifier, at the same time or before; --mode=sample needs both.
Sooner:  --config.base.sampler=ddim --config.base.steps=ddim25 --config.base.guidance.classifier.scale=1.25
"""

from diffax.config import add_section, each, load, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 embedded single shapes, minutes on a CPU"}


def get_config(variant: str = ""):
    config = new("adm_imagenet_128")
    stage = config.base
    stage.shape = (128, 128, 3)
    stage.conditions.label = spec("condition", "label", num_classes=1000)
    stage.data = spec("data", "folder", path="data/imagenet_128")
    stage.loader.flip = True
    stage.net.update(channels=256, channel_mult=(1, 1, 2, 3, 4), num_res_blocks=2, dropout=0.0)
    stage.net.update(attention=(4, 8, 16), heads=4, head_channels=0)  # at 32, 16 and 8 pixels
    stage.net.update(scale_shift=True, resample="biggan")
    stage.schedule = spec("schedule", "linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    stage.variance = "learned_range"
    stage.loss = spec("loss", "hybrid", weight=1.0)  # T / 1000
    stage.steps = "250"
    stage.train.update(num_train_steps=4_360_000, batch_size=256, learning_rate=1e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    stage.guidance = each("guidance", "clip_denoised", "classifier")
    stage.guidance.classifier.scale = 0.5
    config.stages = ("classifier", "base")
    classifier = add_section(config, "classifier", load("adm_classifier_128").classifier)
    config.eval.num = 0  # small evaluation classifiers are for small data
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "shapes")
        classifier.train.update(num_train_steps=600, batch_size=64)
        stage.net.update(channel_mult=(1, 2, 4), attention=(4,))
        stage.train.update(num_train_steps=800, batch_size=64, anneal="cosine", ema=(0.995,))
        config.eval.update(num=500, batch_size=100, classifier=spec("evaluation", "network"))
        config.eval.update(guidance=(0.0, 1.0, 2.0, 4.0, 8.0))
    return config
