"""The importers: what they promise about requests, time, layouts and doing it twice. No network."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from deltalake import DeltaTable
from polars.testing import assert_frame_equal

from features.delta.table import Table
from features.encoding import bucket_of
from features.errors import ConfigError, CorankError
from features.schema import SECOND, partition_of
from pipeline.config import load_config
from pipeline.importers import movielens
from pipeline.importers.movielens import GENRES, import_movielens
from pipeline.importers.synthetic import SCHEMAS, World, import_synthetic, simulate
from pipeline.importers.target import write_table

EXAMPLES = Path(movielens.__file__).parents[1] / "examples"
MOVIELENS_TABLES = ("impressions", "events", "users", "items")
START = 881_452_800  # Sunday, 1997-12-07: the ratings below fall on both sides of a Monday
SMALL = {"users": 120, "items": 60, "seed": 3, "buckets": 2}

USERS = [(1, 24, "M", "technician", "85711"), (2, 53, "F", "other", "94043"), (10, 33, "M", "writer", "T8H1N")]
ITEMS = [  # item_id, title, year, suffix of GroupLens's title, genres
    (1, "Toy Story", 1995, "", ["Animation", "Children's", "Comedy"]),
    (2, "Misérables, Les", 1995, "", ["Drama", "Musical"]),
    (11, "Seven (Se7en)", 1995, "", ["Crime", "Thriller"]),
    (267, "unknown", None, "", ["unknown"]),
    (1412, "Land Before Time III", 1995, " (V)", ["Animation", "Children's"]),
    *[(number, f"Film {number}", 1980 + number % 15, "", [GENRES[1 + number % 18]]) for number in range(20, 100)],
]


def _ratings() -> list[tuple[int, int, int, int]]:
    """user, item, rating, seconds: bursts, pauses of exactly 30 and of 31 s, ties, a run of 70, two weeks."""
    start = START
    rows = [(1, 20 + number, 1 + number % 5, start + number // 2) for number in range(70)]
    rows += [(2, 1, 5, start), (2, 2, 4, start + 30), (2, 11, 2, start + 61), (2, 267, 1, start + 61)]
    rows += [(10, 11, 3, start), (10, 2, 3, start), (10, 1412, 4, start + 4 * 86_400)]
    return [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]


def _write_grouplens(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in _ratings()))
    (folder / "u.user").write_text("".join("|".join(map(str, row)) + "\n" for row in USERS))
    lines = []
    for number, title, year, suffix, genres in ITEMS:
        flags = "|".join(str(int(genre in genres)) for genre in GENRES)
        full = f"{title} ({year}){suffix}|01-Jan-{year}" if year else f"{title}|"
        lines.append(f"{number}|{full}||http://us.imdb.com/|{flags}\n")
    (folder / "u.item").write_text("".join(lines), encoding="latin-1")
    return folder


def _write_recbole(folder: Path) -> Path:
    folder.mkdir(parents=True)
    ratings = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    ratings += ["\t".join(map(str, row)) for row in _ratings()]
    users = ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
    users += ["\t".join(map(str, row)) for row in USERS]
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for number, title, year, suffix, genres in ITEMS:
        # RecBole's conversion trips over these two.
        if year is None:
            title, shown = "unkonwn", "unkonwn"
        else:
            title, shown = (f"{title} ({year})", "V") if suffix else (title, str(year))
        items.append(f"{number}\t{title}\t{shown}\t{' '.join(genres)}")
    for name, lines in (("inter", ratings), ("user", users), ("item", items)):
        (folder / f"ml-100k.{name}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _quiet(line: str) -> None:
    pass


def _versions(target: Path) -> dict[str, int]:
    return {path.name: DeltaTable(path).version() for path in sorted(target.iterdir())}


def _read(target: Path, table: str) -> pl.DataFrame:
    frame = pl.read_delta(str(target / table))
    return frame.sort([name for name, kind in frame.schema.items() if not kind.is_nested()])


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """The tiny MovieLens, imported."""
    import_movielens(tmp_path / "films", _write_grouplens(tmp_path / "grouplens"), say=_quiet)
    return tmp_path / "films"


def test_requests_obey_the_gap_and_the_size(films: Path) -> None:
    impressions, events = _read(films, "impressions"), _read(films, "events")
    assert impressions.height == events.height == len(_ratings())
    sizes = dict(impressions.group_by("request_id").len().iter_rows())
    assert sizes == {
        "u1-000000": 50,
        "u1-000001": 20,
        "u2-000000": 2,  # a pause of 30 s is still one request
        "u2-000001": 2,  # one of 31 s is not
        "u10-000000": 2,
        "u10-000001": 1,
    }
    tied = impressions.filter(pl.col("request_id") == "u10-000000").sort("position")
    assert tied["item_id"].to_list() == ["2", "11"], "ties are ordered by the item's number, not its text"
    assert tied["position"].to_list() == [0, 1]


def test_a_request_is_not_later_than_its_own_ratings(films: Path) -> None:
    impressions, events = _read(films, "impressions"), _read(films, "events")
    assert impressions.group_by("request_id").agg(pl.col("ts").n_unique())["ts"].max() == 1
    own = impressions.join(events, on=["user_id", "item_id"], suffix="_event", validate="1:1")
    assert own.filter(pl.col("ts_event") < pl.col("ts")).is_empty(), "a request sees events earlier than its ts"
    first = own.group_by("request_id").agg(pl.col("ts").first(), pl.col("ts_event").min())
    assert first["ts"].to_list() == first["ts_event"].to_list()
    later = own.filter((pl.col("user_id") == "1") & (pl.col("request_id") == "u1-000001"))
    earlier = own.filter((pl.col("user_id") == "1") & (pl.col("request_id") == "u1-000000"))
    assert (earlier["ts_event"] < later["ts"][0]).all(), "the earlier request's ratings are visible in the next"


def test_labels_partitions_and_ids(films: Path) -> None:
    impressions, events = _read(films, "impressions"), _read(films, "events")
    both = impressions.join(events, on=["user_id", "item_id"])
    rating = both["action"].cast(pl.Int8)
    assert both["finish"].to_list() == (rating >= 4).cast(pl.Int8).to_list()
    assert both["skip"].to_list() == (rating <= 2).cast(pl.Int8).to_list()
    for frame in (impressions, events):
        assert frame["dt"].n_unique() == 2
        assert all(partition_of(ts, "week") == dt for ts, dt in frame.select("ts", "dt").iter_rows())
        assert all(bucket_of(user, 4) == int(bucket) for user, bucket in frame.select("user_id", "bucket").iter_rows())
    assert events["event_id"].n_unique() == events.height
    assert events.sort("ts", "event_id")["event_id"].to_list() == sorted(events["event_id"])
    assert impressions["ts"].max() == max(row[3] for row in _ratings()) * SECOND


def test_both_layouts_give_the_same_tables(films: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "recbole.whl", "w") as archive:
        for file in _write_recbole(tmp_path / "recbole").iterdir():
            archive.write(file, f"recbole/dataset_example/ml-100k/{file.name}")
    import_movielens(tmp_path / "from_recbole", tmp_path / "recbole.whl", say=_quiet)
    for table in MOVIELENS_TABLES:
        assert_frame_equal(_read(films, table), _read(tmp_path / "from_recbole", table))
    items = {row["item_id"]: row for row in _read(films, "items").to_dicts()}
    assert items["267"] == {"item_id": "267", "title": "unknown", "year": None, "genres": ["unknown"], "updated_at": 0}
    assert (items["1412"]["title"], items["1412"]["year"]) == ("Land Before Time III", 1995)
    assert (items["2"]["title"], items["2"]["genres"]) == ("Misérables, Les", ["Drama", "Musical"])
    assert items["11"]["title"] == "Seven (Se7en)"


def test_importing_movielens_again_commits_nothing(films: Path, tmp_path: Path) -> None:
    before = _versions(films)
    lines: list[str] = []
    counts = import_movielens(films, _write_recbole(tmp_path / "recbole"), say=lines.append)
    assert _versions(films) == before == dict.fromkeys(sorted(MOVIELENS_TABLES), 0)
    assert counts == {"users": 3, "items": 85, "events": 77, "impressions": 77}
    assert "already holds" in lines[-1]


def test_an_interrupted_import_is_completed(films: Path, tmp_path: Path) -> None:
    shutil.rmtree(films / "impressions")
    import_movielens(films, tmp_path / "grouplens", say=_quiet)
    assert set(_versions(films).values()) == {0}
    assert _read(films, "impressions").height == 77


def test_other_buckets_replace_the_tables(films: Path, tmp_path: Path) -> None:
    import_movielens(films, tmp_path / "grouplens", buckets=2, say=_quiet)
    assert _read(films, "impressions").height == 77
    assert set(_read(films, "impressions")["bucket"]) <= {"0", "1"}


def test_tables_of_others_are_not_overwritten(tmp_path: Path) -> None:
    source = _write_grouplens(tmp_path / "grouplens")
    pl.DataFrame({"user_id": ["1"]}).write_delta(str(tmp_path / "films" / "users"))
    with pytest.raises(CorankError, match="no import wrote"):
        import_movielens(tmp_path / "films", source, say=_quiet)
    assert _versions(tmp_path / "films") == {"users": 0}


@pytest.mark.parametrize("folder", ["[v2]", "a^b", "a|b", "a\\b", "a%20b"])
def test_a_folder_below_which_nothing_can_be_imported_is_named(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ConfigError, match=r"has .* in its name"):
        import_synthetic(tmp_path / folder, 1, 10, 10, 0, "2026-01-05", 2, say=lambda _: None)
    assert not list(tmp_path.rglob("_delta_log"))


def test_a_source_that_cannot_be_read_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CorankError, match="no such folder or file"):
        import_movielens(tmp_path / "films", tmp_path / "nowhere", say=_quiet)
    with pytest.raises(CorankError, match=r"neither u\.data"):
        import_movielens(tmp_path / "films", tmp_path, say=_quiet)
    broken = _write_grouplens(tmp_path / "broken")
    (broken / "u.data").write_text("1\t2\tfive\tnoon\n")
    with pytest.raises(CorankError, match="not as in MovieLens"):
        import_movielens(tmp_path / "films", broken, say=_quiet)
    assert not (tmp_path / "films").exists(), "nothing is half-written"


def test_without_any_source_the_error_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> movielens.Files:
        raise CorankError("unplugged")

    monkeypatch.setattr(movielens, "_download_grouplens", fail)
    monkeypatch.setattr(movielens, "_download_recbole", fail)
    lines: list[str] = []
    with pytest.raises(CorankError, match=r"(?s)files\.grouplens\.org.*recbole.*name the zip as the source"):
        import_movielens(tmp_path / "films", say=lines.append)
    assert any("falling back" in line for line in lines)
    monkeypatch.setattr(movielens, "_download_recbole", lambda: movielens._read_local(_write_recbole(tmp_path / "r")))
    assert import_movielens(tmp_path / "films", say=_quiet)["impressions"] == 77


@pytest.mark.parametrize("example", ["movielens", "synthetic"])
def test_the_example_configs_are_valid(example: str) -> None:
    assert load_config(EXAMPLES / f"{example}.yaml").name == example


def test_movielens_example_knows_every_genre_of_the_importer() -> None:
    schema = load_config(EXAMPLES / "movielens.yaml").schema_
    (genres,) = [feature for feature in schema.features if feature.name == "genres"]
    assert genres.vocabulary == GENRES


@pytest.fixture(scope="module")
def shop(local_ray: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three simulated days."""
    target = tmp_path_factory.mktemp("shop")
    import_synthetic(target, days=3, **SMALL, say=_quiet)
    return target


