-- Every statement the store runs after opening. Each says which index serves it; tests/stores/test_query_plans.py holds
-- it to that. "By key" means the table's own integer key.


-- Opening.

-- name: schema_exists
-- SQLite's own catalogue: a handful of rows.
SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'callbackq_store';

-- name: other_tables
-- SQLite's own catalogue: a handful of rows.
SELECT count(*) FROM sqlite_master WHERE name NOT LIKE 'callbackq%' AND name NOT LIKE 'sqlite%';

-- name: application_id
-- The file's header.
PRAGMA application_id;

-- name: store
-- By key, one row.
SELECT schema_version, boot_id, offset_us, latest FROM callbackq_store WHERE one = 1;

-- name: set_schema_version
-- By key, one row.
UPDATE callbackq_store SET schema_version = :version WHERE one = 1;

-- name: begin_boot
-- By key, one row.
UPDATE callbackq_store SET boot_id = :boot_id, offset_us = :offset_us, latest = :now WHERE one = 1;

-- name: end_all_locks
-- callbackq_locked, which holds nothing but locked callbacks. The planner would not come upon it by itself.
UPDATE callbackq_callbacks INDEXED BY callbackq_locked SET due = min(due, :now) WHERE state = 1;

-- name: end_impossible_waits
-- callbackq_heads, from the end of the calendar on: what no clock reaches, and what is no number at all. Nothing, unless
-- somebody else has written there.
UPDATE callbackq_callbacks SET due = 0 WHERE is_head = 1 AND due > 253402300799999999;

-- name: end_all_leases
-- All of the table, which holds what is owed, and who was written to of late, at the first opening of a boot.
UPDATE callbackq_mailings SET due = min(due, :now) WHERE token <> 0;


-- Storing.

-- name: last_callback
-- By key, from the end.
SELECT coalesce(max(callback), 0) FROM callbackq_callbacks;

-- name: queue
-- Queues by their unique name; the head by callbackq_head_of_queue.
SELECT q.queue, q.tail, head.id
FROM callbackq_queues AS q
LEFT JOIN callbackq_callbacks AS head ON head.queue = q.queue AND head.is_head = 1
WHERE q.name = :name;

-- name: add_queue
INSERT INTO callbackq_queues (name, tail) VALUES (:name, 0);

-- name: set_tail
-- By key.
UPDATE callbackq_queues SET tail = :tail WHERE queue = :queue;

-- name: add_callback
INSERT INTO callbackq_callbacks (callback, id, queue, sequence, state, is_head, due)
VALUES (:callback, :id, :queue, :sequence, 0, :is_head, :now);

-- name: add_request
INSERT INTO callbackq_requests
    (callback, url, method, headers, retry_phases, application_id, email_address, on_exhausted, body)
VALUES
    (:callback, :url, :method, :headers, :retry_phases, :application_id, :email_address, :on_exhausted, :body);


-- Storing in a transaction of the application's.

-- name: take_write_lock
-- By key, nothing. A transaction whose first statement writes waits for other writers and sees what they have written;
-- one that reads first fails at once when another has written since.
DELETE FROM callbackq_store WHERE one = 0;

-- name: main_file
-- SQLite's own list of open files: a handful.
SELECT file FROM pragma_database_list WHERE name = 'main';


-- Looking.

-- name: callback_of_id
-- By the unique id.
SELECT callback FROM callbackq_callbacks WHERE id = :id;

-- name: status
-- All by key; the blocking head by callbackq_head_of_queue.
SELECT c.id, c.sequence, c.state, c.due, c.token, c.acquired, c.machine, c.failed_reason,
    CASE WHEN c.state <= 1 AND c.is_head = 0 THEN
        (SELECT head.id FROM callbackq_callbacks AS head WHERE head.queue = c.queue AND head.is_head = 1)
    END,
    q.name, r.url, r.method, r.headers, r.retry_phases, r.application_id, r.email_address, r.on_exhausted, r.body
FROM callbackq_callbacks AS c
LEFT JOIN callbackq_requests AS r ON r.callback = c.callback
LEFT JOIN callbackq_queues AS q ON q.queue = c.queue
WHERE c.callback = :callback;

-- name: history
-- callbackq_history_of_callback, whose entries of one callback stand in the order of their tokens.
SELECT token, acquired, timeout, ended, completed, machine,
    status_code, time, duration, failure, attempt_machine, late, truncated, detail, headers, body
FROM callbackq_history
WHERE callback = :callback
ORDER BY token;

-- name: list_callbacks
-- By key: a bounded stretch of the table.
SELECT callback
FROM callbackq_callbacks
WHERE callback > :after AND callback <= :until
    AND (:state IS NULL OR state = :state)
    AND (:alone = 0 OR queue IS NULL)
ORDER BY callback;

