-- How a database gets from one schema version to the next. Migrations only go forward and are never changed once
-- released. All instants are microseconds since 1970 on the server's clock, durations microseconds, flags 0 or 1.
-- Keys are in the order of their bytes, {bytewise}, in which locks are taken; where that can't be said, in the database's.
-- What only PostgreSQL itself understands is in tuning.sql.

-- migration: 1

-- A queue's row outlives its callbacks: the numbers up to `tail` must never be given again. Whoever joins, leaves or
-- opens a queue locks its row first, so that numbers follow the order of commits. `head` is the callback that closes
-- the queue for those behind it (open with the lowest number, or failed and holding), NULL when there is none.
CREATE TABLE {schema}.queues (
    queue TEXT {bytewise} PRIMARY KEY,
    tail BIGINT NOT NULL,
    head TEXT {bytewise}
);

-- One row a callback, kept narrow, because a claim and a result rewrite it: whatever is written once lies elsewhere.
--   callback    its id
--   queue       NULL: a queue of its own
--   shard       which part of the heads it is searched in; always 0 in the profile for PostgreSQL itself
--   state       0 waiting, 1 locked, 2 succeeded, 3 failed, 4 cancelled
--   is_head     1: the head of its queue
--   due         waiting: when; locked: when the lock times out; NULL once finished. Of a finished head: when to try
--               again to open its queue, whose row was locked for too long
--   ready       the same as `due`, but not before it became a head: what claims search by, from a mark that rises
--   token, acquired, machine    the newest lock; of meaning while locked
--   abandoned   locks that timed out in a row
CREATE TABLE {schema}.callbacks (
    callback TEXT {bytewise} PRIMARY KEY,
    shard SMALLINT NOT NULL,
    queue TEXT {bytewise},
    sequence BIGINT NOT NULL,
    state SMALLINT NOT NULL,
    is_head SMALLINT NOT NULL,
    due BIGINT,
    ready BIGINT,
    token BIGINT NOT NULL DEFAULT 0,
    acquired BIGINT,
    machine TEXT,
    attempts_made BIGINT NOT NULL DEFAULT 0,
    abandoned BIGINT NOT NULL DEFAULT 0,
    holds SMALLINT NOT NULL DEFAULT 0,
    cancel_requested SMALLINT NOT NULL DEFAULT 0,
    accepted_late SMALLINT NOT NULL DEFAULT 0,
    finished BIGINT,
    failed_reason TEXT
);

-- What a claim reads: heads that are due and heads whose lock has timed out, in one range, however long the backlog.
-- There is no unique index on the heads' queues: each claim would look there at all former heads of the queue that some
-- open transaction keeps from being removed (after 60,000 callbacks of 200 queues, claims took five times as long).
-- That a queue has one head follows from its row, which names it: it changes from the head that leaves to the next only.
CREATE INDEX callbacks_heads ON {schema}.callbacks (shard, ready) WHERE is_head = 1;

-- Finds the next of a queue. Holds nothing but what waits behind heads.
CREATE INDEX callbacks_behind ON {schema}.callbacks (queue, sequence)
    WHERE state = 0 AND is_head = 0 AND queue IS NOT NULL;

-- What a purge reads: those that hold or close their queue are no part of it and can't slow it down.
CREATE INDEX callbacks_finished ON {schema}.callbacks (finished) WHERE finished IS NOT NULL AND is_head = 0;

-- What to send. Written once; `stored` is when by the server, and gives the order of listings.
CREATE TABLE {schema}.requests (
    callback TEXT {bytewise} PRIMARY KEY,
    stored BIGINT NOT NULL,
    queue TEXT {bytewise},
    url TEXT NOT NULL,
    method TEXT NOT NULL,
    headers TEXT,
    retry_phases TEXT,
    application_id TEXT NOT NULL,
    email_address TEXT NOT NULL,
    on_exhausted TEXT NOT NULL,
    body BYTEA
);

CREATE INDEX requests_stored ON {schema}.requests (stored, callback);

CREATE INDEX requests_of_queue ON {schema}.requests (queue, stored, callback) WHERE queue IS NOT NULL;

