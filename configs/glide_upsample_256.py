"""GLIDE's upsampler: 64x64 to 256x256 under a caption (Nichol et al. 2021, arXiv:2112.10741), at the released size.

398,361,286 parameters, the released upsample.pt; `:paper` is that of the paper, 1.5 billion, of which the depth of the
text's transformer is inferred from the count. Sampled without guidance in the paper's 27 steps by DDIM, from noise of
standard deviation 0.997. The smaller picture is the area mean of the larger one, without augmentation.

Data: a folder of pictures with captions, data/captions below the current one, or --config.up.data.path=FOLDER.
Cost: 400,000 steps (the paper's 1,600,000 of 512 pictures); the batch of the released one is not known.
Command: python -m diffax.main --config=configs/glide_upsample_256.py
To enlarge a picture: the same with --mode=sample --input=photo.png --prompt='what it shows'
The whole system: configs/glide.py
"""

from diffax.config import each, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {
    "paper": "1.5 billion parameters, as in the paper",
    "tiny": "16x16 to 32x32 embedded captioned shapes",
}


def get_config(variant: str = ""):
    variants = split_variant(variant, VARIANTS)
    config = new("glide_upsample_256", stages=("up",))
    stage = config.up
    stage.shape = (256, 256, 3)
    stage.conditions = each("condition", "text", "low_res")
    stage.conditions.low_res.factor = 4
    stage.data = spec("data", "captions", path="data/captions")
    stage.net.update(channels=192, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, dropout=0.1)
    stage.net.update(attention=(8, 16, 32), head_channels=64)  # at 32, 16 and 8 pixels
    stage.net.update(scale_shift=True, resample="biggan", remat="blocks")
    stage.schedule = spec("schedule", "linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    stage.variance = "learned_range"
    stage.loss = spec("loss", "hybrid", weight=1.0)  # T / 1000
    stage.steps = "fast27"
    stage.sampler, stage.temperature = spec("sampler", "ddim"), 0.997
    stage.train.update(num_train_steps=400_000, batch_size=512, learning_rate=1e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    config.sample.update(num=16, batch_size=16, columns=4)
    config.eval.update(num=0, batch_size=16)  # enlarging takes long at this size
    if "paper" in variants:
        stage.net.channels = 384
        stage.conditions.text.update(width=1024, layers=16, heads=16)
        stage.train.num_train_steps = 1_600_000
    if "tiny" in variants:
        tiny(config, "captioned_shapes")
        stage.shape = (32, 32, 3)
        stage.conditions.low_res.factor = 2
        stage.net.update(channels=16, channel_mult=(1, 2, 2), attention=(4,), head_channels=16, remat="none")
        stage.predicts = "v"  # with eps, reading the smaller picture takes far longer to learn than minutes
        stage.steps = "fast27"
        stage.conditions.text.rate = 0.05  # see the base model
        stage.train.update(
            num_train_steps=3000, batch_size=16, learning_rate=2e-3, anneal="cosine", grad_clip=1.0, ema=(0.995,)
        )
        config.eval.update(num=100, batch_size=50)
    return config
