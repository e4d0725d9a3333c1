"""What the scripts and commands share on the command line: flags and their types, one-line errors, logs.

Loads no torch at import, so that `-h` and refusals are immediate.
"""

import argparse
import contextlib
import errno
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from dse.networks.config import HEAD_TYPES, MOST_DROPOUT, PADDINGS
from dse.networks.poolers import POOLERS
from dse.system import parallel, signals
from dse.system.errors import InputError, RunError, one_line
from dse.system.files import check_writable

logger = logging.getLogger(__name__)
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "Storage size calculation overflowed")
_LESS_MEMORY = (
    "lower the batch size (in training, raise --gradient_accumulation_steps with it), give --bf16 or "
    "--gradient_checkpointing where the command takes them, or take smaller layers"
)
DEFAULT_BERT = "bert-large-uncased-whole-word-masking"
_Rule = tuple[Callable[[Any], bool], str]  # of a flag's value, and what is wrong with one that breaks it


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, no abbreviations, and errors on one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, after refusing words that logs, model cards and tables cannot repeat."""
        for word in sys.argv[1:] if args is None else args:
            if found := re.search("[\0\ud800-\udfff]", word):
                what = "has a NUL character" if found[0] == "\0" else "is not valid UTF-8"
                self.error(f"{word!a} {what}: give another name")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong on one line and leave with exit code 2."""
        message = printable(re.sub(r"//[^/\s]*@", "//", message))  # a password in an address
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} -h)\n")


def printable(text: str) -> str:
    """A line for the terminal: characters that would steer it, as file names and servers can have, become escapes."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@contextlib.contextmanager
def clear_errors(prog: str) -> Iterator[None]:
    """Tell what ends the block in one line on stderr, and leave with its exit code.

    2: refused input; 1: work that cannot go on; 130: Ctrl-C; 143: SIGTERM; 141: the reader of the output has stopped.
    """
    with signals.safe_console():
        try:
            with signals.caught(), parallel.process_group():
                yield
                if sys.stdout is not None:
                    sys.stdout.flush()  # now, so that its errors are told like others
        except (InputError, RunError) as error:
            _leave(prog, f"error: {error}", error.exit_code, error)
        except signals.Stopped as stop:
            if not parallel.is_first():  # the first process tells
                raise SystemExit(stop.exit_code) from stop
            _leave(prog, f"{stop}: {stop.advice}", stop.exit_code, stop)
        except BrokenPipeError as error:  # of the output: those of the console are not raised
            signals.flush_or_silence(sys.stdout)
            raise SystemExit(141) from error
        except (MemoryError, OSError, RuntimeError) as error:
            number, file, why = (getattr(error, name, None) for name in ("errno", "filename", "strerror"))
            if number == errno.ENAMETOOLONG:
                _leave(prog, f"error: {file}: the name is too long; give a shorter one", 2, error)
            if number == errno.ENOSPC and file is None:
                signals.flush_or_silence(sys.stdout)
                _leave(prog, f"error: the output cannot be written ({why}); make room", 1, error)
            said = isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
            if not said and number != errno.ENOMEM:
                raise
            _leave(prog, f"error: out of memory ({one_line(error)[:200]}): {_LESS_MEMORY}", 1, error)


def _leave(prog: str, message: str, code: int, why: BaseException) -> NoReturn:
    who = f"{prog}, process {parallel.rank()}" if parallel.launched() else prog
    print(printable(f"{who}: {' '.join(message.splitlines())}"), file=sys.stderr)
    raise SystemExit(code) from why


def program(prog: str, parse: Callable[..., Any], run: Callable[[Any], None]) -> Callable[..., None]:
    """The `main(argv=None)` of a script or command: runs it, and tells its errors in one line (`clear_errors`)."""

    def main(argv: Sequence[str] | None = None) -> None:
        with clear_errors(prog):
            run(parse(argv))

    return main


def _flag_type(read: Callable[[str], Any], what: str, *rules: _Rule) -> Callable[[str], Any]:
    """A flag's type: what `read` makes of the text, by every rule; `read` raises ValueError for what is not `what`."""

    def checked(text: str) -> Any:
        try:
            value = read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        for holds, words in rules:
            if not holds(value):
                raise argparse.ArgumentTypeError(f"{text} {words}")
        return value

    return checked


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


_whole = partial(_flag_type, int, "a whole number", (lambda n: n < 2**63, f"is above {2**63 - 1}"))  # torch takes it
_number = partial(_flag_type, _finite, "a number")
_SHARE = (lambda x: 0 <= x <= 1, "is outside [0, 1]")
_POSITIVE = (lambda x: x > 0, "is not above 0")


def whole_number(least: int) -> Callable[[str], int]:
    """A flag's type: an integer of at least `least`."""
    return _whole((lambda n: n >= least, f"is below {least}: give {least} or more"))


# Types of flags
seed = whole_number(-1)  # -1: a new one each run
extra_size = _whole((lambda n: n == -1 or n > 0, "is not a size: give 1 or more, or -1 for no layer"))  # a layer's
share = _number(_SHARE)
# near 1, at the 16 bits of its random numbers, nothing would be left
dropout_rate = _number(_SHARE, (lambda x: x <= MOST_DROPOUT, "drops everything: give less"))
threshold = _number((lambda x: 0 < x < 1, "is outside (0, 1): a probability between the two is expected"))
positive = _number(_POSITIVE)
whole_epochs = _number(_POSITIVE, (float.is_integer, "is not a whole number of epochs"))  # a float, as in the original