def _auc(score: pl.Series, label: pl.Series) -> float:
    rank, positive = score.rank("average").to_numpy(), label.to_numpy().astype(bool)
    count = positive.sum()
    return float((rank[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def test_more_days_leave_the_days_before_untouched(local_ray: object, shop: Path, tmp_path: Path) -> None:
    target = tmp_path / "shop"
    lines: list[str] = []
    import_synthetic(target, days=2, **SMALL, say=_quiet)
    before = {table: Table(table, str(target / table)).fingerprints() for table in SCHEMAS}
    import_synthetic(target, days=3, **SMALL, say=lines.append)
    for table in SCHEMAS:
        after = Table(table, str(target / table)).fingerprints()
        assert sorted(set(after) - set(before[table])) == ["2026-01-07"]
        assert {day: after[day] for day in before[table]} == before[table]
    for table in ("users", "items", *SCHEMAS):
        assert_frame_equal(_read(target, table), _read(shop, table))  # in two steps as in one
    assert any("2026-01-07" in line for line in lines)
    assert not any("2026-01-06" in line for line in lines)
    versions = _versions(target)
    counts = import_synthetic(target, days=3, **SMALL, say=lines.append)
    assert _versions(target) == versions
    assert "already holds" in lines[-1]
    assert counts == {table: _read(target, table).height for table in ("users", "items", *SCHEMAS)}


def test_a_day_is_a_function_of_seed_day_and_bucket() -> None:
    world = World(120, 60, 3, "2026-01-05", 2, 1.0)
    user = np.arange(0, 120, 2)
    once, again = simulate(world, 1, user, 0), simulate(world, 1, user, 0)
    assert all(once[table].equals(again[table]) for table in SCHEMAS)
    other = simulate(World(120, 60, 4, "2026-01-05", 2, 1.0), 1, user, 0)
    assert not once["impressions"].equals(other["impressions"])


def test_another_simulation_is_not_mixed_in(local_ray: object, shop: Path, tmp_path: Path) -> None:
    before = _versions(shop)
    with pytest.raises(CorankError, match="holds another import"):
        import_synthetic(shop, days=3, **(SMALL | {"seed": 4}), say=_quiet)
    assert _versions(shop) == before
    write_table(str(tmp_path / "users"), pl.DataFrame({"user_id": ["1"]}), "movielens/…")
    with pytest.raises(CorankError, match="holds another import"):
        import_synthetic(tmp_path, days=1, **SMALL, say=_quiet)
    with pytest.raises(ConfigError, match="days is 0"):
        import_synthetic(tmp_path, days=0, say=_quiet)


def test_clicks_can_be_learned_but_not_perfectly(shop: Path) -> None:
    rows = _read(shop, "impressions").join(_read(shop, "truth"), on=["request_id", "item_id"], validate="1:1")
    attainable = _auc(rows["click_probability"], rows["click"])
    assert 0.7 < attainable < 0.95
    assert 0.65 < _auc(rows["click_probability_at_top"], rows["click"]) <= attainable + 0.01
    assert rows["click"].mean() == pytest.approx(rows["click_probability"].mean(), abs=0.02), "the labels follow"
    assert 0.05 < rows["click"].mean() < 0.5
    assert rows.filter(pl.col("purchase") > pl.col("click")).is_empty()
    assert 0 < rows["purchase"].mean() < rows["click"].mean()
    top, bottom = rows.filter(pl.col("position") < 5), rows.filter(pl.col("position") >= 15)
    assert top["click"].mean() > bottom["click"].mean()
    assert rows.group_by("request_id").len()["len"].is_between(5, 30).all()


def test_what_a_user_watched_tells_what_they_click(shop: Path) -> None:
    """The history carries signal: items of categories watched on earlier days are clicked more often."""
    last = "2026-01-07"
    watched = _read(shop, "watches").filter(pl.col("dt") < last)
    category = _read(shop, "items").unique("item_id").select("item_id", "category")
    shown = _read(shop, "impressions").filter(pl.col("dt") == last).join(category, on="item_id")
    share = watched.group_by("user_id", "category").len("times")
    rows = shown.join(share, on=["user_id", "category"], how="left").with_columns(pl.col("times").fill_null(0))
    assert _auc(rows["times"], rows["click"]) > 0.55


def test_profiles_and_events_are_in_time(shop: Path) -> None:
    impressions, users, items = (_read(shop, table) for table in ("impressions", "users", "items"))
    assert users["user_id"].n_unique() == users.height == 120 + 2
    assert items["item_id"].n_unique() == 60 + 2
    assert items.height > 62, "some prices change"
    profiles = {"user_id": users, "item_id": items.group_by("item_id").agg(pl.col("updated_at").min())}
    for table in SCHEMAS.keys() - {"truth"}:
        rows = _read(shop, table)
        assert all(partition_of(ts, "day") == dt for ts, dt in rows.select("ts", "dt").unique().iter_rows())
        for key, profile in profiles.items():
            known = rows.join(profile, on=key, suffix="_profile")
            assert known.height == rows.height
            assert known.filter(pl.col("updated_at") > pl.col("ts")).is_empty(), f"{table} before the {key} appeared"
    clicked = impressions.filter(pl.col("click") == 1)
    watched = clicked.join(_read(shop, "watches"), on=["user_id", "item_id", "dt"], suffix="_event")
    followed = watched.filter((pl.col("ts_event") > pl.col("ts")) & (pl.col("ts_event") < pl.col("ts") + 600 * SECOND))
    assert followed.unique(["request_id", "item_id"]).height == clicked.height, "every click leads to a watch"


def test_the_price_paid_is_the_one_in_the_profile(shop: Path) -> None:
    purchases, items = _read(shop, "purchases").sort("ts"), _read(shop, "items").sort("updated_at")
    valid = purchases.join_asof(
        items, left_on="ts", right_on="updated_at", by="item_id", suffix="_profile", check_sortedness=False
    )
    assert valid["price"].to_list() == valid["price_profile"].to_list()
