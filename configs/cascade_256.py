"""CDM on ImageNet, 256x256: the cascade to 64 pixels and a stage that enlarges them (Ho et al. 2022, arXiv:2106.15282).

The first two stages are those of configs/cascade_64.py. Labels at every stage, guidance at none. The paper's scores,
50,000 samples; CAS is the accuracy of a ResNet-50 that saw samples only, on real pictures (those: 73.09 and 91.47 %):

| FID to train | FID to val | Inception      | CAS top 1 | CAS top 5 |
|--------------|------------|----------------|-----------|-----------|
| 4.88         | 4.63       | 158.71 +- 2.26 | 63.02 %   | 84.06 %   |

What each part of the recipe of the last stage adds, FID: half of the smaller pictures blurred, sigma in (0.4, 0.6),
6.18; labels 5.75; a batch of 1024 5.00; flips 4.88. Four steps in place of its 100 hurt FID but slightly, a thousand
gain nothing. 634.0M parameters, counted here; the paper gives none. Betas, time and variance are those of
configs/cascade_128.py.

Data: folders of images, one folder per class, data/imagenet_32, data/imagenet_64 and data/imagenet_256 below the
      current one, or --config.up_256.data.path=FOLDER and so on.
Cost: 500,000 steps of 1024 pictures beyond configs/cascade_64.py: work for a TPU pod slice.
Command: python -m diffax.main --config=configs/cascade_256.py --workdir=runs/cascade_256 --stage=up_256
     and the same with --stage=base and --stage=up_64, in any order; --mode=sample needs all.
"""

from diffax.config import add_section, load, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "8x8 to 16x16 to 32x32 embedded single shapes, minutes on a CPU"}


def get_config(variant: str = ""):
    config = new("cascade_256", stages=("base", "up_64", "up_256"))
    to_128 = load("cascade_128")
    base, up_64 = add_section(config, "base", to_128.base), add_section(config, "up_64", to_128.up_64)
    stage = add_section(config, "up_256", to_128.up_128)
    stage.shape = (256, 256, 3)
    stage.conditions.low_res.factor = 4
    stage.data.path = "data/imagenet_256"
    stage.net.update(channel_mult=(1, 2, 4, 4, 8, 8), attention=(16,))  # at 16 pixels
    config.sample.update(num=16, batch_size=16, columns=4)
    config.eval.update(num=0, batch_size=16)  # small evaluation classifiers are for small data
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "shapes")
        stage.conditions.low_res.factor = 2
        for small, side in ((base, 8), (up_64, 16), (stage, 32)):
            small.shape = (side, side, 3)
            small.train.update(num_train_steps=1200, batch_size=64, learning_rate=2e-3, anneal="cosine", ema=(0.995,))
        # with eps, reading the smaller picture takes far longer to learn than minutes
        up_64.predicts = stage.predicts = "v"
        up_64.net.update(channel_mult=(1, 2, 4), attention=(4,))
        stage.net.update(channel_mult=(1, 2, 4), attention=(4,))
        stage.train.batch_size = 32
        config.eval.update(num=500, batch_size=100, classifier=spec("evaluation", "network"))
    return config
