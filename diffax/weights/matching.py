"""Which published model a file holds.

A file does not name its network. It is recognised by the number of its parameters, and then by the names and shapes of
all its arrays, which must be those that the network of a config would have.
"""

import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffax.errors import UserError
from diffax.weights import catalogue, clip, files, folders, karlo
from diffax.weights.catalogue import Published, clip_config
from diffax.weights.families import CHOICES, FAMILIES, bears_marks, named_config, system_of, table_of
from diffax.weights.table import Table, misfit, parameter

GENERIC = ("diffusion_pytorch_model", "model", "pytorch_model")  # names that say nothing of a file; its folder's does


class Match(NamedTuple):
    """A file of weights, and what it is.

    Attributes:
      path: the file.
      tensors: {name: Tensor}, not read yet.
      config: the config that its networks are in, a plain dict.
      sections: {section of that: the map between the arrays and its parameters}; together they fit.
      settings: {(section, field, field): value} of what it says besides: statistics of embeddings.
      also: another file, whose arrays are among these.
      rest: the folder of the rest of the network of its one section, of which this is a part; '' if nothing is missing.
    """

    path: pathlib.Path
    tensors: Mapping[str, Any]
    config: dict[str, Any]
    sections: Mapping[str, Table]
    settings: Mapping[tuple[str, ...], Any] = {}
    also: pathlib.Path | None = None
    rest: str = ""


def recognise(tensors: Mapping[str, Any], name: str = "") -> tuple[Published, Table]:
    """The published file that arrays come from, and its table.

    Args:
      tensors: {name: array}, of which shapes alone matter; under today's names (see `Family.rename`).
      name: of the file, or of the folder that it was in, for files whose arrays have the same shapes.

    Raises:
      UserError: no published file has arrays of these names and shapes, or several have.
    """
    shapes = files.shapes(tensors)
    size = files.count(list(shapes.values()))
    rows = [row for row in catalogue.PUBLISHED if row.parameters == size]
    rows = [row for row in rows if bears_marks(tensors, FAMILIES[row.family])]
    rows = [row for row in rows if name in (row.name, row.folder)] or rows
    found = [(row, known) for row, known in ((row, row.table()) for row in rows) if not misfit(shapes, known)]
    if not found:
        raise UserError(
            f"these {len(shapes)} arrays of {size:,} numbers are of no model that was published; pass --model=CONFIG, "
            "of the network that they were trained with"
        )
    if len(found) > 1:
        if len({row.config for row, _ in found}) == 1:
            there = " or ".join(row.folder for row, _ in found)
            raise UserError(f"these arrays could be of {there}; call the file, or its folder, after the one that it is")
        there = ", ".join(row.config or row.name for row, _ in found)
        raise UserError(f"these arrays could be of any of {there}; pass --model=NAME of one")
    return found[0]


# ---- one file --------------------------------------------------------------------------------------------------------


def match(
    path: str | os.PathLike[str], *, model: str | None = None, which: str | None = None, attention_order: str = ""
) -> Match:
    """Reads which arrays a file holds, and finds their network.

    Args:
      path: a file (see `files.read`), or the folder of a model of diffusers or transformers. Of the two files of
        GLIDE's CLIP either one, if the other lies beside it. A file with a part of a network is for `match_all`.
      model: the config, or the published file, that it is; by default it is recognised.
      which: of several state dicts in the file, see `files.read`.
      attention_order: of one of OpenAI's networks that was not published, 'legacy' or 'new', see `openai.table`.

    Raises:
      UserError: the file cannot be read, is not recognised, or does not fit the model.
    """
    found = _match(path, model, which, attention_order)
    _check_whole(found)
    return found


