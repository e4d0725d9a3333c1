"""Turn a checkpoint into a student's folder, which loads without flags, from there or from the hub.

    python -m dse export --trainer_checkpoint CHECKPOINT --output FOLDER

dse_train_runner.py makes such a folder of the best epoch itself: `best` in the run folder.
"""

import argparse
from pathlib import Path

from dse.commands import logger
from dse.system.files import check_file, check_writable


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--trainer_checkpoint", required=True, help="checkpoint that dse_train_runner.py wrote")
    parser.add_argument("--output", required=True, help="folder to write; an earlier student in it is replaced")


def run(args: argparse.Namespace) -> None:
    """Write a checkpoint's student as a folder that loads."""
    check_file(args.trainer_checkpoint, "--trainer_checkpoint", "dse_train_runner.py --store_checkpoints writes it")
    output = Path(args.output).resolve()
    check_writable(output.parent, "--output", output.name)
    from dse.models import DSESiameseClassifier
    from dse.storage.student_folder import check_replaceable

    check_replaceable(Path(args.output), "--output")
    model = DSESiameseClassifier.from_checkpoint(args.trainer_checkpoint)
    model.save_pretrained(args.output)
    epoch = model.origin["epoch"]
    when = "from within an epoch, so without metrics" if epoch is None else f"epoch {epoch}"
    logger.info("student of %s, %s: %s", model.task.name, when, args.output)
