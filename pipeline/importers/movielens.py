"""MovieLens-100K as the log of a recommender: 100,000 ratings of 943 users for 1,682 films.

MovieLens has ratings, not exposures. A user's ratings that follow each other within 30 seconds stand for one
shown list; a rating of 4 or 5 is a finished film, of 1 or 2 a skipped one. GroupLens owns the data and
allows research use; see https://grouplens.org/datasets/movielens/100k/.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import polars as pl

from features.encoding import bucket_column
from features.errors import CorankError
from features.schema import PARTITION_FORMATS, SECOND
from pipeline.importers.target import imported, table_path, write_table

GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
RECBOLE_WHEEL = "recbole==1.2.1"
CONNECT_SECONDS, DOWNLOAD_SECONDS = 3.0, 60.0

REQUEST_GAP = 30 * SECOND
"""Ratings further apart than this begin a new request."""
REQUEST_CANDIDATES = 50
"""A request never has more candidates than this; longer runs of ratings are cut."""

# fmt: off
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
# fmt: on
"""In the order of the flags in GroupLens's u.item."""

GROUPLENS_FILES = ("u.data", "u.user", "u.item")
RECBOLE_FILES = ("ml-100k.inter", "ml-100k.user", "ml-100k.item")
TABLES = ("users", "items", "events", "impressions")
"""In the order of writing, impressions last: all that they refer to is there before them."""
FORMAT = 1
"""To be raised whenever the same source gives different tables, so that a new import replaces them."""

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Source:
    """The same three frames from either layout.

    Attributes:
        ratings: user_id, item_id (text), rating (1 … 5), ts (microseconds UTC).
        users: user_id, age, gender, occupation, zip_code.
        items: item_id, title (without the year), year (null if unknown), genres (list, at least one).
    """

    ratings: pl.DataFrame
    users: pl.DataFrame
    items: pl.DataFrame

    def digest(self) -> str:
        """128-bit digest of the content, whichever layout it came from."""
        state = hashlib.blake2b(digest_size=16)
        for frame in (self.ratings, self.users, self.items):
            state.update(frame.write_ndjson().encode())
        return state.hexdigest()


def import_movielens(
    target: str | Path,
    source: str | Path | None = None,
    buckets: int = 4,
    say: Callable[[str], None] = print,
) -> dict[str, int]:
    """Write MovieLens-100K as Delta tables: impressions, events, users and items.

    Impressions and events are partitioned by week and user bucket. Each table is one commit; a table that
    already holds this very import is left alone.

    Args:
        target: folder of the tables, local or ``s3://``.
        source: a local folder or zip in GroupLens's or RecBole's layout. None: GroupLens's site or, where it
            cannot be reached, the copy inside the PyPI package ``recbole``, which is unpacked, never installed.
        buckets: user-hash buckets; best the number in the config.
        say: takes lines of progress.

    Returns:
        rows per table.

    Raises:
        CorankError: no source could be had or read, or the target holds tables that no import wrote.
    """
    content = _parse(_fetch(say) if source is None else _read_local(Path(source).expanduser()))
    tables = _tables(content, buckets)
    marker = f"movielens/{FORMAT}/{buckets}/{content.digest()}"
    paths = {name: table_path(target, name) for name in TABLES}
    stale = [name for name in TABLES if imported(paths[name]) != marker]
    for name in stale:
        write_table(paths[name], tables[name], marker)
        say(f"{name}: {tables[name].height:,} rows")
    if not stale:
        say(f"{target} already holds this import; nothing to do")
    return {name: tables[name].height for name in TABLES}


def split_requests(ratings: pl.DataFrame) -> pl.DataFrame:
    """Group the ratings of each user into requests.

    Args:
        ratings: user_id, item_id, rating, ts.

    Returns:
        the ratings ordered by (user, ts, item) with request_id, position (from 0) and request_ts, the ts
        of the request's first rating: no rating of a request is earlier than the request.
    """
    rank = pl.int_range(pl.len())
    return (
        ratings.sort("user_id", "ts", pl.col("item_id").cast(pl.Int64))
        .with_columns(run=(pl.col("ts").diff() > REQUEST_GAP).fill_null(False).cum_sum().over("user_id"))
        .with_columns(position=(rank % REQUEST_CANDIDATES).cast(pl.Int32).over("user_id", "run"))
        .with_columns(number=(pl.col("position") == 0).cum_sum().over("user_id") - 1)
        .with_columns(
            request_id=pl.format("u{}-{}", "user_id", pl.col("number").cast(pl.String).str.zfill(6)),
            request_ts=pl.col("ts").first().over("user_id", "number"),
        )
        .drop("run", "number")
    )


