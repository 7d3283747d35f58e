"""The command: `python -m diffax.weights 64x64_diffusion.pt 64x64_classifier.pt runs/adm_64`."""

import argparse
import pathlib
import sys
import traceback
from collections.abc import Sequence

import absl.logging

from diffax import weights
from diffax.errors import RunError, UserError

DESCRIPTION = "Published weights to a workdir that diffax samples from, and a trained workdir back to PyTorch's names."


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; command line; see --help")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = _Parser(prog="python -m diffax.weights", description=DESCRIPTION, allow_abbrev=False)
    p.usage = (
        "python -m diffax.weights FILE ... WORKDIR\n       python -m diffax.weights WORKDIR FILE --to=safetensors\n"
        "       python -m diffax.weights --list"
    )
    p.add_argument(
        "paths",
        nargs="*",
        metavar="FILE ... WORKDIR",
        help=".pt, .pth, .ckpt or .safetensors files or folders of diffusers or transformers that make one system (of "
        "karlo the folder of all), and the workdir to write; or a workdir and the .safetensors file to export it to",
    )
    p.add_argument("--model", help="the config or published file that it is (default: recognised by names and shapes)")
    p.add_argument("--to", choices=("diffax", "safetensors"), default="diffax", help="what to write (default diffax)")
    p.add_argument("--stage", help="--to=safetensors: the stage, where there are several")
    p.add_argument("--ema", help="which of several state dicts in a file; --to=safetensors: which average, as 0.9999")
    p.add_argument(
        "--attention_order",
        default="",
        choices=("legacy", "new"),
        help="of OpenAI's networks that were not published: new if trained with use_new_attention_order",
    )
    p.add_argument("--list", action="store_true", help="show every published file that is known")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


def list_text() -> str:
    """A line for each published file: name, number of parameters, config, and where it lies."""
    rows = [("file", "parameters", "config", "section", "from")]
    for row in weights.PUBLISHED:
        rows.append((row.file, f"{row.parameters:,}", row.config or "-", row.section, row.place))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 (failed) or 2 (bad input)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax logs every save
    try:
        args = parser().parse_args(argv)
        if args.list:
            print(list_text())
        elif len(args.paths) < 2:
            raise UserError("a source and a workdir are needed; command line; see --help")
        elif args.to == "safetensors":
            if len(args.paths) > 2:
                raise UserError("--to=safetensors needs one workdir and one file; command line; see --help")
            source, target = args.paths
            step = weights.export(
                source, target, stage=args.stage, decay=args.ema, attention_order=args.attention_order
            )
            print(f"step {step}: {target}")
        else:
            *files, target = args.paths
            found = weights.match_all(files, model=args.model, which=args.ema, attention_order=args.attention_order)
            config = weights.save(found, target)
            for name in (name for m in found for name in m.sections):
                print(f"{name} of {config['name']}: {pathlib.Path(target) / name}")
        return 0
    except (UserError, RunError) as error:
        if "--debug" in argv:
            traceback.print_exception(error)
        print("diffax: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(run())
