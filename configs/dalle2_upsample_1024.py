"""The second upsampler of DALL-E 2: 256x256 to 1024x1024 (Ramesh et al. 2022, arXiv:2204.06125, section 2.1, table 3).

As the first (configs/dalle2_upsample_256.py), with the linear schedule and 15 steps of DDIM. The smaller picture is
made worse by the degradations of BSRGAN: blurs, resizes, noise and JPEG in random order. The paper says 300M
parameters; these are 282.1M.

Data: a folder of pictures, data/captions below the current one, or --config.up.data.path=FOLDER.
Cost: 1,000,000 steps of 512 windows.
Command: python -m diffax.main --config=configs/dalle2_upsample_1024.py
To enlarge a picture: the same with --mode=sample --input=photo.png
The whole system: configs/dalle2.py
"""

from diffax.config import config_defaults, load, split_variant, tiny

VARIANTS = {"tiny": "32x32 to 64x64 embedded shapes"}


def get_config(variant: str = ""):
    config = config_defaults("dalle2_upsample_1024", stages=("up",))
    stage = config.up
    stage.shape = (1024, 1024, 3)
    stage.takes = ("low_res",)
    stage.low_res.update(factor=4, crop=256, degrade="bsr")
    stage.data.update(name="captions", path="data/captions")
    stage.net.update(channels=192, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2)
    stage.net.update(attention=(), mid_attention=False, scale_shift=True, resample="biggan", remat="blocks")
    stage.schedule.update(name="linear", steps=1000, beta_start=1e-4, beta_end=0.02)
    stage.variance = "fixed_small"
    stage.steps, stage.sampler.name = "15", "ddim"
    stage.train.update(steps=1_000_000, batch_size=512, learning_rate=1e-4, warmup_steps=0)
    stage.train.update(optimizer="adamw", clip=0.0, ema=(0.9999,))
    config.sample.update(num=4, batch_size=4, columns=2)
    config.eval.update(num=0, batch_size=4)  # enlarging takes long at this size
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "shapes")
        stage.shape = (64, 64, 3)
        stage.low_res.update(factor=2, crop=32)
        stage.data.update(single=True, holdout=load("glide_base_64:tiny").base.data.holdout)
        stage.net.update(channels=16, channel_mult=(1, 2, 2), attention=(), remat="none")
        stage.predicts = "v"  # with eps, reading the smaller picture takes far longer to learn than minutes
        stage.steps = "15"
        stage.train.update(steps=1000, batch_size=32, anneal="cosine", clip=1.0, ema=(0.995,))
        config.eval.update(num=100, batch_size=50)
    return config
