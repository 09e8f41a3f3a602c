"""Streams: shards by address and streamed columns; every row once a cycle, the same again from any state."""

import functools
import http.server
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data.streams
from data.bad import Bad
from data.collate import Sample
from data.encode import Example
from data.loader import Loader, read_state
from data.mixture import Mixture
from data.packing import Packing
from data.pictures import load_image
from data.records import Record
from data.sources import open_data, open_source
from data.streams import ColumnStream, Item, ShardStream, Stream, StreamState, fetch_file, spread
from vlm import UserError

PER_SHARD = (5, 3, 7, 4)
TOTAL = sum(PER_SHARD)
BROKEN = {"1-1", "2-6"}


def picture(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard, rows in enumerate(PER_SHARD):
        with tarfile.open(folder / f"rows-{shard}.tar", "w") as tar:
            for row in range(rows):
                name = f"{shard}-{row}"
                answer = "" if name in BROKEN else name
                for suffix, content in (("png", picture(10 * shard + row)), ("txt", answer.encode())):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    asked: Counter[str] = Counter()
    failing: Counter[str] = Counter()

    def do_GET(self) -> None:
        Quiet.asked[self.path] += 1
        if Quiet.failing[self.path]:
            Quiet.failing[self.path] -= 1
            self.send_error(503)
            return
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(shards: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parquet")
    for shard, rows in enumerate(PER_SHARD):
        names = [f"{shard}-{row}" for row in range(rows)]
        table = {
            "question": ["?"] * rows,
            "answer": ["" if name in BROKEN else name for name in names],
            "image": [{"bytes": picture(10 * shard + row), "path": None} for row in range(rows)],
        }
        pq.write_table(pa.table(table), folder / f"rows-{shard}.parquet", row_group_size=2)
    return folder


@pytest.fixture(params=["tars", "columns"])
def stream(request: pytest.FixtureRequest, address: str, parquet: Path, monkeypatch: pytest.MonkeyPatch) -> Stream:
    monkeypatch.setattr(data.streams, "BLOCK", 4)
    name = f"{address}/rows-{{0..3}}.tar" if request.param == "tars" else str(parquet)
    made = open_data(name, Path(), None, None, stream=request.param == "columns")
    assert isinstance(made, ShardStream if request.param == "tars" else ColumnStream)
    return made


def said(item: Item) -> str:
    return "bad" if isinstance(item, Bad) else item.messages[-1]["content"][0]["text"]


def take(
    stream: Stream, count: int, state: StreamState | None = None, **options: Any
) -> list[tuple[Item, StreamState]]:
    rank, world = options.pop("rank", 0), options.pop("world", 1)
    shuffle = options.pop("shuffle", True)
    return list(islice(stream.read(state or StreamState(), 3, shuffle, rank, world), count))


ALL = Counter({f"{shard}-{row}": 1 for shard, rows in enumerate(PER_SHARD) for row in range(rows)})
for name in BROKEN:
    del ALL[name]
ALL["bad"] = len(BROKEN)


def test_a_cycle_has_every_row_once_with_its_picture(stream: Stream) -> None:
    taken = take(stream, 3 * TOTAL)
    cycles = [Counter(said(item) for item, _ in taken[n * TOTAL : (n + 1) * TOTAL]) for n in range(3)]
    assert cycles == [ALL] * 3
    order = [said(item) for item, _ in taken]
    assert order[:TOTAL] != order[TOTAL : 2 * TOTAL]
    for item, _ in taken:
        if isinstance(item, Record):
            shard, row = map(int, said(item).split("-"))
            assert load_image(item.images[0]).getpixel((0, 0)) == (10 * shard + row,) * 3


def test_streams_of_the_same_data_have_the_same_fingerprint(parquet: Path, tmp_path: Path) -> None:
    def streamed(folder: Path) -> str:
        return open_data(str(folder), Path(), None, None, stream=True).fingerprint()

    copy = Path(shutil.copytree(parquet, tmp_path / "copy"))
    assert streamed(parquet) == streamed(copy)
    (copy / "rows-3.parquet").unlink()
    assert streamed(parquet) != streamed(copy)
    names = ["http://a/{0..1}.tar", "http://a/{0..2}.tar"]
    assert len({open_data(name, Path(), None, None, True).fingerprint() for name in names}) == 2
    assert ColumnStream(Path("hub:a/b")).fingerprint() != ColumnStream(Path("hub:a/c")).fingerprint()


def test_unshuffled_rows_come_in_order(stream: Stream) -> None:
    expected = [f"{shard}-{row}" for shard, rows in enumerate(PER_SHARD) for row in range(rows)]
    expected = ["bad" if name in BROKEN else name for name in expected]
    assert [said(item) for item, _ in take(stream, TOTAL, shuffle=False)] == expected
    assert [said(item) for item in stream.head(6)] == expected[:6]
    assert [said(item) for item in stream.head(1000)] == expected


def test_going_on_from_any_state_gives_the_rest(stream: Stream) -> None:
    whole = take(stream, 2 * TOTAL + 3)
    for stop in (0, 3, 4, 9, TOTAL - 1, TOTAL, TOTAL + 5):
        state = StreamState(**json.loads(json.dumps(asdict(whole[stop][1]))))
        again = take(stream, 5, state)
        assert [item for item, _ in again] == [item for item, _ in whole[stop + 1 : stop + 6]]
        # what the library keeps of one place may be worded in several ways
        assert [(at.block, at.taken) for _, at in again] == [
            (at.block, at.taken) for _, at in whole[stop + 1 : stop + 6]
        ]


@pytest.mark.parametrize(("block", "group"), [(3, 1), (1, 4), (5, 4), (4, 100), (100, 2)])
def test_blocks_of_columns_are_read_whole_and_again_whatever_the_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, group: int
) -> None:
    for number, rows in enumerate(PER_SHARD):
        table = pa.table({"question": ["?"] * rows, "answer": [f"{number}-{row}" for row in range(rows)]})
        pq.write_table(table, tmp_path / f"rows-{number}.parquet", row_group_size=group)
    monkeypatch.setattr(data.streams, "BLOCK", block)
    tables: list[Any] = []
    look = data.streams.image_columns
    monkeypatch.setattr(data.streams, "image_columns", lambda schema: tables.append(schema) or look(schema))
    stream = ColumnStream(tmp_path, sorted(tmp_path.glob("*.parquet")))
    whole = take(stream, TOTAL)
    assert Counter(said(item) for item, _ in whole) == Counter(
        f"{number}-{row}" for number, rows in enumerate(PER_SHARD) for row in range(rows)
    )
    assert len(tables) == -(-TOTAL // block)  # one for each block: one for each row takes far longer
    for stop in (0, 5, 9, 16):
        state = StreamState(**json.loads(json.dumps(asdict(whole[stop][1]))))
        again = take(stream, TOTAL - stop - 1, state)
        assert [(item.where, said(item)) for item, _ in again] == [
            (item.where, said(item)) for item, _ in whole[stop + 1 :]
        ]


def test_a_stream_that_nobody_reads_on_ends_without_a_word(parquet: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom data.sources import open_data\n"
        "from data import streams\nfrom data.streams import StreamState\nstreams.BLOCK = 1\n"
        "rows = open_data(sys.argv[1], Path(), None, None, True).read(StreamState(), 0, False)\nprint(next(rows)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(parquet)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Record(")
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(("rows", "count"), [(1, 3), (2, 3), (3, 3), (5, 3), (39, 20), (40, 20), (41, 20)])
def test_spread_rows_are_so_many_and_lie_evenly(tmp_path: Path, rows: int, count: int) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "?", "answer": "a"}\n' * rows)
    source = open_source(tmp_path / "rows.jsonl")
    lines = [int(item.where.rpartition(":")[2]) for item in spread(source, count)]
    assert len(lines) == min(count, len(source))
    gaps = {after - before for before, after in pairwise([1, *lines[1:], len(source) + 1])}
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) > 0