def _tables(source: Source, buckets: int) -> dict[str, pl.DataFrame]:
    bucket = bucket_column(pl.col("user_id"), buckets).cast(pl.String).alias("bucket")
    rated = split_requests(source.ratings)
    impressions = rated.select(
        "request_id",
        "user_id",
        "item_id",
        ts="request_ts",
        position="position",
        finish=(pl.col("rating") >= 4).cast(pl.Int8),
        skip=(pl.col("rating") <= 2).cast(pl.Int8),
        dt=_week("request_ts"),
    )
    genre = source.items.select("item_id", genre=pl.col("genres").list.first())
    events = (
        # Ids in order of time, then item, so that (ts, event_id) orders a user as split_requests does.
        rated.sort("ts", pl.col("user_id").cast(pl.Int64), pl.col("item_id").cast(pl.Int64))
        .with_row_index("event_id")
        .join(genre, on="item_id", how="left", maintain_order="left")
        .select(
            pl.col("event_id").cast(pl.Int64),
            "user_id",
            "item_id",
            pl.col("rating").cast(pl.String).alias("action"),
            "genre",
            "ts",
            _week("ts").alias("dt"),
        )
    )
    since_ever = pl.lit(0, pl.Int64).alias("updated_at")
    return {
        "users": source.users.with_columns(since_ever),
        "items": source.items.with_columns(since_ever),
        "events": events.with_columns(bucket),
        "impressions": impressions.with_columns(bucket),
    }


def _week(ts: str) -> pl.Expr:
    """The weekly partition of a ts column, as :func:`features.schema.partition_of` names it."""
    return pl.from_epoch(ts, "us").dt.truncate("1w").dt.strftime(PARTITION_FORMATS["week"])


def _fetch(say: Callable[[str], None]) -> Files:
    """The files from GroupLens or else from RecBole's wheel."""
    try:
        say(f"downloading {GROUPLENS_URL}")
        return _download_grouplens()
    except (httpx.HTTPError, CorankError) as error:
        grouplens = f"{type(error).__name__}: {error}"
    try:
        say(f"GroupLens cannot be had ({grouplens}); falling back to the copy in {RECBOLE_WHEEL} on PyPI")
        return _download_recbole()
    except (OSError, subprocess.SubprocessError, CorankError) as error:
        details = getattr(error, "stderr", None) or str(error)
        recbole = details.strip().splitlines()[-1] if details.strip() else type(error).__name__
    raise CorankError(
        "MovieLens-100K could not be had.\n"
        f"  tried {GROUPLENS_URL}: {grouplens}\n"
        f"  tried pip download {RECBOLE_WHEEL}: {recbole}\n"
        f"Download {GROUPLENS_URL} elsewhere, copy it here, and name the zip as the source of the import."
    )


def _download_grouplens() -> Files:
    timeout = httpx.Timeout(DOWNLOAD_SECONDS, connect=CONNECT_SECONDS)
    response = httpx.get(GROUPLENS_URL, timeout=timeout, follow_redirects=True).raise_for_status()
    return _unzip(io.BytesIO(response.content), GROUPLENS_URL)


def _download_recbole() -> Files:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, RECBOLE_WHEEL]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=2 * DOWNLOAD_SECONDS)
        (wheel,) = Path(folder).glob("*.whl")
        return _unzip(wheel, RECBOLE_WHEEL)


def _read_local(path: Path) -> Files:
    if path.is_dir():
        files = {file.name: file for folder in (path / "ml-100k", path) for file in folder.glob("*") if file.is_file()}
        return _one_layout({name: file.read_bytes() for name, file in files.items() if _wanted(name)}, str(path))
    if path.is_file():
        return _unzip(path, str(path))
    raise CorankError(f"source {path}: no such folder or file. Name a folder or zip that holds MovieLens-100K.")


