"""A catalog in PostgreSQL: a real server. The strongest tests of store, lineage and runs, again; and what is only there."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
import torch
from postgres import database, new_database, postgres  # noqa: F401  # fixtures
from streams import make_frame, make_pipeline

# The same on PostgreSQL, where `ws` is in this file: put, load, gc, repack, four writers, kills; names, edges, notes, search,
# place, export, tests, bisection, blame, cascade, merge, erasure; runs, killed and gone on.
from test_lineage import (  # noqa: F401
    test_a_model_of_unknown_origin_is_placed_under_its_parent,
    test_a_name_moves_only_from_the_model_that_one_has_seen,
    test_a_run_leaves_its_whole_provenance,
    test_search_finds_the_models_of_a_run_and_of_a_dataset,
    test_the_common_ancestor_is_the_lowest_one,
    test_the_graph_is_exported,
    test_what_people_bring_gets_its_place_name_tags_and_note,
)
from test_lineage_cascade import test_trainings_of_a_run_are_done_again_from_the_new_version  # noqa: F401
from test_lineage_erasure import test_samples_are_erased_twice_in_a_row  # noqa: F401
from test_lineage_merge import test_models_are_compared_with_their_scores  # noqa: F401
from test_lineage_remotes import big, edges
from test_lineage_tests import (  # noqa: F401
    test_models_of_a_workspace_are_bisected_and_results_remembered,
    test_results_are_remembered_by_model_code_and_data,
)
from test_live import test_a_live_run_goes_on_after_its_process_was_killed  # noqa: F401
from test_models_store import (  # noqa: F401
    test_four_writers_with_gc_and_repack_beside_them,
    test_gc_keeps_what_others_are_predicted_from_and_frees_the_rest,
    test_no_kill_loses_or_spoils_a_model,
    test_repack_uses_a_lineage_that_became_known_later,
)
from test_pipeline import test_runs_are_found_by_name_and_beginning_of_the_id  # noqa: F401
from test_remote import bucket, server  # noqa: F401  # fixtures

import dynkit as dk
from dynkit.catalog import Catalog, evaluations, events, insert_missing, names, runs, upsert
from dynkit.errors import Conflict, InvalidInput, StorageError


@pytest.fixture
def ws(tmp_path: Path, database: str) -> dk.Workspace:  # noqa: F811
    return dk.Workspace(tmp_path / "ws", catalog=database)


@pytest.fixture
def dataset(ws: dk.Workspace) -> dk.Dataset:
    return ws.ingest("stream", make_frame(), timestamp="when", label="late")


def test_the_workspace_remembers_its_database(ws: dk.Workspace, database: str, tmp_path: Path) -> None:  # noqa: F811
    ws.lineage.add(big(0), name="m")
    assert not (ws.path / "catalog.sqlite").exists()
    assert (ws.path / "catalog.url").read_text().strip() == database
    for again in (dk.Workspace(ws.path), dk.Workspace(ws.path, catalog=database)):
        assert again.models.names() == ws.models.names()
    command = [sys.executable, "-c", "from dynkit.cli import main; main()", "lineage", "log", "-w", str(ws.path)]
    assert "1 models" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    with pytest.raises(Conflict, match="has its catalog in postgresql:"):
        dk.Workspace(ws.path, catalog="postgresql://elsewhere/x")
    dk.Workspace(tmp_path / "plain")
    with pytest.raises(Conflict, match=r"has its catalog in .*catalog\.sqlite"):
        dk.Workspace(tmp_path / "plain", catalog=database)
    with pytest.raises(Conflict, match="belongs to a workspace that keeps its files in its own directory"):
        dk.Workspace(tmp_path / "other", catalog=database)


def test_a_pipeline_runs_in_the_background(ws: dk.Workspace, dataset: dk.Dataset, tmp_path: Path) -> None:
    run = make_pipeline(dataset).start()
    assert run.wait(120) == "finished"
    local = dk.Workspace(tmp_path / "local").ingest("stream", make_frame(), timestamp="when", label="late")
    expected = make_pipeline(local).start()
    assert expected.wait(120) == "finished"
    assert [one.model for one in run.trained] == [one.model for one in expected.trained]
    assert run.composite()["value"].to_list() == expected.composite()["value"].to_list()
    assert ws.models.stats().catalog_bytes > 0


def test_a_clone_takes_all_and_gives_it_back(ws: dk.Workspace, postgres: str, tmp_path: Path) -> None:  # noqa: F811
    base = ws.lineage.add(big(0), name="main", note="start")
    copy = dk.Workspace.clone(ws.path, tmp_path / "copy", catalog=new_database(postgres))
    child = copy.lineage.add({**big(0), "head": torch.ones(10)}, parents=[base], name="child")
    assert copy.lineage.push().models == (child,)
    assert edges(copy) == edges(ws)
    assert ws.models.load("child")["head"].equal(torch.ones(10))


def test_directories_on_one_database_and_bucket_are_one_workspace(
    bucket: str,  # noqa: F811
    database: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    pytest.importorskip("obstore")
    a = dk.Workspace(tmp_path / "a", storage=bucket, catalog=database)
    a.ingest("stream", make_frame(500), timestamp="when", label="late")
    b = dk.Workspace(tmp_path / "b", catalog=database)
    assert b.catalog.storage == bucket
    assert len(b.dataset("stream")) == 500
    base = a.lineage.add(big(0), name="main")
    writers = [a, b, dk.Workspace(tmp_path / "c", catalog=database)]

    def add(ws: dk.Workspace, offset: float) -> None:
        for i in range(6):
            ws.lineage.add({**big(0), "head": torch.full((10,), offset + i)}, parents=[base], name=f"{offset + i}")
            ws.models.gc()

    threads = [threading.Thread(target=add, args=(one, 10.0 * i)) for i, one in enumerate(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in writers:
        assert len(one.models) == 19
        assert one.models.fsck(deep=True) == []
        assert one.models.load("25.0")["head"].equal(torch.full((10,), 25.0))
    run = make_pipeline(b.dataset("stream"), trigger=dk.triggers.Amount(200)).start()
    assert run.wait(120) == "finished"
    seen = a.run(run.id)
    assert seen.composite().equals(run.composite())
    assert a.models.load(seen.trained[-1].model).keys() == b.models.load(run.trained[-1].model).keys()
    elsewhere = "are not in .*; do this in the directory where it was started"
    with pytest.raises(StorageError, match=elsewhere):
        a.lineage.erase(a.dataset("stream").keys()[:1])
    cancelled = make_pipeline(b.dataset("stream"), name="cancelled").start().cancel()
    cancelled.wait(60)
    with pytest.raises(StorageError, match=elsewhere):
        a.run(cancelled.id).resume()
    assert b.run(cancelled.id).resume().wait(60) == "finished"
    assert b.lineage.erase(a.dataset("stream").keys()[:1], dry_run=False).done


def test_schemas_of_one_database_are_workspaces_of_their_own(database: str, tmp_path: Path) -> None:  # noqa: F811
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA one; CREATE SCHEMA two")
    one, two, rest = (
        dk.Workspace(tmp_path / name, catalog=database + option)
        for name, option in (
            ("one", "&options=-csearch_path%3Done"),
            ("two", "&options=-csearch_path%3Dtwo"),
            ("rest", ""),
        )
    )
    one.models.put({"w": torch.zeros(3)})
    one.catalog.scrub()
    assert (len(one.models), len(two.models), len(rest.models)) == (1, 0, 0)
    assert len(dk.Workspace(one.path).models) == 1


def test_who_looks_after_packs_is_alone(ws: dk.Workspace, tmp_path: Path) -> None:
    order: list[str] = []

    def other() -> None:
        with Catalog(ws.path).alone(tmp_path):
            order.append("other")

    thread = threading.Thread(target=other)
    with ws.catalog.alone(tmp_path):
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def test_a_writer_sees_what_was_committed_while_it_waited(ws: dk.Workspace) -> None:
    model = ws.lineage.add(big(0))

    def count(times: int) -> None:
        for _ in range(times):
            with ws.catalog.write() as connection:
                last = connection.scalar(sa.select(sa.func.max(names.c.changed_ns)))
                row = {"name": f"n{last or 0}", "model": model, "changed_ns": (last or 0) + 1}
                connection.execute(sa.insert(names), row)

    threads = [threading.Thread(target=count, args=(20,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(ws.models.names()) == {f"n{i}" for i in range(80)}


def test_a_reader_has_one_snapshot_and_cannot_write(ws: dk.Workspace) -> None:
    model = ws.lineage.add(big(0))
    row = {"name": "new", "model": model, "changed_ns": 0}
    with ws.catalog.read() as reader:
        assert reader.execute(sa.select(names)).all() == []
        with ws.catalog.write() as writer:
            writer.execute(sa.insert(names), row)
        assert reader.execute(sa.select(names)).all() == []
    with pytest.raises(StorageError, match="read-only"), ws.catalog.read() as reader:
        reader.execute(sa.delete(names))


def test_values_mean_the_same_as_in_a_file(ws: dk.Workspace, tmp_path: Path) -> None:
    """NaN in JSON and in scores, NUL in what a process printed, 64-bit numbers, text in the order of its bytes."""
    told = []
    for one in (ws, dk.Workspace(tmp_path / "file")):
        model = one.lineage.add(big(0))
        with one.catalog.write() as connection:
            row = {"id": "r", "name": "r", "digest": "", "dataset": "d", "dataset_version": 1, "created_ns": 2**62}
            owner = {"host": "", "pid": 1, "process_started": 0.5, "heartbeat_ns": 0, "status": "failed"}
            data = {"loss": float("nan"), "text": "a\0b", "none": None}
            connection.execute(
                sa.insert(runs), {**row, **owner, "pipeline": data, "progress": {}, "error": "x\0y", "state": b"\0"}
            )
            connection.execute(sa.insert(events), {"run": "r", "seq": 0, "time_ns": 0, "kind": "k", "data": data})
            score = {"run": "r", "model": model, "window_start_ns": -(2**62), "window_end_ns": 0, "metric": "m"}
            rest = {"slice": "", "metric_index": 0, "window_anchor_ns": 0, "value": float("nan"), "samples": 2**40}
            connection.execute(sa.insert(evaluations), {**score, **rest})
            for name in ("b", "B", "a", "ä", "_", "a b", "aB"):
                insert_missing(connection, names, {"name": name, "model": model, "changed_ns": 1})
            assert (
                insert_missing(connection, names, [{"name": n, "model": model, "changed_ns": 2} for n in "abcd"]) == 2
            )
            upsert(connection, names, {"name": "a", "model": model, "changed_ns": 3})
        with one.catalog.read() as connection:
            run = connection.execute(sa.select(runs)).one()
            (value,) = connection.scalars(sa.select(evaluations.c.value))
            times = dict(connection.execute(sa.select(names.c.name, names.c.changed_ns)).all())  # type: ignore[arg-type]
            data = connection.scalar(sa.select(events.c.data))
        assert str(data.pop("loss")) == "nan"
        told.append((run.created_ns, run.state, value, times, list(one.models.names()), data))
        assert run.error.startswith("x")
    assert told[0] == told[1]
    assert told[0][4] == ["B", "_", "a", "a b", "aB", "b", "c", "d", "ä"]


def test_bytes_of_deleted_rows_are_gone_from_the_servers_files(ws: dk.Workspace, postgres: str, database: str) -> None:  # noqa: F811
    secret = "secret-" + "5ac2e7" * 4
    model = ws.lineage.add(big(0))
    for i in range(50):
        ws.lineage.note(model, f"{secret} {i}")
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CHECKPOINT")  # what was written is in the files
        folder = Path(connection.execute("SHOW data_directory").fetchone()[0])  # type: ignore[index]
        query = "SELECT oid FROM pg_database WHERE datname = %s"
        oid = connection.execute(query, [database.partition("?")[0].rpartition("/")[2]]).fetchone()[0]  # type: ignore[index]

        def found() -> bool:
            connection.execute("CHECKPOINT")
            return any(secret.encode() in path.read_bytes() for path in (folder / "base" / str(oid)).iterdir())

        assert found()
        with ws.catalog.write() as writer:
            writer.exec_driver_sql("DELETE FROM notes")
        assert found()
        ws.catalog.scrub()
        assert not found()


def test_who_may_not_write_the_tables_anew_is_told(
    ws: dk.Workspace,
    postgres: str,  # noqa: F811
    database: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    user = database.partition("?")[0].rpartition("/")[2].replace("test_", "user_")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            f"CREATE ROLE {user} LOGIN; GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {user}"
        )
    (tmp_path / "guest").mkdir()
    (tmp_path / "guest/catalog.url").write_text(database.replace("postgres:@", f"{user}@"))
    guest = dk.Workspace(tmp_path / "guest")
    with pytest.raises(StorageError, match=r"was not written anew: .*vacuum"):
        guest.catalog.scrub()


def test_scrubbing_waits_for_readers_that_may_still_see_what_was_deleted(ws: dk.Workspace) -> None:
    model = ws.lineage.add(big(0), note="deleted")
    done: list[float] = []

    def scrub() -> None:
        Catalog(ws.path).scrub()
        done.append(time.monotonic())

    thread = threading.Thread(target=scrub)
    with ws.catalog.read() as reader:
        reader.execute(sa.select(names)).all()
        with ws.catalog.write() as writer:
            writer.exec_driver_sql("DELETE FROM notes")
        thread.start()
        time.sleep(0.5)
        end = time.monotonic()
    thread.join()
    assert done[0] > end
    assert ws.lineage.show(model).notes == ()


def test_what_goes_wrong_is_told(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with pytest.raises(InvalidInput, match="PGPASSWORD") as caught:
        dk.Workspace(tmp_path / "a", catalog="postgresql://me:hush@host:5/db?password=hush2&sslmode=require")
    assert "hush" not in str(caught.value) and "'postgresql://me@host:5/db?sslmode=require'" in str(caught.value)
    for wrong in ("mysql://host/db", "nonsense", "postgresql://host", "postgresql://me:hush@host:x/db"):
        with pytest.raises(InvalidInput, match="must be like 'postgresql://user@host/database'") as caught:
            dk.Workspace(tmp_path / "a", catalog=wrong)
        assert "hush" not in str(caught.value)
    assert not (tmp_path / "a").exists()
    with pytest.raises(StorageError, match=r"cannot be used: .*refused"):
        dk.Workspace(tmp_path / "b", catalog="postgresql://127.0.0.1:1/db")
    with pytest.raises(StorageError, match="does not exist"):
        dk.Workspace(tmp_path / "b", catalog=database.replace("/test_", "/no_such_"))
    dk.Workspace(tmp_path / "b", catalog=database)  # nothing of the failed attempts stayed
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StorageError, match=r"pip install 'dynkit\[postgres\]'"):
        dk.Workspace(tmp_path / "b")