def _match(path: str | os.PathLike[str], model: str | None, which: str | None, attention_order: str = "") -> Match:
    """`match`, of a part of a network too."""
    path = pathlib.Path(path)
    file = folders.file_in(path)
    tensors = files.read(file, which)
    family = next((name for name, f in FAMILIES.items() if bears_marks(f.rename(tensors), f)), None)
    if family is None:
        raise UserError(f"these are weights of no known program; {file}; known are those listed by --list")
    tensors = FAMILIES[family].rename(tensors)
    if path.is_dir() and model is None and family == "diffusers":
        config, known = folders.read(path, file, tensors)
        return Match(file, tensors, config, {"base": known})
    name = path.absolute().parent.name if path.stem in GENERIC else path.stem
    try:
        row, known = _named(tensors, model, family, attention_order, name) if model else recognise(tensors, name)
    except UserError as error:
        if not model and (found := _other_clip(file, tensors, family)):
            return found
        what, _, advice = str(error).partition("; ")
        raise UserError(f"{what}; {file}; {advice}") from None
    config = row.its_config()
    sections, settings = _parts(tensors, family, config, row.section, known)
    found = Match(file, tensors, config, sections, settings, rest=row.rest)
    return _with_other_encoder(found, row) if family == "glide-clip" else found


def _parts(
    tensors: Mapping[str, Any], family: str, config: Mapping[str, Any], section: str, known: Table
) -> tuple[dict[str, Table], dict[tuple[str, ...], Any]]:
    """What a file holds, by the sections of a config: tables, and settings."""
    parts = FAMILIES[family].parts
    if not parts:
        return {section: known}, {}
    sections, settings = {}, {}
    for top, owner_of in parts.items():
        owner = owner_of(config[section]) if owner_of else section
        entries = [entry._replace(path=entry.path[1:]) for entry in known if entry.path[0] == top]
        if top == "stats":
            arrays = {entry.path[0]: parameter(tensors, entry) for entry in entries}
            settings |= {(owner, "embedding", name): a.tolist() for name, a in karlo.stats(**arrays).items()}
        else:
            sections[owner] = entries
    return sections, settings


def _named(
    tensors: Mapping[str, Any], model: str, family: str, attention_order: str, name: str
) -> tuple[Published, Table]:
    """The published file of that name or config, or else the section of a config, that arrays fit.

    Sections that a published file of this `name` is of are tried first: those of an upsampler are alike.
    """
    published = catalogue.PUBLISHED
    rows = [row for row in published if model in (row.file, row.name, row.place, row.config)]
    of_family = [row for row in rows if row.family == family]
    if not of_family and (not rows or model in [row.config for row in rows]):
        trained = system_of(named_config(model)).trained
        ways = itertools.product(trained, CHOICES.get(family, [{}]))
        rows = [Published("", "", family, 0, model, section, options) for section, options in ways]
    namesakes = [row.section for row in published if name in (row.name, row.folder)]
    rows = sorted(of_family or rows, key=lambda row: row.section not in namesakes)
    if attention_order and family == "openai":
        rows = [row._replace(options={"attention_order": attention_order}) for row in rows]
    shapes = files.shapes(tensors)
    tried = []
    for row in rows:
        tried.append(_tried(row, shapes))
        if not tried[-1][2]:
            break
    row, known, complaint = min(tried, key=lambda found: len(found[2]))
    if complaint:
        raise UserError(
            f"the weights do not fit {model}: {complaint.replace('; ', ', ')}; pass the --model they are of"
        )
    return row, known


def _tried(row: Published, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Published, Table, str]:
    """The table of a row, and what keeps arrays of these shapes from fitting it."""
    try:
        known = row.table()
    except ValueError as error:
        return row, [], str(error)
    return row, known, misfit(shapes, known)


def _other_clip(file: pathlib.Path, tensors: Mapping[str, Any], family: str) -> Match | None:
    """A CLIP of a size that OpenAI did not publish, as its arrays or the config.json beside it describe it."""
    if family not in ("openai-clip", "transformers"):
        return None
    beside, settings, described = file.with_name("config.json"), {}, family == "transformers"
    if described:
        if not beside.exists():
            return None
        settings = folders.read_json(beside)
        if settings.get("architectures", ["CLIPModel"]) != ["CLIPModel"]:
            return None
    try:
        architecture = clip.transformers_config(settings) if described else clip.openai_config(tensors)
        name = file.absolute().parent.name if described else file.stem
        config = clip_config(folders.config_name(name) or "clip", architecture)
        known = table_of(family, config, "clip")
    except ValueError as error:
        what = " ".join(str(error).split()).replace("; ", ", ")
        raise UserError(f"{what}; {file}; convert another model") from error
    if complaint := misfit(files.shapes(tensors), known):
        raise UserError(
            f"the weights are not those of their sizes: {complaint.replace('; ', ', ')}; {file}; download it again"
        )
    return Match(file, tensors, config, {"clip": known})


