"""The one door: `vlm COMMAND ...`. Only the module of the command asked for is imported."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from vlm import __version__
from vlm.errors import UserError, disk_full, first_line
from vlm.threads import settle_threads

# command -> ("module:function that adds the arguments and sets `run`", help line)
COMMANDS = {
    "demo": ("train.commands:demo", "build, train, evaluate and ask a small model, from nothing, in minutes"),
    "train": ("train.commands:train", "run a recipe: pretraining, alignment, instruction tuning, LoRA"),
    "eval": ("train.commands:evaluate", "answer a benchmark's questions with a model and score the answers"),
    "score": ("data.commands:score", "score a file of predictions against its references"),
    "chat": ("serve.commands:chat", "ask a model about pictures, once or in a conversation"),
    "serve": ("serve.commands:serve", "serve a model behind an OpenAI-compatible URL"),
    "data": ("data.commands:data", "make and look at data"),
    "import": ("vlm.convert.commands:import_", "make a model folder of a LLaVA, LLaVA-NeXT or OpenFlamingo"),
    "export": ("vlm.convert.commands:export", "write a model for the rest of the world, adapters merged, checked"),
    "report": ("train.commands:report", "write a run's page of curves and samples"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0 when done, 1 when the work failed (one sentence on stderr); usage errors exit 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    options = parse(arguments)
    settle_threads()
    try:
        return int(options.run(options) or 0)
    except KeyboardInterrupt as stopped:
        print(f"vlm {options.command}: {str(stopped) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.debug:
            raise
        print(f"vlm {options.command}: {_told(error, getattr(options, 'out', None))}", file=sys.stderr)
        return 1


def _told(error: Exception, out: object) -> str:
    """The sentence of an error. out: where the command writes, for libraries that don't say where there was no room."""
    if isinstance(error, UserError):
        return str(error)
    named = error.filename if isinstance(error, OSError) else None
    if (said := disk_full(error)) is not None and (named or out):
        return f"{named or out}: can't be written ({said}); make room, and run it again"
    told = f"{named}: {error.strerror}" if isinstance(error, OSError) and named else first_line(error)
    return f"{told} [{type(error).__name__}; --debug shows where]"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; exits 2 with usage on stderr when it is malformed."""
    return make_parser(argv[0] if argv else None).parse_args(list(argv))


def make_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser with the arguments of `command` filled in; the other commands are only names and help lines."""
    parser = argparse.ArgumentParser(
        prog="vlm",
        description="Build, fine-tune, evaluate and serve vision-language models.",
        epilog='vlm COMMAND --help explains a command. Tab completion: eval "$(register-python-argcomplete vlm)"',
    )
    parser.add_argument("--version", action="version", version=f"vlm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=CommandParser)
    for name, (target, summary) in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == command:
            module, _, function = target.partition(":")
            getattr(import_module(module), function)(sub)
            sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class CommandParser(argparse.ArgumentParser):
    """Options may stand between positional arguments, too; argparse alone gives up on `MODEL -n 1 PROMPT`.

    A command with a default for `rest` finds there what stands behind `--`, just as it is: options of another program.
    """

    _between = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.get_default("rest") is not None and "--" in args:
            end = args.index("--")
            namespace = argparse.Namespace() if namespace is None else namespace
            namespace.rest, args = args[end + 1 :], args[:end]
        has_commands = any(action.nargs == argparse.PARSER for action in self._get_positional_actions())
        if self._between or has_commands:
            return super().parse_known_args(args, namespace)
        self._between = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._between = False


def _complete() -> None:
    import argcomplete

    words = shlex.split(os.environ.get("COMP_LINE", ""), posix=True)
    argcomplete.autocomplete(make_parser(words[1] if len(words) > 1 and words[1] in COMMANDS else None))


if __name__ == "__main__":
    sys.exit(main())
