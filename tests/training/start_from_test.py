"""Starting from a model without a condition: a widened network is the same function as before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import config as configs
from diffax.errors import UserError
from diffax.training import workdir
from diffax.training.workdir import widen_input
from tests.models import micro

LOW_RES, INPAINT = dict(low_res=dict(factor=2)), dict(inpaint={})


def system_of(root, **conditions):
    made = micro.section(conditions=micro.conditions(**conditions), net=micro.unet())
    made.train.start_from = str(root)
    return micro.system(base=made)


class Saved:
    """Stands for the checkpoints of a section."""

    def __init__(self, config, params):
        self.meta, self.params, self.directory = {"section": configs.to_dict(config)["base"]}, params, "there"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def read_meta(self, step=None):
        return self.meta

    def restore_ema(self, **_):
        return 0, self.params, None


@pytest.mark.parametrize("order", [("inpaint", "low_res"), ("low_res", "inpaint")])
def test_a_widened_network_is_the_same_function(tmp_path, monkeypatch, order):
    """Wherever the new condition stands among those that are concatenated to z."""
    before = system_of(tmp_path, **LOW_RES)
    after = system_of(tmp_path, **{name: (LOW_RES | INPAINT)[name] for name in order})
    old, new = before.model("base"), after.model("base")
    params = micro.drawn(old)
    monkeypatch.setattr(workdir, "Checkpoints", lambda *_, **__: Saved(before.config, params))
    wide = workdir.starting_params(after.config, "base", new)
    assert jax.tree.map(np.shape, wide) == jax.tree.map(np.shape, jax.eval_shape(new.init, jax.random.key(0)))
    z, time = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([3.0, 30.0])
    low_res = {"low_res": micro.filled(old.conditions["low_res"].example(), 2)}
    inpaint = {"inpaint": micro.filled(new.conditions["inpaint"].example(), 2)}
    plain = old.net.apply({"params": params}, z, time, low_res)
    np.testing.assert_allclose(new.net.apply({"params": wide}, z, time, low_res | inpaint), plain, atol=1e-5)


def test_other_differences_are_refused(tmp_path, monkeypatch):
    before = system_of(tmp_path, **LOW_RES)
    monkeypatch.setattr(
        workdir, "Checkpoints", lambda *_, **__: Saved(before.config, micro.drawn(before.model("base")))
    )
    for conditions, words in (
        (dict(label=dict(num_classes=3)) | LOW_RES, "only conditions that are planes beside z can be new"),
        (dict(low_res=dict(factor=4)), "low_res.factor"),
    ):
        after = system_of(tmp_path, **conditions)
        with pytest.raises(UserError, match=words) as caught:
            workdir.starting_params(after.config, "base", after.model("base"))
        assert "\n" not in str(caught.value)


def test_new_channels_stand_where_the_condition_does():
    kernel = np.arange(2 * 2 * 6 * 3, dtype=np.float32).reshape(2, 2, 6, 3)
    params = {"net": {"conv_in": {"kernel": kernel, "bias": np.ones(3)}, "other": {}}, "text": {}}
    wide = widen_input(params, at=3, by=4)["net"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(np.delete(wide, np.s_[3:7], axis=2), kernel)
    assert not np.asarray(wide)[:, :, 3:7].any()


def test_planes_are_counted_by_conditions():
    model = system_of("", label=dict(num_classes=3), **INPAINT, **LOW_RES).model("base")
    assert {name: c.planes for name, c in model.conditions.items()} == {"label": 0, "inpaint": 4, "low_res": 3}
    assert dataclasses.replace(model.conditions["inpaint"], shape=(8, 8, 1)).planes == 2
