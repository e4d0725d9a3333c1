"""What the scripts share on the command line: checked flags, one-line errors, logs, device, seed.

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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from dse.networks.config import HEAD_TYPES, MOST_DROPOUT, PADDINGS
from dse.networks.poolers import POOLERS
from dse.system import parallel, signals
from dse.system.device import describe_device, select_device
from dse.system.errors import InputError, RunError, one_line
from dse.system.files import check_writable

if TYPE_CHECKING:
    from dse.models import DSESiameseClassifier


logger = logging.getLogger(__name__)
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LESS_MEMORY = (
    "lower the batch size (in training, raise --gradient_accumulation_steps with it), give --bf16 or "
    "--gradient_checkpointing where the command takes them, or take smaller layers"
)
DEFAULT_BERT = "bert-large-uncased-whole-word-masking"


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, no abbreviations, and errors on one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """argparse's own, after refusing words that logs, model cards and tables could not repeat."""
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
    """A line as the terminal may have it: what would steer it, as file names and servers can, becomes escapes."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@contextlib.contextmanager
def clear_errors(prog: str) -> Iterator[None]:
    """Turn a refusal of the user's input into its one line on stderr and exit code 2.

    So too for work that cannot go on (exit code 1), Ctrl-C (130), SIGTERM (143), and a reader of the output that has
    had enough (141).
    """
    with signals.safe_console():
        try:
            with signals.caught(), parallel.process_group():
                yield
                if sys.stdout is not None:
                    sys.stdout.flush()  # now, so that its errors are told like others
        except InputError as error:
            _leave(prog, f"error: {error}", 2, error)
        except RunError as error:
            _leave(prog, f"error: {error}", 1, error)
        except signals.Stopped as stop:
            if not parallel.is_first():  # the first one tells
                raise SystemExit(stop.exit_code) from stop
            _leave(prog, f"{stop}: {stop.advice}", stop.exit_code, stop)
        except BrokenPipeError as error:  # `| head` has had enough: the console's own are no errors
            signals.flush_or_silence(sys.stdout)
            raise SystemExit(141) from error
        except (MemoryError, OSError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                _leave(prog, f"error: {error.filename}: the name is too long; give a shorter one", 2, error)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
                signals.flush_or_silence(sys.stdout)
                _leave(prog, f"error: the output cannot be written ({error.strerror}); make room", 1, error)
            if not _is_lack_of_memory(error):
                raise
            _leave(prog, f"error: out of memory ({one_line(error)[:200]}): {_LESS_MEMORY}", 1, error)


def program(
    prog: str, parse: Callable[[Sequence[str] | None], argparse.Namespace], run: Callable[[argparse.Namespace], None]
) -> Callable[..., None]:
    """The `main(argv=None)` of a script or command: runs it, and tells its errors in one line (`clear_errors`)."""

    def main(argv: Sequence[str] | None = None) -> None:
        with clear_errors(prog):
            run(parse(argv))

    return main


def _is_lack_of_memory(error: Exception) -> bool:
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "Storage size calculation overflowed")
    is_systems = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or is_systems or any(word in str(error) for word in words)


def _leave(prog: str, message: str, code: int, why: BaseException) -> NoReturn:
    who = f"{prog}, process {parallel.rank()}" if parallel.launched() else prog
    print(printable(f"{who}: {' '.join(message.splitlines())}"), file=sys.stderr)
    raise SystemExit(code) from why


def whole_number(least: int) -> Any:
    """A flag's type: an integer of at least `least`, that torch takes."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is below {least}: give {least} or more")
        if number >= 2**63:
            raise argparse.ArgumentTypeError(f"{text} is above {2**63 - 1}")
        return number

    return parse


seed = whole_number(-1)  # a flag's type: a seed that torch takes, or -1 for a new one each run


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return number


def share(text: str) -> float:
    """A flag's type: a number in [0, 1]."""
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1]")
    return number


def dropout_rate(text: str) -> float:
    """A flag's type: a number in [0, 1): at 1, to 16 bits, nothing would be left."""
    number = share(text)
    if number > MOST_DROPOUT:
        raise argparse.ArgumentTypeError(f"{text} drops everything: give less")
    return number