-- Locks that ended, each with its attempt, if it came to one. `settled` is the state that the holder's result led to,
-- NULL when the lock ended without one; `status_code` is NULL when there was no attempt; `attempt_machine` is NULL when
-- it is the lock's.
CREATE TABLE {schema}.history (
    callback TEXT {bytewise},
    token BIGINT,
    acquired BIGINT NOT NULL,
    timeout BIGINT NOT NULL,
    ended BIGINT NOT NULL,
    completed SMALLINT NOT NULL,
    machine TEXT NOT NULL,
    settled SMALLINT,
    status_code BIGINT,
    time BIGINT,
    duration BIGINT,
    failure TEXT,
    attempt_machine TEXT,
    late SMALLINT,
    truncated SMALLINT,
    detail TEXT,
    headers TEXT,
    body BYTEA,
    PRIMARY KEY (callback, token)
);

-- What an e-mail address is owed about a queue: one row for each pair, from its first debt until nothing is owed and
-- its due time has passed.
--   queue       empty: all callbacks without one
--   due         when the next e-mail may go out; while leased: when the lease times out
--   last, paid  its debts have numbers from 1; those from `paid` + 1 to `last` are owed
--   covered     the last number that the present e-mail tells of; 0 before its first lease
--   tries, token, first_token    of the present e-mail; `token` is 0 unless leased
CREATE TABLE {schema}.mailings (
    mailing BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    email_address TEXT {bytewise} NOT NULL,
    queue TEXT {bytewise} NOT NULL,
    due BIGINT NOT NULL,
    last BIGINT NOT NULL,
    paid BIGINT NOT NULL DEFAULT 0,
    covered BIGINT NOT NULL DEFAULT 0,
    tries BIGINT NOT NULL DEFAULT 0,
    token BIGINT NOT NULL DEFAULT 0,
    first_token BIGINT NOT NULL DEFAULT 0,
    UNIQUE (email_address, queue)
);

-- What a lease reads: those that owe something. Payment moves a row to the other index.
CREATE INDEX mailings_owing ON {schema}.mailings (due) WHERE last > paid;

-- Finds those that can be forgotten.
CREATE INDEX mailings_quiet ON {schema}.mailings (due) WHERE last = paid;

-- Final failures that somebody is to be told of. Rows up to their mailing's `paid` mean nothing any more: there may be
-- very many, so that they are deleted after the payment, a few at a time.
CREATE TABLE {schema}.debts (
    mailing BIGINT,
    number BIGINT,
    callback TEXT {bytewise} NOT NULL,
    PRIMARY KEY (mailing, number)
);

CREATE INDEX debts_of_callback ON {schema}.debts (callback);

-- For people: what there is, in words and in times of the calendar. Reading it locks nothing.
--   due        waiting: when; locked: when the lock times out
--   behind     the callback that closes its queue for this one. That a head has ended shows at once; that the next is
--              the head may take until its queue's row is free: so to any reader, the next is it already
--   machine    who has the lock
--   attempts   those that count, since it was stored or redelivered
CREATE VIEW {schema}.overview AS
SELECT c.callback AS id, c.queue, c.sequence AS number,
    CASE c.state
        WHEN 0 THEN 'waiting' WHEN 1 THEN 'locked' WHEN 2 THEN 'succeeded' WHEN 3 THEN 'failed' ELSE 'cancelled'
    END AS state,
    CASE WHEN c.state <= 1 THEN to_timestamp(CAST(c.due AS DOUBLE PRECISION) / 1000000) END AS due,
    CASE WHEN c.state <= 1 AND c.is_head = 0 THEN (
        SELECT CASE WHEN h.state > 1 AND h.due IS NOT NULL THEN nullif((
            SELECT n.callback FROM {schema}.callbacks AS n
            WHERE n.queue = h.queue AND n.sequence > h.sequence AND n.state = 0 AND n.is_head = 0
            ORDER BY n.sequence
            LIMIT 1
        ), c.callback) ELSE q.head END
        FROM {schema}.queues AS q LEFT JOIN {schema}.callbacks AS h ON h.callback = q.head
        WHERE q.queue = c.queue
    ) END AS behind,
    CASE WHEN c.state = 1 THEN c.machine END AS machine,
    c.attempts_made AS attempts,
    to_timestamp(CAST(c.finished AS DOUBLE PRECISION) / 1000000) AS finished,
    c.failed_reason
FROM {schema}.callbacks AS c;
