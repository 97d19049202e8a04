-- What engines that speak PostgreSQL's language but are distributed do otherwise: no SKIP LOCKED, no LISTEN and NOTIFY,
-- no settings within a statement. Transactions are SERIALIZABLE there, and one that met another is run again.

-- name: store
-- As in statements.sql.
WITH given AS MATERIALIZED (
    SELECT g.*, row_number() OVER (PARTITION BY g.queue ORDER BY g.place) AS nth,
        count(*) OVER (PARTITION BY g.queue) AS many
    FROM unnest(
        CAST(:callback AS TEXT[]), CAST(:queue AS TEXT[]), CAST(:shard AS SMALLINT[]), CAST(:url AS TEXT[]),
        CAST(:method AS TEXT[]), CAST(:headers AS TEXT[]), CAST(:retry_phases AS TEXT[]),
        CAST(:application_id AS TEXT[]), CAST(:email_address AS TEXT[]), CAST(:on_exhausted AS TEXT[]),
        CAST(:body AS BYTEA[])
    ) WITH ORDINALITY AS g(
        callback, queue, shard, url, method, headers, retry_phases, application_id, email_address, on_exhausted, body,
        place
    )
), joined AS (
    INSERT INTO {schema}.queues AS q (queue, tail, head)
    SELECT queue, many, callback FROM given WHERE queue IS NOT NULL AND nth = 1 ORDER BY queue
    ON CONFLICT (queue) DO UPDATE SET tail = q.tail + excluded.tail, head = coalesce(q.head, excluded.head)
    RETURNING q.queue, q.tail, q.head
), moment AS MATERIALIZED (
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
SELECT sequence, head, now FROM numbered ORDER BY place;

-- name: notify
-- Nothing is there that could be told; polling finds everything.
SELECT 1 WHERE false;

-- name: next_due
-- callbacks_heads, in each shard the first entry behind the mark.
SELECT min(first.ready)
FROM generate_series(0, 15) AS s(shard)
CROSS JOIN LATERAL (
    SELECT c.ready FROM {schema}.callbacks AS c
    WHERE c.shard = s.shard AND c.is_head = 1 AND c.ready >= :mark
    ORDER BY c.ready
    LIMIT 1
) AS first;

-- name: peek
-- callbacks_heads, in each shard from the mark. Outside of the transaction that claims: one that has read a range meets
-- everybody who writes into it.
SELECT found.callback
FROM generate_series(0, 15) AS s(shard)
CROSS JOIN LATERAL (
    SELECT c.callback, c.ready FROM {schema}.callbacks AS c
    WHERE c.shard = s.shard AND c.is_head = 1 AND c.ready >= :mark AND c.ready <= :now
    ORDER BY c.ready
    LIMIT :limit
) AS found
ORDER BY found.ready
LIMIT :limit;

-- name: due_heads
-- All by key. Locked in the order of keys, as whoever records locks them, since an engine may have locks; given in the
-- order in which they are due. What others have taken since it was peeked at is no longer due.
WITH heads AS MATERIALIZED (
    SELECT c.callback, c.queue, c.sequence, c.state, c.is_head, c.due, c.ready, c.token, c.acquired, c.machine,
        c.attempts_made, c.abandoned, c.holds, c.cancel_requested, c.accepted_late, c.finished, c.failed_reason
    FROM {schema}.callbacks AS c
    WHERE c.callback = ANY(CAST(:candidates AS TEXT[])) AND c.is_head = 1 AND c.ready <= :now
    ORDER BY c.callback
    FOR UPDATE
)
SELECT c.callback, c.callback, c.queue, c.sequence, c.state, c.is_head, c.due, c.token, c.acquired, c.machine,
    c.attempts_made, c.abandoned, c.holds, c.cancel_requested, c.accepted_late, c.finished, c.failed_reason,
    c.queue, r.url, r.method, r.headers, r.retry_phases, r.application_id, r.email_address, r.on_exhausted, r.body
FROM heads AS c
LEFT JOIN {schema}.requests AS r ON r.callback = c.callback
ORDER BY c.ready
LIMIT :limit;

-- name: lock
-- By key. A row must be as it was when it was read: neither a lock nor its end must hang on what an engine makes of
-- SERIALIZABLE and of FOR UPDATE. Where one isn't, all is undone and begun again.
UPDATE {schema}.callbacks AS c
SET state = 1, due = v.due, ready = v.due, token = v.token, acquired = v.acquired, machine = v.machine,
    abandoned = v.abandoned
FROM unnest(
    CAST(:callback AS TEXT[]), CAST(:due AS BIGINT[]), CAST(:token AS BIGINT[]), CAST(:acquired AS BIGINT[]),
    CAST(:machine AS TEXT[]), CAST(:abandoned AS BIGINT[]), CAST(:was_token AS BIGINT[]), CAST(:was_state AS SMALLINT[])
) AS v(callback, due, token, acquired, machine, abandoned, was_token, was_state)
WHERE c.callback = v.callback
    AND (v.was_token IS NULL OR c.is_head = 1 AND c.token = v.was_token AND c.state = v.was_state);

-- name: write_callback
-- By key. As for `lock`.
UPDATE {schema}.callbacks AS c
SET state = v.state, is_head = v.is_head, due = v.due, ready = v.due, attempts_made = v.attempts_made,
    abandoned = v.abandoned, holds = v.holds, cancel_requested = v.cancel_requested, accepted_late = v.accepted_late,
    finished = v.finished, failed_reason = v.failed_reason
FROM unnest(
    CAST(:callback AS TEXT[]), CAST(:state AS SMALLINT[]), CAST(:is_head AS SMALLINT[]), CAST(:due AS BIGINT[]),
    CAST(:attempts_made AS BIGINT[]), CAST(:abandoned AS BIGINT[]), CAST(:holds AS SMALLINT[]),
    CAST(:cancel_requested AS SMALLINT[]), CAST(:accepted_late AS SMALLINT[]), CAST(:finished AS BIGINT[]),
    CAST(:failed_reason AS TEXT[]), CAST(:was_token AS BIGINT[]), CAST(:was_state AS SMALLINT[])
) AS v(
    callback, state, is_head, due, attempts_made, abandoned, holds, cancel_requested, accepted_late, finished,
    failed_reason, was_token, was_state
)
WHERE c.callback = v.callback AND (v.was_token IS NULL OR c.token = v.was_token AND c.state = v.was_state);

-- name: due_mailings
-- mailings_owing from its beginning.
SELECT mailing, email_address, queue, last, paid, covered, tries, first_token
FROM {schema}.mailings
WHERE last > paid AND due <= :now
ORDER BY due
LIMIT :limit;

-- name: quiet_mailings
-- mailings_quiet from its beginning.
SELECT mailing FROM {schema}.mailings WHERE last = paid AND due <= :now ORDER BY due LIMIT :limit;

-- name: purgeable
-- callbacks_finished from its beginning; debts by debts_of_callback, their mailings by key.
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
LIMIT :limit;
