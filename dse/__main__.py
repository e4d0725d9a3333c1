"""`python -m dse COMMAND` runs dse/commands/COMMAND.py; `-h` lists them."""

import argparse
import importlib
import pkgutil
import shlex
from collections.abc import Sequence

from dse import cli, commands


def main(argv: Sequence[str] | None = None) -> None:
    """Run the named command with the remaining arguments; its `args.command` is the command line as typed."""
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    modules = {name: importlib.import_module(f"dse.commands.{name}") for name in names}
    helps = {name: str(module.__doc__).splitlines()[0] for name, module in modules.items()}
    lines = ["Commands in addition to the five scripts:\n", *(f"  {name:<12}{text}" for name, text in helps.items())]
    parser = cli.Parser(prog="python -m dse", description="\n".join(lines))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=names, metavar="COMMAND", help="one of these; COMMAND -h lists its flags")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own flags")
    given = parser.parse_args(argv)
    prog, module = f"{parser.prog} {given.command}", modules[given.command]
    with cli.clear_errors(prog):
        parser = cli.Parser(prog=prog, doc=module.__doc__)
        module.add_flags(parser)
        args = parser.parse_args(given.arguments)
        args.command = shlex.join([*prog.split(), *given.arguments])
        cli.set_up_logging()
        module.run(args)


if __name__ == "__main__":
    main()