def file_word(text: str) -> str:
    """A flag's type: a name that becomes part of file names."""
    if text in ("", "..") or text != Path(text).name:
        raise argparse.ArgumentTypeError(f"{text!r} becomes part of file names: it must not be a path")
    return text


def _new_name(text: str) -> tuple[str, str]:
    """A flag's type: TASK=NAME."""
    task, _, name = text.partition("=")
    if not (task and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=NAME")
    return task.lower(), file_word(name)


def _flags(**flags: dict[str, Any]) -> Callable[..., None]:
    """A function that adds flags of these names to a parser, each with its options of argparse."""

    def add(parser: argparse.ArgumentParser, given_only: bool = False) -> None:
        """Add the flags; with `given_only`, those that are not given have no entry in the namespace."""
        for name, options in flags.items():
            if given_only:
                shown = f"{options['help']} (default: {options.get('default', False)})"
                options = {**options, "default": argparse.SUPPRESS, "help": shown}
            parser.add_argument(f"--{name}", **options)

    return add


_SWITCH = {"action": "store_true"}
_DEVICE: dict[str, Any] = {
    "disable_gpu": _SWITCH | {"help": "use the CPU though there is a GPU"},
    "gpu_id": {"type": whole_number(0), "default": 0, "help": "which GPU"},
}
add_device_flags = _flags(**_DEVICE)
_SENTENCES = {"type": whole_number(1), "default": 32, "help": "sentences of full length per step"}
add_inference_flags = _flags(batch_size=_SENTENCES, **_DEVICE)  # of the commands that use a student
add_task_flags = _flags(
    task_name={"required": True, "help": "GLUE task, or a JSON file that describes your own"},
    data_dir={"required": True, "help": "folder of the task's files"},
)
add_log_flags = _flags(
    file_log=_SWITCH | {"help": "log to a file too, and a JSON line per epoch beside it"},
    log_dir={"default": "outputs/logs", "help": "folder of the log files"},
)
add_architecture_flags = _flags(
    bert_model={"default": DEFAULT_BERT, "help": "pre-trained encoder: hub name or folder"},
    do_lower_case=_SWITCH | {"help": "uncased model"},
    pooler_type={"default": "concat_top_mean", "help": "hidden states to embedding", "choices": POOLERS,
                 "metavar": "POOLER"},
    pooler_num_top_hidden_layers={"default": 4, "help": "layers that the pooler works on, from the top",
                                  "type": whole_number(1)},
    max_seq_length={"default": 128, "help": "token ids per sentence, with [CLS] and [SEP]", "type": whole_number(4)},
    siamese_head_type={"default": "concat", "help": "concat: u, v, u*v, |u-v|; dot: u.v", "choices": HEAD_TYPES},
    additional_embedding_layer_size={"default": -1, "help": "linear layer after the pooler; -1: none",
                                     "type": extra_size},
    fc_dims={"default": [512, 1], "help": "sizes of the head's layers; the last is 1, or 3 for NLI",
             "type": whole_number(1), "nargs": "+"},
    freeze_bert=_SWITCH | {"help": "train only the head and the additional layer"},
)  # fmt: skip
_LAYOUTS = "packed: none but in attention; batch: to the longest row; max: to max_seq_length"
add_padding_flag = _flags(  # the results are the same up to rounding
    padding={"choices": PADDINGS, "help": f"{_LAYOUTS} (not given: packed on CPU, batch on CUDA)"}
)
add_resume_flags = _flags(
    resume=_SWITCH | {"help": "go on from the newest whole state of the same run"},
    save_every={"type": whole_number(1), "help": "updates between two states; not given: one after each epoch"},
)
add_precision_flags = _flags(  # `precision_of` reads them
    fp16=_SWITCH | {"help": "mixed precision with float16, CUDA only"},
    bf16=_SWITCH | {"help": "mixed precision with bfloat16"},
)
_CALLED = "what a task is called in the results, as snli=SICK where that lies in its folder"
add_call_flag = _flags(  # `dict(args.call)` has the names by task
    call={"type": _new_name, "action": "append", "default": [], "metavar": "TASK=NAME", "help": _CALLED}
)


def precision_of(args: argparse.Namespace) -> str:
    """The precision that the flags choose: fp32, fp16 or bf16. Raises InputError for two of them."""
    if args.fp16 and args.bf16:
        raise InputError("--bf16: give it or --fp16, not both")
    return "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"


class _ConsoleHandler(logging.Handler):
    """Writes above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record)), file=sys.stderr)


def set_up_logging(file: Path | None = None) -> None:
    """Log to the console and, if given, to a file, whose folder is made; of several processes only the first does."""
    ours, first = logging.getLogger("dse"), parallel.is_first()
    before, ours.handlers = ours.handlers, [_ConsoleHandler()]
    for handler in before:
        with contextlib.suppress(OSError):  # a full disk
            handler.close()
    ours.setLevel(logging.INFO if first else logging.ERROR)
    if file is not None and first:
        check_writable(file.parent, "--log_dir", file.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        ours.addHandler(log := logging.FileHandler(file, encoding="utf-8"))
        # for a line that a full disk refuses: it is reported where results are written
        log.handleError = lambda record: None  # type: ignore[method-assign]  # logging offers no argument for it
    for handler in ours.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    if len(ours.handlers) > 1:
        logger.info("log: %s", file)
