"""Kill the stages at random moments (kill -9), run the same commands again, and compare with a run that was left alone.

    python tests/soak_resume.py --kills 25

Each time fine-tuning, logits and student training of a tiny model run one after the other in a process of their own
(processes.py), which is killed once; the same again then goes on to the end. Weights, optimizer, random numbers,
metrics, logits and the saved student must be the same bits. Ends with `identical: K of N`; exit code 1 unless all were.
Not collected by pytest, whose suite has a shorter form (test_soak.py).
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from processes import ROOT, ended, start

sys.path.insert(0, str(ROOT))


def make_inputs(folder: Path, pairs: int) -> None:
    """A tiny BERT with dropout, and made-up pairs."""
    from dse.experiments.synthetic import write_pairs, write_tiny_bert

    write_tiny_bert(folder / "bert", seed=0, hidden_size=32)
    (folder / "data").mkdir()
    for split, count, seed in (("train", pairs, 1), ("dev", 60, 2)):
        write_pairs(folder / "data" / f"{split}.tsv", count, seed)


def run_stages(folder: str) -> None:
    """The three stages, in this process, each going on where it stopped."""
    import dse_train_runner
    import finetune_bert
    import run_distillation_logits_creator

    common = f"--task_name mrpc --data_dir {folder}/data --do_lower_case"
    finetune_bert.main(
        f"{common} --bert_model {folder}/bert --do_train --do_eval --max_seq_length 48 --train_batch_size 8 "
        f"--learning_rate 1e-3 --num_train_epochs 2 --output_dir {folder}/teacher --resume --save_every 7".split()
    )
    run_distillation_logits_creator.main(
        f"{common} --train_features_path {folder}/data/train_bert_48_mrpc --bert_checkpoint_dir {folder}/teacher "
        f"--max_seq_length 48 --batch_size 2 --output_dir {folder} --save_every 5".split()
    )
    dse_train_runner.main(
        f"{common} --distillation_logits_path {folder}/teacher_logits.pt --bert_model {folder}/bert --epochs 2 "
        f"--max_seq_length 32 --pooler_num_top_hidden_layers 2 --fc_dims 8 1 --batch_size 4 --lr 1e-3 "
        f"--store_checkpoints --checkpoint_dir {folder}/checkpoints --resume --save_every 9".split()
    )


def outcome(folder: Path) -> dict[str, object]:
    """All that must be the same, by name; times and stamps apart."""
    from dse.storage.checkpoint import Checkpoint
    from dse.system.files import sha256_file

    training = json.loads((folder / "teacher" / "training.json").read_text())
    (run,) = (folder / "checkpoints").iterdir()
    found: dict[str, object] = {
        "teacher": sha256_file(folder / "teacher" / "model.safetensors"),
        "teacher's results": (folder / "teacher" / "eval_results.txt").read_text(),
        "teacher's history": [{**record, "seconds": 0} for record in training["history"]],
        "teacher's folder": sorted(path.name for path in (folder / "teacher").iterdir()),
        "logits": sha256_file(folder / "teacher_logits.pt"),
        "best student": sha256_file(run / "best" / "model.safetensors"),
    }
    for path in sorted(run.glob("*.pt")):
        checkpoint = vars(Checkpoint.read(path))
        trainer = checkpoint["trainer"]
        moments = [tensor for state in trainer["optimizer"]["state"].values() for tensor in state.values()]
        name = path.name.rsplit("_epoch_", 1)[1]
        found[f"student {name}"] = [
            [{**record, "seconds": 0} for record in trainer["history"]],
            [tensor.numpy().tobytes() for tensor in [*checkpoint["model"].values(), *moments, *trainer["rng"]["cpu"]]],
        ]
    return found


def soak(kills: int, seed: int, pairs: int, folder: Path) -> int:
    """How many of the killed runs ended as the one that was left alone."""
    rng, identical = random.Random(seed), 0
    make_inputs(folder / "inputs", pairs)
    shutil.copytree(folder / "inputs", folder / "whole")
    process, started = start(run_stages, str(folder / "whole"), log=folder / "whole.log"), time.monotonic()
    ended(process, folder / "whole.log")
    seconds = time.monotonic() - started
    expected = outcome(folder / "whole")
    for number in range(1, kills + 1):
        place, log = folder / "killed", folder / f"{number}.log"
        shutil.copytree(folder / "inputs", place)
        moment = rng.uniform(0.0, 1.0) * seconds
        process = start(run_stages, str(place), log=log)
        process.join(moment)
        process.kill()
        process.join()
        how = "killed" if process.exitcode else "ended"
        said = [line for line in log.read_text().splitlines() if " INFO " in line or " WARNING " in line]
        process = start(run_stages, str(place), log=log)
        process.join()
        found = outcome(place) if process.exitcode == 0 else {}
        different = [name for name in expected if found.get(name) != expected[name]]
        identical += not different
        result = f"exit code {process.exitcode}, different: {', '.join(different)}" if different else "identical"
        print(f"{number:>3}: {how} after {moment:4.1f} s, {len(said)} lines in: {result}", flush=True)
        if different:
            print(log.read_text()[-3000:])
        shutil.rmtree(place)
    print(f"identical: {identical} of {kills}")
    return identical


def main() -> None:
    """Parse the flags; run the soak."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=1200, help="training pairs: how long a run takes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dse-soak-") as folder:
        identical = soak(args.kills, args.seed, args.pairs, Path(folder))
    raise SystemExit(0 if identical == args.kills else 1)


if __name__ == "__main__":
    main()