@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_share_no_row_and_leave_none_out(stream: Stream, world: int) -> None:
    names: Counter[str] = Counter()
    for rank in range(world):
        own: list[str] = []
        for item, _ in stream.read(StreamState(), 3, True, rank, world):  # its first cycle ends where a row comes again
            where = item.where
            if where in own:
                break
            own.append(where)
            names[said(item)] += 1
    assert names == ALL


def test_a_broken_row_is_named_by_its_shard(address: str) -> None:
    stream = ShardStream(Path("x"), [f"{address}/rows-{n}.tar" for n in range(4)])
    bad = [item for item, _ in take(stream, TOTAL) if isinstance(item, Bad)]
    assert sorted(item.where for item in bad) == [f"{address}/rows-1.tar[1-1]", f"{address}/rows-2.tar[2-6]"]
    assert all("empty" in item.reason for item in bad)


class Answers:
    """A row becomes one token, a micro-batch the answers in it."""

    def encode(self, record: Record, rng: Any) -> Example:
        return Example([1], [int(rng.integers(1 << 40))], record.images, said(record))

    def load(self, examples: Any) -> list[Sample | Bad]:
        return [Sample(example) for example in examples]

    def collate(self, rows: Any) -> list[list[tuple[str, int]]]:
        return [[(sample.example.where, sample.example.labels[0]) for sample in row] for row in rows]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["none", "bucket", "pack"])
