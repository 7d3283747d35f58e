"""The smallest configs that still have every part: seconds to compile, milliseconds to run."""

OVERRIDES = (
    "config.base.shape=8,8,1",
    "config.base.net.channels=8",
    "config.base.net.channel_mult=1,2",
    "config.base.net.num_res_blocks=1",
    "config.base.net.attention=2",
    "config.base.net.groups=4",
    "config.base.net.heads=2",
    "config.base.schedule.num_timesteps=40",
    "config.base.steps=5",
    "config.base.train.num_train_steps=6",
    "config.base.train.batch_size=8",
    "config.base.train.log_every=2",
    "config.base.train.save_every=3",
    "config.base.train.sample_every=0",
    "config.base.train.ema=0.9",
    "config.sample.num=12",
    "config.sample.batch_size=8",
    "config.eval.num=20",
    "config.eval.batch_size=20",
    "config.eval.bpd_num=4",
    "config.eval.steps=5",
)


def flags(workdir, *more: str, config: str = "quickstart") -> list[str]:
    """Arguments of `diffax.main` for a micro run of a config on the embedded digits."""
    overrides = [f"--{o}" for o in (*OVERRIDES, *more) if o.startswith("config.")]
    return [f"--config={config}", f"--workdir={workdir}", *overrides, *(m for m in more if m.startswith("--"))]
