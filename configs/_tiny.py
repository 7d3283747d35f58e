"""What the `tiny` variants of the configs share: 16 pixels of embedded data, minutes on two CPU cores."""

from ml_collections import ConfigDict

from diffax.config import sections, spec

SHAPES = "examples.shapes.data:shapes"
CAPTIONS = "examples.shapes.evaluation:captions"  # whether samples show what their captions say
# Combinations that no training picture shows, two of each shape.
HOLDOUT = (
    *("red circle", "cyan circle", "green square", "purple square", "blue triangle", "pink triangle"),
    *("orange diamond", "cyan diamond", "yellow cross", "blue cross", "red ring", "green ring"),
)
# {data: (its component, fields that differ from the defaults, channels, classes)}
DATA = {
    "digits": ("digits", {}, 1, 10),
    "photos": ("photos", {}, 3, 2),
    "shapes": (SHAPES, {"single": True, "label": "colour"}, 3, 8),  # what one sees at this size
    "captioned_shapes": (SHAPES, {"single": True, "holdout": HOLDOUT}, 3, 6),
}


def tiny(config: ConfigDict, data: str = "digits") -> None:
    """Shrinks every section to 16 pixels of an embedded data set.

    What makes the method stays (prediction, variance, loss, schedule, style of attention); size, data and
    length change.

    Args:
      config: edited in place.
      data: a key of `DATA`.
    """
    source, fields, channels, classes = DATA[data]
    for stage in (config[name] for name in sections(config)):
        stage.data = spec("data", source, **fields)
        stage.loader.update(flip=False, crop="center")
        if len(stage.shape) == 3:
            stage.shape = (16, 16, channels)
        if "num_classes" in stage:
            stage.num_classes = classes
        _shrink_net(stage.net)
        if "tokenizer" in stage:
            stage.tokenizer = spec("tokenizer", "demo", length=16)
        for condition in stage.get("conditions", {}).values():
            _shrink_condition(condition, classes)
        if "steps" in stage:
            stage.steps = "50"
        stage.train.update(num_train_steps=1000, batch_size=32, accumulate=1, learning_rate=1e-3, warmup_steps=100)
        stage.train.update(ema=(0.99,) if stage.train.ema else (), ema_warmup=True)
        stage.train.update(log_every=50, save_every=500, sample_every=500)
    config.name = f"{config.name}_tiny"
    config.sample.update(num=16, batch_size=16, columns=4)
    config.eval.update(num=64, batch_size=64, bpd_num=32, template="a {}")


def _shrink_net(net: ConfigDict) -> None:
    """A few thousand parameters in place of millions."""
    if "channels" in net:
        net.update(channels=16, channel_mult=(1, 2), num_res_blocks=1, attention=(2,), groups=8, dropout=0.0)
        net.head_channels = 16 if net.head_channels else 0
    elif "text" in net:
        net.text.update(width=64, layers=2, heads=4)
    else:
        net.update(width=64, layers=2, heads=4)


def _shrink_condition(condition: ConfigDict, classes: int) -> None:
    if "num_classes" in condition:
        condition.num_classes = classes
    if "tokenizer" in condition:
        condition.tokenizer = spec("tokenizer", "demo", length=16)
    if "layers" in condition:
        condition.update(layers=2, heads=4)
    if condition.get("width"):  # of all sequences alike
        condition.width = 64
