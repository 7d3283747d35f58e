"""CDM on ImageNet, 128x128: the cascade to 64 pixels and a stage that doubles them (Ho et al. 2022, arXiv:2106.15282).

The first two stages are those of configs/cascade_64.py. Labels at every stage, guidance at none. The paper's scores,
50,000 samples; CAS is the accuracy of a ResNet-50 that saw samples only, on real pictures (those: 68.82 and 88.79 %):

| FID to train | FID to val | Inception      | CAS top 1 | CAS top 5 |
|--------------|------------|----------------|-----------|-----------|
| 3.52         | 3.76       | 128.80 +- 2.51 | 59.84 %   | 81.79 %   |

The last stage is trained with half of its smaller pictures blurred (section 3) and samples from them as they are;
Gaussian noise did not help here. Its network embeds the noise level itself in place of a timestep, so that the 100
steps of sampling need not be among the 2000 of training. 575.3M parameters, counted here; the paper gives none. The
range of the blur is the best one at 256 pixels; betas, time and variance are those of SR3 (arXiv:2104.07636).

Data: folders of images, one folder per class, data/imagenet_32, data/imagenet_64 and data/imagenet_128 below the
      current one, or --config.up_128.data.path=FOLDER and so on.
Cost: 500,000 steps of 1024 pictures beyond configs/cascade_64.py: work for a TPU pod slice.
Command: python -m diffax.main --config=configs/cascade_128.py --workdir=runs/cascade_128 --stage=up_128
     and the same with --stage=base and --stage=up_64, in any order; --mode=sample needs all.
"""

from diffax.config import add_section, each, load, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "8x8 to 16x16 to 32x32 embedded single shapes, minutes on a CPU"}


def get_config(variant: str = ""):
    config = new("cascade_128", stages=("base", "up_64", "up_128"))
    to_64 = load("cascade_64")
    base, up_64 = add_section(config, "base", to_64.base), add_section(config, "up_64", to_64.up)
    stage = config.up_128
    stage.shape = (128, 128, 3)
    stage.conditions = each("condition", "label", "low_res")
    stage.conditions.label.num_classes = 1000
    stage.conditions.low_res.update(factor=2, blur=0.5, blur_sigma=(0.4, 0.6))
    stage.data = spec("data", "folder", path="data/imagenet_128")
    stage.loader.flip = True
    stage.net.update(channels=128, channel_mult=(1, 2, 4, 8, 8), num_res_blocks=3, dropout=0.0)
    stage.net.update(attention=(8,), heads=1)  # at 16 pixels
    stage.net.update(scale_shift=True, resample="biggan", remat="blocks")
    # From 1e-6 to 1e-2 over 2000 steps; these are for a chain of 1000.
    stage.schedule = spec("schedule", "linear", num_timesteps=2000, beta_start=2e-6, beta_end=0.02, continuous=True)
    stage.variance = "fixed_large"
    stage.steps = "100"
    stage.train.update(
        num_train_steps=500_000, batch_size=1024, learning_rate=1e-4, warmup_steps=5000, grad_clip=1.0, ema=(0.9999,)
    )
    config.sample.update(num=16, batch_size=16, columns=4)
    config.eval.update(num=0, batch_size=16)  # small evaluation classifiers are for small data
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "shapes")
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
