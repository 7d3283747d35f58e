"""GLIDE's base model: 64x64 pictures from text (Nichol et al. 2021, arXiv:2112.10741), at the size that was released.

The U-Net of ADM with a transformer for the caption: its last output is added to the timestep embedding, and every
attention block attends to all of its outputs. 385,030,726 parameters, the released base.pt; `:paper` is the model of
the paper, 3.55 billion, of which the paper gives 3.5 (2.3 and 1.2 for the text); its number of heads is inferred.

Zero-shot FID on MS-COCO at 256x256, of the paper's models, 30,000 captions, 250 steps, scale 1.5: 12.24. People
preferred scale 3 (and classifier-free guidance to CLIP's), which is used here with 100 steps, as in the released code.

The paper first trains with every caption, and then drops 20 % of them, which is `condition_dropout`.
Neither learning rate nor averaging is published; these are those of ADM.

Data: a folder of pictures with captions, data/captions below the current one, or --config.base.data.path=FOLDER.
      Tokens are GPT-2's; the vocabulary is downloaded once, or --config.base.conditions.text.tokenizer.vocab=FOLDER.
Cost: 1,600,000 steps (the paper's models 2,500,000 of 2048 pictures); the batch of the released one is not known.
Command: python -m diffax.main --config=configs/glide_base_64.py
With CLIP guidance: configs/glide_base_64.py:clip --mode=sample --config.base.workdir=runs/glide_base_64
                    --config.clip.workdir=runs/glide_clip --prompt='...'
"""

from diffax.config import add_section, each, load, new, spec, split_variant
from diffax.configs._tiny import CAPTIONS, tiny

VARIANTS = {
    "clip": "guided by a noised CLIP (configs/glide_clip.py) in place of classifier-free guidance",
    "paper": "3.5 billion parameters, as in the paper",
    "tiny": "16x16 embedded captioned shapes",
}


def get_config(variant: str = ""):
    variants = split_variant(variant, VARIANTS)
    config = new("glide_base_64")
    stage = config.base
    stage.shape = (64, 64, 3)
    stage.conditions = each("condition", "text")
    stage.data = spec("data", "captions", path="data/captions")  # unflipped: captions say left and right
    stage.net.update(channels=192, channel_mult=(1, 2, 3, 4), num_res_blocks=3, dropout=0.1)
    stage.net.update(attention=(2, 4, 8), head_channels=64)  # at 32, 16 and 8 pixels
    stage.net.update(scale_shift=True, resample="biggan", remat="blocks")
    stage.schedule = spec("schedule", "cosine", num_timesteps=1000)
    stage.variance = "learned_range"
    stage.loss = spec("loss", "hybrid", weight=1.0)  # T / 1000
    stage.condition_dropout = 0.2
    stage.guidance = each("guidance", "classifier_free", "clip_denoised")
    stage.guidance.classifier_free.scale = 3.0
    stage.steps = "100"
    stage.train.update(num_train_steps=1_600_000, batch_size=2048, learning_rate=1e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    config.sample.update(num=16, batch_size=16, columns=4)
    config.eval.num = 0  # small evaluation classifiers are for small data
    if "paper" in variants:
        stage.net.channels = 512
        stage.conditions.text.update(width=2048, layers=24, heads=32)
        stage.train.num_train_steps = 2_500_000
    if "tiny" in variants:
        tiny(config, "captioned_shapes")
        stage.net.update(channels=32, channel_mult=(1, 2, 2), attention=(2, 4), head_channels=16, remat="none")
        stage.predicts = "v"  # as the stages that enlarge, which do not learn their condition from eps in minutes
        stage.train.update(
            num_train_steps=5000, batch_size=32, learning_rate=2e-3, anneal="cosine", grad_clip=1.0, ema=(0.998,)
        )
        stage.conditions.text.rate = 0.05  # the transformer learns at 1e-4
        config.eval.update(num=500, batch_size=100, guidance=(0.0, 1.0, 2.0, 3.0, 5.0))
        config.eval.classifier = spec("evaluation", CAPTIONS)
    if "clip" in variants:
        add_section(config, "clip", load("glide_clip:tiny" if "tiny" in variants else "glide_clip").clip)
        stage.guidance = each("guidance", "clip", "clip_denoised")
        stage.guidance.clip.update(section="clip", scale=3.0)
    return config
