-- Every statement the store runs after opening. Each says which index serves it; tests/stores/test_postgres_plans.py
-- holds it to that. "By key" means the table's primary key. Rows are given as columns: one array for each, so that any
-- number of them is one statement.


-- Time.

-- name: now
SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT);


-- Storing.

-- name: store
-- Everything that storing is, in one statement: each round trip would cost as much as the work. A queue's row is locked
-- by its insert or update, in the order of names, and tells the numbers as of the newest commit. An id that is taken
-- makes all of it fail.
WITH patience AS MATERIALIZED (
    -- Here, because a transaction of one statement has no other place: how long to wait for another that joins the
    -- same queue and stays open.
    SELECT set_config('lock_timeout', :patience, true)
), given AS MATERIALIZED (
    SELECT g.*, row_number() OVER (PARTITION BY g.queue ORDER BY g.place) AS nth,
        count(*) OVER (PARTITION BY g.queue) AS many
    FROM patience, unnest(
        CAST(:callback AS TEXT[]), CAST(:queue AS TEXT[]), CAST(:shard AS SMALLINT[]), CAST(:url AS TEXT[]),
        CAST(:method AS TEXT[]), CAST(:headers AS TEXT[]), CAST(:retry_phases AS TEXT[]),
        CAST(:application_id AS TEXT[]), CAST(:email_address AS TEXT[]), CAST(:on_exhausted AS TEXT[]),
        CAST(:body AS BYTEA[])
    ) WITH ORDINALITY AS g(
        callback, queue, shard, url, method, headers, retry_phases, application_id, email_address, on_exhausted, body,
        place
    )
), joined AS (
    -- Each queue's wait may last for what those before it have left, or a moment: so patience is for all together.
    INSERT INTO {schema}.queues AS q (queue, tail, head)
    SELECT queue, many, CASE WHEN set_config('lock_timeout', CAST(greatest(
        CAST(:patience AS BIGINT)
            - CAST(extract(epoch FROM clock_timestamp() - statement_timestamp()) * 1000 AS BIGINT),
        least(CAST(:patience AS BIGINT), 100)
    ) AS TEXT), true) IS NOT NULL THEN callback END
    FROM given WHERE queue IS NOT NULL AND nth = 1 ORDER BY queue COLLATE "C"
    ON CONFLICT (queue) DO UPDATE SET tail = q.tail + excluded.tail, head = coalesce(q.head, excluded.head)
    RETURNING q.queue, q.tail, q.head
), moment AS MATERIALIZED (
    -- Once all queues are locked, which are counted for this: whoever had to wait for one is listed behind those it
    -- waited for, as their numbers are, and can't be due before a mark that moved meanwhile.
    SELECT coalesce(CAST(:now AS BIGINT), CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT)) AS now,
        CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT) AS at, count(*) AS queues
    FROM joined
), numbered AS MATERIALIZED (
    SELECT given.*, moment.now, moment.at, coalesce(joined.tail - given.many + given.nth, 1) AS sequence,
        coalesce(joined.head, given.callback) AS head
    FROM moment CROSS JOIN given LEFT JOIN joined ON joined.queue = given.queue
), added AS (
    INSERT INTO {schema}.callbacks (callback, shard, queue, sequence, state, is_head, due, ready)
    SELECT callback, shard, queue, sequence, 0, CASE WHEN head = callback THEN 1 ELSE 0 END, now, now FROM numbered
), kept AS (
    INSERT INTO {schema}.requests
        (callback, stored, queue, url, method, headers, retry_phases, application_id, email_address, on_exhausted, body)
    SELECT callback, at + place, queue, url, method, headers, retry_phases, application_id, email_address,
        on_exhausted, body
    FROM numbered
)
-- The hint goes out with the commit, once however many rows ask for it.
SELECT sequence, head, now, CASE WHEN head = callback THEN pg_notify(:channel, '') END FROM numbered ORDER BY place;