-- name: list_queue
-- The queue by its unique name, its callbacks by callbackq_numbers; sorts one queue's keys.
SELECT callback
FROM callbackq_callbacks
WHERE queue = (SELECT queue FROM callbackq_queues WHERE name = :name)
    AND callback > :after
    AND (:state IS NULL OR state = :state)
ORDER BY callback
LIMIT :limit;


-- Claiming.

-- name: next_due
-- callbackq_heads, first entry.
SELECT due FROM callbackq_callbacks WHERE is_head = 1 AND due <= 253402300799999999 ORDER BY due LIMIT 1;

-- name: due_heads
-- callbackq_heads from its beginning, then all by key: reads as many entries as it returns.
SELECT c.callback, c.id, c.queue, c.sequence, c.state, c.is_head, c.due, c.token, c.acquired, c.machine,
    c.attempts_made, c.abandoned, c.holds, c.cancel_requested, c.accepted_late, c.finished, c.failed_reason,
    q.name, r.url, r.method, r.headers, r.retry_phases, r.application_id, r.email_address, r.on_exhausted, r.body
FROM callbackq_callbacks AS c
LEFT JOIN callbackq_requests AS r ON r.callback = c.callback
LEFT JOIN callbackq_queues AS q ON q.queue = c.queue
WHERE c.is_head = 1 AND c.due <= :now
ORDER BY c.due
LIMIT :limit;

-- name: draw_tokens
-- By key, one row. The instant goes along because the row is written anyway.
UPDATE callbackq_store SET token = token + :count, latest = :now WHERE one = 1;

-- name: last_token
-- By key, one row.
SELECT token FROM callbackq_store WHERE one = 1;

-- name: lock
-- By key.
UPDATE callbackq_callbacks
SET state = 1, due = :due, token = :token, acquired = :acquired, machine = :machine, holder = :holder,
    abandoned = :abandoned
WHERE callback = :callback;


-- Ending locks, and operators' wishes.

-- name: callback
-- By the unique id.
SELECT callback, id, queue, sequence, state, is_head, due, token, acquired, machine,
    attempts_made, abandoned, holds, cancel_requested, accepted_late, finished, failed_reason
FROM callbackq_callbacks
WHERE id = :id;

-- name: write_callback
-- By key.
UPDATE callbackq_callbacks
SET state = :state, is_head = :is_head, due = :due, attempts_made = :attempts_made, abandoned = :abandoned,
    holds = :holds, cancel_requested = :cancel_requested, accepted_late = :accepted_late, finished = :finished,
    failed_reason = :failed_reason
WHERE callback = :callback;

-- name: open_queue
-- callbackq_numbers from the number that ended; passes over what was cancelled behind it, once.
UPDATE callbackq_callbacks
SET is_head = 1
WHERE callback = (
    SELECT next.callback
    FROM callbackq_callbacks AS next
    WHERE next.queue = :queue AND next.sequence > :sequence AND next.state = 0
    ORDER BY next.sequence
    LIMIT 1
);

-- name: join_tail
-- By key.
UPDATE callbackq_callbacks SET sequence = :sequence WHERE callback = :callback;

-- name: queue_tail
-- By key; the head by callbackq_head_of_queue.
SELECT q.tail, EXISTS (SELECT 1 FROM callbackq_callbacks AS head WHERE head.queue = q.queue AND head.is_head = 1)
FROM callbackq_queues AS q
WHERE q.queue = :queue;

-- name: add_history
INSERT INTO callbackq_history (
    token, callback, acquired, timeout, ended, completed, machine, settled,
    status_code, time, duration, failure, attempt_machine, late, truncated, detail, headers, body
) VALUES (
    :token, :callback, :acquired, :timeout, :ended, :completed, :machine, :settled,
    :status_code, :time, :duration, :failure, :attempt_machine, :late, :truncated, :detail, :headers, :body
);

-- name: ended_lock
-- By key.
SELECT settled FROM callbackq_history WHERE token = :token AND callback = :callback;

-- name: keep_late
-- By key. An attempt that is already there stays as it is.
UPDATE callbackq_history
SET status_code = :status_code, time = :time, duration = :duration, failure = :failure,
    attempt_machine = :attempt_machine, late = 1, truncated = :truncated, detail = :detail,
    headers = :headers, body = :body
WHERE token = :token AND status_code IS NULL;

-- name: accept_late
-- By key.
UPDATE callbackq_callbacks SET accepted_late = 1 WHERE callback = :callback;


-- E-mails that are owed.

-- name: number_debt
-- Callback and request by key, the mailing by its unique address and queue.
INSERT INTO callbackq_mailings (email_address, queue, due, last)
SELECT r.email_address, coalesce(c.queue, 0), :now, 1
FROM callbackq_callbacks AS c
JOIN callbackq_requests AS r ON r.callback = c.callback
WHERE c.callback = :callback
ON CONFLICT (email_address, queue) DO UPDATE SET last = last + 1;

