"""What every condition of a model is: one object that data, training, sampling and evaluation use alike.

A condition has up to three forms. A call of the sampler is *given* one (a label, the ids of a caption, a smaller
picture); a training *batch* holds one; and the network's encoder reads an *input*. For most all three are one array,
and then a condition is a few lines:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Pose(Condition):
        size: int = 12  # of a vector of joint angles

        def example(self):
            return jax.ShapeDtypeStruct((self.size,), jnp.float32)

        def encoder(self, net):
            return PoseEncoder(net.vector_width)        # (pose [B, size], z) -> Context
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import TRAINING, WIRED, In, shown
from diffax.diffusion import augment
from diffax.errors import UserError

Array = jax.Array
Tree = Any
Params = Any


class Offer(NamedTuple):
    """What a condition can choose from where a grid of samples is wanted and the user named nothing.

    Attributes:
      prompts: of the config or the command line; may be empty.
      held_out: n -> at most n held-out examples of the data, {'image': [n, H, W, C], column: ...}.
      embed: pictures [n, H, W, C] -> image embeddings [n, E].
    """

    prompts: Sequence[str]
    held_out: Callable[[int], Mapping[str, np.ndarray]]
    embed: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """The base of all conditions. Override what differs; `example` and `encoder` always do.

    Attributes:
      name: under which the config lists it.
      shape: of what the model makes, such as (H, W, C).
      droppable: whether training drops it for a share of the examples, so that there is a null value for it.
      dropout: share of the training examples that are trained without it, apart from the rest; 0: together with them.
    """

    name: Annotated[str, WIRED] = ""
    shape: Annotated[tuple[int, ...], WIRED] = ()
    droppable: Annotated[bool, WIRED] = False
    dropout: Annotated[float, In(0, 1, below=True), TRAINING] = 0.0

    # ---- what it is

    @property
    def argument(self) -> str:
        """The argument of a call that gives it, such as 'prompt'."""
        return self.name

    @property
    def sections(self) -> tuple[str, ...]:
        """Other sections of the config whose frozen parameters it needs."""
        return ()

    @property
    def can_drop(self) -> bool:
        """Whether it has a null value if the model drops conditions."""
        return False

    @property
    def encoded_once(self) -> bool:
        """Whether its encoder reads neither z nor the noise level: sampling then encodes it before the first step."""
        return False

    @property
    def rates(self) -> Mapping[str, float]:
        """{regular expression on the path of a parameter below its encoder: factor of the learning rate}."""
        return {}

    @property
    def smallest(self) -> tuple[int, int]:
        """Height and width of the smallest picture that training has to read for it."""
        return (1, 1)

    @property
    def planes(self) -> int:
        """How many channels its encoder concatenates to z."""
        return 0

    def encoder(self, net: nn.Module) -> nn.Module:
        """The module (input [B, ...], z) -> Context that feeds a network."""
        raise NotImplementedError

    def example(self) -> Tree:
        """`jax.ShapeDtypeStruct`s of one example of the encoder's input."""
        raise NotImplementedError

    def given_example(self) -> Tree:
        """`jax.ShapeDtypeStruct`s of one example of what a call is given."""
        return self.example()

    def batch_example(self) -> dict[str, Tree]:
        """`jax.ShapeDtypeStruct`s of what a training batch holds for it, of one example."""
        return {self.name: self.example()}

    def null(self, params: Mapping[str, Params]) -> Tree:
        """One example of the encoder's input that stands for no condition.

        Args:
          params: {section: frozen parameters} of its `sections`; empty where there are none yet.
        """
        raise NotImplementedError(f"{self.name} is never dropped")

    def check(self, model: Any) -> None:
        """Raises ValueError if the condition does not fit the model that has it."""

    # ---- on the host

    def check_data(self, source: Any) -> None:
        """Raises UserError if the data cannot feed it."""
        for name, (key, _) in self.columns().items():
            if key not in source.keys and key != "caption":
                raise UserError(
                    f"{self.name!r} needs {key!r} of every picture, but the data have {list(source.keys)}; "
                    f"{source.name}; choose other data or leave the condition {name!r} out"
                )

    def columns(self) -> dict[str, tuple[str, Callable | None]]:
        """{name in a batch: (name in a record of the data, list of values -> array)} that training reads."""
        return {self.name: (self.name, None)}

    @property
    def edit(self) -> Callable | None:
        """A change of every training picture on the host, (uint8 pixels, Generator) -> (pixels, {name: picture})."""
        return None

    def from_user(self, value: Any, n: int) -> Tree:
        """What a user gives in a call, for n pictures or one for all, as arrays [n, ...].

        Raises:
          UserError: it is no such value.
        """
        like = self.given_example()
        try:
            array = np.asarray(value)
            wrong = not np.can_cast(array.dtype, like.dtype, "same_kind")
        except ValueError:  # a ragged list
            wrong = True
        rank = len(like.shape)
        if wrong or array.ndim not in (rank, rank + 1) or array.shape[array.ndim - rank :] != like.shape:
            raise UserError(
                f"{self.argument} is {shown(value)}; sample_fn; pass {like.dtype} of shape {list(like.shape)} for all "
                f"pictures, or {['n', *like.shape]} for one each"
            )
        if not np.isfinite(array).all():
            raise UserError(f"{self.argument} has values that are not finite; sample_fn; correct them")
        return one_each(self.argument, array.astype(like.dtype), n, len(like.shape))

    def count(self, value: Any) -> int | None:
        """For how many pictures a user gave values; None: one for all."""
        try:
            return len(value) if np.ndim(value) > len(self.given_example().shape) else None
        except (TypeError, ValueError):
            return None

    def absent(self, n: int) -> Tree | None:
        """What stands for n values that a call leaves out; None: it must not."""
        del n
        return None

    def from_batch(self, batch: Mapping[str, np.ndarray]) -> Tree:
        """What a call is given so that it makes the pictures of a batch of the data."""
        return batch[self.name]

    def choose(self, n: int, offer: Offer) -> Any:
        """Values of the argument for n pictures, where the user named none."""
        found = offer.held_out(n)
        return found[self.name][np.arange(n) % len(found["image"])]

    def captions(self, value: Any, class_names: Sequence[str]) -> list[str] | None:
        """What to write below pictures that were made with these values of the argument."""
        del value, class_names
        return None

    # ---- on the devices

    def prepare(self, params: Mapping[str, Params], batch: Mapping[str, Array]) -> dict[str, Tree]:
        """What frozen models make of a batch before the train step: replaces entries of the batch."""
        del params
        return {name: batch[name] for name in self.batch_example() if name in batch}

    def in_training(self, batch: Mapping[str, Array], x: Array, keys: Array) -> tuple[Array, Tree]:
        """The data x [B, ...] (cut or not) and the encoder's input, of a batch with one key for each example."""
        del keys
        return x, batch[self.name]

    def in_sampling(self, given: Tree, keys: Array, params: Mapping[str, Params]) -> Tree:
        """The encoder's input for what a call is given; called once before the steps."""
        del keys, params
        return given

    def result_size(self, given: Tree) -> tuple[int, int] | None:
        """Height and width that this value requires of the result; None: it does not matter."""
        del given
        return None

    def made(self, out: Array, given: Tree | None, reached: Any) -> Tree:
        """What is given to it when an earlier model of a cascade made it.

        Args:
          out: the sample, [B, ...].
          given: what the call gives besides, or None.
          reached: the noise level at which the sample was left, or None if it is clean.
        """
        del given, reached
        return out

    @property
    def stops_before(self) -> float | None:
        """The noise level u, of the model before, at which that one is to stop; None: at clean data."""
        return None