-- name: store_one
-- The same for a single callback: without arrays and what puts them in order, half of the server's CPU (160 µs, not 320).
WITH patience AS MATERIALIZED (
    SELECT set_config('lock_timeout', :patience, true)
), joined AS (
    INSERT INTO {schema}.queues AS q (queue, tail, head)
    SELECT CAST(:queue AS TEXT), 1, CAST(:callback AS TEXT) FROM patience WHERE CAST(:queue AS TEXT) IS NOT NULL
    ON CONFLICT (queue) DO UPDATE SET tail = q.tail + 1, head = coalesce(q.head, excluded.head)
    RETURNING q.tail, q.head
), numbered AS MATERIALIZED (
    SELECT coalesce(CAST(:now AS BIGINT), CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT)) AS now,
        CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT) AS at,
        coalesce(joined.tail, 1) AS sequence, coalesce(joined.head, CAST(:callback AS TEXT)) AS head
    FROM patience LEFT JOIN joined ON true
), added AS (
    INSERT INTO {schema}.callbacks (callback, shard, queue, sequence, state, is_head, due, ready)
    SELECT CAST(:callback AS TEXT), CAST(:shard AS SMALLINT), CAST(:queue AS TEXT), sequence, 0,
        CASE WHEN head = CAST(:callback AS TEXT) THEN 1 ELSE 0 END, now, now
    FROM numbered
), kept AS (
    INSERT INTO {schema}.requests
        (callback, stored, queue, url, method, headers, retry_phases, application_id, email_address, on_exhausted, body)
    SELECT CAST(:callback AS TEXT), at, CAST(:queue AS TEXT), CAST(:url AS TEXT), CAST(:method AS TEXT),
        CAST(:headers AS TEXT), CAST(:retry_phases AS TEXT), CAST(:application_id AS TEXT),
        CAST(:email_address AS TEXT), CAST(:on_exhausted AS TEXT), CAST(:body AS BYTEA)
    FROM numbered
)
SELECT sequence, head, now, CASE WHEN head = CAST(:callback AS TEXT) THEN pg_notify(:channel, '') END FROM numbered;

-- name: notify
SELECT pg_notify(:channel, '');

-- name: taken_ids
-- By key.
SELECT callback FROM {schema}.callbacks WHERE callback = ANY(CAST(:ids AS TEXT[]));


-- Looking.

-- name: status
-- All by key; callbacks_behind, first entry of the queue, when the queue is still to be opened.
SELECT c.callback, c.sequence, c.state, c.due, c.token, c.acquired, c.machine, c.failed_reason,
    CASE WHEN c.state <= 1 AND c.is_head = 0 THEN
        (SELECT o.behind FROM {schema}.overview AS o WHERE o.id = c.callback)
    END,
    c.queue, r.url, r.method, r.headers, r.retry_phases, r.application_id, r.email_address, r.on_exhausted, r.body
FROM {schema}.callbacks AS c
LEFT JOIN {schema}.requests AS r ON r.callback = c.callback
WHERE c.callback = :callback;

-- name: history
-- By key, whose entries of one callback stand in the order of their tokens.
SELECT token, acquired, timeout, ended, completed, machine,
    status_code, time, duration, failure, attempt_machine, late, truncated, detail, headers, body
FROM {schema}.history
WHERE callback = :callback
ORDER BY token;

-- name: list_callbacks
-- requests_stored from where the page before it ended.
SELECT r.callback, r.stored
FROM {schema}.requests AS r
WHERE (r.stored, r.callback) > (:after, :after_callback)
ORDER BY r.stored, r.callback
LIMIT :limit;

-- name: list_queue
-- requests_of_queue from where the page before it ended.
SELECT r.callback, r.stored
FROM {schema}.requests AS r
WHERE r.queue = :queue AND (r.stored, r.callback) > (:after, :after_callback)
ORDER BY r.stored, r.callback
LIMIT :limit;

-- name: states
-- By key.
SELECT callback, state, queue FROM {schema}.callbacks WHERE callback = ANY(CAST(:ids AS TEXT[]));


-- Claiming.

-- name: next_due
-- callbacks_heads, first entry behind the mark.
SELECT ready FROM {schema}.callbacks WHERE shard = 0 AND is_head = 1 AND ready >= :mark ORDER BY ready LIMIT 1;

