-- KEYS stream, ledger, metrics, held, reads, given. ARGV group, consumer, the lowest id that it holds then, what it was given since
-- it told last, then per tally: outcome, metrics field, number of drops, number of ids, drops..., ids... A tally without ids counts its drops once if anything
-- before it was acked.
-- include begin_writing
-- include hold
-- include disown
-- mutant: an ack that does not tell what was read
hold(KEYS[1], KEYS[4], KEYS[5], KEYS[6], ARGV[2], ARGV[3], ARGV[4])
local at, total = 5, 0
while at <= #ARGV do
  local outcome, kind = ARGV[at], ARGV[at + 1]
  local drop_count, id_count = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local drops_at, ids_at = at + 4, at + 4 + drop_count
  local stop = ids_at + id_count
  local acked = 0
  for first = ids_at, stop - 1, 1000 do
    acked = acked + redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, first, math.min(first + 999, stop - 1)))
  end
  if acked > 0 then
    redis.call('HINCRBY', KEYS[2], outcome, acked)
    redis.call('HINCRBY', KEYS[3], 'totalEvents', acked)
    if kind ~= '' then redis.call('HINCRBY', KEYS[3], kind, acked) end
  end
  total = total + acked
  local weight = acked
  if id_count == 0 and total > 0 then weight = 1 end
  if weight > 0 then
    for i = drops_at, ids_at - 1 do redis.call('HINCRBY', KEYS[2], 'drop:' .. ARGV[i], weight) end
  end
  at = stop
end
if total > 0 then disown(KEYS[1], ARGV[1], KEYS[4], ARGV[2], ARGV) end
return total
