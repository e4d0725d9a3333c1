"""What the scripts and commands share on the command line: flags and their types, one-line errors, logs.

Importing it does not load torch, so `-h` and refusals are immediate.
"""

import argparse
import contextlib
import errno
import logging
import math
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from dse.data.tasks import DEFAULT_DEV_SHARE
from dse.networks.config import HEAD_TYPES, MOST_DROPOUT, PADDINGS, PRECISIONS
from dse.networks.poolers import POOLERS
from dse.system import parallel, signals
from dse.system.errors import InputError, RunError, lack_of_memory
from dse.system.files import check_writable

logger = logging.getLogger(__name__)
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LESS_MEMORY = (
    "of these flags, use what the command has: a lower --batch_size or --train_batch_size (in training with more "
    "--gradient_accumulation_steps), --gradient_checkpointing, --precision bf16, a lower --max_seq_length; "
    "or use smaller layers"
)
DEFAULT_BERT = "bert-large-uncased-whole-word-masking"
_Rule = tuple[Callable[[Any], bool], str]  # of a flag's value, and what is wrong with one that breaks it


# The groups of flags in the help, in order, and the flags of each; others stand before them.
_GROUPS = {
    "data": "data_dir task_name dev_share data dev text_a text_b label kind labels negatives split tasks max_rows call "
            "path_to_mrpc base_url snli_url no_verify distillation_logits_path train_features_path dev_features_path "
            "queries candidates text_column id_column",
    "model": "bert_model model bert_checkpoint_dir teacher cache_dir do_lower_case max_seq_length pooler_type "
             "pooler_num_top_hidden_layers siamese_head_type symmetric additional_embedding_layer_size fc_dims "
             "freeze_bert threshold rank_label rerank rerank_top shortlist",
    "training": "do_train do_eval recipe preset variants epochs num_train_epochs lr learning_rate head_lr dropout "
                "warmup_proportion schedule_in_updates distillation_coeff tune_positive_thresholds batch_size "
                "train_batch_size val_batch_size eval_batch_size gradient_accumulation_steps validate_every patience "
                "random_seed seed seeds run_evaluation_before_fine_tune",
    "output": "output output_dir overwrite_output_dir experiment_name store_checkpoints save_checkpoint_every_epoch "
              "checkpoint_dir file_log log_dir plot_metrics plots_dir plot rows scores format top_k append half export "
              "resamples",
    "long runs": "resume save_every trainer_checkpoint",
    "hardware": "disable_gpu no_cuda no_parallel gpu_id device precision fp16 bf16 padding gradient_checkpointing",
}  # fmt: skip
_GROUP_OF = {flag: title for title, flags in _GROUPS.items() for flag in flags.split()}


