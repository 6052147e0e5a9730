"""The corpus while it is put together: an SQLite file, so that memory does not grow with the number of rows."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from prefmill.core.disk import refusal_untold
from prefmill.reviews.rows import DecisionRow, DeletedRow, PaperRow, Place, ReviewRow, RowError, RowProblem
from prefmill.reviews.scale import COMMON_SCALE, Scale
from prefmill.reviews.splits import title_key
from prefmill.reviews.versions import MERGED_FIELDS, as_one, differ, filled, final, require_agreement
from prefmill.store.jsonl import encode_checked, parse_json

_CACHE_KILOBYTES, _PAGE_BYTES = 65536, 32768  # a page holds some forty reviews
_SCHEMA = """
CREATE TABLE papers (paper_id TEXT PRIMARY KEY, title TEXT, abstract TEXT, text TEXT, decision TEXT, venue TEXT,
    drawn INTEGER, date REAL, title_key TEXT, origin INTEGER, line INTEGER, item TEXT);
CREATE TABLE reviews (review_id TEXT PRIMARY KEY, paper_id TEXT, json BLOB, rating REAL, date REAL,
    origin INTEGER, line INTEGER, item TEXT);
CREATE TABLE deleted (note_id TEXT PRIMARY KEY, date REAL);
CREATE TABLE decisions (note_id TEXT, paper_id TEXT, decision TEXT, rank INTEGER, date REAL, origin INTEGER,
    line INTEGER, item TEXT);
