"""CDM on ImageNet, 64x64: a model of 32 pixels and one that doubles them (Ho et al. 2022, arXiv:2106.15282).

Labels at both stages, guidance at none. The paper's scores, 50,000 samples:

| size | FID to train | FID to val | Inception     |
|------|--------------|------------|---------------|
| 32   | 1.11         | 1.99       | 26.01 +- 0.59 |
| 64   | 1.48         | 2.48       | 67.95 +- 1.97 |

The second stage is trained on smaller pictures with any amount of Gaussian noise, which its network reads (section 3).
Without noise the cascade has FID 1.71; steps 751 to 1251 of 4000 are best, here 1000, which `conditions.low_res.level`
gives as a fraction. `conditions.low_res.truncated` stops the first stage at that level in place of adding noise; the
paper finds both equally good. To choose the level for another model: --mode=evaluate
--config.eval.levels=0,0.1,0.2,0.3

825.5M and 751.7M parameters, counted here; the paper gives none, nor says whether it took BigGAN's resampling and
adaptive normalisation, which are assumed. Warm-up, clipping of gradients and the scale of time are those of Improved
DDPM and ADM.

Data: folders of images, one folder per class, data/imagenet_32 and data/imagenet_64 below the current one, or
      --config.base.data.path=FOLDER and --config.up.data.path=FOLDER, which may be the same.
Cost: 700,000 and 400,000 steps of 2048 pictures: work for a TPU pod slice.
Command: python -m diffax.main --config=configs/cascade_64.py --workdir=runs/cascade_64 --stage=base
     and the same with --stage=up, at the same time or before; --mode=sample needs both.
Sooner:  --config.base.steps=250 --config.up.steps=100
"""

from diffax.config import each, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "8x8 to 16x16 embedded single shapes, minutes on a CPU"}


def get_config(variant: str = ""):
    config = new("cascade_64", stages=("base", "up"))
    base, up = config.base, config.up
    for stage, size in ((base, 32), (up, 64)):
        stage.shape = (size, size, 3)
        stage.data = spec("data", "folder", path=f"data/imagenet_{size}")
        stage.loader.flip = True
        stage.net.update(channels=256, channel_mult=(1, 2, 3, 4), dropout=0.1, heads=4)
        stage.net.update(scale_shift=True, resample="biggan", remat="blocks")
        stage.schedule = spec("schedule", "cosine", num_timesteps=4000, rescale_time=True)
        stage.variance = "learned_range"
        stage.loss = spec("loss", "hybrid", weight=4.0)  # T / 1000
        stage.train.update(batch_size=2048, learning_rate=1e-4, warmup_steps=5000, grad_clip=1.0, ema=(0.9999,))
    base.conditions, up.conditions = each("condition", "label"), each("condition", "label", "low_res")
    base.conditions.label.num_classes = up.conditions.label.num_classes = 1000
    base.net.update(num_res_blocks=6, attention=(2, 4))  # at 16 and 8 pixels
    up.net.update(num_res_blocks=5, attention=(4, 8))  # at 16 and 8 pixels
    base.train.num_train_steps, up.train.num_train_steps = 700_000, 400_000
    up.conditions.low_res.update(factor=2, noise=1.0, level=0.25)
    config.eval.num = 0  # small evaluation classifiers are for small data
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "shapes")
        base.shape = (8, 8, 3)
        for stage in (base, up):
            stage.train.update(num_train_steps=1600, batch_size=64, learning_rate=2e-3, anneal="cosine", ema=(0.995,))
        up.predicts = "v"  # with eps, reading the smaller picture takes far longer to learn than minutes
        up.net.update(channel_mult=(1, 2, 4), attention=(4,))
        up.train.num_train_steps = 3000
        config.eval.update(num=500, batch_size=100, classifier=spec("evaluation", "network"))
        config.eval.update(levels=(0.0, 0.1, 0.2, 0.3, 0.5, 0.7))
    return config
