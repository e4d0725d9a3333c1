"""`python -m dse COMMAND` runs dse/commands/COMMAND.py; `-h` lists them."""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

from dse import cli, commands


def main(argv: Sequence[str] | None = None) -> None:
    """Run the named command with the rest of the arguments."""
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    modules = {name: importlib.import_module(f"dse.commands.{name}") for name in names}
    lines = [f"  {name:<12}{str(module.__doc__).splitlines()[0]}" for name, module in modules.items()]
    parser = cli.Parser(prog="python -m dse", description="\n".join(["Commands beside the five scripts:\n", *lines]))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=names, metavar="COMMAND", help="one of these; COMMAND -h tells its flags")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own flags")
    args = parser.parse_args(argv)
    modules[args.command].main(args.arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
