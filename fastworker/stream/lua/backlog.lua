-- KEYS stream. ARGV group. Answers two numbers (backlog_of.lua).
-- include backlog_of
return backlog_of(KEYS[1], ARGV[1])