-- name: add_debt
-- Callback and request by key, the mailing by its unique address and queue.
INSERT INTO callbackq_debts (mailing, number, callback)
SELECT m.mailing, m.last, c.callback
FROM callbackq_callbacks AS c
JOIN callbackq_requests AS r ON r.callback = c.callback
JOIN callbackq_mailings AS m ON m.email_address = r.email_address AND m.queue = coalesce(c.queue, 0)
WHERE c.callback = :callback;

-- name: mailing_due
-- callbackq_owing and callbackq_quiet, first entries.
SELECT EXISTS (SELECT 1 FROM callbackq_mailings WHERE last > paid AND due <= :now)
    OR EXISTS (SELECT 1 FROM callbackq_mailings WHERE last = paid AND due <= :now);

-- name: due_mailings
-- callbackq_owing from its beginning, then by key.
SELECT m.mailing, m.email_address, coalesce(q.name, ''), m.last, m.paid, m.covered, m.tries, m.first_token
FROM callbackq_mailings AS m
LEFT JOIN callbackq_queues AS q ON q.queue = m.queue
WHERE m.last > m.paid AND m.due <= :now
ORDER BY m.due
LIMIT :limit;

-- name: lease_mailing
-- By key.
UPDATE callbackq_mailings
SET due = :due, token = :token, covered = :covered, first_token = :first_token
WHERE mailing = :mailing;

-- name: told_callbacks
-- By key, a bounded stretch; the callbacks by key.
SELECT c.id
FROM callbackq_debts AS d
JOIN callbackq_callbacks AS c ON c.callback = d.callback
WHERE d.mailing = :mailing AND d.number > :paid AND d.number <= :until
ORDER BY d.number;

-- name: leased_mailing
-- The mailing by its unique address and queue, the queue by its unique name.
SELECT mailing
FROM callbackq_mailings
WHERE email_address = :email_address
    AND queue = coalesce((SELECT queue FROM callbackq_queues WHERE name = :queue_id), 0)
    AND token = :token;

-- name: pay_mailing
-- By key.
UPDATE callbackq_mailings
SET due = :due, paid = covered, covered = 0, tries = 0, token = 0, first_token = 0
WHERE mailing = :mailing;

-- name: postpone_mailing
-- By key.
UPDATE callbackq_mailings SET due = :due, tries = tries + 1, token = 0 WHERE mailing = :mailing;

-- name: forget_debts
-- By key: a bounded stretch from the mailing's first debt.
DELETE FROM callbackq_debts
WHERE mailing = :mailing
    AND number <= (SELECT paid FROM callbackq_mailings WHERE mailing = :mailing)
    AND number < (SELECT min(number) FROM callbackq_debts WHERE mailing = :mailing) + :limit;

-- name: quiet_mailings
-- callbackq_quiet from its beginning.
SELECT mailing FROM callbackq_mailings WHERE last = paid AND due <= :now ORDER BY due LIMIT :limit;

-- name: forget_mailing
-- By key.
DELETE FROM callbackq_mailings WHERE mailing = :mailing;


-- Forgetting.

-- name: purgeable
-- callbackq_finished from its beginning; debts by callbackq_debts_of_callback, their mailings by key.
SELECT callback
FROM callbackq_callbacks
WHERE finished <= :before AND finished IS NOT NULL AND holds = 0
    AND NOT EXISTS (
        SELECT 1
        FROM callbackq_debts AS d
        JOIN callbackq_mailings AS m ON m.mailing = d.mailing
        WHERE d.callback = callbackq_callbacks.callback AND d.number > m.paid
    )
ORDER BY finished
LIMIT :limit;

-- name: forget_history
-- callbackq_history_of_callback.
DELETE FROM callbackq_history WHERE callback = :callback;

-- name: forget_request
-- By key.
DELETE FROM callbackq_requests WHERE callback = :callback;

-- name: forget_callback
-- By key.
DELETE FROM callbackq_callbacks WHERE callback = :callback;


-- Holders.

-- name: holders
-- All of the table: one row for each store object that is in use.
SELECT holder FROM callbackq_holders;

-- name: add_holder
INSERT OR IGNORE INTO callbackq_holders (holder) VALUES (:holder);

-- name: remove_holder
-- By key.
DELETE FROM callbackq_holders WHERE holder = :holder;

-- name: remove_all_holders
-- All of the table: one row for each store object that is in use.
DELETE FROM callbackq_holders;

-- name: end_locks_of_holder
-- callbackq_locked.
UPDATE callbackq_callbacks SET due = min(due, :now) WHERE holder = :holder AND state = 1;
