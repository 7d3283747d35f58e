"""--mode=compile: compiles programs ahead, and says what they need."""

from diffax.commands import Job
from diffax.data import images
from diffax.errors import UserError
from diffax.models.system import System
from diffax.tools import compile_ahead


def run(job: Job) -> None:
    """Compiles the train step and the sampler of each section; prints what they need, and keeps it in the workdir."""
    args, found = job.args, []
    effort = compile_ahead.QUICK if args.effort is None else args.effort
    if args.program not in (None, *compile_ahead.PROGRAMS):
        raise UserError(f"unknown --program={args.program}; command line; use {' or '.join(compile_ahead.PROGRAMS)}")
    if not -1 <= effort <= 1:
        raise UserError(f"--effort={effort} is not from -1 to 1; command line; use 0 for what a run gets")
    folder, system = job.workdir / "ahead", System(job.config)
    for name in [args.stage] if args.stage else system.trained:
        for program in [args.program] if args.program else compile_ahead.PROGRAMS:
            if program == "sample" and not hasattr(system.model(name), "sample"):
                continue
            how = {"topology": args.topology, "effort": effort, "folder": folder}
            row = compile_ahead.report(job.config, name, program, **how)
            print(compile_ahead.describe(row), flush=True)
            if "cached" in row:
                print(f"  from {row['cached']}; delete it to compile again")
            found.append(row)
            text = compile_ahead.table(found).encode()
            images.write_atomically(folder / "report.md", lambda file, text=text: file.write(text))
    print(f"report: {folder / 'report.md'}")
