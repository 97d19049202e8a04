-- How a database gets from one schema version to the next. Migrations only go forward and are never changed once
-- released. All instants are microseconds since 1970 on the store's time line (timeline.py), durations microseconds.

-- migration: 1

-- The store itself: one row. `token` is the last number given to a lock or a lease: one counter for all, so that none
-- ever repeats. `offset_us` belongs to `boot_id`; `latest` is the latest instant seen, behind which no boot may begin.
CREATE TABLE callbackq_store (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    schema_version INTEGER NOT NULL,
    token INTEGER NOT NULL CHECK (typeof(token) = 'integer'),
    boot_id TEXT NOT NULL,
    offset_us INTEGER,
    latest INTEGER NOT NULL
);

INSERT INTO callbackq_store VALUES (1, 0, 0, '', NULL, 0);

-- A queue's row outlives its callbacks: the numbers up to `tail` must never be given again.
CREATE TABLE callbackq_queues (
    queue INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    tail INTEGER NOT NULL CHECK (typeof(tail) = 'integer')
);

-- One row a callback, kept narrow, because a claim and a result rewrite it: whatever is written once lies elsewhere.
--   queue       NULL: a queue of its own
--   state       0 waiting, 1 locked, 2 succeeded, 3 failed, 4 cancelled
--   is_head     1: it closes its queue for those behind it (open with the lowest number, or failed and holding)
--   due         waiting: when; locked: when the lock times out; NULL once finished
--   token, acquired, machine, holder    the newest lock; of meaning while locked
--   abandoned   locks that timed out in a row
CREATE TABLE callbackq_callbacks (
    callback INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    queue INTEGER,
    sequence INTEGER NOT NULL,
    state INTEGER NOT NULL,
    is_head INTEGER NOT NULL,
    due INTEGER,
    token INTEGER NOT NULL DEFAULT 0,
    acquired INTEGER,
    holder INTEGER,
    attempts_made INTEGER NOT NULL DEFAULT 0,
    abandoned INTEGER NOT NULL DEFAULT 0,
    holds INTEGER NOT NULL DEFAULT 0,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    accepted_late INTEGER NOT NULL DEFAULT 0,
    finished INTEGER,
    failed_reason TEXT,
    machine TEXT,
    -- What other programs may not write. What gets there all the same, each row is mended of (rows.py).
    CHECK (
        typeof(id) = 'text' AND typeof(sequence) = 'integer' AND typeof(token) = 'integer'
        AND typeof(attempts_made) = 'integer' AND typeof(abandoned) = 'integer'
        AND state IN (0, 1, 2, 3, 4) AND is_head IN (0, 1) AND holds IN (0, 1)
        AND cancel_requested IN (0, 1) AND accepted_late IN (0, 1)
        AND typeof(queue) IN ('integer', 'null') AND typeof(due) IN ('integer', 'null')
        AND typeof(acquired) IN ('integer', 'null') AND typeof(finished) IN ('integer', 'null')
        AND typeof(failed_reason) IN ('text', 'null') AND typeof(machine) IN ('text', 'null')
    )
);

-- What a claim reads: heads that are due and heads whose lock has timed out, in one range, however long the backlog.
CREATE INDEX callbackq_heads ON callbackq_callbacks (due) WHERE is_head = 1;

-- Finds the head of a queue, and is the last line of defence: never two heads, so never two locks, in one queue.
CREATE UNIQUE INDEX callbackq_head_of_queue ON callbackq_callbacks (queue) WHERE is_head = 1 AND queue IS NOT NULL;

-- Finds the next of a queue. Finished callbacks stay in it: taking each out as it ends would write one more page for
-- it, and a search begins behind the number that has just ended.
CREATE UNIQUE INDEX callbackq_numbers ON callbackq_callbacks (queue, sequence) WHERE queue IS NOT NULL;

-- Finds the locks of a holder that died. Holds what is locked at the moment, so it is tiny.
CREATE INDEX callbackq_locked ON callbackq_callbacks (holder) WHERE state = 1;

-- What a purge reads: those that hold their queue are no part of it and can't slow it down.
CREATE INDEX callbackq_finished ON callbackq_callbacks (finished) WHERE finished IS NOT NULL AND holds = 0;

-- What to send. Written once; the body comes last, so that the rest can be read without it.
CREATE TABLE callbackq_requests (
    callback INTEGER PRIMARY KEY,
    url TEXT NOT NULL,
    method TEXT NOT NULL,
    headers TEXT,
    retry_phases TEXT,
    application_id TEXT NOT NULL,
    email_address TEXT NOT NULL,
    on_exhausted TEXT NOT NULL,
    body BLOB
);

-- Locks that ended, each with its attempt, if it came to one: one insert for both. Tokens only rise, so rows are
-- added at the end. `settled` is the state that the holder's result led to, NULL when the lock ended without one;
-- `status_code` is NULL when there was no attempt; `attempt_machine` is NULL when it is the lock's.
CREATE TABLE callbackq_history (
    token INTEGER PRIMARY KEY,
    callback INTEGER NOT NULL,
    acquired INTEGER NOT NULL,
    timeout INTEGER NOT NULL,
    ended INTEGER NOT NULL,
    completed INTEGER NOT NULL,
    machine TEXT NOT NULL,
    settled INTEGER,
    status_code INTEGER,
    time INTEGER,
    duration INTEGER,
    failure TEXT,
    attempt_machine TEXT,
    late INTEGER,
    truncated INTEGER,
    detail TEXT,
    headers TEXT,
    body BLOB
);

CREATE INDEX callbackq_history_of_callback ON callbackq_history (callback);

-- What an e-mail address is owed about a queue: one row for each pair, from its first debt until nothing is owed and
-- its due time has passed.
--   queue       0: all callbacks without one
--   due         when the next e-mail may go out; while leased: when the lease times out
--   last, paid  its debts have numbers from 1; those from `paid` + 1 to `last` are owed
--   covered     the last number that the present e-mail tells of; 0 before its first lease
--   tries, token, first_token    of the present e-mail; `token` is 0 unless leased
CREATE TABLE callbackq_mailings (
    mailing INTEGER PRIMARY KEY,
    email_address TEXT NOT NULL,
    queue INTEGER NOT NULL,
    due INTEGER NOT NULL,
    last INTEGER NOT NULL,
    paid INTEGER NOT NULL DEFAULT 0,
    covered INTEGER NOT NULL DEFAULT 0,
    tries INTEGER NOT NULL DEFAULT 0,
    token INTEGER NOT NULL DEFAULT 0,
    first_token INTEGER NOT NULL DEFAULT 0,
    UNIQUE (email_address, queue)
);

-- What a lease reads: those that owe something. Payment moves a row to the other index.
CREATE INDEX callbackq_owing ON callbackq_mailings (due) WHERE last > paid;

-- Finds those that can be forgotten.
CREATE INDEX callbackq_quiet ON callbackq_mailings (due) WHERE last = paid;

-- Final failures that somebody is to be told of. Rows up to their mailing's `paid` mean nothing any more: there may be
-- very many, so that they are deleted after the payment, a few at a time.
CREATE TABLE callbackq_debts (
    mailing INTEGER NOT NULL,
    number INTEGER NOT NULL,
    callback INTEGER NOT NULL,
    PRIMARY KEY (mailing, number)
) WITHOUT ROWID;

CREATE INDEX callbackq_debts_of_callback ON callbackq_debts (callback);

-- Store objects that may hold locks. Each keeps an operating system's lock on a file named by this number (holders.py).
CREATE TABLE callbackq_holders (holder INTEGER PRIMARY KEY);