CREATE TABLE aliases (alias TEXT PRIMARY KEY, paper_id TEXT);
CREATE TABLE problems (origin INTEGER, line INTEGER, item TEXT, reason TEXT, fix TEXT, excerpt TEXT);
"""
_PAPER_COLUMNS = "paper_id, title, abstract, text, decision, venue, drawn, date"
_ADD_ALIAS = "INSERT OR REPLACE INTO aliases VALUES (?, ?)"
_ADD_REVIEW = "INSERT INTO reviews VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


class StoredReview(msgspec.Struct, frozen=True):
    """A review as its line of the corpus, and what the corpus counts."""

    json: bytes
    rating: float
    scale: Scale
    source: int


class CorpusStore(AbstractContextManager["CorpusStore"]):
    """Papers and reviews by id. Rows go in, `link` puts them together, then they come out in order of their ids."""

    def __init__(self, path: Path) -> None:
        """A new store at `path`; what an interrupted run left there is discarded, as reading again is quick."""
        for stale in path.parent.glob(f"{path.name}*"):
            stale.unlink()
        self._path = path
        # No journal, no syncs, one transaction that is never committed: a store that was interrupted is thrown away,
        # and no other connection reads it.
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.executescript(
            f"PRAGMA page_size={_PAGE_BYTES}; PRAGMA cache_size=-{_CACHE_KILOBYTES}; PRAGMA journal_mode=OFF; "
            f"PRAGMA synchronous=OFF; {_SCHEMA} BEGIN;"
        )
        self._database.create_function("moved", 2, _moved)
        # One cursor for what is done for every row: a connection's execute makes one each time.
        self._insert = self._database.cursor().execute
        self._encode = msgspec.json.Encoder().encode
        # Source, file and scale by number: a row has one of them for three, as each column is time for each row.
        self._origins: list[tuple[int, str, Scale]] = []
        self._origin_numbers: dict[tuple[int, str, Scale], int] = {}
        self._last_paper: PaperRow | None = None
        self.num_repeated = 0  # reviews listed again, word for word
        self.num_apart = 0  # papers with the title of another that fared otherwise
        self.num_older = 0  # versions of notes that a newer one replaces
        self.num_deleted = 0  # reviews and papers that a later version says are deleted

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._database.close()
        # SQLite says "database or disk is full", and of a quota, say, "disk I/O error": told as of every other file.
        if isinstance(error, sqlite3.OperationalError) and ("full" in str(error) or "I/O" in str(error)):
            raise refusal_untold(self._path, errno.ENOSPC if "full" in str(error) else errno.EIO) from error

    def add(self, place: Place, item: PaperRow | DecisionRow | ReviewRow | DeletedRow) -> None:
        """Take in an item; raises RowError, naming the earlier row, when it contradicts or repeats one."""
        if item is self._last_paper:  # tables repeat the paper on each of its reviews
            return
        if isinstance(item, ReviewRow):
            self._add_review(place, item)
        elif isinstance(item, DecisionRow):
            values = (item.note_id, item.paper_id, item.decision, item.rank, item.date, *self._located(place))
            self._database.execute("INSERT INTO decisions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        elif isinstance(item, DeletedRow):
            query = "INSERT INTO deleted VALUES (?, ?) ON CONFLICT DO UPDATE SET date = max(date, excluded.date)"
            self._database.execute(query, (item.note_id, item.date))
        elif item != self._last_paper:
            if item.reviewed_as:
                self._database.execute(_ADD_ALIAS, (item.paper_id, item.reviewed_as))
            self._add_paper(place, item)
            self._last_paper = item

    def add_problem(self, problem: RowProblem) -> None:
        """Keep a problem for the quarantine."""
        values = (*self._located(problem.place), problem.reason, problem.fix, problem.excerpt)
        self._database.execute("INSERT INTO problems VALUES (?, ?, ?, ?, ?, ?)", values)

    def count(self, table: str) -> int:
        """How many rows `table` (papers, reviews, problems) holds."""
        return int(self._database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608 (our own names)

    def problems(self) -> Iterator[RowProblem]:
        """The problems, in the order in which they were met."""
        for origin, line, item, *rest in self._database.execute("SELECT * FROM problems ORDER BY rowid"):
            yield RowProblem(self._place(origin, line, item), *rest)

    def papers(self) -> Iterator[tuple[Place, PaperRow, str]]:
        """Place, paper and title key, in order of the ids."""
        query = f"SELECT origin, line, item, title_key, {_PAPER_COLUMNS} FROM papers ORDER BY paper_id"  # noqa: S608
        for origin, line, item, key, *paper in self._database.execute(query):
            yield self._place(origin, line, item), _paper(paper), key

    def reviews_by_paper(self) -> Iterator[tuple[str, list[StoredReview]]]:
        """Each paper's id and its reviews, both in order of their ids; one that dumps name differently counts once."""
        query = "SELECT paper_id, json, rating, origin FROM reviews ORDER BY paper_id, review_id"
        said = [(scale, source) for source, _, scale in self._origins]
        for paper_id, rows in groupby(self._database.execute(query), itemgetter(0)):
            found: dict[bytes, StoredReview] = {}
            for _, json, rating, origin in rows:
                # Words and rating stand side by side, and a quote inside a text or an id is escaped.
                words_and_rating = json[json.index(b'"text":') : json.index(b',"confidence":')]
                self.num_repeated += words_and_rating in found
                found.setdefault(words_and_rating, StoredReview(json, rating, *said[origin]))
            yield paper_id, list(found.values())

    def find_title(self, identifier: str, key: str) -> str | None:
        """The title key of the paper with that id, with an id that was merged into it, or with that title key."""
        queries = (
            ("SELECT title_key FROM papers WHERE paper_id = ?", identifier),
            ("SELECT title_key FROM papers JOIN aliases USING (paper_id) WHERE alias = ?", identifier),
            ("SELECT title_key FROM papers WHERE title_key = ?", key),
        )
        rows = (self._database.execute(query, (value,)).fetchone() for query, value in queries)
        return next((row[0] for row in rows if row), None)

    def drop_deleted(self) -> None:
        """Drop what deleted notes said: reviews, papers and decisions; a version from after the deletion stands."""
        if not self.count("deleted"):  # every row would be looked at
            return
        for table, key in (("reviews", "review_id"), ("papers", "paper_id"), ("decisions", "note_id")):
            # The first condition finds rows by their key, so that it costs as little as there are deleted notes.
            query = (
                f"DELETE FROM {table} WHERE {key} IN (SELECT note_id FROM deleted) AND "  # noqa: S608 (our own names)
                f"ifnull(date <= (SELECT date FROM deleted WHERE note_id = {key}), 1)"
            )
            self.num_deleted += self._database.execute(query).rowcount

    def drop_orphans(self, all_of_them: bool) -> dict[str, int]:
        """Drop what belongs to no paper, or only to deleted ones; returns how many reviews of each paper."""
        if not (all_of_them or self.count("deleted")):  # as nearly always: every look goes through all reviews
            return {}
        unknown = "paper_id NOT IN (SELECT paper_id FROM papers)"
        if not all_of_them:
            unknown += " AND paper_id IN (SELECT note_id FROM deleted)"
        query = f"SELECT paper_id, count(*) FROM reviews WHERE {unknown} GROUP BY paper_id ORDER BY paper_id"  # noqa: S608
        found = dict(self._database.execute(query).fetchall())
        for table in ("reviews", "decisions"):
            self._database.execute(f"DELETE FROM {table} WHERE {unknown}")  # noqa: S608
        return found

    def link(self) -> Iterator[RowProblem]:
        """Index the reviews and bring decisions to their papers; what belongs to no paper is yielded."""
        # Only now: to build an index once costs less than to keep it right through every insert.
        self._database.execute("CREATE INDEX by_paper ON reviews (paper_id, review_id)")
        self._database.execute("CREATE INDEX by_title ON papers (title_key, paper_id)")
        (known,) = self._database.execute("SELECT ifnull(min(paper_id), 'there are none') FROM papers").fetchone()
        for table, what in (("reviews", "review"), ("decisions", "decision")):
            # A paper is looked for once, and not for each of its reviews.
            unknown = f"paper_id IN (SELECT paper_id FROM {table} EXCEPT SELECT paper_id FROM papers)"  # noqa: S608
            query = f"SELECT paper_id, origin, line, item FROM {table} WHERE {unknown}"  # noqa: S608
            # Fetched whole, as the caller puts each problem into this database before it asks for the next.
            orphans = self._database.execute(query).fetchall()
            fix = (
                f"add the papers' titles or submission notes to the sources, write ids as papers do ({known}), or "
                f"set unknown_papers: drop to leave out what is said of papers that are not there ({len(orphans)} rows)"
            )
            for paper_id, *place in orphans:
                reason = f"{what} of paper {paper_id}, which is not in the sources"
                yield RowProblem(self._place(*place), reason, fix, "")
        yield from self._decide()

    def drop_unreviewed(self) -> int:
        """Drop the papers that have no review; returns how many."""
        query = "DELETE FROM papers WHERE paper_id NOT IN (SELECT paper_id FROM reviews)"
        return self._database.execute(query).rowcount

    def merge_titles(self) -> list[tuple[str, str]]:
        """Make one paper of those that share a title, as `as_one` does; returns (dropped id, kept id)."""
        repeated = "SELECT title_key FROM papers GROUP BY title_key HAVING count(*) > 1 ORDER BY min(paper_id)"
        merged = []
        for (key,) in self._database.execute(repeated).fetchall():
            query = f"SELECT {_PAPER_COLUMNS} FROM papers WHERE title_key = ? ORDER BY paper_id"  # noqa: S608
            papers = as_one(_paper(row) for row in self._database.execute(query, (key,)))
            self.num_apart += len(papers) - 1
            for kept, dropped in papers:
                for paper_id in dropped:
                    self._replace(kept.paper_id, paper_id)
                    merged.append((paper_id, kept.paper_id))
                self._update(kept)
        return merged

    def _add_paper(self, place: Place, paper: PaperRow) -> None:
        # Inserted without a look, as nearly every id is new; the earlier row is read only on a clash.
        values = (
            paper.paper_id, paper.title, paper.abstract, paper.text, paper.decision, paper.venue, paper.drawn,
            paper.date, title_key(paper.title), *self._located(place),
        )  # fmt: skip
        try:
            self._insert("INSERT INTO papers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        except sqlite3.IntegrityError:
            self._complete(paper)

    def _complete(self, paper: PaperRow) -> None:
        """Fill in what earlier rows of the paper lack; raises RowError where they say something else.

        Of two versions with different dates the newer one alone stands.
        """
        query = f"SELECT origin, line, item, {_PAPER_COLUMNS} FROM papers WHERE paper_id = ?"  # noqa: S608
        known = self._database.execute(query, (paper.paper_id,)).fetchone()
        earlier = _paper(known[3:])
        if differ(earlier.date, paper.date):
            older, newer = sorted((earlier, paper), key=lambda version: version.date or 0)
            self.num_older += replace(older, date=newer.date) != newer
            self._update(newer)
            return
        require_agreement(earlier, paper, self._place(*known[:3]))
        self._update(filled(earlier, paper))

    def _add_review(self, place: Place, review: ReviewRow) -> None:
        values = (
            review.review_id, review.paper_id, self._encode(replace(review, date=UNSET) if review.date else review),
            review.rating, review.date or None, *self._located(place, review.scale or COMMON_SCALE),
        )  # fmt: skip
        try:
            self._insert(_ADD_REVIEW, values)
        except sqlite3.IntegrityError:
            self._meet_again(review.review_id, values)

    def _meet_again(self, review_id: str, values: tuple[Any, ...]) -> None:
        """Count a review that was listed before, word for word or with another date, of which the newest stands.

        Raises RowError where it says something else and no date tells which is the newer one.
        """
        query = "SELECT * FROM reviews WHERE review_id = ?"
        known = self._database.execute(query, (review_id,)).fetchone()
        *said, date, origin, line, item = known
        is_same, told = tuple(said) == values[:-4], differ(date, values[-4])
        self.num_repeated += is_same
        self.num_older += told and not is_same
        if told and values[-4] > date:
            self._database.execute(_ADD_REVIEW.replace("INSERT", "REPLACE"), values)
        if is_same or told:
            return
        raise RowError(
            f"another review with the id {review_id} is at {self._place(origin, line, item).brief}",
            "remove one of the two rows, or rename its id" if said[1] == values[1] else
            "give each review an id of its own, or leave review_id out: they are then named by what they say",
        )  # fmt: skip

    def _decide(self) -> Iterator[RowProblem]:
        """Give papers that say none themselves the decision of their notes; those that contradict one are yielded."""
        # Only now: a note may be deleted by one that is read later.
        query = (
            "SELECT paper_id, rank, decision, date, origin, line, item FROM decisions "
            "ORDER BY paper_id, rank DESC, rowid"
        )  # fmt: skip
        update = "UPDATE papers SET decision = ? WHERE paper_id = ? AND decision IS NULL"
        for paper_id, notes in groupby(self._database.execute(query).fetchall(), itemgetter(0)):
            (_, highest, decision, date, *place), *others = notes
            for _, rank, other, other_date, *other_place in others:
                if rank < highest:
                    break
                stands = final(decision, other)
                if stands is None and differ(date, other_date):
                    self.num_older += 1
                    stands = other if other_date > date else decision
                if stands is None:
                    yield RowProblem(
                        self._place(*other_place),
                        f"decision '{other}', but '{decision}' for the same paper at {self._place(*place).brief}",
                        "remove the one that does not hold", "",
                    )  # fmt: skip
                    continue
                decision, date = stands, max(filter(None, (date, other_date)), default=None)
            self._database.execute(update, (decision, paper_id))
        # A committed paper's: of several the first by alphabet, which is acceptance.
        query = "SELECT min(decision), aliases.paper_id FROM aliases JOIN papers ON alias = papers.paper_id GROUP BY 2"
        self._database.executemany(update, self._database.execute(query).fetchall())

    def _replace(self, kept_id: str, dropped_id: str) -> None:
        query = "UPDATE reviews SET paper_id = :kept, json = moved(json, :kept) WHERE paper_id = :dropped"
        self._database.execute(query, {"kept": kept_id, "dropped": dropped_id})
        self._database.execute("DELETE FROM papers WHERE paper_id = ?", (dropped_id,))
        # A test set may list the dropped id, which must still find its paper.
        self._database.execute(_ADD_ALIAS, (dropped_id, kept_id))

    def _update(self, paper: PaperRow) -> None:
        said = {name: getattr(paper, name) for name in ("title", *MERGED_FIELDS, "date")}
        said["title_key"] = title_key(paper.title)
        query = f"UPDATE papers SET {', '.join(f'{name} = ?' for name in said)} WHERE paper_id = ?"  # noqa: S608
        self._database.execute(query, (*said.values(), paper.paper_id))

    def _located(self, place: Place, scale: Scale = COMMON_SCALE) -> tuple[int, int | None, str | None]:
        origin = (place.source, place.file, scale)
        number = self._origin_numbers.get(origin)
        if number is None:
            number = self._origin_numbers[origin] = len(self._origins)
            self._origins.append(origin)
        return number, place.line, place.item

    def _place(self, origin: int, line: int | None, item: str | None) -> Place:
        return Place(*self._origins[origin][:2], line, item)


def _moved(review: bytes, paper_id: str) -> bytes:
    return encode_checked({**parse_json(review), "paper_id": paper_id})


def _paper(values: Any) -> PaperRow:
    return PaperRow(*[*values[:-2], bool(values[-2]), values[-1]])