def one_each(name: str, array: np.ndarray, n: int, rank: int) -> np.ndarray:
    """One value for all pictures, or one each -> [n, ...].

    Raises:
      UserError: there is another number of values.
    """
    if array.ndim > rank and len(array) != n:
        raise UserError(f"{len(array)} values of {name} for {n} pictures; sample_fn; pass one each, or one for all")
    return array if array.ndim > rank else np.broadcast_to(array, (n, *array.shape))


def zeros(example: Tree, n: int = 1) -> Tree:
    """[n, ...] zeros like the `ShapeDtypeStruct`s of one example."""
    return jax.tree.map(lambda a: jnp.zeros((n, *a.shape), a.dtype), example)


def drop(values: Mapping[str, Tree], keys: Array, *, conditions: Mapping[str, Condition], rate: float, nulls) -> dict:
    """Drops the conditions of a share of the examples: see `diffusion.augment.drop`.

    Args:
      values: {name: encoder's input}.
      keys: [B].
      conditions: of the model.
      rate: share of the examples without all conditions that have no rate of their own.
      nulls: {name: null value, of one example}.

    Returns:
      The values, with nulls in place of what is dropped.
    """
    leaves, paths, null_leaves = {}, {}, {}
    for name in nulls:
        found, structure = jax.tree.flatten(values[name])
        paths[name] = structure
        for i, (leaf, null) in enumerate(zip(found, jax.tree.leaves(nulls[name]), strict=True)):
            leaves[name, i], null_leaves[name, i] = leaf, null
    groups: dict[Any, tuple[list, float]] = {}
    for name, i in leaves:
        own = conditions[name].dropout
        group = conditions[name].argument if own else None
        groups.setdefault(group, ([], own or rate))[0].append((name, i))
    rates = {tuple(names): share for names, share in groups.values()}
    kept = augment.drop(leaves, keys, rate=rates, null=null_leaves)
    dropped = {
        name: jax.tree.unflatten(structure, [kept[name, i] for i in range(structure.num_leaves)])
        for name, structure in paths.items()
    }
    return {**values, **dropped}
