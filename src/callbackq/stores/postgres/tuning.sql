-- What PostgreSQL itself should know about the tables, after the migration of the same number. Left out in the profile for
-- others, which refuse such settings.

-- migration: 1

-- Each claim and each result leaves a dead row, and an entry in the index of heads that a claim steps over: to be cleared
-- away when they are a hundredth of the table, not a fifth, and without pauses. Room in each page lets a row that keeps
-- its place in the indexes be rewritten beside itself.
ALTER TABLE {schema}.callbacks SET (
    fillfactor = 70,
    autovacuum_vacuum_scale_factor = 0.01,
    autovacuum_vacuum_threshold = 500,
    autovacuum_vacuum_cost_delay = 0
);

ALTER TABLE {schema}.queues SET (
    fillfactor = 70,
    autovacuum_vacuum_scale_factor = 0.01,
    autovacuum_vacuum_threshold = 500,
    autovacuum_vacuum_cost_delay = 0
);
