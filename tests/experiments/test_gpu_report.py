"""What a check of a GPU found, as tables and lines; the numbers are made up."""

import pytest

from dse.experiments import gpu_report


def row(section, what, value, limit=None, goal=None, **more):
    held = value <= limit if limit is not None else value >= goal if goal is not None else None
    return {"section": section, "what": what, "value": value, "limit": limit, "goal": goal, "held": held, "more": more}


def update(name, share, ms):
    return row("updates", f"{name}: share of the peak", share, goal=0.35, ms=ms, useful_TFLOPs=120.4, GiB_reserved=8.84)


FOUND = {
    "machine": {"gpu": "NVIDIA X", "versions": {"torch": "2.11"}},
    "seconds": {"agreement": 3.0, "updates": 40.0},
    "rows": [
        row("agreement", "near", 9e-6, 1e-5),
        row("agreement", "far", 1e-7, 1e-5),
        row("agreement", "beyond", 3e-5, 1e-5),
        update("student, bf16, packed", 0.18, 22.4),
        update("student without dropout, bf16, packed", 0.22, 18.3),
        update("student, bf16, batch", 0.02, 191.0),
        update("student, tf32, packed", 0.26, 34.0),
        row("encode", "bf16, 16384 tokens: share of the peak", 0.49, goal=0.5, seconds=0.18),
        row("encode", "bf16, 32768 tokens: share of the peak", 0.51, goal=0.5, seconds=0.1734),
        row("search", "queries 1: copied for each call, seconds", 0.25),
        row("search", "queries 1: streamed, gain", 4.0, seconds=0.0625),
        row("search", "queries 1: resident, gain", 10.0, goal=5.0, seconds=0.025),
        row("search", "queries 64: copied for each call, seconds", 1.6),
        row("search", "queries 64: streamed, gain", 1.0, seconds=1.55),
        row("search", "queries 64: resident, gain", 1.1, seconds=1.5),
        row("states", "first save: seconds that the update is held up", 2.43, GiB=3.83, on_disk_after=7.6),
        row("states", "second save: seconds that the update is held up", 0.094, GiB=3.83, on_disk_after=5.3),
        row("transfers", "student, bf16, packed: reads by the host", 1, 3, launches=89.3, kernels=1693,
            idle_share=0.09),
        row("transfers", "student, bf16, packed: ms of the device", 21.6, products=5.5, lists=5.1, rest=11.0),
    ],
}  # fmt: skip


def test_goals_that_are_missed_are_no_failed_checks():
    assert gpu_report.in_one_line(FOUND) == "On an NVIDIA X with torch 2.11, 3 of 4 checks hold."


def test_the_row_nearest_to_its_limit_is_told():
    table = gpu_report.checks_table(FOUND).splitlines()
    assert table[2:] == ["| agreement | 2 of 3 | beyond: 3.0e-05 of 1e-05 |"]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (gpu_report.updates_table, "| student, bf16, packed | 22.4 | 120 | 18 % | 8.8 | 89 | 1,693 | 9 % |"),
        (gpu_report.updates_table, "| student, bf16, batch | 191.0 | 120 | 2 % | 8.8 | - | - | - |"),
        (gpu_report.kernels_table, "| student, bf16, packed | 5.5 | 0.0 | 5.1 | 11.0 | 21.6 |"),
        (gpu_report.encoding_table, "| bf16 | 49 % | 51 % |"),
        (gpu_report.searches_table, "| 1 | 0.250 | 0.062 | 0.025 |"),
        (gpu_report.summary, "| with `--dropout 0` | 18 | 22 % |"),
        (gpu_report.summary, "| 4,096 texts encoded, bf16 | 173 | 51 % |"),
        (gpu_report.summary, "| a query, 100,000 candidates | 25 | - |"),
    ],
)
def test_tables(table, expected):
    assert expected in table(FOUND).splitlines()


def test_states():
    told = gpu_report.states_line(FOUND)
    assert told.startswith("A state of 3.8 GiB holds up the training for 2.4 s the first time")
    assert told.endswith("for 0.09 s later. It is on the disk after 5.3 s.")