-- name: due_heads
-- callbacks_heads from the mark, then all by key: reads as many entries as it returns. What others are just taking is
-- passed over; what they have just taken is no longer due, which PostgreSQL finds out when it locks the row.
SELECT c.callback, c.callback, c.queue, c.sequence, c.state, c.is_head, c.due, c.token, c.acquired, c.machine,
    c.attempts_made, c.abandoned, c.holds, c.cancel_requested, c.accepted_late, c.finished, c.failed_reason,
    c.queue, r.url, r.method, r.headers, r.retry_phases, r.application_id, r.email_address, r.on_exhausted, r.body
FROM {schema}.callbacks AS c
LEFT JOIN {schema}.requests AS r ON r.callback = c.callback
WHERE c.shard = 0 AND c.is_head = 1 AND c.ready >= :mark AND c.ready <= :now
ORDER BY c.ready
LIMIT :limit
FOR UPDATE OF c SKIP LOCKED;

-- name: lock
-- By key.
UPDATE {schema}.callbacks AS c
SET state = 1, due = v.due, ready = v.due, token = v.token, acquired = v.acquired, machine = v.machine, abandoned = v.abandoned
FROM unnest(
    CAST(:callback AS TEXT[]), CAST(:due AS BIGINT[]), CAST(:token AS BIGINT[]), CAST(:acquired AS BIGINT[]),
    CAST(:machine AS TEXT[]), CAST(:abandoned AS BIGINT[])
) AS v(callback, due, token, acquired, machine, abandoned)
WHERE c.callback = v.callback;


-- Ending locks, and operators' wishes.

-- name: free_queues
-- By key. Those that are being joined at the moment are passed over.
SELECT queue FROM {schema}.queues
WHERE queue = ANY(CAST(:queues AS TEXT[]))
ORDER BY queue
FOR UPDATE SKIP LOCKED;

-- name: lock_queues
-- By key.
SELECT queue FROM {schema}.queues WHERE queue = ANY(CAST(:queues AS TEXT[])) ORDER BY queue FOR UPDATE;

-- name: callback
-- By key.
SELECT callback, callback, queue, sequence, state, is_head, due, token, acquired, machine,
    attempts_made, abandoned, holds, cancel_requested, accepted_late, finished, failed_reason
FROM {schema}.callbacks
WHERE callback = :id;

-- name: callbacks
-- By key, in the order of keys.
SELECT callback, callback, queue, sequence, state, is_head, due, token, acquired, machine,
    attempts_made, abandoned, holds, cancel_requested, accepted_late, finished, failed_reason
FROM {schema}.callbacks
WHERE callback = ANY(CAST(:ids AS TEXT[]))
ORDER BY callback
FOR UPDATE;

-- name: write_callback
-- By key.
UPDATE {schema}.callbacks AS c
SET state = v.state, is_head = v.is_head, due = v.due, ready = v.due, attempts_made = v.attempts_made, abandoned = v.abandoned,
    holds = v.holds, cancel_requested = v.cancel_requested, accepted_late = v.accepted_late, finished = v.finished,
    failed_reason = v.failed_reason
FROM unnest(
    CAST(:callback AS TEXT[]), CAST(:state AS SMALLINT[]), CAST(:is_head AS SMALLINT[]), CAST(:due AS BIGINT[]),
    CAST(:attempts_made AS BIGINT[]), CAST(:abandoned AS BIGINT[]), CAST(:holds AS SMALLINT[]),
    CAST(:cancel_requested AS SMALLINT[]), CAST(:accepted_late AS SMALLINT[]), CAST(:finished AS BIGINT[]),
    CAST(:failed_reason AS TEXT[])
) AS v(
    callback, state, is_head, due, attempts_made, abandoned, holds, cancel_requested, accepted_late, finished,
    failed_reason
)
WHERE c.callback = v.callback;

