"""The commands of `python -m dse`: modules with `add_flags`, `run` and a docstring whose first line is the help."""

import argparse
import logging
from typing import TYPE_CHECKING

from dse import cli
from dse.system.device import describe_device, select_device

if TYPE_CHECKING:
    from dse.models import DSESiameseClassifier

logger = logging.getLogger("dse")


def load_student(args: argparse.Namespace) -> "DSESiameseClassifier":
    """The student of --model, on the device that the flags choose."""
    from dse.models import DSESiameseClassifier

    precision = cli.precision_of(args)
    device = select_device(args.disable_gpu, args.gpu_id, precision)
    model = DSESiameseClassifier.from_pretrained(args.model)
    model.network.precision = precision
    logger.info("student of %s from %s on %s", model.task.name, args.model, describe_device(device, precision))
    return model.to(device)
