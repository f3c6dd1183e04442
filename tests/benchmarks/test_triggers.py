"""What asking a trigger costs per sample, and a what-if over many thresholds."""

import os
import time

import numpy as np
import polars as pl
import torch
from racing import raced
from streams import make_frame, make_pipeline, replayed

import dynkit as dk
from dynkit import testing
from dynkit.drift import Threshold
from dynkit.triggers import Amount, Drift, Time, any_of

BLOCK = 1000


def test_asking_a_trigger() -> None:
    table = testing.stream(200_000)
    time_ns = table["timestamp"].to_physical()
    contestants = {
        "Amount": Amount(5000),
        "Time": Time("1d"),
        "Time, by the calendar": Time("1mo"),
        "any_of(Amount, Time)": any_of(Amount(5000), Time("1d")),
    }

    def asked(trigger: object) -> int:
        view = testing.StreamView(start_ns=int(time_ns[0]), now_ns=int(time_ns[0]))
        fired = 0
        for start in range(0, table.height, BLOCK):
            view.past, view.now_ns = table.head(start), int(time_ns[max(start - 1, 0)])
            view.samples_since_trigger = start % 5000
            fired += sum(1 for _ in trigger(table.slice(start, BLOCK), view))  # type: ignore[operator]
        return fired

    seconds = raced({name: lambda trigger=trigger: asked(trigger) for name, trigger in contestants.items()})
    print("\n| trigger | us per sample |\n|---|---|")
    for name, some in seconds.items():
        print(f"| {name} | {some / table.height * 1e6:.3f} |")


def test_what_if_over_fifty_thresholds(tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.set_num_threads(os.cpu_count() or 1)  # as outside of tests
    dataset = dk.Workspace(tmp_path).ingest("s", make_frame(300_000, minutes=1), timestamp="when", label="late")
    print("\n| compared | looks | thresholds | triggers | s |\n|---|---|---|---|---|")
    for on in ("fields", "embedding"):
        trigger = Drift(every=5000, on=on, criterion=Threshold(0.001))
        run = replayed(make_pipeline(dataset, name=on, trigger=trigger, selection=dk.selection.Recent(n=5000)))
        scores = run.decisions()["score"].drop_nulls()
        thresholds = np.quantile(scores, np.linspace(0.02, 0.98, 50)).tolist()
        begin = time.perf_counter()
        found = dk.what_if(run, drift_threshold=thresholds).frame
        took = time.perf_counter() - begin
        triggers = found["triggers"].slice(1)
        print(f"| {on} | {scores.len() + 1} | 50 | {triggers.min()} to {triggers.max()} | {took:.2f} |")
        for at in (5, 25, 45):
            if on == "fields":
                again = Drift(every=5000, on=on, criterion=Threshold(thresholds[at]))
                really = replayed(make_pipeline(dataset, trigger=again, selection=dk.selection.Recent(n=5000)))
                same = [one.position for one in really.trained] == found["positions"][at + 1].to_list()
                print(
                    f"| really run with threshold {at} | | | {len(really.trained)} | {'equal' if same else 'DIFFERS'} |"
                )
    assert isinstance(found, pl.DataFrame)