-- name: open_queue
-- callbacks_behind, first entry of the queue; the rest by key. A head is ready from now on at the earliest,
-- so that it can't fall behind the mark from which claims search. The last line of defence against two heads: the
-- queue's row must still name the one that leaves.
WITH next AS MATERIALIZED (
    SELECT v.queue, v.now, v.leaving, (
        SELECT c.callback FROM {schema}.callbacks AS c
        WHERE c.queue = v.queue AND c.sequence > v.sequence AND c.state = 0 AND c.is_head = 0
        ORDER BY c.sequence
        LIMIT 1
    ) AS callback
    FROM unnest(
        CAST(:queue AS TEXT[]), CAST(:sequence AS BIGINT[]), CAST(:now AS BIGINT[]), CAST(:leaving AS TEXT[])
    ) AS v(queue, sequence, now, leaving)
), led AS (
    UPDATE {schema}.queues AS q SET head = next.callback
    FROM next
    WHERE q.queue = next.queue AND q.head = next.leaving
    RETURNING q.head, next.now
)
UPDATE {schema}.callbacks AS c
SET is_head = 1, ready = greatest(c.due, led.now)
FROM led
WHERE c.callback = led.head;

-- name: join_tail
-- By key.
UPDATE {schema}.queues SET tail = tail + 1, head = coalesce(head, :callback)
WHERE queue = :queue
RETURNING tail, CASE WHEN head = :callback THEN 1 ELSE 0 END;

-- name: renumber
-- By key.
UPDATE {schema}.callbacks SET sequence = :sequence WHERE callback = :callback;

-- name: add_history
INSERT INTO {schema}.history (
    token, callback, acquired, timeout, ended, completed, machine, settled,
    status_code, time, duration, failure, attempt_machine, late, truncated, detail, headers, body
)
SELECT * FROM unnest(
    CAST(:token AS BIGINT[]), CAST(:callback AS TEXT[]), CAST(:acquired AS BIGINT[]), CAST(:timeout AS BIGINT[]),
    CAST(:ended AS BIGINT[]), CAST(:completed AS SMALLINT[]), CAST(:machine AS TEXT[]), CAST(:settled AS SMALLINT[]),
    CAST(:status_code AS BIGINT[]), CAST(:time AS BIGINT[]), CAST(:duration AS BIGINT[]), CAST(:failure AS TEXT[]),
    CAST(:attempt_machine AS TEXT[]), CAST(:late AS SMALLINT[]), CAST(:truncated AS SMALLINT[]),
    CAST(:detail AS TEXT[]), CAST(:headers AS TEXT[]), CAST(:body AS BYTEA[])
);

-- name: ended_lock
-- By key.
SELECT settled FROM {schema}.history WHERE callback = :callback AND token = :token;

-- name: keep_late
-- By key. An attempt that is already there stays as it is.
UPDATE {schema}.history
SET status_code = :status_code, time = :time, duration = :duration, failure = :failure,
    attempt_machine = :attempt_machine, late = 1, truncated = :truncated, detail = :detail,
    headers = :headers, body = :body
WHERE callback = :callback AND token = :token AND status_code IS NULL;

-- name: accept_late
-- By key.
UPDATE {schema}.callbacks SET accepted_late = 1 WHERE callback = :callback;


-- E-mails that are owed.

-- name: owe
-- Requests by key, mailings by their unique address and queue, locked in that order.
WITH given AS MATERIALIZED (
    SELECT v.callback, v.now, r.email_address, coalesce(r.queue, '') AS queue,
        row_number() OVER (PARTITION BY r.email_address, coalesce(r.queue, '') ORDER BY v.place) AS nth,
        count(*) OVER (PARTITION BY r.email_address, coalesce(r.queue, '')) AS many
    FROM unnest(CAST(:callback AS TEXT[]), CAST(:now AS BIGINT[])) WITH ORDINALITY AS v(callback, now, place)
    JOIN {schema}.requests AS r ON r.callback = v.callback
), numbered AS (
    INSERT INTO {schema}.mailings AS m (email_address, queue, due, last)
    SELECT email_address, queue, now, many FROM given WHERE nth = 1 ORDER BY email_address, queue
    ON CONFLICT (email_address, queue) DO UPDATE SET last = m.last + excluded.last
    RETURNING m.mailing, m.email_address, m.queue, m.last
)
INSERT INTO {schema}.debts (mailing, number, callback)
SELECT numbered.mailing, numbered.last - given.many + given.nth, given.callback
FROM given
JOIN numbered ON numbered.email_address = given.email_address AND numbered.queue = given.queue;

