"""ADM on ImageNet, 64x64, class-conditional (Dhariwal & Nichol 2021, arXiv:2105.05233).

Tables 5, 11 and 14. The paper's scores, 50,000 samples of 250 steps, without guidance:

| dropout  | FID  | sFID | precision | recall |
|----------|------|------|-----------|--------|
| 0.1      | 2.07 | 4.29 | 0.74      | 0.63   |
| 0        | 2.61 | 3.77 | 0.73      | 0.63   |

295.9M parameters. Guided by the classifier of configs/adm_classifier_64.py with the paper's scale 1.0, which sharpens
pictures and worsens FID at this size: --config.base.guidance.classifier.scale=0 for the scores above.

Data: a folder of images, one folder per class, data/imagenet_64 below the current one, or
      --config.base.data.path=FOLDER and --config.classifier.data.path=FOLDER.
Cost: 540,000 steps of 2048 pictures, about 173 days of a V100 at the 74.1 pictures/s that the paper measured.
Command: python -m diffax.main --config=configs/adm_imagenet_64.py --workdir=runs/adm_imagenet_64 --stage=base
     and the same with --stage=classifier, at the same time or before; --mode=sample needs both.
"""

from diffax.config import add_section, each, load, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 embedded digits, minutes on a CPU"}


def get_config(variant: str = ""):
    config = new("adm_imagenet_64")
    stage = config.base
    stage.shape = (64, 64, 3)
    stage.conditions.label = spec("condition", "label", num_classes=1000)
    stage.data = spec("data", "folder", path="data/imagenet_64")
    stage.loader.flip = True
    stage.net.update(channels=192, channel_mult=(1, 2, 3, 4), num_res_blocks=3, dropout=0.1)
    stage.net.update(attention=(2, 4, 8), head_channels=64)  # at 32, 16 and 8 pixels
    stage.net.update(scale_shift=True, resample="biggan")
    stage.schedule = spec("schedule", "cosine", num_timesteps=1000)
    stage.variance = "learned_range"
    stage.loss = spec("loss", "hybrid", weight=1.0)  # T / 1000
    stage.steps = "250"
    stage.train.update(num_train_steps=540_000, batch_size=2048, learning_rate=3e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    stage.guidance = each("guidance", "clip_denoised", "classifier")
    stage.guidance.classifier.scale = 1.0
    config.stages = ("classifier", "base")
    add_section(config, "classifier", load("adm_classifier_64").classifier)
    config.eval.num = 0  # small evaluation classifiers are for small data
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config)
        config.classifier.train.update(num_train_steps=600, batch_size=64)
        stage.net.update(channel_mult=(1, 2, 4), attention=(4,))
        stage.train.update(num_train_steps=800, batch_size=64, anneal="cosine", ema=(0.995,))
        config.eval.update(num=500, batch_size=100, guidance=(0.0, 1.0, 2.0, 4.0, 8.0))
    return config