def _unzip(archive: Path | io.BytesIO, name: str) -> Files:
    try:
        with zipfile.ZipFile(archive) as opened:
            members = {Path(member).name: member for member in opened.namelist() if _wanted(Path(member).name)}
            return _one_layout({file: opened.read(member) for file, member in members.items()}, name)
    except zipfile.BadZipFile as error:
        raise CorankError(f"{name} is not a zip file: {error}") from None


def _wanted(name: str) -> bool:
    return name in GROUPLENS_FILES or name in RECBOLE_FILES


def _one_layout(files: Files, name: str) -> Files:
    for layout in (GROUPLENS_FILES, RECBOLE_FILES):
        if all(file in files for file in layout):
            return {file: files[file] for file in layout}
    raise CorankError(
        f"{name} holds neither {', '.join(GROUPLENS_FILES)} (GroupLens) nor {', '.join(RECBOLE_FILES)} (RecBole)."
    )


def _parse(files: Files) -> Source:
    try:
        ratings, users, items = _grouplens_frames(files) if "u.data" in files else _recbole_frames(files)
        return _normalise(ratings, users, items)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise CorankError(f"{', '.join(files)}: not as in MovieLens-100K: {error}") from None


def _grouplens_frames(files: Files) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    ratings = _read_text(files["u.data"], "\t", ["user_id", "item_id", "rating", "ts"])
    users = _read_text(files["u.user"], "|", ["user_id", "age", "gender", "occupation", "zip_code"])
    columns = ["item_id", "title", "release_date", "video_release_date", "imdb_url", *GENRES]
    items = _read_text(files["u.item"].decode("latin-1").encode(), "|", columns)
    flags = [pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in GENRES]
    genres = pl.concat_list(flags).list.drop_nulls()
    # The year is part of the title; the release date is another one (that of a re-release, for instance).
    return ratings, users, items.select("item_id", "title", year=pl.lit(None, pl.String), genres=genres)


def _recbole_frames(files: Files) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    ratings = _read_text(files["ml-100k.inter"], "\t").rename({"timestamp": "ts"})
    users = _read_text(files["ml-100k.user"], "\t")
    items = _read_text(files["ml-100k.item"], "\t")
    genres = pl.col("class").fill_null("").str.split(" ")
    # RecBole's conversion misspells the one film without a title.
    title = pl.col("movie_title").str.replace("^unkonwn$", "unknown")
    return ratings, users, items.select("item_id", title=title, year="release_year", genres=genres)


def _read_text(content: bytes, separator: str, columns: list[str] | None = None) -> pl.DataFrame:
    """Rows of text; without names for the columns the file has them, as ``name:type``."""
    frame = pl.read_csv(
        content,
        separator=separator,
        has_header=columns is None,
        new_columns=columns,
        quote_char=None,
        infer_schema=False,
    )
    return frame.rename(lambda column: column.split(":")[0])


def _normalise(ratings: pl.DataFrame, users: pl.DataFrame, items: pl.DataFrame) -> Source:
    title, suffix = pl.col("title").str.strip_chars(), r"\s*\((\d{4})\)(\s*\(V\))?$"  # (V): released on video
    genres = pl.col("genres").list.eval(pl.element().filter(pl.element() != "")).list.sort()
    return Source(
        ratings.select(
            "user_id",
            "item_id",
            pl.col("rating").cast(pl.Float64).cast(pl.Int8),
            pl.col("ts").cast(pl.Float64).cast(pl.Int64) * SECOND,
        ).sort(pl.all()),
        users.select("user_id", pl.col("age").cast(pl.Int32), "gender", "occupation", "zip_code").sort("user_id"),
        items.select(
            "item_id",
            title=title.str.replace(suffix, ""),
            year=pl.coalesce(pl.col("year").cast(pl.Int32, strict=False), title.str.extract(suffix).cast(pl.Int32)),
            genres=pl.when(genres.list.len() > 0).then(genres).otherwise(pl.lit(["unknown"])),
        ).sort("item_id"),
    )