class Parser(argparse.ArgumentParser):
    """argparse with defaults and groups in the help, no abbreviations, and errors on one line.

    `doc` is a module's docstring: its first paragraph describes the program, and the others follow the flags.
    """

    def __init__(self, doc: str | None = None, **options: Any) -> None:
        if doc is not None:
            first, _, others = doc.partition("\n\n")
            width = shutil.get_terminal_size().columns - 2
            options |= {"description": textwrap.fill(first, width), "epilog": others.rstrip()}
            options |= {"formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(allow_abbrev=False, **options)
        self._titled = {title: self.add_argument_group(title) for title in _GROUPS}  # in this order

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As argparse does; a default that means something is added to the help as a user would type it."""
        default = options.get("default")
        shown = str(" ".join(map(str, default)) if isinstance(default, list) else default)
        if shown not in ("None", "False", "", argparse.SUPPRESS):
            options["help"] = f"{options['help']} (default: {shown})"
        title = _GROUP_OF.get(names[0].removeprefix("--"))
        if title is not None:
            return self._titled[title].add_argument(*names, **options)
        return super().add_argument(*names, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, after refusing words that logs, model cards and tables cannot show."""
        for word in sys.argv[1:] if args is None else args:
            if found := re.search("[\0\ud800-\udfff]", word):
                what = "has a NUL character" if found[0] == "\0" else "is not valid UTF-8"
                self.error(f"{word!a} {what}: give another name")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong on one line and exit with code 2."""
        message = printable(re.sub(r"//[^/\s]*@", "//", message))  # a password in an address
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} -h)\n")


def printable(text: str) -> str:
    """Escape control characters, which file names and servers can send, so that they cannot steer the terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@contextlib.contextmanager
def clear_errors(prog: str) -> Iterator[None]:
    """Report the error that ends the block in one line on stderr, and exit with its code.

    2: refused input; 1: work that cannot continue; 130: Ctrl-C; 143: SIGTERM; 141: the output's reader has stopped.
    """
    with signals.safe_console():
        try:
            with signals.caught(), parallel.process_group():
                yield
                if sys.stdout is not None:
                    sys.stdout.flush()  # now, so that its errors are reported like others
        except (InputError, RunError) as error:
            _leave(prog, f"error: {error}", error.exit_code, error)
        except signals.Stopped as stop:
            if not parallel.is_first():  # the first process reports it
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
            if (lacking := lack_of_memory(error)) is None:
                raise
            _leave(prog, f"error: out of memory ({lacking}): {_LESS_MEMORY}", 1, error)


def _leave(prog: str, message: str, code: int, why: BaseException) -> NoReturn:
    who = f"{prog}, process {parallel.rank()}" if parallel.launched() else prog
    print(printable(f"{who}: {' '.join(message.splitlines())}"), file=sys.stderr)
    raise SystemExit(code) from why


def program(prog: str, parse: Callable[..., Any], run: Callable[[Any], None]) -> Callable[..., None]:
    """The `main(argv=None)` of a script or command: runs it, and reports errors in one line (`clear_errors`)."""

    def main(argv: Sequence[str] | None = None) -> None:
        with clear_errors(prog):
            run(parse(argv))

    return main


def _flag_type(read: Callable[[str], Any], what: str, *rules: _Rule) -> Callable[[str], Any]:
    """A flag's type: reads the text with `read`, which raises ValueError unless it is `what`, and checks the rules."""

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


def whole_number_or(word: str, least: int) -> Callable[[str], int | str]:
    """A flag's type: a word, or an integer of at least `least`."""
    number = whole_number(least)
    return lambda text: word if text == word else number(text)


# Types of flags
seed = whole_number(-1)  # -1: a new one each run
extra_size = _whole((lambda n: n == -1 or n > 0, "is not a size: give 1 or more, or -1 for no layer"))  # a layer's
share = _number(_SHARE)
# near 1, at the 16 bits of its random numbers, nothing would be left
dropout_rate = _number(_SHARE, (lambda x: x <= MOST_DROPOUT, "would drop everything: give a lower rate"))
inner_share = _number((lambda x: 0 < x < 1, "is outside (0, 1): give a share above 0 and below 1"))
threshold = _number((lambda x: 0 < x < 1, "is outside (0, 1): give a probability above 0 and below 1"))
positive = _number(_POSITIVE)
whole_epochs = _number(_POSITIVE, (float.is_integer, "is not a whole number of epochs"))  # a float, as in the original


def file_word(text: str) -> str:
    """A flag's type: a name that becomes part of file names."""
    if text in ("", "..") or text != Path(text).name:
        raise argparse.ArgumentTypeError(f"{text!r} becomes part of file names: give a plain name, not a path")
    return text


def _new_name(text: str) -> tuple[str, str]:
    """A flag's type: TASK=NAME."""
    task, _, name = text.partition("=")
    if not (task and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=NAME")
    return task.lower(), file_word(name)


def _flags(**flags: dict[str, Any]) -> Callable[..., None]:
    """A function that adds the named flags to a parser, each with its argparse options."""

    def add(parser: argparse.ArgumentParser, given_only: bool = False) -> None:
        """Add the flags; with `given_only`, a flag that the user leaves out has no entry in the namespace."""
        for name, options in flags.items():
            action = parser.add_argument(f"--{name}", **options)
            if given_only:
                action.default = argparse.SUPPRESS

    return add


_SWITCH = {"action": "store_true"}
_DEVICE: dict[str, Any] = {
    "disable_gpu": _SWITCH | {"help": "use the CPU even if there is a GPU"},
    "gpu_id": {"type": whole_number(0), "default": 0, "help": "number of the GPU, from 0"},
}
_PRECISION = {
    "choices": PRECISIONS,
    "help": "of the encoder's products; tf32 and fp16 need CUDA (default: tf32 on CUDA, fp32 elsewhere)",
}
add_device_flags = _flags(**_DEVICE)
add_precision_flag = _flags(precision=_PRECISION)
_SENTENCES = {"type": whole_number(1), "default": 32, "help": "full-length sentences per step; more if shorter"}
# of the commands that use a student
add_inference_flags = _flags(batch_size=_SENTENCES, **_DEVICE, precision=_PRECISION)
add_student_flag = _flags(
    model={"required": True, "help": "a student: its folder, a run's folder, a checkpoint (.pt) or a hub name"}
)
add_columns_flags = _flags(
    text_column={
        "help": "column of the candidates, if their file is a table (default: text, of .csv and .jsonl files)"
    },
    id_column={"help": "column of their ids (default: id, if there is one)"},
)
add_task_flags = _flags(
    task_name={"required": True, "help": "GLUE task, or a JSON file that describes your own"},
    data_dir={"required": True, "help": "folder of the task's files"},
    dev_share={
        "type": inner_share,
        "help": f"of the training pairs, for dev, if a task of your own has no dev file (default: {DEFAULT_DEV_SHARE})",
    },
)
add_log_flags = _flags(
    file_log=_SWITCH | {"help": "also log to a file, and write a JSON line per epoch beside it"},
    log_dir={"default": "outputs/logs", "help": "folder for the log files"},
)
_POOLER = f"how hidden states become an embedding: {', '.join(POOLERS)}"
add_architecture_flags = _flags(
    bert_model={"default": DEFAULT_BERT, "help": "pre-trained encoder: hub name or folder"},
    do_lower_case=_SWITCH | {"help": "lower-case the text, for an uncased model"},
    pooler_type={"default": "concat_top_mean", "help": _POOLER, "choices": POOLERS, "metavar": "POOLER"},
    pooler_num_top_hidden_layers={"default": 4, "help": "how many of the top layers the pooler uses",
                                  "type": whole_number(1)},
    max_seq_length={"default": 128, "help": "token ids per sentence, with [CLS] and [SEP]", "type": whole_number(4)},
    siamese_head_type={"default": "concat", "choices": HEAD_TYPES,
                       "help": "head over embeddings u, v: layers on [u, v, u*v, |u-v|] (concat), these added to the "
                               "cosine (residual), or layers on u.v (dot)"},
    symmetric=_SWITCH | {"help": "for texts that may change places: learn and give the mean of both orders' scores"},
    additional_embedding_layer_size={"default": -1, "help": "size of a linear layer after the pooler, or -1 for none",
                                     "type": extra_size},
    fc_dims={"default": [512, 1], "help": "sizes of the head's layers; the last is 1, or 3 for three classes",
             "type": whole_number(1), "nargs": "+"},
    freeze_bert=_SWITCH | {"help": "train only the head and the additional layer"},
)  # fmt: skip
_PADDING = "pad rows only within attention (packed), to the batch's longest row (batch), or to --max_seq_length (max)"
add_padding_flag = _flags(  # the results are the same up to rounding
    padding={"choices": PADDINGS, "help": f"{_PADDING} (default: packed)"}
)
add_resume_flags = _flags(
    resume=_SWITCH | {"help": "continue the same run from its newest intact state, if there is one"},
    save_every={
        "type": whole_number(1),
        "help": "also write a state every N updates (default: only after epochs)",
        "metavar": "N",
    },
)
add_precision_flags = _flags(  # of training; `precision_of` reads them
    precision=_PRECISION,
    fp16=_SWITCH | {"help": "same as --precision fp16"},
    bf16=_SWITCH | {"help": "same as --precision bf16"},
)
_CALLED = "a task's name in the results, such as snli=SICK if the folder of snli holds SICK"
add_call_flag = _flags(  # `dict(args.call)` has the names by task
    call={"type": _new_name, "action": "append", "default": [], "metavar": "TASK=NAME", "help": _CALLED}
)


def tell_next(what: str, *words: object) -> None:
    """Log what was written, and the command line that uses it; empty words are left out."""
    logger.info("%s; next: %s", what, shlex.join(str(word) for word in words if word != ""))


def precision_of(args: argparse.Namespace) -> str:
    """The precision that the flags choose, of networks/encoder.py. Raises InputError if two flags choose."""
    chosen = [name for name in ("fp16", "bf16") if getattr(args, name, False)]
    if len(chosen) + (args.precision is not None) > 1:
        raise InputError(f"--{chosen[-1]}: give only one of --precision, --fp16 and --bf16")
    return args.precision or (chosen or ["auto"])[0]


class _ConsoleHandler(logging.Handler):
    """Writes above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record)), file=sys.stderr)


def set_up_logging(file: Path | None = None) -> None:
    """Log to the console and, if given, to a file, whose folder is made. Only the first of several processes logs."""
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