def test_a_loader_mixes_streams_with_numbered_rows_and_goes_on_anywhere(
    stream: Stream, tmp_path: Path, mode: str, workers: int
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"question": "?", "answer": f"n-{n}"}) for n in range(6)))
    mixture = Mixture([stream, open_source(rows)], 3, counts=[8, 6])

    def steps(count: int, state: Any = None) -> list[Any]:
        packing = Packing(mode, window=5)  # type: ignore[arg-type]
        loader = Loader(mixture, Answers(), 2, packing=packing, tokens=3, workers=workers)
        return list(islice(loader.steps(state), count))

    whole = steps(14)
    seen = [name for step in whole for made in step.micro_batches for row in made for name, _ in row]
    bad = sum(len(step.bad) for step in whole)
    assert len(seen) + bad == whole[-1].state.seen
    assert set(seen) & {f"n-{n}" for n in range(6)}
    for stop in (0, 4, 9):
        state = read_state(json.loads(json.dumps(asdict(whole[stop].state))))
        for ours, expected in zip(steps(3, state), whole[stop + 1 : stop + 4], strict=True):
            assert (ours.micro_batches, ours.bad, ours.state.seen) == (
                expected.micro_batches,
                expected.bad,
                expected.state.seen,
            )


def test_a_download_is_tried_again_and_given_up_with_a_reason(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    Quiet.failing["/rows-0.tar"] = 3
    before = Quiet.asked["/rows-0.tar"]
    fetched = fetch_file(f"{address}/rows-0.tar", tmp_path / "a.tar")
    assert fetched.stat().st_size > 0
    assert Quiet.asked["/rows-0.tar"] == before + 4
    with pytest.raises(UserError, match=r"gone\.tar: cannot be fetched .*404"):
        fetch_file(f"{address}/gone.tar", tmp_path / "b.tar")
    assert Quiet.asked["/gone.tar"] == 1  # asking again helps nothing
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch_file("http://127.0.0.1:1/a.tar", tmp_path / "c.tar")


@pytest.mark.parametrize(
    ("name", "stream", "message"),
    [
        ("ftp://host/a.tar", False, "http\\(s\\)://... of .tar files are read"),
        ("https://host/rows.jsonl", False, "http\\(s\\)://... of .tar files are read"),
        ("rows.jsonl", True, "Parquet files are streamed"),
    ],
)
def test_what_cannot_be_streamed_is_said(tmp_path: Path, name: str, stream: bool, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "?", "answer": "a"}')
    with pytest.raises(UserError, match=message):
        open_data(name, tmp_path, None, None, stream)
