"""ADM on ImageNet, 512x512, class-conditional (Dhariwal & Nichol 2021, arXiv:2105.05233).

Tables 5, 11 and 14. The paper's scores, 50,000 samples:

| steps    | guidance | FID   | sFID  | Inception | precision | recall |
|----------|----------|-------|-------|-----------|-----------|--------|
| 250      | none     | 23.24 | 10.19 | 58.06     | 0.73      | 0.60   |
| 250      | 4.0      | 7.72  | 6.57  | 172.71    | 0.87      | 0.42   |
| 25, DDIM | 9.0      | 8.41  | 9.67  |           | 0.83      | 0.47   |

559.0M parameters: the network of 256 pixels below one more level of half its width, at 512. Guided by the classifier of
configs/adm_classifier_512.py.

Data: a folder of images, one folder per class, data/imagenet_512 below the current one, or
      --config.base.data.path=FOLDER and --config.classifier.data.path=FOLDER.
Cost: 1,940,000 steps of 256 pictures, each 1.8 times the arithmetic of one of 256 pixels.
Command: python -m diffax.main --config=configs/adm_imagenet_512.py --workdir=runs/adm_imagenet_512 --stage=base
     and the same with --stage=classifier, at the same time or before; --mode=sample needs both.
Sooner:  --config.base.sampler=ddim --config.base.steps=ddim25 --config.base.guidance.classifier.scale=9
"""

from diffax.config import add_section, each, load, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 embedded digits, minutes on a CPU"}


def get_config(variant: str = ""):
    config = new("adm_imagenet_512")
    stage = config.base
    stage.shape = (512, 512, 3)
    stage.conditions.label = spec("condition", "label", num_classes=1000)
    stage.data = spec("data", "folder", path="data/imagenet_512")
    stage.loader.flip = True
    stage.net.update(channels=256, channel_mult=(0.5, 1, 1, 2, 2, 4, 4), num_res_blocks=2, dropout=0.0)
    stage.net.update(attention=(16, 32, 64), head_channels=64)  # at 32, 16 and 8 pixels
    stage.net.update(scale_shift=True, resample="biggan", remat="blocks")
    stage.schedule = spec("schedule", "linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    stage.variance = "learned_range"
    stage.loss = spec("loss", "hybrid", weight=1.0)  # T / 1000
    stage.steps = "250"
    stage.train.update(num_train_steps=1_940_000, batch_size=256, learning_rate=1e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    stage.guidance = each("guidance", "clip_denoised", "classifier")
    stage.guidance.classifier.scale = 4.0
    config.stages = ("classifier", "base")
    classifier = add_section(config, "classifier", load("adm_classifier_512").classifier)
    config.sample.update(num=8, batch_size=8, columns=4)
    config.eval.update(num=0, batch_size=8)  # small evaluation classifiers are for small data
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config)
        classifier.train.update(num_train_steps=600, batch_size=64)
        stage.net.update(channel_mult=(1, 2, 4), attention=(4,))
        stage.train.update(num_train_steps=800, batch_size=64, anneal="cosine", ema=(0.995,))
        config.eval.update(num=500, batch_size=100, guidance=(0.0, 1.0, 2.0, 4.0, 8.0))
    return config