-- name: mailing_due
-- mailings_owing and mailings_quiet, first entries. Not EXISTS: that may read the whole table in vain.
SELECT least(
    (SELECT due FROM {schema}.mailings WHERE last > paid ORDER BY due LIMIT 1),
    (SELECT due FROM {schema}.mailings WHERE last = paid ORDER BY due LIMIT 1)
) <= :now;

-- name: due_mailings
-- mailings_owing from its beginning.
SELECT mailing, email_address, queue, last, paid, covered, tries, first_token
FROM {schema}.mailings
WHERE last > paid AND due <= :now
ORDER BY due
LIMIT :limit
FOR UPDATE SKIP LOCKED;

-- name: lease_mailing
-- By key.
UPDATE {schema}.mailings
SET due = :due, token = :token, covered = :covered, first_token = :first_token
WHERE mailing = :mailing;

-- name: told_callbacks
-- By key, a bounded stretch.
SELECT callback FROM {schema}.debts WHERE mailing = :mailing AND number > :paid AND number <= :until ORDER BY number;

-- name: leased_mailing
-- By the unique address and queue.
SELECT mailing
FROM {schema}.mailings
WHERE email_address = :email_address AND queue = :queue_id AND token = :token
FOR UPDATE;

-- name: pay_mailing
-- By key.
UPDATE {schema}.mailings
SET due = :due, paid = covered, covered = 0, tries = 0, token = 0, first_token = 0
WHERE mailing = :mailing;

-- name: postpone_mailing
-- By key.
UPDATE {schema}.mailings SET due = :due, tries = tries + 1, token = 0 WHERE mailing = :mailing;

-- name: forget_debts
-- By key: a bounded stretch from the mailing's first debt.
DELETE FROM {schema}.debts
WHERE mailing = :mailing
    AND number <= (SELECT paid FROM {schema}.mailings WHERE mailing = :mailing)
    AND number < (SELECT min(number) FROM {schema}.debts WHERE mailing = :mailing) + :limit;

-- name: quiet_mailings
-- mailings_quiet from its beginning. One that somebody owes again at this moment is passed over.
SELECT mailing FROM {schema}.mailings WHERE last = paid AND due <= :now ORDER BY due LIMIT :limit FOR UPDATE SKIP LOCKED;

-- name: forget_mailing
-- By key.
DELETE FROM {schema}.mailings WHERE mailing = :mailing;


-- Forgetting.

-- name: purgeable
-- callbacks_finished from its beginning; debts by debts_of_callback, their mailings by key. What somebody is just
-- redelivering is passed over.
SELECT c.callback
FROM {schema}.callbacks AS c
WHERE c.finished <= :before AND c.finished IS NOT NULL AND c.is_head = 0
    AND NOT EXISTS (
        SELECT 1
        FROM {schema}.debts AS d
        JOIN {schema}.mailings AS m ON m.mailing = d.mailing
        WHERE d.callback = c.callback AND d.number > m.paid
    )
ORDER BY c.finished
LIMIT :limit
FOR UPDATE OF c SKIP LOCKED;

-- name: owing
-- debts_of_callback, their mailings by key.
SELECT d.callback
FROM {schema}.debts AS d
WHERE d.callback = ANY(CAST(:ids AS TEXT[]))
    AND d.number > (SELECT m.paid FROM {schema}.mailings AS m WHERE m.mailing = d.mailing);

-- name: forget_history
-- By key, whose entries of one callback stand side by side.
DELETE FROM {schema}.history WHERE callback = ANY(CAST(:callback AS TEXT[]));

-- name: forget_request
-- By key.
DELETE FROM {schema}.requests WHERE callback = ANY(CAST(:callback AS TEXT[]));

-- name: forget_callback
-- By key.
DELETE FROM {schema}.callbacks WHERE callback = ANY(CAST(:callback AS TEXT[]));
