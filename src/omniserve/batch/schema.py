"""The tables of the store, by version. A database is brought up to date in steps, each a transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from omniserve.batch.errors import StateError

_FIRST = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER
);
CREATE INDEX files_of_owner ON files (owner, seq);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    completion_window TEXT NOT NULL,
    expires_at INTEGER NOT NULL,
    output_life_s INTEGER,
    metadata TEXT,
    output_file_id TEXT NOT NULL,
    error_file_id TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    status TEXT NOT NULL,
    ending TEXT,
    model TEXT,
    errors TEXT NOT NULL DEFAULT '[]',
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    output_bytes INTEGER NOT NULL DEFAULT 0,
    error_bytes INTEGER NOT NULL DEFAULT 0,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    cached_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0,
    in_progress_at INTEGER,
    finalizing_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    expired_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER
);
CREATE INDEX batches_of_owner ON batches (owner, seq);
CREATE TABLE lines (
    batch INTEGER NOT NULL REFERENCES batches (seq),
    number INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    length INTEGER NOT NULL,
    is_finished INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (batch, number)
) WITHOUT ROWID
"""

# Ended batches are found by when they ended, and go when their time is over.
_RETENTION = """
ALTER TABLE batches ADD COLUMN ended_at INTEGER;
UPDATE batches SET ended_at = coalesce(completed_at, failed_at, expired_at, cancelled_at);
CREATE INDEX batches_by_end ON batches (ended_at)
"""

# Engines that died while they had a line.
_DEATHS = "ALTER TABLE lines ADD COLUMN num_deaths INTEGER NOT NULL DEFAULT 0"

# Version n is reached from n - 1 by the n-th of these. Never change one that was released; add another.
MIGRATIONS: tuple[str, ...] = (_FIRST, _RETENTION, _DEATHS)
# A statement that waits for another connection's lock gives up then; only `state check` is ever another one.
BUSY_TIMEOUT_S = 5.0


def connect(path: Path, at: Callable[[str], None]) -> sqlite3.Connection:
    """Open the database, made or brought up to date where needed. StateError when it is of a newer version.

    A commit has been synced when it returns (WAL with synchronous=FULL).
    """
    # One thread uses it at a time: the writer's, after the one that opened it.
    db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    try:
        refuse_newer(db, path)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        _migrate(db, at)
        # What an earlier failure may have left unsynced in the log is written to the database and synced.
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except BaseException:
        db.close()
        raise
    return db


def version_of(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def refuse_newer(db: sqlite3.Connection, path: Path) -> None:
    """StateError for a database of a newer version, and for a file that is none."""
    try:
        version = version_of(db)
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorname", "") not in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
            raise
        raise StateError(
            f"{path} is damaged: {error}; restore the directory from a backup, or use another --state-dir"
        ) from error
    if version > len(MIGRATIONS):
        raise StateError(
            f"{path} is of version {version}, this release knows up to {len(MIGRATIONS)}; "
            "use the release that wrote it, or another --state-dir"
        )


def _migrate(db: sqlite3.Connection, at: Callable[[str], None]) -> None:
    for version in range(version_of(db) + 1, len(MIGRATIONS) + 1):
        db.execute("BEGIN IMMEDIATE")
        try:
            for statement in MIGRATIONS[version - 1].split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {version}")
            at("migrate.changed")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