def threshold(text: str) -> float:
    """A flag's type: a number in (0, 1), the ends excluded."""
    number = _number(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside (0, 1): a probability between the two is expected")
    return number


def positive(text: str) -> float:
    """A flag's type: a number above 0."""
    number = _number(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def whole_epochs(text: str) -> float:
    """A flag's type: epochs, which the original takes as a float; a fraction of an epoch is refused."""
    number = positive(text)
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text} is no whole number of epochs")
    return number


def extra_size(text: str) -> int:
    """A flag's type: a layer's size, or -1 for no layer."""
    if text != "-1" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give 1 or more, or -1 for no layer")
    return whole_number(-1)(text)


def file_word(text: str) -> str:
    """A flag's type: a name that becomes part of file names."""
    if text in ("", "..") or text != Path(text).name:
        raise argparse.ArgumentTypeError(f"{text!r} becomes part of file names: it must be no path")
    return text


def add_architecture_flags(parser: argparse.ArgumentParser, given_only: bool = False) -> None:
    """The student's architecture, as dse_train_runner.py and the example take it.

    Args:
        given_only: leave flags that were not given out of the namespace, so that the given ones can be compared
            with a checkpoint.
    """

    def add(name: str, default: Any, help: str, **options: Any) -> None:
        parser.add_argument(name, default=argparse.SUPPRESS if given_only else default,
                            help=f"{help} (default: {default})" if given_only else help, **options)  # fmt: skip

    add("--bert_model", DEFAULT_BERT, "pre-trained encoder: hub name or folder")
    add("--do_lower_case", False, "uncased model", action="store_true")
    add("--pooler_type", "concat_top_mean", "hidden states to embedding", choices=POOLERS, metavar="POOLER")
    add("--pooler_num_top_hidden_layers", 4, "layers that the pooler works on, from the top", type=whole_number(1))
    add("--max_seq_length", 128, "token ids per sentence, with [CLS] and [SEP]", type=whole_number(4))
    add("--siamese_head_type", "concat", "concat: u, v, u*v, |u-v|; dot: u.v", choices=HEAD_TYPES)
    add("--additional_embedding_layer_size", -1, "linear layer after the pooler; -1: none", type=extra_size)
    add(
        "--fc_dims",
        [512, 1],
        "sizes of the head's layers; the last is 1, or 3 for NLI",
        type=whole_number(1),
        nargs="+",
    )
    add("--freeze_bert", False, "train only the head and the additional layer", action="store_true")


def add_padding_flag(parser: argparse.ArgumentParser) -> None:
    """How batches are laid out; the numbers are the same to rounding."""
    parser.add_argument(
        "--padding",
        choices=PADDINGS,
        help="packed: none but in attention; batch: to the longest row; max: to max_seq_length "
        "(not given: packed on CPU, batch on CUDA)",
    )


def add_resume_flags(parser: argparse.ArgumentParser) -> None:
    """States of a training that can go on."""
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole state of the same run")
    parser.add_argument(
        "--save_every", type=whole_number(1), help="updates between two states; not given: one after each epoch"
    )


def add_precision_flags(parser: argparse.ArgumentParser) -> None:
    """Mixed precision for training."""
    parser.add_argument("--fp16", action="store_true", help="mixed precision with float16, CUDA only")
    parser.add_argument("--bf16", action="store_true", help="mixed precision with bfloat16")


def _new_name(text: str) -> tuple[str, str]:
    """A flag's type: TASK=NAME."""
    task, _, name = text.partition("=")
    if not (task and name):
        raise argparse.ArgumentTypeError(f"{text!r} is no TASK=NAME")
    return task.lower(), file_word(name)


def add_call_flag(parser: argparse.ArgumentParser) -> None:
    """Other names for tasks in tables: `dict(args.call)` has them by task."""
    parser.add_argument(
        "--call", type=_new_name, action="append", default=[], metavar="TASK=NAME",
        help="what a task is called in the results, as snli=SICK where that lies in its folder",
    )  # fmt: skip


def add_inference_flags(parser: argparse.ArgumentParser) -> None:
    """What the commands that use a student share."""
    add = parser.add_argument
    add("--batch_size", type=whole_number(1), default=32, help="sentences of full length per step")
    add("--disable_gpu", action="store_true", help="use the CPU though there is a GPU")
    add("--gpu_id", type=whole_number(0), default=0, help="which GPU")


def load_student(args: argparse.Namespace) -> "DSESiameseClassifier":
    """The student of --model, on the device that the flags choose."""
    from dse.models import DSESiameseClassifier

    device = select_device(args.disable_gpu, args.gpu_id)
    model = DSESiameseClassifier.from_pretrained(args.model)
    logger.info("student of %s from %s on %s", model.task.name, args.model, describe_device(device))
    return model.to(device)


class _ConsoleHandler(logging.Handler):
    """Writes above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record)), file=sys.stderr)


class _LogFile(logging.FileHandler):
    """Goes on without a line that cannot be written; a full disk is told of where it matters."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def set_up_logging(file: Path | None = None) -> None:
    """Log to the console and, if given, to a file, whose folder is made; of several processes, the first does."""
    ours = logging.getLogger("dse")
    for handler in list(ours.handlers):
        ours.removeHandler(handler)
        with contextlib.suppress(OSError):  # a full disk
            handler.close()
    handlers: list[logging.Handler] = [_ConsoleHandler()]
    if not parallel.is_first():
        file = None
    if file is not None:
        check_writable(file.parent, "--log_dir", file.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        ours.addHandler(handler)
    ours.setLevel(logging.INFO if parallel.is_first() else logging.ERROR)
    if file is not None:
        logger.info("log: %s", file)


def precision_of(args: argparse.Namespace) -> str:
    """ "fp32", "fp16" or "bf16". Raises InputError for two of them."""
    if args.fp16 and args.bf16:
        raise InputError("--bf16: give it or --fp16, not both")
    return "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"
