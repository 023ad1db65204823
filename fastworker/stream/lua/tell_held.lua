-- KEYS stream, held, reads, given. ARGV group, consumer, the lowest id that it holds, what it was given since it told last.
-- include begin_writing
-- include hold
hold(KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[2], ARGV[3], ARGV[4])
return 1