def _with_other_encoder(found: Match, row: Published) -> Match:
    """The CLIP of which `found` is one encoder: the file of the other lies beside it, under its published name."""
    mine = row.options["tower"]
    ((other, name),) = ((tower, name) for tower, name in clip.GLIDE_FILES.items() if tower != mine)
    file = found.path.with_name(name)
    if not file.exists():
        raise UserError(f"this is one encoder of a CLIP, and {name} is not beside it; {found.path}; put both there")
    network = system_of(found.config).model(row.section).net
    tensors = {mine: found.tensors, other: files.read(file)}
    if complaint := misfit(files.shapes(tensors[other]), clip.table(getattr(network, other), "glide")):
        what = f"this is not the {other} encoder that goes with {found.path.name}: {complaint.replace('; ', ', ')}"
        raise UserError(f"{what}; {file}; download it again")
    sections = {row.section: clip.glide_table(network)}
    return found._replace(tensors=clip.glide_arrays(**tensors), sections=sections, also=file)


# ---- several files ---------------------------------------------------------------------------------------------------


def match_all(
    paths: Sequence[str | os.PathLike[str]], *, model: str | None = None, which: str | None = None, **options: Any
) -> list[Match]:
    """`match` of files that make one system.

    Args:
      paths: the files, and folders of models or of a whole system of diffusers (see `folders.PARTS`). Of the two of
        GLIDE's CLIP one is enough.
      model: the config of the first one, and of others that are not recognised by themselves.
      which: see `match`.
      **options: see `match`.

    Raises:
      UserError: see `match`; or two files are of one section; or the rest of a network is not among them.
    """
    found: list[Match] = []
    for file in itertools.chain.from_iterable(map(folders.parts_in, paths)):
        if file in [m.also for m in found]:
            continue
        m = _match_next(file, model, which, first=not found, **options)
        other = next((i for i, other in enumerate(found) if _are_one_network(other, m)), None)
        if other is not None:
            found[other] = _joined(found[other], m)
            continue
        for section in m.sections:
            if any(section in other.sections for other in found):
                raise UserError(f"{m.path} is one more {section}; {paths[0]}; pass one file for each part of a system")
        found.append(m)
    for m in found:
        _check_whole(m)
    return found


def _match_next(file: pathlib.Path, model: str | None, which: str | None, *, first: bool, **options: Any) -> Match:
    """One of several files; `model` is the config of the first, and of others that are not recognised."""
    if first or model is None:
        return _match(file, model, which, **options)
    try:
        return _match(file, None, which, **options)
    except UserError:
        return _match(file, model, which, **options)


def _are_one_network(a: Match, b: Match) -> bool:
    """Whether two files hold different parts of the network of one section."""
    return bool(a.rest and b.rest) and a.rest != b.rest and {*a.sections} == {*b.sections}


def _joined(a: Match, b: Match) -> Match:
    """The network of which two files hold a part each; their arrays have different names."""
    sections = {name: [*table, *b.sections[name]] for name, table in a.sections.items()}
    return a._replace(tensors={**a.tensors, **b.tensors}, sections=sections, rest="")


def _check_whole(m: Match) -> None:
    """Raises UserError if a file holds a part of a network alone."""
    if m.rest:
        (section,) = m.sections
        raise UserError(
            f"this is a part of the {section} of {m.config['name']}, and {m.rest} is missing; {m.path}; pass the file "
            "of that too, or one file of the whole"
        )
